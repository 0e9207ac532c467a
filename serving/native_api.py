"""The routes that SGLang has, under its names.

    curl localhost:30000/generate -H 'Content-Type: application/json' \\
        -d '{"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16, "temperature": 0}}'

A field that is not known is refused by name; so is a known one with a value that would change nothing here. As in SGLang, each
event of a stream has the whole text so far, and `top_k` -1 means off.

What /generate does with a request is in native_generate.py.

    python -m pytest tests/test_server_native.py
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from errors import UserError
from serving import sse
from serving.api_errors import ApiError, EngineDown, ModelNotFound
from serving.client import EngineClient
from serving.native_generate import Batch, new_rid, refuse_if_many
from serving.native_protocol import (
    AbortRequest,
    Detokenized,
    DetokenizeRequest,
    EngineState,
    Flushed,
    Generated,
    GenerateRequest,
    Health,
    ModelInfo,
    ServerInfo,
    Success,
    Tokenized,
    TokenizeRequest,
)
from serving.openapi import answers
from serving.settings import Settings
from tokenizer import Tokenizer

HEALTH_SECONDS = 20.0  # that /health_generate waits for a token
STATS_SECONDS = 5.0  # that /metrics and /server_info wait for the engine, which answers between two steps


def router(client: EngineClient, tokenizer: Tokenizer, settings: Settings) -> APIRouter:
    routes = APIRouter()

    @routes.post("/generate", **answers(Generated | list[Generated], 400, 503, stream=True))
    async def generate(asked: GenerateRequest) -> Response:
        """Complete a text or token ids, one or a batch; whole, or as server-sent events."""
        batch = await Batch.submit(asked, client, tokenizer, settings)
        if not asked.stream:
            return JSONResponse(await batch.whole())
        events = batch.events()
        first = await anext(events)  # what the engine refuses is a status, not an event
        return sse.stream(first, events)

    @routes.get("/flush_cache", **answers(Flushed, 503))
    @routes.post("/flush_cache", **answers(Flushed, 503))
    async def flush_cache() -> Response:
        """Drop all cached prefixes that nobody runs on."""
        return JSONResponse({"success": True, "pages_held": await client.flush()})

    @routes.post("/abort_request", **answers(Success, 400))
    async def abort_request(asked: AbortRequest) -> Response:
        """End a request by its rid, or all. One that is unknown, or has ended: nothing happens."""
        if bool(asked.rid) == asked.abort_all:
            raise UserError("rid or abort_all must be given, and not both")
        client.abort_all() if asked.abort_all else client.abort(asked.rid)
        return JSONResponse({"success": True})

    @routes.get("/get_model_info", **answers(ModelInfo))
    @routes.get("/model_info", **answers(ModelInfo))
    async def model_info() -> Response:
        """The model, and its limits."""
        facts = client.model
        return JSONResponse(
            {
                "model_path": facts.model_path,
                "tokenizer_path": facts.checkpoint,
                "is_generation": True,
                "model_type": facts.model_type,
                "served_model_name": settings.served_model_name,
                "max_model_len": facts.max_model_len,
                "vocab_size": facts.vocab_size,
                "dtype": facts.dtype,
                "device": facts.device,
            }
        )

    @routes.get("/server_info", **answers(ServerInfo, 400, 503))
    @routes.get("/get_server_info", **answers(ServerInfo, 400, 503))
    async def server_info(check: bool = False) -> Response:
        """What runs here, and its gauges. check=true: prove first that no page of the cache is lost."""
        async with _in_time():
            stats = await client.stats(check)
        state = EngineState(**asdict(stats), last_gen_throughput=stats.tokens_per_second, engine_pid=client.pid)
        info = ServerInfo(
            **asdict(client.model),
            tokenizer_path=client.model.checkpoint,
            served_model_name=settings.served_model_name,
            open_requests=client.open_requests,
            engine_restarts=client.restarts,
            internal_states=[state],
        )
        return JSONResponse(asdict(info))

    @routes.get("/health", **answers(Health, 503, tag="Health"))
    async def health() -> Response:
        """Is there an engine that takes requests? The one route that needs no key."""
        if not client.healthy:
            raise EngineDown(client.why_unhealthy)
        return JSONResponse({"status": "ok"})

    @routes.get("/health_generate", **answers(Health, 503, tag="Health"))
    async def health_generate() -> Response:
        """The same, proved: a token is made."""
        prompt = [client.model.eos_token_ids[0] if client.model.eos_token_ids else 0]
        params = {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True}
        async with _in_time(HEALTH_SECONDS), client.generate(new_rid(), prompt, params) as answer:
            async for _ in answer:
                pass
        return JSONResponse({"status": "ok"})

    @routes.post("/tokenize", **answers(Tokenized, 400, 404))
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Text, or several, as token ids."""
        ModelNotFound.unless_served(asked.model, settings.served_model_name)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        refuse_if_many("prompt", prompts, settings.max_prompts)
        ids = [await asyncio.to_thread(tokenizer.encode, prompt, asked.add_special_tokens) for prompt in prompts]
        count = [len(x) for x in ids]
        one = isinstance(asked.prompt, str)
        answer = {"tokens": ids[0] if one else ids, "count": count[0] if one else count}
        return JSONResponse(answer | {"max_model_len": client.model.max_model_len})

    @routes.post("/detokenize", **answers(Detokenized, 400, 404))
    async def detokenize(asked: DetokenizeRequest) -> Response:
        """Token ids, or several lists of them, as text."""
        ModelNotFound.unless_served(asked.model, settings.served_model_name)
        many = bool(asked.tokens) and isinstance(asked.tokens[0], list)
        lists = asked.tokens if many else [asked.tokens]
        refuse_if_many("tokens", lists, settings.max_prompts)
        texts = [await asyncio.to_thread(tokenizer.decode, ids, asked.skip_special_tokens) for ids in lists]
        return JSONResponse({"text": texts if many else texts[0]})

    @routes.get("/metrics", **answers(kind="text/plain", tag="Health"))
    async def metrics() -> Response:
        """For Prometheus."""
        try:
            async with _in_time():
                stats = await client.stats()
        except ApiError:
            stats = None
        return Response(client.metrics.exposition(stats), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


@asynccontextmanager
async def _in_time(seconds: float = STATS_SECONDS) -> AsyncIterator[None]:
    """EngineDown if what is inside takes too long."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineDown(f"the engine has not answered within {seconds:g} s") from None
