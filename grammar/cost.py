"""How long xgrammar needs for a spec, roughly: a sum of what is known to cost.

What costs is a place in the text where nearly any character may follow and where the state tells what came before, for each
asks about every token of the vocabulary: a character of a bounded string, and a character of a property's name in an object that
is open, since any other name must be let through. Such a place takes 25 ms with the 152,000 tokens of Qwen 2.5 on one core at
2.5 GHz (xgrammar 0.2.8). The same thing twice costs once.

    python -m pytest tests/test_grammar_limits.py
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from grammar import ebnf, pattern, schema, tag
from grammar.schema import Subschema
from grammar.spec import Spec

# Seconds
PLACE = 0.025  # where nearly any character may follow
NARROW_PLACE = 0.002  # where only some may, as [a-z]: [a-z]{1,128} 0.3, and from there on as much whatever the bound
SUBSCHEMA = 0.0006  # 1,000 properties 0.6
OPTIONAL = 0.003  # a property that may be left out: 256 in one object 0.9
OPTIONAL_COUNTED = 0.00014  # times their number, beside minProperties or maxProperties: 100 of them 1.4
SPELLED_BYTE = 0.00002  # of enum, const, choices and literals: 16 KB 0.2 to 0.3
FORMAT = 0.05  # uri-template 0.2, others less
RULE = 0.0002  # 2,000 of EBNF 0.4
LOOKED_FOR_BYTE = 0.0003  # of what any text is searched for in a structural tag: 500 words of 12 bytes 1.5

_WIDE = re.compile(r"(?<!\\)(?:\\\\)*(?:\.|\[\^|\\[DSW])")  # a class that nearly any character is in
_LENGTH_SATURATES = 200  # a longer string costs no more
_REPEAT_SATURATES = 250


def seconds(spec: Spec) -> float:
    """Of one core, to compile what has passed `limits.check`."""
    match spec.kind:
        case "json_schema":
            return _of_schema(json.loads(spec.text))
        case "structural_tag":
            return sum(map(_of_format, tag.read(json.loads(spec.text))))
        case "regex":
            return _of_pattern(spec.text)
        case "ebnf":
            return _of_ebnf(spec.text)
        case _:
            return SPELLED_BYTE * len(spec.text.encode())


def _of_schema(document: Any) -> float:
    subschemas = schema.read(document)
    lengths = {_length(subschema) for subschema in subschemas}
    patterns = {text for subschema in subschemas for text in _patterns(subschema)}
    formats = {subschema.keywords.get("format") for subschema in subschemas} - {None}
    open_names = {_open_names(subschema) for subschema in subschemas}
    return (
        SUBSCHEMA * len(subschemas)
        + PLACE * sum(lengths)
        + sum(map(_of_pattern, patterns))
        + FORMAT * len(formats)
        + PLACE * sum(map(_prefixes, open_names))
        + sum(map(_of_choices, subschemas))
    )


def _length(subschema: Subschema) -> int:
    """Characters that are counted in a string."""
    if "string" not in subschema.types:
        return 0
    bounds = (subschema.keywords.get(keyword, 0) for keyword in ("minLength", "maxLength"))
    return min(max(bounds), _LENGTH_SATURATES)


def _patterns(subschema: Subschema) -> Iterator[str]:
    if "pattern" in subschema.keywords:
        yield subschema.keywords["pattern"]
    yield from subschema.keywords.get("patternProperties", ())


def _open_names(subschema: Subschema) -> frozenset[str]:
    """The properties of an object that may have others."""
    if "object" not in subschema.types or subschema.keywords.get("additionalProperties") is False:
        return frozenset()
    return frozenset(subschema.keywords.get("properties", ()))


def _prefixes(names: Iterable[str]) -> int:
    """How many different beginnings the names have."""
    return len({name[:end] for name in names for end in range(1, len(name) + 1)})


def _of_choices(subschema: Subschema) -> float:
    """What it leaves to choose: values, and which properties."""
    keywords, optional = subschema.keywords, subschema.optional
    spelled = [keywords[keyword] for keyword in ("enum", "const") if keyword in keywords]
    counted = bool(keywords.keys() & {"minProperties", "maxProperties"})
    return (
        SPELLED_BYTE * len(json.dumps(spelled, ensure_ascii=False).encode()) * bool(spelled)
        + OPTIONAL * optional
        + OPTIONAL_COUNTED * optional * optional * counted
    )


def _of_pattern(text: str) -> float:
    found = pattern.read(text)
    return (PLACE if _WIDE.search(text) else NARROW_PLACE) * min(found.unrolled, _REPEAT_SATURATES)


def _of_ebnf(text: str) -> float:
    found = ebnf.read(text)
    classes = PLACE * found.wide + NARROW_PLACE * (found.classes - found.wide)
    return (
        RULE * len(found.rules)
        + SPELLED_BYTE * sum(found.literals)
        + classes * max(min(found.repeat, _REPEAT_SATURATES), 1)
        + sum(map(_of_pattern, found.patterns))
    )


def _of_format(part: tag.Format) -> float:
    texts = [len(text.encode()) for text in part.texts()]
    cost = SPELLED_BYTE * sum(texts)
    match part.kind:
        case "json_schema" | "qwen_xml_parameter":
            cost += _of_schema(part.fields["json_schema"])
        case "regex":
            cost += _of_pattern(part.fields["pattern"])
        case "grammar":
            cost += _of_ebnf(part.fields["grammar"])
        case "const_string":
            pass
        case "repeat":
            cost += PLACE * min(max(part.fields["min"], part.fields["max"]), _REPEAT_SATURATES)
        case _:
            cost += LOOKED_FOR_BYTE * sum(texts) + PLACE * max(texts, default=0)
    return cost
