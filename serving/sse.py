"""Server-sent events: what every stream of the server is made of.

    return stream(first, rest)

A stream begins once there is something to say, so that what is refused before is a status. What fails later is an event with an
`error`; the last event is [DONE].

    python -m pytest tests/test_server_native.py tests/test_openai_api.py
"""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from serving.api_errors import ApiError, api_error

log = logging.getLogger("uvicorn.error")

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def stream(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """`first` and then the rest, which is closed when the reader goes."""
    return response(_events(first, rest))


def response(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Events that `event` has made."""
    return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)


def event(content: dict[str, Any], name: str | None = None) -> bytes:
    data = f"data: {json.dumps(content, separators=(',', ':'))}\n\n"
    return (data if name is None else f"event: {name}\n{data}").encode()


async def _events(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        try:
            yield event(first)
            async for content in rest:
                yield event(content)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("a stream has failed")
            yield event(api_error(error).body())
        yield b"data: [DONE]\n\n"
