"""Seconds of a call on a GPU: a CUDA graph of many calls, replayed between two events.

A kernel of some microseconds takes Python longer to launch than the GPU to run. In a graph all launches are made
beforehand, so what is timed is the device, as in an engine that replays its steps from graphs. The calls of one graph
differ in the data they read: when one comes round again, the others have pushed its data out of the L2 cache.

    measure = graph_clock([lambda: a @ b, lambda: c @ d])
    measure()      # seconds of one call
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.common import seconds

Call = Callable[[], Any]
Measure = Callable[[], float]

LEAST_SECONDS = 0.01  # between the two events: the graph is replayed as often as that takes
MOST_REPLAYS = 1000


def graph_clock(calls: Sequence[Call]) -> Measure:
    """-> a measure: seconds of one call, launches excluded. Every call runs once before, which compiles its kernels.

    The events stand outside of the graph; that costs a microsecond or two a replay, which all its calls share.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    replay(1)  # the first one uploads the graph
    replays = max(1, min(MOST_REPLAYS, int(LEAST_SECONDS / max(replay(1), 1e-9))))
    return lambda: replay(replays) / (replays * len(calls))


def host_clock(calls: Sequence[Call]) -> Measure:
    """The same for calls that compute on the CPU."""

    def work() -> None:
        for call in calls:
            call()

    return lambda: seconds(work) / len(calls)
