"""JSON that somebody else wrote: parsed without trust, and the path by which a message names a place in it.

Nothing here recurses: the depth of a text is bounded before the parser sees it, and what was parsed is walked with a stack.

    python -m pytest tests/test_grammar_limits.py
"""

import json
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

from errors import UserError

_MAX_SPELLED = 200  # characters of a path in a message
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKET = re.compile(r"[^][{}]+")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}


class Path(NamedTuple):
    """A place in a document, as a key below another place. Written out only when a message needs it."""

    parent: "Path | None"
    key: str | int

    def __truediv__(self, key: str | int) -> "Path":
        return Path(self, key)

    def __str__(self) -> str:
        keys, path = [], self
        while path is not None:
            keys.append(path.key)
            path = path.parent
        text = str(keys.pop()) + "".join(map(_spell, reversed(keys)))
        return text if len(text) <= _MAX_SPELLED else f"{text[:_MAX_SPELLED]}..."


ROOT = Path(None, "$")


def _spell(key: str | int) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    return f".{key}" if re.fullmatch(r"[A-Za-z_$][\w$-]*", key) else f"[{json.dumps(key)}]"


def nesting(text: str) -> int:
    """How deep objects and lists stand in each other; of text that is no JSON, some number, and at least what a parser meets."""
    brackets = _NO_BRACKET.sub("", _STRING.sub("", text))
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def parse(text: str, max_depth: int, max_nodes: int) -> Any:
    """UserError if it is no JSON, has more than that, or holds what can be written but not meant: 1e999, half a character."""
    if (depth := nesting(text)) > max_depth:
        raise UserError(f"has objects and lists {depth:,} deep in each other; the limit is {max_depth}")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON: {error}") from error
    nodes = sum(1 for _ in walk(document))
    if nodes > max_nodes:
        raise UserError(f"has {nodes:,} values; the limit is {max_nodes:,}")
    return document


def walk(document: Any, path: Path = ROOT) -> Iterator[tuple[Any, Path]]:
    """Every value in it, and where it stands."""
    stack = [(document, path)]
    while stack:
        value, path = stack.pop()
        yield value, path
        if isinstance(value, dict):
            stack.extend((child, Path(path, key)) for key, child in value.items())
        elif isinstance(value, list):
            stack.extend((child, Path(path, i)) for i, child in enumerate(value))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
