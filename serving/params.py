"""Sampling parameters as JSON: the fields of SamplingParams, without the one that is a function.

    sampling_params({"temperature": 0, "stop": ["\\n"]})

The model is made from SamplingParams itself, so that a field that is added there can be sent. It checks the types;
SamplingParams checks the values.
"""

import dataclasses
import json
import typing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Strict, ValidationError, create_model

from errors import UserError
from scheduler.request import SamplingParams

OVER_JSON = {
    "json_schema": str | bool | dict[str, Any] | None,  # a pydantic model stays in its process
    "logit_bias": dict[Annotated[int, Strict(False)], float],  # the keys of an object are strings
    "stop": str | list[str] | None,
    "stop_token_ids": list[int],
    "choices": list[str] | None,
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


# A field that is unknown is refused, and so is "1" where a number should be.
Params: type[BaseModel] = create_model("Params", __config__=ConfigDict(extra="forbid", strict=True), **_fields())


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
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{where}: {message}" if where else message
