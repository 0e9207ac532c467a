"""Who looks at the engine, and what they see: the newest snapshot, for as many as look.

    async for snapshot in client.watchers.look(): ...

The engine takes snapshots only while somebody looks. All get the same, made ready once; who is slow misses some.

    python -m pytest tests/test_debug_events.py
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from serving.api_errors import ServerBusy
from snapshot import Snapshot

WATCH_SECONDS = 0.25  # between two snapshots
SILENCE = 1.0  # seconds without one, after which those who look are told so
MOST_WATCHERS = 16


class Watchers:
    """switch: told when the first one comes (True), and when the last one has gone (False)."""

    def __init__(self, switch: Callable[[bool], None]):
        self.count = 0
        self._switch = switch
        self._newest: Snapshot | None = None
        self._news = asyncio.Event()  # replaced by another when it has happened

    def show(self, snapshot: Snapshot, names: dict[str, str]) -> None:
        """names: the engine's ids of requests -> those that their clients know."""
        requests = [replace(request, id=names.get(request.id, request.id)) for request in snapshot.requests]
        self._newest = replace(snapshot, requests=requests)
        news, self._news = self._news, asyncio.Event()
        news.set()

    def refuse_if_full(self) -> None:
        if self.count >= MOST_WATCHERS:
            raise ServerBusy(f"{self.count} look at the engine already; that is the limit")

    async def look(self) -> AsyncIterator[Snapshot | None]:
        """Snapshots as they come. None: for a second there was none."""
        self.count += 1
        try:
            if self.count == 1:
                self._switch(True)
            while True:
                try:
                    async with asyncio.timeout(SILENCE):
                        await self._news.wait()
                except TimeoutError:
                    yield None
                else:
                    yield self._newest
        finally:
            self.count -= 1
            if not self.count:
                self._switch(False)
