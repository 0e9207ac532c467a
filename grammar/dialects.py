"""What a regular expression uses, and whether each backend means it as JSON Schema (ECMA-262) does.

xgrammar matches a pattern against a whole string and skips anchors in its middle, lookarounds and flags. llguidance has Rust's
regexes: a search, no lookarounds, and sets inside of sets ([a&&b]), which JSON Schema does not have.

    python -m pytest tests/test_grammar_support.py
"""

import re
from collections.abc import Callable, Iterator

# One piece of a pattern. A class is a piece; a group is its bracket, what is inside, and ")".
PIECE = re.compile(
    r"(?P<class>\[\^?\]?(?:\\.|[^\]\\])*\])|(?P<look>\(\?<?[=!])|(?P<flags>\(\?[a-zA-Z-]+[:)])|(?P<group>\((?:\?:|\?P?<\w+>)?)"
    r"|(?P<boundary>\\[bB])|(?P<back>\\(?:[1-9]|k<))|(?P<property>\\[pP]\{[^}]*\})|(?P<anchor>[\^$]|\\[AzZ])|(?P<escape>\\.)"
    r"|(?P<repeat>[*+?]\??|\{\d*,?\d*\}\??)|(?P<or>\|)|(?P<close>\))|(?P<literal>.)",
    re.DOTALL,
)


OPEN = (".", r"\D", r"\S", r"\W", r"\s")  # classes with characters that JSON escapes


def pieces(pattern: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each piece."""
    return ((match.lastgroup, match[0]) for match in PIECE.finditer(pattern))


def whole(pattern: str) -> bool:
    """Is it anchored at both ends, as one, and nowhere else?"""
    kinds = list(pieces(pattern))
    anchors = [i for i, (kind, _) in enumerate(kinds) if kind == "anchor"]
    if [kinds[i][1] for i in anchors] != ["^", "$"] or anchors != [0, len(kinds) - 1]:
        return False
    depth = 0
    for kind, _ in kinds:
        depth += (kind in ("group", "look")) - (kind == "close")
        if kind == "or" and depth == 0:
            return False
    return True


def without_anchors(pattern: str) -> str:
    """What a pattern anchored at both ends matches, said of a whole text."""
    return pattern[1:-1] if whole(pattern) else pattern


def xgrammar(text: str, search: bool) -> Iterator[tuple[str, str]]:
    """What xgrammar does with a pattern otherwise than it should: (effect, the piece).

    `search`: it is one of JSON Schema, that may match a part of a string. Then a character that JSON escapes is written as it
    is, and the text is no JSON; one that only a class has among others is left out.
    """
    kinds = list(pieces(text))
    for i, (kind, piece) in enumerate(kinds):
        if kind == "look" or (kind == "anchor" and (i, piece) not in ((0, "^"), (len(kinds) - 1, "$"))):
            yield "ignores", piece
        elif kind in ("flags", "boundary", "back", "property"):
            yield "refuses", piece
        elif search and (piece == '"' or re.fullmatch(r'\\["\\fnrtvcxu]', piece)):
            yield "ignores", piece
        elif search and (
            piece in OPEN or piece.startswith("[^") or (kind == "class" and re.search(r'"|\\["\\DSWfnrstvcxu]', piece))
        ):
            yield ("narrows" if text.isascii() else "ignores"), piece
    if search and not whole(text):
        yield "narrows", "pattern"


def llguidance(text: str, search: bool) -> Iterator[tuple[str, str]]:
    """The same of llguidance."""
    for kind, piece in pieces(text if search else without_anchors(text)):
        if kind in ("look", "boundary", "back") or (kind == "anchor" and not search):
            yield "refuses", piece
        elif piece in (r"\A", r"\Z", r"\a", r"\z") or (kind == "class" and re.search(r"&&|--|~~|(?<!\\)\[", piece[1:])):
            yield "ignores", piece


FAULTS: dict[str, Callable[[str, bool], Iterator[tuple[str, str]]]] = {"xgrammar": xgrammar, "llguidance": llguidance}
