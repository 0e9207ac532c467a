"""What one request has been told by the engine, until its reader takes it.

    answer = client.generate("r1", [1, 2, 3], {"temperature": 0})
    async with aclosing(answer):
        async for delta in answer: ...

The engine's messages are put here as they come and nobody waits for the reader: one that is slow finds many Deltas joined to
one. What is kept is bounded by what a request may generate. An answer that is closed, dropped, late, or whose reader's
task is cancelled aborts its request.

    python -m pytest tests/test_server_client.py
"""

import asyncio
from collections.abc import Callable
from typing import Any

from serving.api_errors import TimedOut
from serving.messages import Delta


class Answer:
    """The Deltas of one request: `samples` of them end. abort: what to do if nobody wants to know any more."""

    def __init__(self, rid: str, samples: int, timeout: float, abort: Callable[[], None]):
        self.rid = rid
        self._going, self._abort = samples, abort
        self._timeout, self._deadline = timeout, asyncio.get_running_loop().time() + timeout
        self._pending: dict[int, list[Delta]] = {}
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def put(self, delta: Delta) -> None:
        self._pending.setdefault(delta.index, []).append(delta)
        self._news.set()

    def fail(self, error: Exception) -> None:
        """It has ended without an answer; the reader gets the error."""
        self._error = error
        self._news.set()

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Delta:
        """The next Delta. UserError if the engine refuses the request; ApiError if it is late, or the engine has failed."""
        while self._going:
            if self._error is not None:
                self._going = 0
                raise self._error
            if self._pending:
                index = next(iter(self._pending))
                delta = joined(self._pending.pop(index))
                self._going -= delta.finish_reason is not None
                return delta
            self._news.clear()
            try:
                async with asyncio.timeout_at(self._deadline):
                    await self._news.wait()
            except BaseException as error:
                self.close()
                raise TimedOut(self._timeout) if isinstance(error, TimeoutError) else error from None
        raise StopAsyncIteration

    def close(self) -> None:
        """Nobody reads any more: abort what still runs. Once more does nothing."""
        going, self._going = self._going, 0
        if going and self._error is None:
            self._abort()

    async def aclose(self) -> None:
        self.close()

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def joined(deltas: list[Delta]) -> Delta:
    """Consecutive Deltas of one sample as one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return Delta(
        rid=last.rid,
        index=last.index,
        text="".join(d.text for d in deltas),
        token_ids=[i for d in deltas for i in d.token_ids],
        logprobs=None if last.logprobs is None else [x for d in deltas for x in d.logprobs],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
        embedding=last.embedding,
    )
