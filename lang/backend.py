"""Where programs run: what every backend offers, and the one that is an engine of this process.

    set_default_backend(Engine.from_pretrained("assets/folio-tiny"))

endpoint.py has that for a server, remote.py those for remote APIs.

    python -m pytest tests/test_lang.py
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from engine import Engine
from errors import UserError
from lang.choices import Score
from lang.ir import RETURNS
from lang.transcript import Messages, Transcript
from scheduler.request import SamplingParams, TokenLogprob


class BackendError(RuntimeError):
    """A backend has failed at something that it can do."""


class Cancelled(Exception):
    """Nobody waits for this any more."""


class Cancel:
    """Ends all that runs under it, from another thread. outer: ends this one, too."""

    def __init__(self, outer: "Cancel | None" = None):
        self._outer = outer
        self._ends: set[Callable[[], None]] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def __call__(self) -> None:
        with self._lock:
            self._cancelled, ends = True, list(self._ends)
        for end in ends:
            end()

    @contextmanager
    def ends(self, end: Callable[[], None]) -> Iterator[None]:
        """What is inside is ended by `end`. Raises Cancelled if it was, or is to be ended before it begins."""
        with self._lock:
            self._ends.add(end)
        try:
            self.check()
            with nullcontext() if self._outer is None else self._outer.ends(end):
                yield
        finally:
            with self._lock:
                self._ends.discard(end)
        self.check()

    def check(self) -> None:
        if self._cancelled:
            raise Cancelled
        if self._outer is not None:
            self._outer.check()


@dataclass
class Piece:
    """What has come of sample `index`; the last one of a sample has all of `meta`."""

    text: str
    meta: dict[str, Any]
    index: int = 0
    thought: str = ""  # if it is separated from the text


@dataclass
class TokenUsage:
    """What was asked of an API, and what speculation (speculation.py) has spared."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    saved_calls: int = 0
    saved_prompt_tokens: int = 0  # at least: what the prompts of those calls had in common with one that was sent

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def reset(self) -> None:
        self.__init__()


class Backend:
    """What the interpreter needs. Threads share it."""

    continues_turns = True  # can the assistant be made to go on from words put into its mouth?

    def __init__(self) -> None:
        self.token_usage = TokenUsage()

    def check(self, params: dict[str, Any]) -> None:
        """UserError for parameters that this backend does not have, before anything is sent."""

    def check_select(self, unconditional: bool) -> None:
        """UserError if this backend cannot score choices, or not without the prompt."""

    def render(self, messages: Messages, open_assistant: bool) -> str:
        """A chat as text."""
        raise NotImplementedError

    def generate(self, prompt: Transcript, params: dict[str, Any], stream: bool, cancel: Cancel) -> Iterator[Piece]:
        """Go on from a prompt: piece by piece, or (`stream` False) each sample as one."""
        raise NotImplementedError

    def score(self, prompt: Transcript, choices: Sequence[str], unconditional: bool) -> list[Score]:
        """How likely each token of each choice is behind the prompt; `unconditional`: and without it."""
        raise NotImplementedError

    def hold(self, prompt: Transcript) -> AbstractContextManager[Any]:
        """Compute what many prompts begin with, and keep it while inside."""
        return nullcontext()

    def flush_cache(self) -> None:
        """Forget all prefixes that nobody uses."""
        raise UserError(f"{self!r} has no cache that can be flushed from here")


class EngineBackend(Backend):
    """An engine of this process."""

    def __init__(self, engine: Engine):
        super().__init__()
        if engine.tokenizer is None:
            raise UserError("programs are text, and this engine has no tokenizer")
        self.engine, self.tokenizer = engine, engine.tokenizer

    def check(self, params: dict[str, Any]) -> None:
        self._params(params)

    def render(self, messages: Messages, open_assistant: bool) -> str:
        return self.tokenizer.render_chat(messages, add_generation_prompt=open_assistant)

    def generate(self, prompt: Transcript, params: dict[str, Any], stream: bool, cancel: Cancel) -> Iterator[Piece]:
        ids, wanted = self._encode(prompt), self._params(params)
        self.token_usage.add(calls=1, prompt_tokens=len(ids))
        texts, tokens, logprobs = [""] * wanted.n, [[] for _ in range(wanted.n)], [[] for _ in range(wanted.n)]
        with self.engine.stream(ids, wanted) as deltas, cancel.ends(deltas.close):
            for delta in deltas if stream else deltas.whole():
                i = delta.index
                if delta.finish_reason in ("error", "abort"):
                    raise delta.error or BackendError(str(delta.stop_reason or "the request was aborted"))
                texts[i] += delta.text
                tokens[i] += delta.token_ids
                logprobs[i] += delta.logprobs or []
                if stream or delta.finish_reason is not None:
                    meta = {
                        "finish_reason": delta.finish_reason
                        and {"type": delta.finish_reason, "matched": delta.stop_reason},
                        "prompt_tokens": len(ids),
                        "completion_tokens": len(tokens[i]),
                        "cached_tokens": delta.cached_tokens,
                        "output_ids": tokens[i],
                    }
                    yield Piece(texts[i], meta | self._logprobs(logprobs[i], params), i)
                    texts[i] = ""
        self.token_usage.add(completion_tokens=sum(map(len, tokens)))

    def score(self, prompt: Transcript, choices: Sequence[str], unconditional: bool) -> list[Score]:
        before = self._encode(prompt)
        texts = [self._encode(prompt, choice) for choice in choices]
        starts = [begin_of_choice(before, ids) for ids in texts]
        prompts = [(ids, start) for ids, start in zip(texts, starts, strict=True)]
        if unconditional:
            prompts += [(ids[start:], 1) for ids, start in prompts]
        params = [SamplingParams(max_new_tokens=0, prompt_logprobs=0, logprob_start_len=s) for _, s in prompts]
        outputs = self.engine.generate([ids for ids, _ in prompts], params)
        if failed := [o.outputs[0] for o in outputs if o.outputs[0].finish_reason in ("error", "abort")]:
            raise BackendError(str(failed[0].stop_reason or "the request was aborted"))
        logprobs = [[token.logprob for token in output.prompt_logprobs] for output in outputs]
        alone = [[0.0, *row] for row in logprobs[len(choices) :]] or [None] * len(choices)
        return [
            Score([(p, id, self.tokenizer.token_text(id)) for p, id in zip(row, ids[start:], strict=True)], without)
            for (ids, start), row, without in zip(prompts, logprobs, alone, strict=False)
        ]

    def hold(self, prompt: Transcript) -> AbstractContextManager[int]:
        return self.engine.hold(self._encode(prompt))

    def flush_cache(self) -> None:
        self.engine.flush_cache()

    def _encode(self, prompt: Transcript, more: str = "") -> list[int]:
        ids = self.tokenizer.encode(prompt.text + more, add_special_tokens=not prompt.is_chat)
        if not ids:
            raise UserError("the text is empty: there is nothing to go on from")
        return ids

    def _params(self, params: dict[str, Any]) -> SamplingParams:
        given = {name: value for name, value in params.items() if name not in RETURNS}
        if params.get("return_logprob"):
            given["logprobs"] = params.get("top_logprobs_num", 0)
        return SamplingParams(**given)

    def _logprobs(self, tokens: Sequence[TokenLogprob], params: dict[str, Any]) -> dict[str, Any]:
        """As SGLang's meta_info has them: (logprob, id, text), the text only if it is asked for."""
        if not params.get("return_logprob"):
            return {}

        def shown(logprob: float, id: int) -> tuple[float, int, str | None]:
            return logprob, id, self.tokenizer.token_text(id) if params.get("return_text_in_logprobs") else None

        told = {"output_token_logprobs": [shown(token.logprob, token.token_id) for token in tokens]}
        if params.get("top_logprobs_num"):
            told["output_top_logprobs"] = [[shown(p, id) for id, p in token.top] for token in tokens]
        return told


class Runtime(EngineBackend):
    """An engine of its own, as SGLang's examples make one. options: of `Engine.from_pretrained`."""

    def __init__(self, model_path: str | Path, **options: Any):
        super().__init__(Engine.from_pretrained(model_path, **options))

    def shutdown(self) -> None:
        """Drop what is cached; the engine goes when nobody has it any more, and has no process that must be ended."""
        self.flush_cache()


def begin_of_choice(before: Sequence[int], ids: Sequence[int]) -> int:
    """Where in `ids`, a prompt with a choice, the choice begins: at the first token that is not the prompt's `before`.

    That may be a token which the end of the prompt and the beginning of the choice have become together. The first token of all
    has no logprob, and belongs to no choice.
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False)))
    return max(1, min(same, len(ids) - 1))


_default: Backend | None = None


def set_default_backend(backend: "Backend | Engine | None") -> None:
    """For programs that are run without `backend`."""
    global _default
    _default = None if backend is None else as_backend(backend)


def flush_cache(backend: "Backend | Engine | None" = None) -> None:
    """Forget all prefixes that nobody uses; `backend`: of which, if not of the default one."""
    as_backend(backend).flush_cache()


def as_backend(backend: "Backend | Engine | None") -> Backend:
    """An engine is a backend as it is; None is the default one. UserError if there is none, and for what is no backend."""
    if backend is None:
        if _default is None:
            raise UserError("there is no backend: call set_default_backend, or give `backend`")
        return _default
    if not isinstance(backend, Backend | Engine):
        raise UserError(f"backend is {backend!r}; it must be an Engine, or one of the backends of lang")
    return EngineBackend(backend) if isinstance(backend, Engine) else backend
