"""Who runs in the next step. First come, first served: a waiting request is admitted when a row and all the pages that it
may ever need are free; then its prompt is computed chunk by chunk, then it decodes together with all others.

`plan` makes a Batch of plain ints; `commit` takes the sampled tokens. Between the two the device works.

    python -m pytest tests/test_scheduler.py
"""

from collections import deque
from dataclasses import dataclass

from cache.pages import PagePool
from errors import UserError
from scheduler.request import Request, State


@dataclass
class Batch:
    """One step: a rectangle of B requests with Q new tokens each. Decode has Q = 1, a chunk of a prompt B = 1."""

    requests: list[Request]
    ids: list[list[int]]  # [B][Q]
    start: list[int]  # [B] position of the first of them
    samples: bool  # False for a chunk that does not reach the end of its prompt

    @property
    def greedy(self) -> bool:
        return not self.samples or all(r.params.greedy for r in self.requests)


class Scheduler:
    def __init__(self, pool: PagePool, max_batch_size: int, chunk_size: int):
        self.pool, self.max_batch_size, self.chunk_size = pool, max_batch_size, chunk_size
        self.free_rows = list(range(max_batch_size, 0, -1))  # row 0 is padding
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue it. UserError if it could never fit, even alone."""
        tokens = len(request.prompt_ids) + request.max_new_tokens
        if self.pool.pages_for(tokens) > self.pool.total:
            size = self.pool.total * self.pool.page_size
            raise UserError(f"{tokens} tokens (prompt and new) can never fit into a cache of {size}")
        self.waiting.append(request)

    def plan(self) -> Batch | None:
        """The next step, or None when there is nothing to do. A prompt goes before the decodes."""
        self._admit()
        for request in self.running:
            if request.state is State.PREFILLING:
                end = min(request.computed + self.chunk_size, len(request.prompt_ids))
                chunk = request.prompt_ids[request.computed : end]
                return Batch([request], [chunk], [request.computed], samples=end == len(request.prompt_ids))
        if not self.running:
            return None
        return Batch(
            requests=list(self.running),
            ids=[[r.output_ids[-1]] for r in self.running],
            start=[r.computed for r in self.running],
            samples=True,
        )

    def commit(self, batch: Batch, tokens: list[int]) -> None:
        """Take the step's tokens [B]. Whoever ends gives row and pages back."""
        for request, ids, token in zip(batch.requests, batch.ids, tokens, strict=True):
            if request.state is State.FINISHED:  # ended while the step ran
                continue
            request.computed += len(ids)
            if batch.samples:
                request.state = State.RUNNING
                request.append(token)
                if request.finish_reason is not None:
                    self._release(request)

    def end(self, request: Request, reason: str, detail: int | str | None = None) -> None:
        """End a request from outside (stop string, abort, error), whatever its state. Ended already: nothing happens."""
        if request.state is not State.FINISHED:
            request.finish(reason, detail)
            self._release(request)

    def _admit(self) -> None:
        while self.waiting and self.free_rows:
            request = self.waiting[0]
            need = self.pool.pages_for(len(request.prompt_ids) + request.max_new_tokens)
            if need > self.pool.free_pages:
                return
            self.waiting.popleft()
            request.row, request.pages = self.free_rows.pop(), self.pool.allocate(need)
            request.state = State.PREFILLING
            self.running.append(request)

    def _release(self, request: Request) -> None:
        if request.state is State.WAITING:
            if request in self.waiting:  # not if it was refused
                self.waiting.remove(request)
        else:
            self.running.remove(request)
            self.free_rows.append(request.row)
            self.pool.free(request.pages)
            request.row, request.pages = 0, []
        request.state = State.FINISHED

    def check(self) -> None:
        """Prove that pages and rows are conserved; RuntimeError says what is lost."""
        owned = [page for r in self.running for page in r.pages]
        if len(owned) != len(set(owned)) or len(owned) + self.pool.free_pages != self.pool.total:
            raise RuntimeError(f"{len(owned)} pages owned + {self.pool.free_pages} free != {self.pool.total}")
        rows = [r.row for r in self.running] + self.free_rows
        if sorted(rows) != list(range(1, self.max_batch_size + 1)):
            raise RuntimeError(f"rows are lost or have two owners: {sorted(rows)} of {self.max_batch_size}")
