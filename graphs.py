"""CUDA graphs: a step's launches recorded once, for each batch size that is worth it, and replayed with one call.

A decode of a small model is hundreds of kernels of a few microseconds each, and the host needs longer to launch one than the
device to run it. A graph launches all with one call. It freezes every address and every size, so a step reads from and
writes to static buffers, and batches are padded to the next of a few sizes, the buckets. All graphs share one pool of
memory, the largest is captured first, and the smaller ones fit into what it took.

Without a GPU `ReplayOnCpu` takes the graph's place. It computes anew what it was given, from the same buffers, padded to the same
sizes, so that everything about a replay but the recording is tested on any machine.

    python -m pytest tests/test_graphs.py
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Call = Callable[[], Sequence[Tensor]]


class Replay(Protocol):
    """One call, to be repeated on whatever its buffers hold by then."""

    def __call__(self) -> list[Tensor]:
        """Run it. -> copies of what it returns, safe from the next run."""


class CudaReplay:
    def __init__(self, call: Call, pool: Any):
        """Records `call`; runs it once before, for what is compiled or loaded at the first use cannot be recorded."""
        call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._outputs = call()

    def __call__(self) -> list[Tensor]:
        self._graph.replay()
        return [t.clone() for t in self._outputs]


class ReplayOnCpu:
    def __init__(self, call: Call, pool: Any = None):
        self._call, self._outputs = call, [t.clone() for t in call()]

    def __call__(self) -> list[Tensor]:
        for output, new in zip(self._outputs, self._call(), strict=True):
            output.copy_(new)
        return [t.clone() for t in self._outputs]


Recorder = Callable[[Call, Any], Replay]


def recorder(device: torch.device) -> tuple[Recorder, Any]:
    """What records on this device, and the memory that all of its recordings share."""
    return (ReplayOnCpu, None) if device.type == "cpu" else (CudaReplay, torch.cuda.graph_pool_handle())


def buckets(largest: int) -> list[int]:
    """Batch sizes worth a graph, up to `largest`: 1, 2, 4, then steps of 8, from 256 on of 16 (vLLM's)."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, largest + 16, 16)]
    return [n for n in sizes if n < largest] + [largest]
