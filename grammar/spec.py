"""What a request asks of its output, as one value that can be compared, cached and sent to another process.

    Spec("json_schema", '{"type": "integer"}')
    Spec.json_schema(MyPydanticModel)

python -m pytest tests/test_grammar_spec.py
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from errors import UserError
from grammar.tag import TOOL_CALLS
from grammar.tools import expand

Kind = Literal["json_schema", "regex", "ebnf", "choices", "structural_tag"]


@dataclass(frozen=True)
class Spec:
    """`any_whitespace`: JSON may be laid out freely; else its separators are ", " and ": ", as `json.dumps` writes them."""

    kind: Kind
    text: str  # a schema or a structural tag as JSON, a regex, EBNF, or a JSON list of choices
    any_whitespace: bool = True

    @classmethod
    def json_schema(cls, schema: str | bool | dict[str, Any] | type, any_whitespace: bool = True) -> "Spec":
        """A schema as text, as a dict, or as a pydantic model. UserError if it is none."""
        if isinstance(schema, type):
            if not hasattr(schema, "model_json_schema"):
                raise UserError(f"json_schema is the class {schema.__name__}, which is no pydantic model")
            try:
                schema = schema.model_json_schema()
            except Exception as error:  # of pydantic's own: a field of a type that JSON does not have
                reason = str(error).partition("\n")[0]
                raise UserError(f"json_schema is the class {schema.__name__}, which has no schema: {reason}") from error
        return cls("json_schema", _json_text("json_schema", schema, (dict, bool)), any_whitespace)

    @classmethod
    def json_object(cls, any_whitespace: bool = True) -> "Spec":
        """Any JSON object."""
        return cls("json_schema", '{"type": "object"}', any_whitespace)

    @classmethod
    def regex(cls, pattern: str) -> "Spec":
        """Text that a regular expression matches from its beginning to its end."""
        return cls("regex", _text("regex", pattern))

    @classmethod
    def ebnf(cls, grammar: str) -> "Spec":
        """xgrammar's EBNF (GBNF), whose first rule is `root`."""
        return cls("ebnf", _text("ebnf", grammar))

    @classmethod
    def choices(cls, choices: Sequence[str]) -> "Spec":
        """One of some texts."""
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise UserError(f"choices is a {type(choices).__name__}; it must be a list of texts")
        if not choices:
            raise UserError("choices is empty")
        for choice in choices:
            if not _text("choices", choice):
                raise UserError("choices has an empty text")
        return cls("choices", json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False))

    @classmethod
    def structural_tag(cls, tag: str | dict[str, Any], any_whitespace: bool = True) -> "Spec":
        """Text with tagged structured parts, in xgrammar's notation; and with tool calls (`grammar.tools.expand`)."""
        text = _json_text("structural_tag", tag, (dict,))
        if f'"{TOOL_CALLS}"' in text:
            text = expand(text)
        return cls("structural_tag", text, any_whitespace)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} is a {type(value).__name__}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid Unicode: {error.reason} at {error.start}") from error
    return value


def _json_text(name: str, value: Any, types: tuple[type, ...]) -> str:
    """As JSON text, whose objects keep their order: that is the order in which properties are written."""
    try:
        parsed = json.loads(_text(name, value)) if isinstance(value, str) else value
        if not isinstance(parsed, types):
            raise UserError(f"{name} is a JSON {type(parsed).__name__}; it must be a schema or an object")
        return _text(name, json.dumps(parsed, ensure_ascii=False, allow_nan=False))
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
