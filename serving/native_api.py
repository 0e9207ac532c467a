"""The routes that SGLang has, under its names.

    curl localhost:30000/generate -H 'Content-Type: application/json' \\
        -d '{"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16, "temperature": 0}}'

A field that is not known is refused by name; so is a known one with a value that would change nothing here. As in SGLang, each
event of a stream has the whole text so far, and `top_k` -1 means off.

    python -m pytest tests/test_server_native.py
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from errors import UserError
from scheduler.request import TokenLogprob
from serving import sse
from serving.answers import Answer
from serving.api_errors import ApiError, EngineDown, ModelNotFound
from serving.client import EngineClient
from serving.messages import Delta
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
        async with _in_time(HEALTH_SECONDS), client.generate(_new_rid(), prompt, params) as answer:
            async for _ in answer:
                pass
        return JSONResponse({"status": "ok"})

    @routes.post("/tokenize", **answers(Tokenized, 400, 404))
    async def tokenize(asked: TokenizeRequest) -> Response:
        """Text, or several, as token ids."""
        ModelNotFound.unless_served(asked.model, settings.served_model_name)
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        _refuse_if_many("prompt", prompts, settings.max_prompts)
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
        _refuse_if_many("tokens", lists, settings.max_prompts)
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


# ---- /generate


@dataclass
class Sample:
    """One of the n texts of one prompt, so far."""

    rid: str
    prompt: int  # which one of the batch
    first_id: int  # of the prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None  # of the first sample of a prompt
    last: Delta | None = None
    started: float = field(default_factory=time.perf_counter)

    def take(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.last = delta


class Batch:
    """The prompts of one call of /generate, all submitted or none."""

    def __init__(
        self, asked: GenerateRequest, tokenizer: Tokenizer, answers: list[Answer], samples: list[list[Sample]]
    ):
        self._asked, self._tokenizer, self._answers, self._samples = asked, tokenizer, answers, samples
        prompts = asked.input_ids if asked.text is None else asked.text
        self._is_list = (not isinstance(prompts, str) and not isinstance(prompts[0], int)) or len(samples[0]) > 1

    @classmethod
    async def submit(
        cls, asked: GenerateRequest, client: EngineClient, tokenizer: Tokenizer, settings: Settings
    ) -> "Batch":
        """UserError names what is wrong; ServerBusy if there is no room for all."""
        prompts = await _prompts(asked, tokenizer, settings.max_prompts)
        params = _one_each("sampling_params", asked.sampling_params, len(prompts))
        rids = [_new_rid() for _ in prompts] if asked.rid is None else _one_each("rid", asked.rid, len(prompts))
        answers, samples = [], []
        with ExitStack() as undo:
            for i, (ids, sampling, rid) in enumerate(zip(prompts, params, rids, strict=True)):
                values = sampling.translated()
                if asked.return_logprob:
                    values["logprobs"] = asked.top_logprobs_num
                    if asked.logprob_start_len != -1:
                        values |= {
                            "prompt_logprobs": asked.top_logprobs_num,
                            "logprob_start_len": asked.logprob_start_len,
                        }
                elif asked.top_logprobs_num:
                    raise UserError("top_logprobs_num is given, but return_logprob is not")
                elif asked.logprob_start_len != -1:
                    raise UserError("logprob_start_len is given, but return_logprob is not")
                answers.append(client.generate(rid, ids, values, priority=asked.priority, cache_salt=asked.cache_salt))
                undo.callback(answers[-1].close)
                samples.append([Sample(rid, i, ids[0] if ids else 0) for _ in range(values.get("n", 1))])
            undo.pop_all()
        return cls(asked, tokenizer, answers, samples)

    async def whole(self) -> dict[str, Any] | list[dict[str, Any]]:
        """All texts, when all are done."""

        async def read(answer: Answer, samples: list[Sample]) -> None:
            async for delta in answer:
                samples[delta.index].take(delta)

        try:
            async with asyncio.TaskGroup() as tasks:
                for answer, samples in zip(self._answers, self._samples, strict=True):
                    tasks.create_task(read(answer, samples))
        except ExceptionGroup as errors:  # the first that has failed; the others have been cancelled
            raise errors.exceptions[0] from None
        finally:
            self._close()
        shown = [self._show(sample) for samples in self._samples for sample in samples]
        return shown if self._is_list else shown[0]

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Each sample so far, whenever there is more of it."""
        # of one place: a slow reader holds the readers, nobody else
        news: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue(1)

        async def read(answer: Answer, samples: list[Sample]) -> None:
            try:
                async for delta in answer:
                    sample = samples[delta.index]
                    sample.take(delta)
                    at = {"index": sample.prompt * len(samples) + delta.index} if self._is_list else {}
                    await news.put(self._show(sample) | at)
                await news.put(None)
            except Exception as error:
                await news.put(error)

        tasks = [asyncio.create_task(read(*pair)) for pair in zip(self._answers, self._samples, strict=True)]
        going = len(tasks)
        try:
            while going:
                said = await news.get()
                if isinstance(said, Exception):
                    raise said
                if said is None:
                    going -= 1
                else:
                    yield said
        finally:
            for task in tasks:
                task.cancel()
            self._close()

    def _close(self) -> None:
        for answer in self._answers:
            answer.close()

    def _show(self, sample: Sample) -> dict[str, Any]:
        last = sample.last
        meta = {
            "id": sample.rid,
            "finish_reason": _finish_reason(last, len(sample.token_ids)),
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": len(sample.token_ids),
            "cached_tokens": last.cached_tokens,
        }
        if last.finish_reason is not None:
            meta["e2e_latency"] = time.perf_counter() - sample.started
        if self._asked.return_logprob:
            meta |= self._logprobs("output", sample.logprobs)
            first = self._samples[sample.prompt][0]
            if first.prompt_logprobs is not None:
                meta |= self._logprobs("input", first.prompt_logprobs)
                if self._asked.logprob_start_len == 0:  # nothing says how likely the first token is
                    meta["input_token_logprobs"].insert(0, self._logprob(None, first.first_id))
                    meta.get("input_top_logprobs", []).insert(0, None)
        return {"text": sample.text, "output_ids": sample.token_ids, "meta_info": meta}

    def _logprobs(self, kind: str, tokens: list[TokenLogprob]) -> dict[str, list]:
        fields = {f"{kind}_token_logprobs": [self._logprob(x.logprob, x.token_id) for x in tokens]}
        if self._asked.top_logprobs_num:
            fields[f"{kind}_top_logprobs"] = [[self._logprob(p, id) for id, p in x.top] for x in tokens]
        return fields

    def _logprob(self, logprob: float | None, id: int) -> tuple[float | None, int, str | None]:
        return logprob, id, self._tokenizer.token_text(id) if self._asked.return_text_in_logprobs else None


async def _prompts(asked: GenerateRequest, tokenizer: Tokenizer, most: int) -> list[list[int]]:
    """The token ids of each prompt."""
    if (asked.text is None) == (asked.input_ids is None):
        raise UserError("text or input_ids must be given, and not both")
    name, given = ("input_ids", asked.input_ids) if asked.text is None else ("text", asked.text)
    if not given:
        raise UserError(f"{name} is empty")
    one = isinstance(given, str) or isinstance(given[0], int)
    prompts = [given] if one else given
    _refuse_if_many(name, prompts, most)
    return [await asyncio.to_thread(tokenizer.encode, p) if isinstance(p, str) else p for p in prompts]


def _refuse_if_many(name: str, prompts: Sequence[Any], most: int) -> None:
    if len(prompts) > most:
        raise UserError(f"{name} has {len(prompts)} prompts; {most} is the limit")


def _one_each(name: str, given: Any, prompts: int) -> Sequence[Any]:
    if not isinstance(given, list):
        if prompts > 1 and name == "rid":
            raise UserError(f"rid is one text; there are {prompts} prompts, and each needs its own")
        return [given] * prompts
    if len(given) != prompts:
        raise UserError(f"{name} has {len(given)} entries; there are {prompts} prompts")
    return given


def _finish_reason(delta: Delta, tokens: int) -> dict[str, Any] | None:
    match delta.finish_reason:
        case None:
            return None
        case "length":
            return {"type": "length", "length": tokens}
        case "stop":
            return {"type": "stop", "matched": delta.stop_reason}
        case reason:
            return {"type": reason, "message": "the request was aborted"}


def _new_rid() -> str:
    return uuid.uuid4().hex


@asynccontextmanager
async def _in_time(seconds: float = STATS_SECONDS) -> AsyncIterator[None]:
    """EngineDown if what is inside takes too long."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EngineDown(f"the engine has not answered within {seconds:g} s") from None
