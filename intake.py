"""A prompt becomes requests: encoded, and checked for everything that a person can get wrong.

Runs in the caller's thread, before the engine knows of it, so that a refusal disturbs nobody.

    python -m pytest tests/test_engine.py
"""

import random
import threading
import uuid
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any

from cache.radix import Namespace
from errors import UserError
from grammar.constraint import AllowedTokens
from grammar.spec import Spec
from output import CompletionOutput, RequestOutput, TextStream
from scheduler.request import Request, SamplingParams, resolve_stop_ids
from scheduler.scheduler import Scheduler
from streams import Stream
from tokenizer import Tokenizer

Prompt = str | Sequence[int]


@dataclass(eq=False)
class Group:
    """The n requests of one prompt, and where their text goes."""

    id: str
    prompt: str | None
    requests: list[Request]
    texts: list[TextStream]
    spec: Spec | None = None  # what its output must be; a grammar has to be compiled first
    stream: "weakref.ref[Stream] | None" = None  # weak: a stream that its reader drops must die, and abort
    done: threading.Event = field(default_factory=threading.Event)

    def output(self) -> RequestOutput:
        completions = [
            CompletionOutput(
                index=r.index,
                text=text.text,
                token_ids=[] if r.params.only_reads else r.output_ids,
                finish_reason=r.finish_reason,
                stop_reason=r.stop_reason,
                logprobs=r.logprobs if r.params.logprobs is not None else None,
                parsed=parsed(r, text.text),
                embedding=r.embedding,
                metrics=r.metrics,
            )
            for r, text in zip(self.requests, self.texts, strict=True)
        ]
        first = self.requests[0]
        return RequestOutput(self.id, self.prompt, first.prompt_ids, completions, first.prompt_logprobs)


class Intake:
    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        max_model_len: int,
        scheduler: Scheduler,
    ):
        self.tokenizer, self.eos_token_ids, self.vocab_size = tokenizer, list(eos_token_ids), vocab_size
        self.max_model_len, self.scheduler = max_model_len, scheduler

    def group(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Group:
        """The n requests of one prompt. UserError if they cannot be served."""
        ids = self._encode(prompt)
        new = self._new_tokens(len(ids), 1 if params.only_reads else params.max_new_tokens)
        if params.logprob_start_len > len(ids):
            raise UserError(f"logprob_start_len is {params.logprob_start_len}; the prompt has {len(ids)} tokens")
        check_ids("prompt", ids, self.vocab_size)
        check_ids("stop_token_ids", params.stop_token_ids, self.vocab_size)
        check_ids("logit_bias", params.logit_bias, self.vocab_size)
        if not isinstance(priority, int):
            raise UserError(f"priority is {priority!r}; it must be a whole number")
        spec = spec_of(params)
        if spec is not None and self.tokenizer is None:
            raise UserError(f"{spec.kind}: this engine has no tokenizer to spell it with")
        id = request_id if request_id is not None else f"request-{uuid.uuid4().hex}"
        seed = params.seed if params.seed is not None else random.getrandbits(62)
        stop_ids = resolve_stop_ids(params, self.eos_token_ids)
        namespace = namespace_of(cache_salt)
        first = Request(ids, params, stop_ids, new, _int64(seed), id=id, namespace=namespace, priority=priority)
        others = [
            Request(
                ids, params, stop_ids, new, _int64(seed + i), i,
                id=id, leader=first, namespace=namespace, priority=priority,
            )
            for i in range(1, params.n)
        ]  # fmt: skip
        if params.allowed_tokens_fn is not None:
            for request in (first, *others):
                request.constraint = AllowedTokens(params.allowed_tokens_fn, self._check_allowed)
        return Group(
            id,
            prompt if isinstance(prompt, str) else None,
            [first, *others],
            [TextStream(self._detokenizer(params), params.stop) for _ in range(params.n)],
            spec,
        )

    def _check_allowed(self, ids: Sequence[int]) -> None:
        check_ids("allowed_tokens_fn", ids, self.vocab_size)

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

    def _new_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        """How many tokens may be generated. What was asked for is given or refused, never clipped; None is what fits."""
        room = self.max_model_len - prompt_tokens
        if room < 1:
            raise UserError(
                f"the prompt has {prompt_tokens} tokens; the context has {self.max_model_len}, and one must be new"
            )
        if asked is not None and asked > room:
            raise UserError(
                f"{prompt_tokens} prompt tokens + {asked} new ones exceed the context of {self.max_model_len}"
            )
        new = asked or max(1, min(room, self.scheduler.capacity - prompt_tokens))
        self.scheduler.refuse_if_too_large(prompt_tokens, new)
        return new

    def _detokenizer(self, params: SamplingParams):
        return self.tokenizer and self.tokenizer.detokenizer(params.skip_special_tokens)


def namespace_of(cache_salt: str | None) -> Namespace:
    """Where in the cache a request's prefixes are. UserError for a salt that is none."""
    if cache_salt is not None and (not isinstance(cache_salt, str) or not cache_salt):
        raise UserError(f"cache_salt is {cache_salt!r}; it must be a text that is not empty")
    return () if cache_salt is None else ("salt", cache_salt)


def check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """UserError if an id is no whole number, or outside of the vocabulary."""
    bad = [i for i in ids if not isinstance(i, Integral) or not 0 <= i < vocab_size]
    if bad:
        raise UserError(f"{what} has token id {bad[0]!r}; the vocabulary has ids 0 to {vocab_size - 1}")


def spec_of(params: SamplingParams) -> Spec | None:
    """What a request asks of its output. UserError if that is not valid in itself, or if it asks for two things."""
    free = not params.disable_any_whitespace
    specs = {
        "json_schema": params.json_schema is not None and partial(Spec.json_schema, params.json_schema, free),
        "json_object": params.json_object and partial(Spec.json_object, free),
        "regex": params.regex is not None and partial(Spec.regex, params.regex),
        "ebnf": params.ebnf is not None and partial(Spec.ebnf, params.ebnf),
        "choices": params.choices is not None and partial(Spec.choices, params.choices),
        "structural_tag": params.structural_tag is not None
        and partial(Spec.structural_tag, params.structural_tag, free),
        "allowed_tokens_fn": params.allowed_tokens_fn is not None and (lambda: None),
    }
    asked = {name: make for name, make in specs.items() if make}
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are given; a request has one of them at most")
    for make in asked.values():
        return make()
    if params.json_finish or params.disable_any_whitespace:
        given = "json_finish" if params.json_finish else "disable_any_whitespace"
        raise UserError(f"{given} is given, but nothing that says what the output must be")
    return None


def parsed(request: Request, text: str) -> Any:
    """A text that is whole, as an object of the pydantic model that was asked for. None: it is not, or the model refuses it."""
    model = request.params.json_schema
    if request.finish_reason != "stop" or not isinstance(model, type):
        return None
    try:
        return model.model_validate_json(text)
    except ValueError:  # a stop string may have cut it off; and a model can want more than its schema says
        return None


def _int64(n: int) -> int:
    """Wrap around, as an integer of the device would."""
    return (n + 2**63) % 2**64 - 2**63
