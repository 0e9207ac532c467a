"""xgrammar's EBNF, read as far as it takes to say how large a grammar is, and whether it has an end.

What is written wrongly and does not matter for that goes unnoticed here; xgrammar's own parser says so.

    python -m pytest tests/test_grammar_limits.py
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass, field

from errors import UserError
from grammar.emptiness import NOTHING, Clause, productive

_TOKEN = re.compile(
    r"""(?P<space>(?:[ \t\r\n]|\#[^\r\n]*)++)
      | (?P<text>"(?:\\.|[^"\\\r\n])*+")
      | (?P<chars>\[(?:\\.|[^]\\\r\n])*+\])
      | (?P<name>[A-Za-z_.-][A-Za-z0-9_.-]*+)(?:\[(?:"[^"\r\n]{0,99}"|[^]"\r\n]){0,99}\](?=[ \t]*::=))?
      | (?P<assign>::=)
      | (?P<number>[+-]?[0-9]++)
      | (?P<mark>\(=|[(){}|,*+?=])""",
    re.VERBOSE,
)
_MACROS = frozenset(("ExcludeToken", "Regex", "Substring", "TagDispatch", "Token", "TokenTagDispatch"))
_MOST_DIGITS = 12  # of a number that is looked at; a longer one is above any limit
_TEXT = ("text",)  # the symbol of what is text by itself


@dataclass
class Ebnf:
    """rules: name -> where it is defined, in characters. nesting: the depth of parentheses. repeat: the largest number in braces.

    classes: how many there are. wide: those of them that begin with [^. literals: the bytes of texts in quotes. patterns: what
    stands in `Regex("...")`.
    """

    rules: dict[str, int] = field(default_factory=dict)
    nesting: int = 0
    repeat: int = 0
    classes: int = 0
    wide: int = 0
    literals: list[int] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    clauses: list[Clause] = field(default_factory=list)


def read(grammar: str) -> Ebnf:
    """UserError for what cannot be read, for a rule that is used and not defined, and for one that is defined twice."""
    return _Reader(grammar).read()


def refuse_empty(grammar: Ebnf) -> None:
    """UserError for a rule that no finite text follows from: a text that has come so far could not be ended."""
    with_an_end = productive(grammar.clauses)
    for name in grammar.rules:
        if name not in with_an_end:
            raise UserError(f"rule {name} has no end: no finite text follows from it")


@dataclass
class _Group:
    """An open parenthesis, or the body of a rule: its alternatives so far, each as the symbols that it needs."""

    alternatives: list[list[Hashable]] = field(default_factory=lambda: [[]])
    lookahead: bool = False


class _Reader:
    def __init__(self, grammar: str):
        self._tokens = _tokens(grammar)
        self._at = 0
        self._found = Ebnf()
        self._used: dict[str, int] = {}  # rule -> where

    def read(self) -> Ebnf:
        while self._at < len(self._tokens):
            if not self._is_rule():
                raise UserError(
                    f"has {self._tokens[self._at][1]!r} where a rule should begin, at character {self._where()}"
                )
            self._rule()
        for name, where in self._used.items():
            if name not in self._found.rules:
                raise UserError(f"uses rule {name}, which is not defined, at character {where}")
        return self._found

    def _where(self) -> int:
        return self._tokens[self._at][2]

    def _is_rule(self) -> bool:
        return [kind for kind, _, _ in self._tokens[self._at : self._at + 2]] == ["name", "assign"]

    def _rule(self) -> None:
        name = self._tokens[self._at][1]
        if name in self._found.rules:
            raise UserError(f"defines rule {name} twice, at character {self._where()}")
        self._found.rules[name] = self._where()
        self._at += 2
        open_groups = [_Group()]
        while self._at < len(self._tokens) and not self._is_rule():
            self._element(open_groups)
        if len(open_groups) > 1:
            raise UserError(f"has {len(open_groups) - 1} parentheses in rule {name} that do not close")
        self._close(open_groups[0], name)

    def _close(self, group: _Group, head: Hashable) -> None:
        for needed in group.alternatives:
            self._found.clauses.append((head, [symbol for symbol in needed if symbol is not _TEXT]))

    def _element(self, open_groups: list[_Group]) -> None:
        kind, text, where = self._tokens[self._at]
        self._at += 1
        sequence = open_groups[-1].alternatives[-1]
        if kind == "name" and text in _MACROS and self._next_is("("):
            self._macro(text, len(open_groups))
            sequence.append(_TEXT)
        elif kind == "name":
            self._used.setdefault(text, where)
            sequence.append(text)
        elif kind == "text":
            self._found.literals.append(len(text.encode()))
            sequence.append(_TEXT)
        elif kind == "chars":
            self._found.classes += 1
            self._found.wide += text.startswith("[^")
            sequence.append(NOTHING if text == "[]" else _TEXT)
        elif text in ("(", "(="):
            open_groups.append(_Group(lookahead=text == "(="))
            self._found.nesting = max(self._found.nesting, len(open_groups) - 1)
        elif text == ")":
            self._end_group(open_groups, where)
        elif text == "|":
            open_groups[-1].alternatives.append([])
        elif text in ("*", "?") or (text == "{" and self._repeat() == 0):
            sequence[-1:] = [_TEXT]

    def _end_group(self, open_groups: list[_Group], where: int) -> None:
        group = open_groups.pop()
        if not open_groups:
            raise UserError(f"closes a parenthesis that is not open, at character {where}")
        symbol = len(self._found.clauses)
        self._close(group, symbol)
        open_groups[-1].alternatives[-1].append(_TEXT if group.lookahead else symbol)

    def _next_is(self, text: str) -> bool:
        return self._at < len(self._tokens) and self._tokens[self._at][1] == text

    def _repeat(self) -> int:
        """What stands between braces. -> the smaller number."""
        numbers = []
        while self._at < len(self._tokens) and not self._next_is("}"):
            kind, text, _ = self._tokens[self._at]
            numbers += [int(text[:_MOST_DIGITS])] if kind == "number" else []
            self._at += 1
        self._found.repeat = max(self._found.repeat, *numbers, 0)
        return numbers[0] if numbers else 0

    def _macro(self, name: str, outside: int) -> None:
        """The arguments, in parentheses that nest. They name rules that need not follow: free text is enough."""
        depth = 0
        while self._at < len(self._tokens):
            kind, text, _ = self._tokens[self._at]
            self._at += 1
            depth += {"(": 1, ")": -1}.get(text, 0)
            self._found.nesting = max(self._found.nesting, outside + depth - 1)
            if kind == "text":
                self._found.literals.append(len(text.encode()))
                self._found.patterns += [_unescape(text)] if name == "Regex" else []
            if depth == 0:
                return
        raise UserError(f"has a {name}( that does not close")


def _tokens(grammar: str) -> list[tuple[str, str, int]]:
    """(kind, text, where it begins), without space and comments."""
    tokens, end = [], 0
    for token in iter(_TOKEN.scanner(grammar).match, None):  # not finditer: it would look for one further on
        end = token.end()
        if token.lastgroup != "space":
            tokens.append((token.lastgroup, token[token.lastgroup], token.start()))
    if end != len(grammar):
        raise UserError(f"has {grammar[end : end + 10]!r}, which cannot be read, at character {end}")
    return tokens


def _unescape(literal: str) -> str:
    """The pattern in a literal, nearly: what is escaped once more in quotes is a backslash or a quote."""
    return re.sub(r'\\(["\\])', r"\1", literal[1:-1])
