"""The routes of the OpenAI API: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models.

    app.include_router(router(client, tokenizer, settings))

A request becomes one or more prompts for the engine, whose deltas come back in whatever order; a stream passes on what each brings
(serving/openai_answers.py), and an answer that is not streamed is the sum of the same. What is refused before the first token is an
error with a status; after it, an `error` in the stream.

    python -m pytest tests/test_openai_api.py
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from errors import UserError
from serving import sse
from serving.api_errors import ApiError, ModelNotFound
from serving.chat import Chats
from serving.messages import Delta
from serving.openai_answers import ChatChoice, CompletionChoice, Tally, embedding, envelope
from serving.openai_protocol import ChatRequest, CompletionRequest, EmbeddingRequest, Sampling, refused
from serving.openai_route import NamingRoute
from serving.openai_shapes import ChatCompletion, Completion, Embeddings, Model, Models
from serving.openapi import answers
from serving.settings import Settings
from tokenizer import Tokenizer


class Client(Protocol):
    """What is needed of the engine: `serving.client.EngineClient`, or a stand-in."""

    model: Any  # its max_model_len

    def generate(
        self,
        rid: str,
        prompt_ids: list[int],
        params: dict[str, Any],
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[Delta]:
        """The deltas of params["n"] samples; closing it aborts. What fails raises UserError or ApiError, at once or later."""


@dataclass(frozen=True)
class Job:
    """One prompt of a request, for the engine."""

    rid: str
    prompt_ids: list[int]
    params: dict[str, Any]


def router(client: Client, tokenizer: Tokenizer, settings: Settings) -> APIRouter:
    """The routes, for an app that renders ApiError. UserError for a parser that there is not."""
    routes = APIRouter(prefix="/v1", route_class=NamingRoute)
    chats = Chats(tokenizer, settings.tool_call_parser, settings.reasoning_parser)
    name, created = settings.served_model_name, int(time.time())

    def model() -> Model:
        length = client.model.max_model_len
        return {"id": name, "object": "model", "created": created, "owned_by": "folio", "max_model_len": length}

    def says(model: Any, *statuses: int, stream: bool = False) -> dict[str, Any]:
        return answers(model, *statuses, stream=stream, tag="OpenAI")

    @routes.post("/chat/completions", **says(ChatCompletion, 400, 404, 503, stream=True))
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a chat; whole, or as server-sent events."""
        ModelNotFound.unless_served(body.model, name)
        with _naming(body):
            prompt = await run_in_threadpool(chats.prompt, body)
        id = body.rid or f"chatcmpl-{uuid.uuid4().hex}"
        choices = [ChatChoice(i, chats, prompt) for i in range(body.n or 1)]
        answer = Answer("chat.completion", id, name, body, choices)
        return await answer.respond(client, [Job(id, prompt.ids, prompt.params)])

    @routes.post("/completions", **says(Completion, 400, 404, 503, stream=True))
    async def completions(body: CompletionRequest) -> Response:
        """Complete one prompt or several; whole, or as server-sent events."""
        ModelNotFound.unless_served(body.model, name)
        id = body.rid or f"cmpl-{uuid.uuid4().hex}"
        with _naming(body):
            prompts = await run_in_threadpool(_encoded, body, tokenizer, settings.max_prompts)
        n, params = body.n or 1, body.params()
        jobs = _jobs(id, prompts, params)
        choices = [
            CompletionChoice(i * n + sample, tokenizer, text if body.echo else "", ids[0] if ids else 0)
            for i, (text, ids) in enumerate(prompts)
            for sample in range(n)
        ]
        return await Answer("text_completion", id, name, body, choices).respond(client, jobs)

    @routes.post("/embeddings", **says(Embeddings, 400, 404, 499, 503))
    async def embeddings(body: EmbeddingRequest) -> Response:
        """What the model's last layer makes of a prompt, at length 1."""
        ModelNotFound.unless_served(body.model, name)
        id, tally = body.rid or f"embd-{uuid.uuid4().hex}", Tally()
        with _naming(body):
            prompts = await run_in_threadpool(_encoded, body, tokenizer, settings.max_prompts)
            found: list[Any] = [None] * len(prompts)
            async with aclosing(_deltas(client, _jobs(id, prompts, body.params()), body)) as deltas:
                async for job, delta in deltas:
                    tally.add(job, delta)
                    found[job] = delta.embedding
        if None in found:
            raise ApiError(499, "the request was aborted")
        as_base64 = body.encoding_format == "base64"
        data = [{"object": "embedding", "index": i, "embedding": embedding(x, as_base64)} for i, x in enumerate(found)]
        count = tally.usage["prompt_tokens"]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})

    @routes.get("/models", **says(Models))
    async def models() -> Response:
        """The models that can be asked: one."""
        return JSONResponse({"object": "list", "data": [model()]})

    @routes.get("/models/{asked:path}", **says(Model, 404))
    async def one_model(asked: str) -> Response:
        """That model, by its name."""
        ModelNotFound.unless_served(asked, name)
        return JSONResponse(model())

    return routes


class Answer:
    """The answer to one request: to be streamed, or whole."""

    def __init__(
        self, kind: str, id: str, model: str, body: Sampling, choices: Sequence[ChatChoice | CompletionChoice]
    ):
        self.body, self.choices, self.tally = body, choices, Tally()
        self._head = envelope(kind, id, model)
        self._chunk_kind = "chat.completion.chunk" if kind == "chat.completion" else kind

    async def respond(self, client: Client, jobs: Sequence[Job]) -> Response:
        """ApiError for what is refused before anything of it is said."""
        chunks = self._chunks(client, jobs)
        if self.body.stream:
            first = await anext(chunks)  # from now on the status is 200
            return sse.stream(first, chunks)
        async for _ in chunks:
            pass
        choices = [choice.whole() for choice in self.choices]
        return JSONResponse(self._head | {"choices": choices, "usage": self.tally.usage})

    async def _chunks(self, client: Client, jobs: Sequence[Job]) -> AsyncIterator[dict[str, Any]]:
        """All that a stream says, as objects."""
        n, begun = self.body.n or 1, False
        with _naming(self.body):
            async with aclosing(_deltas(client, jobs, self.body)) as deltas:
                async for job, delta in deltas:
                    if not begun and isinstance(self.choices[0], ChatChoice):
                        for choice in self.choices:
                            yield self._chunk([choice.first()])
                    begun = True
                    self.tally.add(job, delta)
                    for chunk in self.choices[job * n + delta.index].feed(delta):
                        yield self._chunk([chunk])
        if self.body.include_usage:
            yield self._chunk([]) | {"usage": self.tally.usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._head | {"object": self._chunk_kind, "choices": choices}
        return chunk | {"usage": None} if self.body.include_usage else chunk


async def _deltas(
    client: Client, jobs: Sequence[Job], body: Sampling | EmbeddingRequest
) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of all jobs as they come, each with the number of its job. Closing it closes them all."""
    async with AsyncExitStack() as open_streams:
        streams = []
        for job in jobs:
            stream = client.generate(
                job.rid, job.prompt_ids, job.params, priority=body.priority or 0, cache_salt=body.cache_salt
            )
            streams.append(await open_streams.enter_async_context(aclosing(stream)))
        async with aclosing(merged(streams)) as deltas:
            async for number, delta in deltas:
                yield number, delta


async def merged(streams: Sequence[AsyncIterator[Delta]]) -> AsyncIterator[tuple[int, Delta]]:
    """What several streams bring, as it comes, each with the number of its stream."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta | Exception | None]] = asyncio.Queue()

    async def forward(number: int, stream: AsyncIterator[Delta]) -> None:
        end = None
        try:
            async for delta in stream:
                arrived.put_nowait((number, delta))
        except Exception as error:
            end = error
        arrived.put_nowait((number, end))

    tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(streams)]
    try:
        going = len(tasks)
        while going:
            number, delta = await arrived.get()
            if isinstance(delta, Exception):
                raise delta
            if delta is None:
                going -= 1
            else:
                yield number, delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # before their streams are closed


def _encoded(
    body: CompletionRequest | EmbeddingRequest, tokenizer: Tokenizer, most: int
) -> list[tuple[str, list[int]]]:
    """Each prompt as text and ids; the text of ids only if it is to be echoed."""
    return [
        (prompt, tokenizer.encode(prompt))
        if isinstance(prompt, str)
        else (tokenizer.decode(prompt) if getattr(body, "echo", False) else "", prompt)
        for prompt in body.prompts(most)
    ]


def _jobs(id: str, prompts: list[tuple[str, list[int]]], params: dict[str, Any]) -> list[Job]:
    """One for each prompt; where there are several, they are numbered."""
    return [Job(id if len(prompts) == 1 else f"{id}-{i}", ids, params) for i, (_, ids) in enumerate(prompts)]


@contextmanager
def _naming(body: Sampling | EmbeddingRequest) -> Iterator[None]:
    """What the engine refuses, under the name that the client knows."""
    try:
        yield
    except UserError as error:
        raise refused(error, body) from error
