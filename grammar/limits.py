"""The gate: what is refused before any native code sees it, and what passes but may be slow.

A request may ask for a grammar that costs the compiler minutes, or the process its life. So a spec is first measured in plain
Python, in linear time and without recursion, and its size is bounded. Times are of xgrammar 0.2.8 with the 152,000 tokens of
Qwen 2.5 on one core at 2.5 GHz.

    python -m pytest tests/test_grammar_limits.py
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from errors import UserError
from grammar import cost, ebnf, emptiness, json_text, pattern, schema, tag
from grammar.json_text import ROOT, Path
from grammar.schema import Subschema
from grammar.spec import Spec

# Any JSON. In 11,305 real schemas (MaskBench) one in a hundred has more than 73 KB, and the greatest depth is 62.
MAX_BYTES = 256 << 10
MAX_DEPTH = 64  # xgrammar's time is cubic in it: lists in each other 0.1 s at 100 and 6 s at 400, objects more
MAX_NODES = 30_000  # one in a thousand of the real ones has more; SGLang's limit is 50,000

# JSON schemas. Real ones: properties that may be left out 131 in one of a thousand, values of an enum 865 in one of a thousand.
MAX_OPTIONAL = 256  # of one object: 1 s at 256, 10 s at 600
MAX_OPTIONAL_COUNTED = 100  # beside minProperties or maxProperties: 1.4 s and 48 MB
MAX_ENUM = 4_000  # 0.1 s at 4,000 short values, 16 s at 10,000
MAX_SPELLED_BYTES = 64 << 10  # of enum and const, choices, literals: 1.4 s; no end within 30 s at 1 MB
MAX_NAME_BYTES = 256  # a property of an open object, or what a tag looks for: 25 ms a byte, and 16 KB end the process
MAX_COUNT = 2**31 - 1  # lengths, items, properties: both libraries count in 32 bits, and xgrammar wraps around
MAX_INTEGER = 2**63 - 1  # bounds of an integer

# Regular expressions, also those in schemas. Real ones: 314 characters in one of a thousand, repeats up to 255.
MAX_PATTERN = 1_024
MAX_NESTING = 100  # of groups, also in EBNF: xgrammar's process ends at 50,000 in a pattern
MAX_UNROLLED = 10_000  # with all repeats written out: llguidance needs 0.1 s for a mask at 10,000 and 7 s at 1,000,000

# EBNF
MAX_EBNF_BYTES = 64 << 10
MAX_RULES = 2_000  # 0.4 s at 2,000, 2 s at 5,000, no end within 30 s at 50,000
MAX_REPEAT = 10_000  # of one `{n,m}`: no dearer than 130, but xgrammar takes 2^32 + 2 for 2

MAX_CHOICES = 1_000  # 0.04 s

SLOW = 0.25  # seconds by `cost`; it tells 0.3 from less with an error of a fifth


def check(spec: Spec) -> None:
    """UserError, naming the place and the limit, for what no backend is to see."""
    try:
        match spec.kind:
            case "json_schema":
                _check_schema(_document(spec.text), ROOT)
            case "structural_tag":
                _check_tag(_document(spec.text))
            case "regex":
                _check_pattern(spec.text)
            case "ebnf":
                _check_ebnf(spec.text)
            case "choices":
                _check_choices(spec.text)
            case _:
                raise UserError("is no kind of grammar")
    except UserError as error:
        raise UserError(f"{spec.kind} {error}") from error


def may_be_slow(spec: Spec) -> bool:
    """May xgrammar need more than about 0.3 s for what has passed `check`? A guess from its size, on the safe side."""
    return cost.seconds(spec) > SLOW


def _most(place: Path | None, what: str, value: int, limit: int, unit: str = "") -> None:
    """place: a path is written out only here, for that takes longer than all the rest."""
    if value > limit:
        found = f"{value:,}" if value < 10**15 else "far more"
        text = f"{what} {found} {unit}".rstrip()
        raise UserError(f"{'' if place is None else f'{place} '}{text}; the limit is {limit:,}")


# JSON schemas ---------------------------------------------------------------------------------------------------------


def _document(text: str) -> Any:
    _most(None, "has", len(text.encode()), MAX_BYTES, "bytes")
    return json_text.parse(text, MAX_DEPTH, MAX_NODES)


def _check_schema(document: Any, path: Path) -> None:
    if document is False:
        raise UserError(f"{path} is false, which no value fits")
    subschemas = schema.read(document, path)
    spelled = 0
    for subschema in subschemas:
        spelled += _check_values(subschema)
        _check_object(subschema)
        _check_numbers(subschema)
        for text, where in _patterns(subschema):
            _check_pattern(text, where)
    _most(path, "has", spelled, MAX_SPELLED_BYTES, "bytes in enum and const")
    emptiness.refuse_empty(subschemas)


def _check_values(subschema: Subschema) -> int:
    """-> the bytes of the values that it spells out."""
    keywords = subschema.keywords
    values = keywords.get("enum", [])
    if not values and "const" not in keywords:
        return 0
    _most(subschema.path / "enum", "has", len(values), MAX_ENUM, "values")
    if "const" in keywords:
        values = [*values, keywords["const"]]
    return sum(len(json.dumps(value, ensure_ascii=False).encode()) for value in values)


def _check_object(subschema: Subschema) -> None:
    keywords, path, optional = subschema.keywords, subschema.path, subschema.optional
    for name in (*keywords.get("properties", ()), *keywords.get("required", ())):
        _most(path, "names a property of", len(name.encode()), MAX_NAME_BYTES, "bytes")
    _most(path, "has", optional, MAX_OPTIONAL, "properties that are not required")
    for keyword in ("minProperties", "maxProperties"):
        if keyword in keywords:
            unit = "properties that are not required, beside it"
            _most(path / keyword, "has", optional, MAX_OPTIONAL_COUNTED, unit)


def _check_numbers(subschema: Subschema) -> None:
    keywords, path = subschema.keywords, subschema.path
    for keyword in keywords.keys() & schema.COUNTS:
        _most(path / keyword, "is", keywords[keyword], MAX_COUNT)
    if "integer" in subschema.types and "type" in keywords:
        for keyword in keywords.keys() & schema.NUMBERS:
            _most(path / keyword, "is, without its sign,", abs(keywords[keyword]), MAX_INTEGER)


def _patterns(subschema: Subschema) -> Iterator[tuple[str, Path]]:
    if "pattern" in subschema.keywords:
        yield subschema.keywords["pattern"], subschema.path / "pattern"
    for text in subschema.keywords.get("patternProperties", ()):
        yield text, subschema.path / "patternProperties" / text


# Structural tags ------------------------------------------------------------------------------------------------------


def _check_tag(document: Any) -> None:
    spelled = 0
    for part in tag.read(document):
        fields, path = part.fields, part.path
        for text in part.texts():
            spelled += len(text.encode())
            if part.kind != "const_string":
                _most(path, "looks for a text of", len(text.encode()), MAX_NAME_BYTES, "bytes")
        match part.kind:
            case "json_schema" | "qwen_xml_parameter":
                _check_schema(fields.get("json_schema"), path / "json_schema")
            case "regex":
                _check_pattern(_text(fields, "pattern", path), path / "pattern")
            case "grammar":
                _check_ebnf(_text(fields, "grammar", path), path / "grammar")
            case "repeat":
                _check_repeat(fields, path)
    _most(None, "has", spelled, MAX_SPELLED_BYTES, "bytes of text that is spelled out or looked for")


def _text(fields: dict[str, Any], name: str, path: Path) -> str:
    if not isinstance(fields.get(name), str):
        raise UserError(f"{path / name} must be text")
    return fields[name]


def _check_repeat(fields: dict[str, Any], path: Path) -> None:
    least, most = fields.get("min"), fields.get("max")
    for name, bound in (("min", least), ("max", most)):
        if not isinstance(bound, int) or isinstance(bound, bool) or bound < (-1 if name == "max" else 0):
            raise UserError(f"{path / name} must be a whole number from 0 up; for max, -1 is no limit")
        _most(path / name, "is", bound, MAX_COUNT)
    if most != -1 and least > most:
        raise UserError(f"{path / 'min'} is {least} and max is {most}: nothing is between")


# Regular expressions, EBNF, choices -----------------------------------------------------------------------------------


def _check_pattern(text: str, path: Path | None = None) -> None:
    with _named(path):
        _most(None, "has", len(text), MAX_PATTERN, "characters")
        _refuse_nul(text)
        found = pattern.read(text)
        _most(None, "has", found.nesting, MAX_NESTING, "groups in each other")
        _most(None, "has, with its repeats written out,", found.unrolled, MAX_UNROLLED, "characters and classes")


def _check_ebnf(text: str, path: Path | None = None) -> None:
    with _named(path):
        _most(None, "has", len(text.encode()), MAX_EBNF_BYTES, "bytes")
        _refuse_nul(text)
        found = ebnf.read(text)
        if "root" not in found.rules:
            raise UserError("has no rule named root")
        _most(None, "has", len(found.rules), MAX_RULES, "rules")
        _most(None, "has", found.nesting, MAX_NESTING, "parentheses in each other")
        _most(None, "repeats", found.repeat, MAX_REPEAT, "times")
        _most(None, "has", sum(found.literals), MAX_SPELLED_BYTES, "bytes in quotes")
        for inner in found.patterns:
            _check_pattern(inner)
        ebnf.refuse_empty(found)


def _refuse_nul(text: str) -> None:
    """xgrammar's parser of EBNF takes it for the end of the text, and its parser of patterns refuses it."""
    if "\0" in text:
        raise UserError(f"has a NUL at character {text.index(chr(0))}; write it as an escape")


@contextmanager
def _named(path: Path | None) -> Iterator[None]:
    """Put the place before what is said of it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} {error}" if path else str(error)) from error


def _check_choices(text: str) -> None:
    choices = _document(text)
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise UserError("must be a list of texts that are not empty")
    _most(None, "has", len(choices), MAX_CHOICES, "texts")
    _most(None, "has", sum(len(choice.encode()) for choice in choices), MAX_SPELLED_BYTES, "bytes")
