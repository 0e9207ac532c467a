"""In front of every route: who has no key is sent away, a body that is too large is not read, and a client that leaves is noticed.

It reads the body before the application runs. So whatever the client says after that can only be that it has gone, and then
the task that works for it is cancelled, whichever route it is in: what it had asked the engine for is aborted within a step. A
client that stays but does not read is cut off when its time is up.

    python -m pytest tests/test_server_gate.py
"""

import asyncio
import hmac
from contextlib import suppress
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api_errors import ApiError, TimedOut, error_response
from serving.settings import Settings

OPEN = {"/health", "/"}  # routes that need no key: a browser has none before the page has asked for it
OPEN_FOLDER = "/web/"  # the page's files
GRACE = 10.0  # seconds for a client that does not read, beyond what a request may take
BODY_SECONDS = 60.0  # for a client to say what it wants


class Gate:
    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        if body is not None:
            await self._run(scope, body, receive, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if self.settings.api_key is None or path in OPEN or path.startswith(OPEN_FOLDER):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.settings.api_key.encode()):
            message = "this server has a key: send it as `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body. None: the client has gone. ApiError 413 or 408."""
        limit = self.settings.max_body_bytes
        too_large = ApiError(413, f"the body is too large; {limit} bytes is the limit", code="body_too_large")
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > limit:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(HTTPStatus.REQUEST_TIMEOUT, f"no whole body within {BODY_SECONDS:g} s") from None

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The application, as long as the client is there and has time."""
        first, started = [{"type": "http.request", "body": body, "more_body": False}], False
        left = asyncio.Event()

        async def replay() -> Message:
            if first:
                return first.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        async def notice() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            left.set()

        work, watch = asyncio.create_task(self.app(scope, replay, noted)), asyncio.create_task(notice())
        try:
            done, _ = await asyncio.wait(
                {work, watch}, timeout=self.settings.request_timeout + GRACE, return_when=asyncio.FIRST_COMPLETED
            )
            late = not done
        finally:  # this task may itself be cancelled: the server stops
            watch.cancel()
            if not work.done():
                work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        if late and not started:
            await error_response(TimedOut(self.settings.request_timeout))(scope, receive, send)
