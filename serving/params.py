"""Sampling parameters as JSON: the fields of SamplingParams, without the one that is a function.

    sampling_params({"temperature": 0, "stop": ["\\n"]})

The model is made from SamplingParams itself, so that a field that is added there can be sent. It checks the types;
SamplingParams checks the values.
"""

import dataclasses
import json
import typing
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Strict,
    ValidationError,
    create_model,
    model_validator,
)

from errors import UserError
from scheduler.request import SamplingParams
from serving.fields import describe_fields

MAX_FIELDS = 512  # of an object


def few_fields(value: Any) -> Any:
    """Refuse an object that pydantic would find half a million things wrong with, and list them all."""
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"an object with {len(value)} fields; {MAX_FIELDS} is the limit")
    return value


class FirstOnly(FailFast):
    """For a list: what is wrong with the first bad element is enough to know."""

    __hash__ = object.__hash__  # a union of types wants one


Ids = Annotated[list[int], FirstOnly()]
Texts = Annotated[list[str], FirstOnly()]
OVER_JSON = {
    "json_schema": str | bool | dict[str, Any] | None,  # a pydantic model stays in its process
    # the keys of an object are strings
    "logit_bias": Annotated[dict[Annotated[int, Strict(False)], float], BeforeValidator(few_fields)],
    "stop": str | Texts | None,
    "stop_token_ids": Ids,
    "choices": Texts | None,
}
NOT_OVER_JSON = {"allowed_tokens_fn"}


def _fields() -> dict[str, Any]:
    types = typing.get_type_hints(SamplingParams)
    fields = {}
    for field in dataclasses.fields(SamplingParams):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = list(default) if isinstance(default, tuple) else default
        if field.name not in NOT_OVER_JSON:
            fields[field.name] = (OVER_JSON.get(field.name, types[field.name]), default)
    return fields


class StrictModel(BaseModel):
    """A field that is unknown is refused, and so is "1" where a number should be."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=describe_fields)
    _few = model_validator(mode="before")(few_fields)


Params: type[StrictModel] = create_model("Params", __base__=StrictModel, **_fields())


def sampling_params(values: dict[str, Any]) -> SamplingParams:
    """UserError names the field that is unknown, of the wrong type, or out of its range."""
    try:
        model = Params.model_validate(values)
    except ValidationError as error:
        raise UserError(describe(error.errors(include_input=False, include_url=False)[0])) from None
    return SamplingParams(**{name: getattr(model, name) for name in model.model_fields_set})


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The same, with what may be nested as JSON text: a parser of frames must not meet a client's thousand levels. UserError."""
    try:
        return {
            name: json.dumps(value)
            if name in ("json_schema", "structural_tag") and isinstance(value, dict | bool)
            else value
            for name, value in values.items()
        }
    except (ValueError, RecursionError) as error:
        raise UserError(f"json_schema or structural_tag is no JSON: {error}") from None


def describe(problem: dict[str, Any]) -> str:
    """One problem that pydantic has found, as a line that begins with the field's name."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{where} is not a field that is supported here"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return f"{where}: {message}" if where else message
