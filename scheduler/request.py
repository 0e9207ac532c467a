"""One request: what was asked for, how far it is, and how it ended.

Names are those of vLLM, SGLang and the OpenAI API. A request ends exactly once, by `finish`, with one of
"stop", "length", "abort", "error".

    python -m pytest tests/test_request.py
"""

import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from cache.radix import Namespace, Node
from errors import UserError
from kernels.widths import MAX_BIAS, MAX_STOP_IDS, TOP_LOGPROBS

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256  # of one of them: each token's text is compared with every beginning of each
MAX_SAMPLES = 128
MAX_INT = 2**31 - 1
RANGES = {  # of SamplingParams: the least and the most, where it is a number
    "n": (1, MAX_SAMPLES),
    "temperature": (0, 100),
    "top_k": (0, MAX_INT),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "max_new_tokens": (0, MAX_INT),
    "min_new_tokens": (0, MAX_INT),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, TOP_LOGPROBS),
    "prompt_logprobs": (0, TOP_LOGPROBS),
    "logprob_start_len": (0, MAX_INT),
}
WHOLE = [name for name in RANGES if name not in ("temperature", "min_p", "presence_penalty", "frequency_penalty")]
ABOVE_ZERO = {"top_p": 1, "repetition_penalty": 100}  # the most; the least is any that is above 0
MOST_BIAS = 100


@dataclass
class SamplingParams:
    """How to choose tokens and when to stop. UserError on construction names the field and its limits."""

    max_new_tokens: int | None = None  # None: up to the context length; 0: compute the prompt, and say nothing
    min_new_tokens: int = 0
    n: int = 1
    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # None: no logprobs; n: of the chosen token and the n likeliest
    prompt_logprobs: int | None = None  # the same of the prompt's tokens, but for the first
    logprob_start_len: int = 0  # of these, the first one's position; what is before it may come from the cache
    pooling: Literal["mean", "last"] | None = None  # no text, but the hidden states of the prompt as one
    skip_special_tokens: bool = True
    json_schema: str | bool | dict[str, Any] | type | None = (
        None  # text, dict or pydantic model; at most one of these six
    )
    json_object: bool = False
    regex: str | None = None
    ebnf: str | None = None
    choices: Sequence[str] | None = None
    structural_tag: str | dict[str, Any] | None = None
    json_finish: bool = False  # bring the text to a valid end before max_new_tokens runs out
    disable_any_whitespace: bool = False  # JSON with the separators ", " and ": " and no other whitespace
    allowed_tokens_fn: Callable[[list[int]], Sequence[int]] | None = None  # prompt + output ids -> what may come next

    def __post_init__(self) -> None:
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise UserError(f"{name} is {value!r}; it must be a whole number")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids = list(self.stop_token_ids)
        for name, (low, high) in RANGES.items():
            value, default = getattr(self, name), getattr(SamplingParams, name)
            if value is not None or default is not None:
                _in_range(name, value, low, high)
        for name, high in ABOVE_ZERO.items():
            if not 0 < getattr(self, name) <= high:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above 0 and at most {high}")
        most = MAX_INT if self.max_new_tokens is None else self.max_new_tokens
        _in_range("min_new_tokens", self.min_new_tokens, 0, most)
        if self.logprob_start_len and self.prompt_logprobs is None:
            raise UserError(f"logprob_start_len is {self.logprob_start_len}, but prompt_logprobs is not given")
        if self.pooling not in (None, "mean", "last"):
            raise UserError(f"pooling is {self.pooling!r}; it must be mean or last")
        if self.pooling is not None and self.n > 1:
            raise UserError(f"n is {self.n}; with pooling there is one result")
        if len(self.logit_bias) > MAX_BIAS:
            raise UserError(f"logit_bias has {len(self.logit_bias)} entries; {MAX_BIAS} is the limit")
        for value in self.logit_bias.values():
            _in_range("a logit_bias value", value, -MOST_BIAS, MOST_BIAS)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise UserError(f"stop has {len(self.stop)} strings; {MAX_STOP_STRINGS} is the limit")
        longest = max(map(len, self.stop), default=0)
        if longest > MAX_STOP_CHARS:
            raise UserError(f"stop has a string of {longest} characters; {MAX_STOP_CHARS} is the limit")
        if "" in self.stop:
            raise UserError("stop has an empty string, which would end every text at once")

    @property
    def only_reads(self) -> bool:
        """Is no token wanted? The one that comes with the forward of the prompt is nobody's."""
        return self.pooling is not None or self.max_new_tokens == 0

    @property
    def greedy(self) -> bool:
        """Does argmax over the bare logits give the answer?"""
        return (
            self.temperature == 0
            and self.repetition_penalty == 1
            and self.presence_penalty == self.frequency_penalty == 0
            and not self.logit_bias
            and not self.min_new_tokens
            and self.logprobs is None
        )


def _in_range(name: str, value: float, low: float, high: float | None = None) -> None:
    above = high is not None and value > high
    if (isinstance(value, float) and not math.isfinite(value)) or value < low or above:
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name} is {value}; it must be {limit}")


class State(Enum):
    WAITING = "waiting"
    PREFILLING = "prefilling"  # admitted: has a row and pages; not all of its tokens are computed yet
    RUNNING = "running"  # decodes: one token a step
    PREEMPTED = "preempted"  # waits again, with the tokens it has
    FINISHED = "finished"


@dataclass
class TokenLogprob:
    """Of one chosen token: its log probability, its rank (1 = likeliest), and the likeliest alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass
class Reading:
    """What a request has read of its own prompt so far (readings.py)."""

    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position
    sum: list[float] = field(default_factory=list)  # of hidden states
    told: bool = False  # whoever waits has been told

    def add(self, start: int, hidden: list[float], pooling: str) -> None:
        """The sum over a chunk that begins at `start`; a prompt that begins again, after a preemption, forgets what it had."""
        again = start == 0 or pooling == "last"
        self.sum = hidden if again else [a + b for a, b in zip(self.sum, hidden, strict=True)]


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of `time.perf_counter`, and what it cost. Names as in vLLM."""

    queued_at: float = 0.0
    admitted_at: float | None = None  # first got a row and pages
    finished_at: float | None = None
    token_times: list[float] = field(default_factory=list)  # when each output token reached the host
    cached_tokens: int = 0  # of the prompt, found in the tree when first admitted
    preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from being queued; None before it came."""
        return self.token_times[0] - self.queued_at if self.token_times else None


class Request:
    """One sequence in the engine. `n` samples of a prompt are n requests, which `leader` ties together.

    tokens:  [ prompt ........ | output ..... ]
              0 ......... computed                 keys and values are in the pages, or a step on its way puts them there
              pages: [0, shared) the tree's, locked through `node` | [shared, len) this request's own
    """

    __slots__ = (
        "arrival", "computed", "constraint", "finish_reason", "id", "in_flight", "index", "last", "leader", "logprobs",
        "max_new_tokens", "metrics", "namespace", "node", "num_prompt", "pages", "params", "passed_over", "priority", "reading",
        "row", "seed", "shared", "state", "stop_ids", "stop_reason", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int],
        max_new_tokens: int,
        seed: int,
        index: int = 0,
        *,
        id: str = "",
        leader: "Request | None" = None,
        namespace: Namespace = (),
        priority: int = 0,
    ):
        self.id, self.index = id, index  # index: which of the n samples
        self.params, self.stop_ids, self.seed = params, stop_ids, seed  # stop_ids: the checkpoint's and the caller's
        self.tokens = array("i", prompt_ids)
        self.num_prompt, self.max_new_tokens = len(prompt_ids), max_new_tokens
        self.last = self.num_prompt + max_new_tokens - 1  # position of the last token, which is never computed
        self.leader = leader  # the first sample of the same prompt; None for that one
        self.namespace, self.priority = namespace, priority
        self.constraint: Any = (
            None  # what limits its tokens beyond the params; the engine's, here only to be there or not
        )
        self.state = State.WAITING
        self.row = 0  # of the device's static tensors; 0 = none
        self.pages: list[int] = []
        self.node: Node | None = None
        self.shared = 0
        self.computed = 0
        self.in_flight = 0  # steps on the device that this request takes part in
        self.arrival = 0  # the order in which the scheduler saw it
        self.passed_over = 0  # times that a later one was admitted while this was the oldest
        self.logprobs: list[TokenLogprob] = []
        wanted = params.pooling is not None or params.prompt_logprobs is not None
        self.reading = Reading() if wanted and leader is None else None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None  # the stop id or string, or the error
        self.metrics = RequestMetrics()

    @property
    def prompt_ids(self) -> list[int]:
        return self.tokens[: self.num_prompt].tolist()

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :].tolist()

    @property
    def reusable(self) -> int:
        """How many of its tokens may come from the cache: not the last, which gives the next one, and none that it reads."""
        most, params = len(self.tokens) - 1, self.params
        if self.reading is None or params.pooling == "last":
            return most
        return 0 if params.pooling == "mean" else min(most, max(0, params.logprob_start_len - 1))

    def key(self) -> bytes:
        """What the tree is asked for."""
        return self.tokens[: self.reusable + 1].tobytes()

    @property
    def embedding(self) -> list[float] | None:
        """The pooled hidden states of the prompt [hidden], once they are all there."""
        if self.params.pooling is None or not self.new_tokens:
            return None
        count = self.num_prompt if self.params.pooling == "mean" else 1
        return [x / count for x in self.reading.sum]

    @property
    def prompt_logprobs(self) -> list[TokenLogprob] | None:
        """Of the prompt's tokens from `logprob_start_len` on, but not of the first, once they are all there."""
        if self.reading is None or self.params.prompt_logprobs is None or not self.new_tokens:
            return None
        return [self.reading.logprobs[i] for i in range(max(1, self.params.logprob_start_len), self.num_prompt)]

    @property
    def new_tokens(self) -> int:
        """How many tokens were sampled and have reached the host."""
        return len(self.tokens) - self.num_prompt

    def append(self, token: int) -> None:
        """Take a sampled token, and end if it is a stop id or the last one asked for."""
        self.tokens.append(token)
        new = len(self.tokens) - self.num_prompt
        if token in self.stop_ids and new > self.params.min_new_tokens:
            self.finish("stop", token)
        elif new >= self.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str, detail: int | str | None = None) -> None:
        if self.finish_reason is not None:
            raise RuntimeError(f"request ended twice: {self.finish_reason}, then {reason}")
        self.finish_reason, self.stop_reason = reason, detail
        self.state = State.FINISHED
        self.metrics.finished_at = time.perf_counter()


def resolve_stop_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """The ids that end a text: the checkpoint's, unless ignored, and the caller's."""
    ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))
    if len(ids) > MAX_STOP_IDS:
        raise UserError(f"{len(ids)} stop token ids (the checkpoint's included); {MAX_STOP_IDS} is the limit")
    return ids
