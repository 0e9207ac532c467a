"""What SGLang's routes take and answer, as types: for the checks, and for the server's own description at /openapi.json.

python -m pytest tests/test_server_native.py
"""

from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # pydantic wants this one, and the next, before Python 3.12
)

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from errors import UserError
from serving.fields import describe_fields
from serving.messages import ModelFacts
from serving.params import FirstOnly, Ids, Params, StrictModel, Texts
from stats import Stats

MAX_NEW_TOKENS = 128  # where a request does not say (SGLang)


ELSEWHERE = {  # fields of SamplingParams that are asked for in another way
    "logprobs": "use return_logprob and top_logprobs_num",
    "prompt_logprobs": "use logprob_start_len",
    "logprob_start_len": "it stands beside sampling_params",
    "pooling": "use /v1/embeddings",
}


def _described(schema: dict[str, Any]) -> None:
    for name in ELSEWHERE:
        del schema["properties"][name]
    describe_fields(schema)


class SGLangParams(Params):
    """sampling_params: Folio's own, and what SGLang calls otherwise."""

    model_config = ConfigDict(json_schema_extra=_described)

    sampling_seed: int | None = None
    no_stop_trim: Literal[False] = False
    spaces_between_special_tokens: Literal[True] = True

    def translated(self) -> dict[str, Any]:
        """As fields of SamplingParams."""
        values = {name: getattr(self, name) for name in self.model_fields_set}
        for name, instead in ELSEWHERE.items():
            if name in values:
                raise UserError(f"sampling_params.{name} is not a field here; {instead}")
        if (seed := values.pop("sampling_seed", None)) is not None:
            if values.get("seed") not in (None, seed):
                raise UserError("sampling_params.seed and sampling_seed are the same, and say different things")
            values["seed"] = seed
        values.pop("no_stop_trim", None)
        values.pop("spaces_between_special_tokens", None)
        if values.get("top_k") == -1:
            values["top_k"] = 0
        return {"max_new_tokens": MAX_NEW_TOKENS} | values


class GenerateRequest(StrictModel):
    text: str | Texts | None = None
    input_ids: Ids | Annotated[list[Ids], FirstOnly()] | None = None
    sampling_params: SGLangParams | Annotated[list[SGLangParams], FirstOnly()] = Field(default_factory=SGLangParams)
    rid: str | Texts | None = None
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = Field(-1, ge=-1)
    top_logprobs_num: int = 0
    return_text_in_logprobs: bool = False
    priority: int = 0
    cache_salt: str | None = None
    lora_path: None = None
    image_data: None = None


class AbortRequest(StrictModel):
    rid: str = ""
    abort_all: bool = False


class TokenizeRequest(StrictModel):
    prompt: str | Texts
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(StrictModel):
    tokens: Ids | Annotated[list[Ids], FirstOnly()]
    skip_special_tokens: bool = True
    model: str | None = None


# ---- answers


class FinishReason(TypedDict):
    """matched: the stop id or the stop string, if one has ended it."""

    type: Literal["stop", "length", "abort"]
    matched: NotRequired[int | str | None]
    length: NotRequired[int]
    message: NotRequired[str]


Logprob = tuple[float | None, int, str | None]  # logprob (None: of the first token), id, text if asked for


class MetaInfo(TypedDict):
    id: str
    finish_reason: FinishReason | None  # None: more is to come in this stream
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: NotRequired[float]  # seconds, once it has ended
    output_token_logprobs: NotRequired[list[Logprob]]
    output_top_logprobs: NotRequired[list[list[Logprob]]]
    input_token_logprobs: NotRequired[list[Logprob]]  # from logprob_start_len on
    input_top_logprobs: NotRequired[list[list[Logprob] | None]]


class Generated(TypedDict):
    """One text. In an event, as far as it is; `index` where there are several."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: NotRequired[int]


class Success(TypedDict):
    success: Literal[True]


class Flushed(Success):
    pages_held: int  # that stay, because somebody runs on them


class Health(TypedDict):
    status: Literal["ok"]


class ModelInfo(TypedDict):
    model_path: str
    tokenizer_path: str
    is_generation: Literal[True]
    model_type: str
    served_model_name: str
    max_model_len: int
    vocab_size: int
    dtype: str
    device: str


@dataclass(frozen=True)
class EngineState(Stats):
    """The engine's gauges."""

    last_gen_throughput: float  # tokens a second; the name that SGLang has for it
    engine_pid: int | None


@dataclass(frozen=True)
class ServerInfo(ModelFacts):
    tokenizer_path: str
    served_model_name: str
    open_requests: int
    engine_restarts: int
    internal_states: list[EngineState]  # one: there is one engine


class Tokenized(TypedDict):
    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int


class Detokenized(TypedDict):
    text: str | list[str]
