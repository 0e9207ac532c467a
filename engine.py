"""The engine: the one public object. It owns model, pages and scheduler, and runs the step loop.

    from engine import Engine, SamplingParams
    engine = Engine.from_pretrained("assets/folio-tiny")
    print(engine.generate("Once upon a time", SamplingParams(temperature=0))[0].outputs[0].text)

There is one way through a step, for one prompt and for many:

    plan -> launch -> read -> commit -> text

    python -m pytest tests/test_engine.py
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache.pages import PagePool
from checkpoint import Checkpoint, load
from errors import UserError
from machine import cpp_compiler, free_memory, pick_device, pick_dtype
from model import Transformer
from output import CompletionOutput, Delta, RequestOutput, TextStream
from runner import Runner
from scheduler.request import Request, SamplingParams, TokenLogprob, resolve_stop_ids
from scheduler.scheduler import Scheduler
from tokenizer import Tokenizer

__all__ = ["Engine", "SamplingParams"]

Prompt = str | Sequence[int]


class Engine:
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        *,
        max_batch_size: int = 16,
        max_model_len: int | None = None,
        max_total_tokens: int | None = None,
        page_size: int = 16,
        chunk_size: int = 2048,
    ):
        """Serve a model that is loaded already. Without a tokenizer, prompts are token ids and texts are empty.

        max_batch_size: rows that decode together. max_total_tokens: tokens in the cache (default: what all rows can use,
        at most half of the free memory). max_model_len: longest sequence (default: the model's, as far as the cache goes).
        chunk_size: most tokens of a prompt in one step.
        """
        for name, value in (("max_batch_size", max_batch_size), ("chunk_size", chunk_size)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if not 1 <= page_size <= 128:
            raise UserError(f"page_size is {page_size}; it must be between 1 and 128")
        c = model.config
        if max_model_len is not None and not 2 <= max_model_len <= c.max_position:
            raise UserError(f"max_model_len is {max_model_len}; it must be between 2 and the model's {c.max_position}")
        self.model, self.tokenizer, self.eos_token_ids = model, tokenizer, list(eos_token_ids)
        in_memory = self._tokens_in_memory() if max_total_tokens is None else max_total_tokens
        self.max_model_len = max_model_len or max(1, min(c.max_position, in_memory))
        if max_total_tokens is None:
            row = -(-self.max_model_len // page_size) * page_size
            max_total_tokens = max(row, min(max_batch_size * row, in_memory))
        pages = 1 + max_total_tokens // page_size
        self.pool = PagePool(pages, page_size)
        self.scheduler = Scheduler(self.pool, max_batch_size, chunk_size)
        self.runner = Runner(model, pages, page_size, max_batch_size, chunk_size)
        self.steps = 0
        self._streams: dict[Request, TextStream] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        **options,
    ) -> "Engine":
        """A checkpoint folder or hub id, ready to run. UserError says what is wrong with it or with an option."""
        on = pick_device(device)
        checkpoint = Checkpoint.open(model)
        tokenizer = Tokenizer.from_pretrained(checkpoint.path)
        weights = load(checkpoint, pick_dtype(dtype, checkpoint.dtype, on), on, max_model_len)
        eos = sorted({*checkpoint.eos_token_ids, *tokenizer.eos_token_ids})
        return cls(weights, tokenizer, eos, max_model_len=max_model_len, **options)

    def compile(self, greedy: bool | None = None) -> Iterator[str]:
        """Compile every shape that serving will meet; yields the name of each before it, for a progress bar.

        greedy: compile only the greedy (True) or only the sampling variant (False), when no other request will come.
        """
        if self.runner.device.type == "cpu" and cpp_compiler() is None:
            raise UserError("--compile needs a C++ compiler: install g++ (apt install g++, or xcode-select --install)")
        self.runner.compile()
        return self.runner.warm_up((True, False) if greedy is None else (greedy,))

    # ---- requests in, text out

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete one prompt or many (texts or token ids); all run together. One set of params, or one for each."""
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but {len(each)} sampling params")
        groups = [self._requests(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        with self._serving([request for group in groups for request in group]) as streams:
            while any(r.finish_reason is None for r in streams):
                self.step()
            return [
                RequestOutput(
                    prompt if isinstance(prompt, str) else None,
                    group[0].prompt_ids,
                    [_completion(r, streams[r].text) for r in group],
                )
                for prompt, group in zip(prompts, groups, strict=True)
            ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Complete one prompt, a Delta at a time. Closing the iterator aborts what is still running.

        A prompt that cannot be served is refused here, before the first Delta is asked for.
        """
        return self._stream(self._requests(prompt, params or SamplingParams()))

    def _stream(self, requests: list[Request]) -> Iterator[Delta]:
        sent = dict.fromkeys(requests, 0)
        with self._serving(requests) as streams:
            going = set(requests)
            while going:
                self.step()
                for r in [r for r in requests if r in going]:
                    ids, reason = r.output_ids[sent[r] :], r.finish_reason
                    sent[r] += len(ids)
                    if reason is not None:
                        going.remove(r)
                    if ids or reason is not None:
                        yield Delta(r.index, streams[r].take(), ids, reason, r.stop_reason)

    # ---- the step

    def step(self) -> None:
        """One step of whatever there is to do."""
        batch = self.scheduler.plan()
        if batch is None:
            return
        for request in batch.requests:
            if request.computed == 0:
                self.runner.set_row(request)
        tokens, finite, logprobs = self.runner.read(self.runner.launch(batch), batch)
        for request, ok in zip(batch.requests, finite, strict=True):
            if not ok:
                self.runner.clear(request.pages)
                self.scheduler.end(request, "error", "the model's logits are not finite")
        self.scheduler.commit(batch, tokens)
        if batch.samples:
            for request, logprob in zip(batch.requests, logprobs, strict=True):
                if request.finish_reason != "error":
                    self._take_token(request, logprob)
        self.steps += 1

    def _take_token(self, request: Request, logprob: TokenLogprob | None) -> None:
        """The text side of a commit: detokenize, look for stop strings, note the time."""
        request.token_times.append(time.perf_counter())
        if logprob is not None:
            request.logprobs.append(logprob)
        stream, ended = self._streams[request], request.finish_reason
        if ended in (None, "length"):  # the token of a stop id is not text
            stream.add(request.output_ids[-1], may_stop=len(request.output_ids) >= request.params.min_new_tokens)
        if ended is not None:
            stream.finish()
        elif stream.stopped_by is not None:
            self.scheduler.end(request, "stop", stream.stopped_by)
        if ended == "length" and stream.stopped_by is not None:  # both at once: the stop string is the better reason
            request.finish_reason, request.stop_reason = "stop", stream.stopped_by

    def check(self) -> None:
        """Prove that no page and no row is lost or owned twice; RuntimeError otherwise."""
        self.scheduler.check()
        if not self.scheduler.has_work and self.pool.free_pages != self.pool.total:
            raise RuntimeError(f"idle, but only {self.pool.free_pages} of {self.pool.total} pages are free")

    # ---- inside

    def _requests(self, prompt: Prompt, params: SamplingParams) -> list[Request]:
        """The n requests of one prompt, refused with a UserError if they cannot be served."""
        ids = self._encode(prompt)
        room = self.max_model_len - len(ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens; the context has {self.max_model_len}, and one must be new"
            )
        vocab = self.model.config.vocab_size
        for what, values in (
            ("prompt", ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            bad = next((i for i in values if not 0 <= i < vocab), None)
            if bad is not None:
                raise UserError(f"{what} has token id {bad}; the vocabulary has ids 0 to {vocab - 1}")
        if params.max_new_tokens is not None and params.max_new_tokens > room:
            asked = f"{len(ids)} prompt tokens + {params.max_new_tokens} new ones"
            raise UserError(f"{asked} exceed the context of {self.max_model_len}")
        seed = params.seed if params.seed is not None else random.getrandbits(62)
        stop_ids = resolve_stop_ids(params, self.eos_token_ids)
        return [
            Request(ids, params, stop_ids, params.max_new_tokens or room, _int64(seed + i), i) for i in range(params.n)
        ]

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("this engine has no tokenizer; give token ids")
            ids = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise UserError("the prompt is empty: it has no tokens")
        return ids

    @contextmanager
    def _serving(self, requests: list[Request]) -> Iterator[dict[Request, TextStream]]:
        """Queue the requests; on the way out, however that comes, abort those that still run and forget all."""
        try:
            for r in requests:
                detokenizer = self.tokenizer and self.tokenizer.detokenizer(r.params.skip_special_tokens)
                self._streams[r] = TextStream(detokenizer, r.params.stop)
                r.queued_at = time.perf_counter()
                self.scheduler.add(r)
            yield {r: self._streams[r] for r in requests}
        finally:
            for r in requests:
                if self._streams.pop(r, None) is not None:
                    self.scheduler.end(r, "abort")

    def _tokens_in_memory(self) -> int:
        """How many tokens' keys and values fit into half of the free memory."""
        c, device = self.model.config, self.model.norm.weight.device
        bytes_per_token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.model.dtype.itemsize
        return free_memory(device) // 2 // bytes_per_token


def _int64(n: int) -> int:
    """Wrap around, as an integer of the device would."""
    return (n + 2**63) % 2**64 - 2**63


def _completion(request: Request, text: str) -> CompletionOutput:
    return CompletionOutput(
        index=request.index,
        text=text,
        token_ids=request.output_ids,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
        logprobs=request.logprobs if request.params.logprobs is not None else None,
        token_times=[t - request.queued_at for t in request.token_times],
    )
