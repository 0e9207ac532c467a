"""A JSON schema as a graph: its subschemas, what each leads to, and whether every keyword is well formed.

Only what the root leads to counts, by keywords that hold schemas and by `$ref`: no backend looks at the rest. Subschemas are
told apart by identity, for `json.loads` makes an object for each place in the text.

    python -m pytest tests/test_grammar_limits.py
"""

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag

from errors import UserError
from grammar.json_text import ROOT, Path, walk

Schema = dict[str, Any] | bool  # as JSON has it

TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
_ONE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("dependencies", "dependentSchemas", "patternProperties", "properties")
_HOLD_SCHEMAS = frozenset((*_ONE, *_LISTS, *_MAPS))
_TEXTS = ("$ref", "format", "pattern")
COUNTS = frozenset(
    (
        "maxContains",
        "maxItems",
        "maxLength",
        "maxProperties",
        "minContains",
        "minItems",
        "minLength",
        "minProperties",
    )
)
NUMBERS = frozenset(("exclusiveMaximum", "exclusiveMinimum", "maximum", "minimum"))


@dataclass(eq=False)
class Subschema:
    """keywords: as in the document. children: the subschemas right below, with the keyword that leads to each."""

    keywords: dict[str, Any]
    path: Path
    children: list[tuple[str, Schema]] = field(default_factory=list)
    target: Schema | None = None  # of its $ref

    @property
    def types(self) -> tuple[str, ...]:
        """What `type` allows; all if it is not there."""
        named = self.keywords.get("type", TYPES)
        return (named,) if isinstance(named, str) else tuple(named)

    @property
    def optional(self) -> int:
        """How many of its properties may be left out."""
        return len(self.keywords.get("properties", {}).keys() - set(self.keywords.get("required", [])))


def read(document: Any, path: Path = ROOT) -> list[Subschema]:
    """What the root leads to, itself first. UserError names the place of a keyword that is malformed or leads nowhere."""
    found: dict[int, Subschema] = {}
    references = _References(document, path)
    stack = [(document, path)]
    while stack:
        value, path = stack.pop()
        if isinstance(value, bool) or id(value) in found:
            continue
        if not isinstance(value, dict):
            raise UserError(f"{path} is {_brief(value)}; it must be a schema: an object, true or false")
        _check_form(value, path)
        here = found[id(value)] = Subschema(value, path)
        below = list(_below(value, path))
        here.children = [(keyword, child) for keyword, child, _ in below]
        stack.extend((child, where) for _, child, where in below)
        if "$ref" in value:
            here.target, where = references.resolve(value["$ref"], path / "$ref")
            stack.append((here.target, where))
    return list(found.values())


def _below(keywords: dict[str, Any], path: Path):
    """The subschemas of one, as (keyword, subschema, path); those behind a reference left out."""
    for keyword, value in keywords.items():
        if keyword not in _HOLD_SCHEMAS:
            continue
        where = path / keyword
        if isinstance(value, dict) and keyword in _MAPS:
            below = [(child, where / key) for key, child in value.items() if not _lists_names(keyword, child)]
        elif isinstance(value, list):
            below = [(child, where / i) for i, child in enumerate(value)]
        else:
            below = [(value, where)]
        yield from ((keyword, child, at) for child, at in below)


def _lists_names(keyword: str, value: Any) -> bool:
    """`dependencies` of the older drafts: a schema, or a list of properties."""
    return keyword == "dependencies" and isinstance(value, list)


# What a keyword may be ------------------------------------------------------------------------------------------------


def _check_form(keywords: dict[str, Any], path: Path) -> None:
    for keyword, value in keywords.items():
        wanted = _wanted(keyword, value)
        if wanted is not None:
            raise UserError(f"{path / keyword} is {_brief(value)}; it must be {wanted}")


def _wanted(keyword: str, value: Any) -> str | None:
    """What the value should have been; None if it is that, or if the keyword is not one that we know."""
    match keyword:
        case "type":
            named = value if isinstance(value, list) else [value]
            known = all(isinstance(name, str) and name in TYPES for name in named)
            return None if known and 0 < len(named) == len(set(named)) else f"one or more of {', '.join(TYPES)}"
        case "required":
            return None if _is_names(value) else "a list of names"
        case "enum":
            return None if isinstance(value, list) and value else "a list of at least one value"
        case "multipleOf":
            return None if _is_number(value) and value > 0 else "a number above 0"
        case "exclusiveMinimum" | "exclusiveMaximum":  # true and false: draft 4
            return None if _is_number(value) or isinstance(value, bool) else "a number"
    if keyword in _LISTS:
        return None if isinstance(value, list) and value else "a list of at least one schema"
    if keyword in _MAPS:
        return None if isinstance(value, dict) else "an object that holds schemas"
    if keyword in _TEXTS:
        return None if isinstance(value, str) else "text"
    if keyword in COUNTS:
        return (
            None
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0
            else "a whole number from 0 up"
        )
    if keyword in NUMBERS:
        return None if _is_number(value) else "a number"
    return None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


# References -----------------------------------------------------------------------------------------------------------


class _References:
    """What `$ref` names inside one document."""

    def __init__(self, document: Any, path: Path):
        self._document, self._path = document, path
        self._anchors: dict[str, tuple[Any, Path]] | None = None

    def resolve(self, reference: str, path: Path) -> tuple[Any, Path]:
        """The subschema and its place. UserError, naming the place of the reference, if it is not in the document."""
        document, fragment = urldefrag(reference)
        own = self._document.get("$id", self._document.get("id")) if isinstance(self._document, dict) else None
        if document and (not isinstance(own, str) or document != urldefrag(own).url):
            raise UserError(f"{path} is {_brief(reference)}; references to other documents are not followed")
        fragment = unquote(fragment)
        place = self._pointer(fragment) if fragment.startswith("/") or not fragment else self._anchor(fragment)
        if place is None:
            raise UserError(f"{path} is {_brief(reference)}, which is not in the schema")
        return place

    def _pointer(self, fragment: str) -> tuple[Any, Path] | None:
        """RFC 6901."""
        value, path = self._document, self._path
        for part in fragment.split("/")[1:]:
            key: str | int = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list) and part.isdecimal() and len(part) < 6 and int(part) < len(value):
                key = int(part)
            elif not isinstance(value, dict) or key not in value:
                return None
            value, path = value[key], path / key
        return value, path

    def _anchor(self, name: str) -> tuple[Any, Path] | None:
        if self._anchors is None:
            self._anchors = {}
            for value, path in walk(self._document, self._path):
                if isinstance(value, dict):
                    names = [value.get("$anchor"), *(_after_hash(value.get(key)) for key in ("$id", "id"))]
                    self._anchors |= {name: (value, path) for name in names if isinstance(name, str)}
        return self._anchors.get(name)


def _after_hash(identifier: Any) -> str | None:
    return identifier[1:] if isinstance(identifier, str) and identifier.startswith("#") else None
