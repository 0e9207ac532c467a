"""The engine's gauges: what `engine.stats()` returns."""

import time
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    healthy: bool
    running: int  # requests that have a row
    waiting: int
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
    tokens_per_second: float  # sampled, over the last seconds


class Throughput:
    """Tokens a second over the last `window` seconds."""

    def __init__(self, window: float = 5.0):
        self._window = window
        self._steps: deque[tuple[float, int]] = deque()  # when a step came home, and its tokens
        self._tokens = 0

    def add(self, now: float, tokens: int) -> None:
        self._steps.append((now, tokens))
        self._tokens += tokens
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._steps and self._steps[0][0] < now - self._window:
            self._tokens -= self._steps.popleft()[1]

    def rate(self) -> float:
        now = time.perf_counter()
        self._forget(now)
        return self._tokens / max(now - self._steps[0][0], 1e-3) if self._steps else 0.0
