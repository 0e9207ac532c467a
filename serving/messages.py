"""What the HTTP process and the engine's process say to each other.

    frame = encode(Submit("r1", [1, 2, 3], {"temperature": 0}), Abort("r0"))
    messages = decode(frame)

A frame (frames.py) is a JSON list of messages, each an object with its `type`: one frame carries all that a step has produced.
Decoding checks every field against these classes, in pydantic's compiled code, and builds nothing else: whatever the other side
has become, the worst that it can say is a ValueError.

    python -m pytest tests/test_server_messages.py
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from scheduler.request import TokenLogprob
from snapshot import Snapshot
from stats import Stats


class Message:
    __pydantic_config__ = ConfigDict(extra="forbid")


# ---- to the engine


@dataclass(frozen=True)
class Start(Message):
    """The first message. options: keywords of `Engine.from_pretrained`, and its `model`."""

    options: dict[str, Any]
    compile: str | None = None  # a mode of `Engine.compile`
    type: Literal["start"] = "start"


@dataclass(frozen=True)
class Submit(Message):
    """A prompt. params: fields of SamplingParams that differ from their defaults (params.py)."""

    rid: str
    prompt_ids: list[int]
    params: dict[str, Any]
    priority: int = 0
    cache_salt: str | None = None
    type: Literal["submit"] = "submit"


@dataclass(frozen=True)
class Abort(Message):
    """An id that is unknown or has ended: nothing happens."""

    rid: str
    type: Literal["abort"] = "abort"


@dataclass(frozen=True)
class Flush(Message):
    id: int  # of the question: the answer has the same
    type: Literal["flush"] = "flush"


@dataclass(frozen=True)
class AskStats(Message):
    """check: prove first that no page is lost (`Engine.check`)."""

    id: int
    check: bool = False
    type: Literal["ask_stats"] = "ask_stats"


@dataclass(frozen=True)
class Watch(Message):
    """Somebody looks: send a Seen so often, until Unwatch."""

    seconds: float
    type: Literal["watch"] = "watch"


@dataclass(frozen=True)
class Unwatch(Message):
    type: Literal["unwatch"] = "unwatch"


@dataclass(frozen=True)
class Stop(Message):
    type: Literal["stop"] = "stop"


# ---- from the engine


@dataclass(frozen=True)
class ModelFacts:
    """What the HTTP process has to know about the engine."""

    model_path: str  # as it was asked for
    checkpoint: str  # the folder it was loaded from; the tokenizer's too
    model_type: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    max_running_requests: int
    max_total_tokens: int
    page_size: int
    eos_token_ids: list[int]


@dataclass(frozen=True)
class Ready(Message):
    """The engine is loaded, and takes requests."""

    model: ModelFacts
    type: Literal["ready"] = "ready"


@dataclass(frozen=True)
class Failed(Message):
    """The engine's last words. user: it was asked for what cannot be had, so that another start would fail likewise."""

    message: str
    user: bool = False
    type: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Delta(Message):
    """What one step added to sample `index` of a request; the last one of a sample carries its finish_reason."""

    rid: str  # the one that the engine knows
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None  # stop, length or abort; what failed is an Error
    stop_reason: int | str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None  # with the first token
    embedding: list[float] | None = None
    type: Literal["delta"] = "delta"


@dataclass(frozen=True)
class Error(Message):
    """A request has ended without an answer. kind: what was asked for was wrong; there is no room now; or something broke."""

    rid: str
    kind: Literal["refused", "busy", "failed"]
    message: str
    type: Literal["error"] = "error"


@dataclass(frozen=True)
class Flushed(Message):
    id: int
    pages_held: int  # of the tree, that stay because somebody runs on them
    type: Literal["flushed"] = "flushed"


@dataclass(frozen=True)
class StatsReply(Message):
    id: int
    stats: Stats
    type: Literal["stats_reply"] = "stats_reply"


@dataclass(frozen=True)
class Seen(Message):
    snapshot: Snapshot
    type: Literal["seen"] = "seen"


ToEngine = Start | Submit | Abort | Flush | AskStats | Watch | Unwatch | Stop
FromEngine = Ready | Failed | Delta | Error | Flushed | StatsReply | Seen
AnyMessage = ToEngine | FromEngine

_codec: TypeAdapter[list[AnyMessage]] = TypeAdapter(list[Annotated[AnyMessage, Field(discriminator="type")]])
TYPES = get_args(AnyMessage)


def encode(*messages: AnyMessage) -> bytes:
    """ValueError for what JSON has no place for: half a surrogate pair, or too many levels."""
    return _codec.dump_json(list(messages))


def decode(frame: bytes) -> list[AnyMessage]:
    """ValueError for whatever is not a list of these messages, with the types of their fields."""
    try:
        return _codec.validate_json(frame, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"not a message: {where}: {first['msg']}") from None
