"""What the OpenAI API takes: each request as a model that knows all of its fields, and as what the engine is asked.

Nothing is accepted and ignored: a field that is not here gets a 400 that names it. The extras (top_k, min_p, regex, cache_salt ...)
have the names of vLLM and SGLang. Limits that the engine has are the engine's to check; here are those on what must be
bounded before it gets that far.

    python -m pytest tests/test_openai_protocol.py
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator

from errors import UserError
from grammar.tools import MAX_TOOLS
from scheduler.request import MAX_SAMPLES
from serving.api_errors import ApiError
from serving.fields import describe_fields
from serving.params import FirstOnly, few_fields

MAX_TEXT_FIELD = 256  # characters of a salt, a name
MAX_LIST = 1024  # stop strings, stop ids, choices; what the engine allows is less, and said by it
MAX_MESSAGES = 8192
DEFAULT_MAX_TOKENS = 16  # of /v1/completions; a chat may fill the context


def _unicode(text: str) -> str:
    """json.loads lets half a surrogate pair through, which is no character and can be sent to nobody."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at {error.start}") from error
    return text


def _number(value: Any) -> Any:
    """Neither "7" nor true is a number, though pydantic would make one of it."""
    if isinstance(value, str | bool):
        raise ValueError(f"{value!r} is not a number")
    return value


Text = Annotated[str, AfterValidator(_unicode)]
ShortText = Annotated[Text, Field(min_length=1, max_length=MAX_TEXT_FIELD)]
Int = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
Float = Annotated[float, BeforeValidator(_number)]
Schema = dict[str, Any] | StrictBool
Texts = Annotated[list[Text], FirstOnly()]
Ids = Annotated[list[Int], FirstOnly()]
Prompt = Text | Texts | Ids | Annotated[list[Ids], FirstOnly()]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, json_schema_extra=describe_fields)
    _few = model_validator(mode="before")(few_fields)


class StreamOptions(Strict):
    include_usage: StrictBool = False


class JsonSchema(Strict):
    name: ShortText
    description: Text | None = None
    schema_: Schema = Field(alias="schema")
    strict: StrictBool | None = None  # the schema is always kept to


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None  # of a structural tag

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        for field, type in (("json_schema", "json_schema"), ("format", "structural_tag")):
            if (getattr(self, field) is not None) != (self.type == type):
                raise ValueError(f"{field} goes with the type {type!r}, and with no other")
        return self


class Sampling(Strict):
    """What every request for text may say. None is the same as not given."""

    model: Text | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    frequency_penalty: Float | None = None
    presence_penalty: Float | None = None
    logit_bias: Annotated[dict[str, Float], BeforeValidator(few_fields)] | None = None
    seed: Int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_LIST), FirstOnly()] | None = None
    max_tokens: Int | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None  # who asks, for the records of a provider; none are kept here
    response_format: ResponseFormat | None = None
    # extras of vLLM and SGLang
    top_k: Int | None = None
    min_p: Float | None = None
    repetition_penalty: Float | None = None
    min_tokens: Int | None = None
    ignore_eos: StrictBool | None = None
    stop_token_ids: Annotated[list[Int], Field(max_length=MAX_LIST), FirstOnly()] | None = None
    skip_special_tokens: StrictBool | None = None
    regex: Text | None = None
    ebnf: Text | None = None
    choice: Annotated[list[Text], Field(max_length=MAX_LIST), FirstOnly()] | None = None
    structural_tag: Text | dict[str, Any] | None = None
    guided_json: Text | Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(max_length=MAX_LIST), FirstOnly()] | None = None
    guided_grammar: Text | None = None
    json_finish: StrictBool | None = None
    disable_any_whitespace: StrictBool | None = None
    cache_salt: ShortText | None = None
    priority: Int | None = None
    rid: ShortText | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for a stream: set stream to true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(Strict):
    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _other_kinds_by_name(cls, part: Any) -> Any:
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise ValueError(f"a part of type {part['type']!r} is not supported; this server takes text")
        return part


class FunctionCall(Strict):
    name: ShortText
    arguments: Text


class ToolCall(Strict):
    id: ShortText | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One message of a chat. What an answer's message has and a question cannot is taken if it is null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], FirstOnly()] | None = None
    name: ShortText | None = None
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: ShortText | None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    refusal: None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "Message":
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError(f"only an assistant calls tools and thinks; this is a message of the {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError(f"tool_call_id is for the role 'tool'; this is a message of the {self.role}")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            raise ValueError("content is missing")
        return self

    def for_template(self, arguments_as_text: bool) -> dict[str, Any]:
        """As chat templates know it. arguments_as_text: of its calls; else they are objects."""
        message = self.model_dump(exclude_none=True)
        if self.role == "developer":
            message["role"] = "system"
        if isinstance(self.content, list):
            message["content"] = "\n".join(part.text for part in self.content)
        for call in message.get("tool_calls", []) if not arguments_as_text else []:
            call["function"]["arguments"] = _object(call["function"]["arguments"])
        return message


class Function(Strict):
    name: ShortText
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    name: ShortText


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FirstOnly()]
    max_completion_tokens: Int | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Int | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: StrictBool | None = None
    reasoning_effort: ShortText | None = None  # if the chat template asks for it
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template

    @model_validator(mode="after")
    def _what_goes_with_what(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given, but logprobs is not true")
        if not self.tools and (self.tool_choice not in (None, "none") or self.parallel_tool_calls is not None):
            field = "parallel_tool_calls" if self.tool_choice is None else "tool_choice"
            raise ValueError(f"{field} is about tools, and there are none")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same, and say different things")
        return self

    def params(self) -> dict[str, Any]:
        """As fields of SamplingParams, plain and fit for JSON."""
        params = sampling_params(self)
        params["max_new_tokens"] = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        params["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return params

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"


class CompletionRequest(Sampling):
    prompt: Prompt
    echo: StrictBool | None = None
    logprobs: Int | None = None

    @model_validator(mode="after")
    def _one_sample_of_an_echo(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None and (self.n or 1) > 1:
            raise ValueError("echo with logprobs is for one sample of each prompt: leave n out")
        return self

    def params(self) -> dict[str, Any]:
        """As fields of SamplingParams, plain and fit for JSON."""
        params = sampling_params(self)
        params["max_new_tokens"] = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        params["logprobs"] = self.logprobs
        if self.echo:
            params["prompt_logprobs"] = self.logprobs
        return params

    def prompts(self, most: int) -> list[str | list[int]]:
        """One or many, as a list. ApiError if there are none, or too many."""
        return as_prompts("prompt", self.prompt, most)


class EmbeddingRequest(Strict):
    model: Text | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    pooling: Literal["mean", "last"] | None = None  # an extra: of all tokens (the default), or of the last one
    user: Text | None = None
    cache_salt: ShortText | None = None
    priority: Int | None = None
    rid: ShortText | None = None

    def prompts(self, most: int) -> list[str | list[int]]:
        """One or many, as a list. ApiError if there are none, or too many."""
        return as_prompts("input", self.input, most)

    def params(self) -> dict[str, Any]:
        """As fields of SamplingParams, plain and fit for JSON."""
        return {"pooling": self.pooling or "mean"}


def as_prompts(field: str, prompt: Prompt, most: int) -> list[str | list[int]]:
    """One or many, as a list. ApiError if there are none, or more than `most`."""
    one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    prompts = [prompt] if one else prompt
    if not 1 <= len(prompts) <= most:
        raise ApiError(400, f"{field} has {len(prompts)} prompts; 1 to {most} are allowed", param=field)
    return prompts


SAME = (
    "n", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "min_p", "repetition_penalty", "ignore_eos",
    "stop_token_ids", "skip_special_tokens", "json_finish", "disable_any_whitespace",
)  # fmt: skip
CONSTRAINTS = {  # field -> what the engine calls it
    "regex": "regex",
    "ebnf": "ebnf",
    "choice": "choices",
    "structural_tag": "structural_tag",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choices",
    "guided_grammar": "ebnf",
}
ENGINE_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # that differ, and may be to blame


def sampling_params(body: Sampling) -> dict[str, Any]:
    """What all requests have in common, under the names of SamplingParams. ApiError if two say what the output must be."""
    params = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if body.stop is not None:
        params["stop"] = [body.stop] if isinstance(body.stop, str) else body.stop
    if body.min_tokens is not None:
        params["min_new_tokens"] = body.min_tokens
    if body.top_k is not None:
        params["top_k"] = 0 if body.top_k == -1 else body.top_k  # both mean off
    if body.logit_bias is not None:
        params["logit_bias"] = {_token_id(key): value for key, value in body.logit_bias.items()}
    return params | _constraint(body)


def _constraint(body: Sampling) -> dict[str, Any]:
    """What the output must be, if a field says so."""
    given = [name for name in CONSTRAINTS if getattr(body, name) is not None]
    form = body.response_format
    if form is not None and form.type != "text":
        given.append("response_format")
    if len(given) > 1:
        raise ApiError(400, f"{' and '.join(given)} are given; a request has one of them at most", param=given[1])
    if not given:
        return {}
    if given[0] != "response_format":
        name = CONSTRAINTS[given[0]]
        value = getattr(body, given[0])
        return {name: value if name in ("regex", "ebnf", "choices") else json_text(value, given[0])}
    if form.type == "json_object":
        return {"json_object": True}
    if form.type == "json_schema":
        return {"json_schema": json_text(form.json_schema.schema_, "response_format.json_schema.schema")}
    return {"structural_tag": json_text({"type": "structural_tag", "format": form.format}, "response_format.format")}


def json_text(value: Any, field: str) -> str:
    """A schema as text, which is what travels to the engine. ApiError if it cannot be written."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{field} cannot be used: {error}", param=field) from error


def refused(error: UserError, body: Strict) -> ApiError:
    """What the engine says of a request, with the field that is to blame if its message begins with one."""
    message = str(error)
    word = re.match("[a-z_]*", message)[0]
    field = next((name for name in _blamed(word, body) if getattr(body, name, None) is not None), None)
    return ApiError(400, message if field is None else field + message.removeprefix(word), param=field)


def _blamed(word: str, body: Strict) -> list[str]:
    """The fields that may have brought what the engine calls by that name, the likeliest first."""
    fields = [ENGINE_NAMES.get(word, word), *(name for name, engine in CONSTRAINTS.items() if engine == word)]
    if word in ("json_schema", "structural_tag"):
        fields += ["tools", "response_format"] if getattr(body, "calls_tools", False) else ["response_format"]
    return [name for name in fields if name in type(body).model_fields]


def _token_id(key: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", key):
        raise ApiError(400, f"logit_bias has the key {key!r}; it must be a token id", param="logit_bias")
    return int(key)


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call, as the object that they must be."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the arguments of a tool call are not valid JSON: {error}", param="messages") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the arguments of a tool call must be a JSON object", param="messages")
    return value
