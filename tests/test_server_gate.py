"""The gate alone, in front of applications of a few lines.

python -m pytest tests/test_server_gate.py
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving import gate
from serving.gate import Gate
from serving.settings import Settings


async def echo(scope, receive, send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


class Caller:
    """One request: what comes in, and what went out. Silent after `parts`, until it leaves."""

    def __init__(self, *parts: bytes, path: str = "/generate", headers: tuple[tuple[bytes, bytes], ...] = ()):
        self.scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
        last = len(parts) - 1
        self.incoming = [{"type": "http.request", "body": p, "more_body": i < last} for i, p in enumerate(parts)]
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self.incoming:
            return self.incoming.pop(0)
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)


def call(app: Callable[..., Coroutine], *parts: bytes, settings: Settings | None = None, **options: Any) -> Caller:
    async def run() -> Caller:
        caller = Caller(*parts, **options)
        await Gate(app, settings or Settings())(caller.scope, caller.receive, caller.send)
        return caller

    return asyncio.run(run())


def bearer(key: bytes) -> dict[str, Any]:
    return {"headers": ((b"authorization", key),)}


def test_a_body_in_parts_comes_whole():
    assert call(echo, b"a", b"", b"bc").body == b"abc"


@pytest.mark.parametrize(
    "given", [b"", b"Bearer", b"Bearer other", b"Bearer secret2", b"Basic secret", b"\xff\xfe secret"]
)
def test_without_the_key_nothing(given):
    caller = call(echo, b"a", settings=Settings(api_key="secret"), **bearer(given))
    assert caller.status == 401
    error = json.loads(caller.body)["error"]
    assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
    assert (b"www-authenticate", b"Bearer") in caller.sent[0]["headers"]


@pytest.mark.parametrize("given", [b"Bearer secret", b"bearer  secret "])
def test_with_the_key_everything(given):
    assert call(echo, b"a", settings=Settings(api_key="secret"), **bearer(given)).body == b"a"


def test_only_health_and_the_files_of_the_page_are_open():
    closed = Settings(api_key="secret")
    for path in ("/health", "/", "/web/style.css"):
        assert call(echo, b"a", settings=closed, path=path).status == 200
    for path in (
        "/debug/events",
        "/web",
        "//web/style.css",
        "/metrics",
        "/health_generate",
        "/health/",
        "//health",
        "/v1/models",
        "/openapi.json",
        "/nothing",
    ):
        assert call(echo, b"a", settings=closed, path=path).status == 401


@pytest.mark.parametrize("length", [b"11", b"9" * 5000])
def test_a_body_that_is_said_to_be_too_large_is_not_read(length):
    caller = call(echo, settings=Settings(max_body_bytes=10), headers=((b"content-length", length),))
    assert caller.status == 413 and b"10 bytes" in caller.body


def test_a_body_that_turns_out_too_large_is_refused():
    assert call(echo, b"a" * 6, b"a" * 5, settings=Settings(max_body_bytes=10)).status == 413
    assert call(echo, b"a" * 5, b"a" * 5, settings=Settings(max_body_bytes=10)).status == 200


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.01)
    assert call(echo).status == 408


@pytest.mark.parametrize("answering", [False, True])
def test_when_a_client_leaves_the_work_for_it_is_cancelled(answering):
    ended = []

    async def works(scope, receive, send) -> None:
        try:
            if answering:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async def run() -> None:
        caller = Caller(b"a")
        task = asyncio.create_task(Gate(works, Settings())(caller.scope, caller.receive, caller.send))
        await asyncio.sleep(0.01)
        assert not ended
        caller.left.set()
        await task
        assert ended == [1] and len(caller.sent) == answering

    asyncio.run(run())


def test_one_that_leaves_before_it_has_said_what_is_forgotten():
    async def run() -> None:
        caller = Caller()
        caller.left.set()
        await Gate(echo, Settings())(caller.scope, caller.receive, caller.send)
        assert caller.sent == []

    asyncio.run(run())


def test_the_time_is_limited(monkeypatch):
    monkeypatch.setattr(gate, "GRACE", 0.01)

    async def hangs(scope, receive, send) -> None:
        await asyncio.Event().wait()

    caller = call(hangs, b"a", settings=Settings(request_timeout=0.01))
    assert caller.status == 504 and json.loads(caller.body)["error"]["code"] == "timeout"


def test_when_the_server_stops_so_does_the_work():
    ended = []

    async def works(scope, receive, send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async def run() -> None:
        caller = Caller(b"a")
        task = asyncio.create_task(Gate(works, Settings())(caller.scope, caller.receive, caller.send))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert ended == [1]

    asyncio.run(run())
