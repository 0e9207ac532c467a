"""The OpenAI routes on a free port, with the bundled model's engine in this process: what stands in for `EngineClient`."""

import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException

from engine import Engine
from errors import UserError
from serving.api_errors import ApiError, RequestFailed, error_response
from serving.engine_process import tell
from serving.messages import Delta, Error
from serving.openai_api import Client, router
from serving.params import sampling_params
from serving.settings import Settings
from tokenizer import Tokenizer


class InProcess:
    """Asks an engine of this process as `EngineClient` asks that of another."""

    def __init__(self, engine: Engine):
        self.engine = self.model = engine

    async def generate(
        self,
        rid: str,
        prompt_ids: list[int],
        params: dict[str, Any],
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Delta]:
        asked = sampling_params(params)
        with self.engine.stream(prompt_ids, asked, request_id=rid, priority=priority, cache_salt=cache_salt) as stream:
            async for d in stream:
                said = tell(d)
                if isinstance(said, Error):
                    raise UserError(said.message) if said.kind == "refused" else RequestFailed(said.message)
                yield said


class Scripted:
    """Says the same text to everybody, letter by letter, and then maybe fails."""

    def __init__(self, text: str, error: Exception | None = None):
        self.text, self.error = text, error

    async def generate(self, rid: str, prompt_ids: list[int], params: dict[str, Any], **_: Any) -> AsyncIterator[Delta]:
        for letter in self.text:
            yield Delta(rid=rid, index=0, text=letter, token_ids=[5], prompt_tokens=len(prompt_ids))
        if self.error is not None:
            raise self.error
        yield Delta(rid=rid, index=0, text="", token_ids=[2], finish_reason="stop", stop_reason=2)


def app_of(client: Client, tokenizer: Tokenizer, **settings: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(router(client, tokenizer, Settings("folio-tiny", max_prompts=16, **settings)))

    async def answer(request: Request, error: Exception):
        return error_response(error)

    for kind in (ApiError, UserError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """-> the address, while it is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
