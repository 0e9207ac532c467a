"""What one call of /generate asks for, and what it is told: one prompt or a batch, n samples of each, whole or in pieces.

python -m pytest tests/test_server_native.py
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from errors import UserError
from scheduler.request import TokenLogprob
from serving.answers import Answer
from serving.client import EngineClient
from serving.messages import Delta
from serving.native_protocol import GenerateRequest
from serving.settings import Settings
from tokenizer import Tokenizer


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
        rids = [new_rid() for _ in prompts] if asked.rid is None else _one_each("rid", asked.rid, len(prompts))
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
    refuse_if_many(name, prompts, most)
    return [await asyncio.to_thread(tokenizer.encode, p) if isinstance(p, str) else p for p in prompts]


def refuse_if_many(name: str, prompts: Sequence[Any], most: int) -> None:
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


def new_rid() -> str:
    return uuid.uuid4().hex
