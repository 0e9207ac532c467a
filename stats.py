"""The engine's gauges: what `engine.stats()` returns."""

import time
from collections import deque
from dataclasses import dataclass

from grammar.stats import CompilerStats


@dataclass(frozen=True)
class Stats:
    healthy: bool
    running: int  # requests that have a row
    waiting: int
    batch_size: int  # requests in the step committed last
    pages_total: int
    pages_free: int
    pages_held: int  # by the radix tree
    pages_locked: int  # of those: in use by a request
    hit_rate: float  # cached_tokens / prompt_tokens
    prompt_tokens: int  # of all requests admitted so far
    cached_tokens: int  # of those: found in the tree
    preemptions: int
    new_token_ratio: float  # share of max_new_tokens that a request is expected to use
    steps: int
    steps_replayed: int  # of those: decodes that were one replay of a CUDA graph
    forced_tokens: int  # that a grammar left no choice about, and that took no step of their own
    grammars: (
        CompilerStats | None
    )  # hits, misses, refusals and more of the grammar compiler; None before the first is asked for
    compiled_graphs: int  # that torch.compile has made in this process; grows in the warm-up only
    captured_graphs: int  # CUDA graphs; likewise
    tokens_per_second: float  # sampled, over the last seconds
    breakdown: dict[str, float] | None  # seconds a step, by part, of the steps profiled last (profiling.PARTS)


class Throughput:
    """Tokens a second over the last `window` seconds. One thread adds, any thread asks."""

    def __init__(self, window: float = 5.0):
        self._window = window
        self._steps: deque[tuple[float, int]] = deque()  # when a step came home, and its tokens

    def add(self, now: float, tokens: int) -> None:
        self._steps.append((now, tokens))
        while self._steps[0][0] < now - self._window:
            self._steps.popleft()

    def rate(self) -> float:
        now = time.perf_counter()
        recent = [step for step in list(self._steps) if step[0] >= now - self._window]
        return sum(tokens for _, tokens in recent) / max(now - recent[0][0], 1e-3) if recent else 0.0
