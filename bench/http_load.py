"""A load generator's HTTP: one request a connection, events with the time they came at. As little work as can be.

The client, the server and the engine share a machine, so what the client takes is missing elsewhere.

    answer = await ask(url, {"text": "Once", "stream": True})
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
START_SECONDS = 600  # compiling included


@dataclass
class Answer:
    """Of one request. Times are those of time.perf_counter; `times`: when each event came."""

    start: float
    status: int = 0
    times: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # the last event, or the body

    @property
    def tokens(self) -> int:
        return self.last.get("meta_info", {}).get("completion_tokens", 0)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.start

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first."""
        return (self.times[-1] - self.times[0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between two events."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


async def ask(url: str, body: dict[str, Any] | bytes, leave_after: int | None = None) -> Answer:
    """POST /generate, and read to the end, or go after so many events. A body of bytes is sent as it is."""
    host, _, port = url.removeprefix("http://").partition(":")
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = Answer(time.perf_counter())
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        header = (await reader.readuntil(b"\r\n\r\n")).lower()
        answer.status = int(header.split(None, 2)[1])
        if b"transfer-encoding: chunked" not in header:
            answer.last = json.loads(await reader.read())
            answer.times.append(time.perf_counter())
        else:
            await _read_events(reader, answer, leave_after)
    finally:
        writer.close()
    return answer


async def _read_events(reader: asyncio.StreamReader, answer: Answer, leave_after: int | None) -> None:
    last = b"{}"
    while size := int(await reader.readline(), 16):
        chunk = (await reader.readexactly(size + 2))[:-2]
        if chunk != b"data: [DONE]\n\n":
            answer.times.append(time.perf_counter())
            last = chunk
        if leave_after is not None and len(answer.times) >= leave_after:
            return
    answer.last = json.loads(last.removeprefix(b"data: "))


async def offer(
    asks: list[Callable[[], Awaitable[Answer]]], gaps: list[float], concurrency: int | None
) -> list[Answer]:
    """Start each request `gaps` seconds after the one before it, at most `concurrency` at a time."""
    room = asyncio.Semaphore(concurrency or len(asks))

    async def one(ask: Callable[[], Awaitable[Answer]]) -> Answer:
        async with room:
            return await ask()

    tasks, due = [], time.perf_counter()
    for ask, gap in zip(asks, gaps, strict=True):
        due += gap
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(ask)))
    return await asyncio.gather(*tasks)


@contextmanager
def server(flags: list[str], port: int) -> Iterator[tuple[str, int]]:
    """`python server.py` with these flags -> its URL and its process' id."""
    process = subprocess.Popen([sys.executable, str(ROOT / "server.py"), "--port", str(port), *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server does not start")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def get(url: str, path: str) -> Any:
    with urlopen(url + path) as response:
        return json.load(response)


def _answers(url: str) -> bool:
    try:
        return get(url, "/health") == {"status": "ok"}
    except OSError:
        return False
