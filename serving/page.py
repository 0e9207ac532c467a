"""The page at `/`, and the events that it lives from.

    curl -N localhost:30000/debug/events

The files of web/ are open to everybody, because a browser must have the page before it can ask for a key. What the engine does is
behind the key: snapshots have the beginnings of prompts in them.

    python -m pytest tests/test_debug_events.py tests/test_page.py
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import TypeAdapter
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from serving import sse
from serving.client import EngineClient
from serving.openapi import answers
from serving.settings import Settings
from snapshot import Snapshot
from tokenizer import Tokenizer

WEB = Path(__file__).parents[1] / "web"
HEADERS = {  # nothing from elsewhere is loaded, nobody else frames it, and a new version is seen at once
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_plain = TypeAdapter(Snapshot)


class Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def files() -> StaticFiles:
    """What the page consists of."""
    return Files(directory=WEB)


def router(client: EngineClient, tokenizer: Tokenizer, settings: Settings) -> APIRouter:
    routes = APIRouter()

    @lru_cache(maxsize=4096)
    def text_of(ids: tuple[int, ...]) -> str:
        known = [id for id in ids if id < tokenizer.vocab_size]  # a model's vocabulary may be padded
        return tokenizer.decode(known, skip_special_tokens=False)

    def told(snapshot: Snapshot) -> dict[str, Any]:
        content = _plain.dump_python(snapshot)
        for node in content["nodes"]:
            node["text"] = text_of(tuple(node.pop("first")))
        return content

    @routes.get("/", **answers(kind="text/html", tag="Page"))
    async def page() -> Response:
        """The page."""
        return FileResponse(WEB / "index.html", headers=HEADERS)

    @routes.get("/debug/events", **answers(None, 503, stream=True, tag="Page"))
    async def events(request: Request) -> Response:
        """Events `model` (once), `snapshot` (a few times a second) and `away` (while there is no engine), until the reader goes."""
        client.watchers.refuse_if_full()
        return sse.response(stream(request.app.state.stopping))

    async def stream(stopping: Any) -> AsyncIterator[bytes]:
        yield sse.event({"name": settings.served_model_name} | asdict(client.model), "model")
        async with aclosing(client.watchers.look()) as snapshots:
            async for snapshot in snapshots:
                if stopping():
                    return
                if snapshot is not None:
                    yield sse.event(told(snapshot), "snapshot")
                else:
                    yield sse.event({"why": client.why_unhealthy or "it is busy with a long step"}, "away")

    return routes
