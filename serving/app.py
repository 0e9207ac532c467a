"""The FastAPI application: all routes, behind the gate; every error as JSON.

    app = make_app(client, tokenizer, Settings())

`client` may be anything with EngineClient's methods; the routes hold no engine. There are no pages with documentation, because
FastAPI's load their scripts from elsewhere; /openapi.json is there.

    python -m pytest tests/test_server_schema.py
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from errors import UserError
from serving import native_api, openai_api, page
from serving.api_errors import ApiError, error_response
from serving.client import EngineClient
from serving.gate import Gate
from serving.openapi import document
from serving.settings import Settings
from tokenizer import Tokenizer

ROUTERS = (native_api.router, openai_api.router, page.router)  # each takes (client, tokenizer, settings)


def make_app(client: EngineClient, tokenizer: Tokenizer, settings: Settings) -> FastAPI:
    """client: started already. It is closed when the application shuts down."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await client.close()

    app = FastAPI(title="Folio", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.stopping = lambda: False  # server.py knows better
    for kind in (ApiError, UserError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _say)
    for router in ROUTERS:
        app.include_router(router(client, tokenizer, settings))
    app.openapi = lru_cache(lambda: document(app, settings))
    app.mount("/web", page.files())
    app.add_middleware(Gate, settings=settings)
    if settings.cors_origins:  # outermost: a browser asks first without the key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


async def _say(request: Request, error: Exception) -> Response:
    return error_response(error)
