"""What a caller of `engine.stream` holds: the Deltas of one prompt as they come, in a thread or in asyncio.

    for delta in engine.stream("Once"): ...
    async for delta in engine.stream("Once"): ...

The engine's thread puts, one reader takes. A stream that is closed, dropped or whose task is cancelled aborts its request.

    python -m pytest tests/test_streams.py
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from output import Delta


class Stream:
    def __init__(self, request_id: str, samples: int, abort: Callable[[str], None]):
        self.request_id = request_id
        self._going = samples  # that have not ended, as far as the reader knows
        self._abort = abort
        self._deltas: deque[Delta] = deque()
        self._ready = threading.Condition()
        self._patient = False  # the reader wants to hear of ends only
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future] | None = None

    def put(self, delta: Delta) -> None:
        """Called by the engine, in its own thread."""
        with self._ready:
            self._deltas.append(delta)
            if not self._patient or delta.finish_reason is not None:
                self._wake_reader()

    def _wake_reader(self) -> None:
        """Under the lock."""
        self._ready.notify()
        if self._waiter is not None:
            (loop, future), self._waiter = self._waiter, None
            with suppress(RuntimeError):  # the loop is closed, and its reader gone: no concern of the engine's thread
                loop.call_soon_threadsafe(_wake, future)

    def _take(self) -> Delta | None:
        """What has come, if anything has; under the lock."""
        if not self._deltas:
            return None
        delta = self._deltas.popleft()
        self._going -= delta.finish_reason is not None
        return delta

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Delta:
        with self._ready:
            while self._going:
                if (delta := self._take()) is not None:
                    return delta
                self._ready.wait()
        raise StopIteration

    def whole(self) -> list[Delta]:
        """All Deltas, when the last has come; of a stream that is closed, those that have. Nobody is woken for each of them."""
        deltas: list[Delta] = []
        with self._ready:
            self._patient = True
            while self._going:
                if (delta := self._take()) is not None:
                    deltas.append(delta)
                else:
                    self._ready.wait()
        return deltas

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Delta:
        while True:
            with self._ready:
                if not self._going:
                    raise StopAsyncIteration
                if (delta := self._take()) is not None:
                    return delta
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = loop, future
            try:
                await future
            except asyncio.CancelledError:
                self.close()
                raise

    def close(self) -> None:
        """Nobody reads any more: abort what still runs. Once more does nothing."""
        with self._ready:
            going, self._going = self._going, 0
            self._wake_reader()
        if going:
            self._abort(self.request_id)

    async def aclose(self) -> None:
        self.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _wake(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
