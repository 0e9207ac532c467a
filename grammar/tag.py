"""xgrammar's structural tags, read as a list of the formats in them.

One format is ours: "tool_calls", which stands for others until grammar.tools has put them there.

python -m pytest tests/test_grammar_limits.py
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from errors import UserError
from grammar.json_text import ROOT, Path

TOOL_CALLS = "tool_calls"
_LEAVES = frozenset(
    (
        "any_text",
        "any_tokens",
        "const_string",
        "exclude_token",
        "grammar",
        "json_schema",
        "qwen_xml_parameter",
        "regex",
        "token",
        TOOL_CALLS,
    )
)
_INNER = {  # type -> the field that holds the formats in it
    "dispatch": "rules",
    "optional": "content",
    "or": "elements",
    "plus": "content",
    "repeat": "content",
    "sequence": "elements",
    "star": "content",
    "tag": "content",
    "tags_with_separator": "tags",
    "token_dispatch": "rules",
    "token_triggered_tags": "tags",
    "triggered_tags": "tags",
}
_SPELLED = ("begin", "end", "separator", "triggers", "value")


@dataclass
class Format:
    kind: str
    fields: dict[str, Any]
    path: Path

    def texts(self) -> Iterator[str]:
        """What it spells, or looks for in a text."""
        yield from self.spelled()
        yield from self._of("excludes")

    def spelled(self) -> Iterator[str]:
        """What may have to be written."""
        for name in _SPELLED:
            yield from self._of(name)
        if self.kind == "dispatch":
            yield from (rule[0] for rule in self.fields["rules"] if isinstance(rule[0], str))

    def _of(self, name: str) -> Iterator[str]:
        value = self.fields.get(name)
        yield from (text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str))


def spelled(document: dict[str, Any]) -> list[str]:
    """All that a text in these formats may have to spell, schemas and grammars aside."""
    return [text for part in read(document) for text in part.spelled()]


def read(document: dict[str, Any]) -> list[Format]:
    """UserError for a format that there is not, and for one without what it must hold."""
    if document.get("type") != "structural_tag" or "format" not in document:
        raise UserError(f'{ROOT} must be {{"type": "structural_tag", "format": ...}}')
    formats, stack = [], [(document["format"], ROOT / "format")]
    while stack:
        value, path = stack.pop()
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or (kind not in _LEAVES and kind not in _INNER):
            raise UserError(f"{path} must be a format, with a type that is known")
        formats.append(Format(kind, value, path))
        if kind in _INNER:
            stack.extend(_inside(value, _INNER[kind], path))
    return formats


def _inside(fields: dict[str, Any], name: str, path: Path) -> list[tuple[Any, Path]]:
    value, path = fields.get(name), path / name
    if name == "content":
        return [(value, path)]
    if not isinstance(value, list) or not value:
        raise UserError(f"{path} must be a list of at least one")
    if name != "rules":
        return [(inner, path / i) for i, inner in enumerate(value)]
    if not all(isinstance(rule, list) and len(rule) == 2 for rule in value):
        raise UserError(f"{path} must be a list of pairs")
    return [(rule[1], path / i / 1) for i, rule in enumerate(value)]
