"""How large a regular expression is: what can be told of one in any dialect, without compiling it.

Dialects differ in what an escape means, not in how groups, classes and quantifiers nest; so this refuses only what is wrong in
each of them.

    python -m pytest tests/test_grammar_limits.py
"""

import re
from dataclasses import dataclass

from errors import UserError

_TOKEN = re.compile(
    r"""(?P<escape>\\.)
      | (?P<class>\[\^?(?:\\.|[^]\\])*+\])
      | (?P<open>\((?:\?(?:<?[=!]|:|P?<[^>]*+>)?)?)
      | (?P<close>\))
      | (?P<repeat>\{\s*(?P<least>\d*)\s*(?P<comma>,?)\s*(?P<most>\d*)\s*\})
      | (?P<quantifier>[*+?])
      | (?P<alternative>\|)
      | (?P<other>.)""",
    re.DOTALL | re.VERBOSE,
)


@dataclass
class Pattern:
    """nesting: the depth of its groups. bounded: the largest number in a `{n,m}`.

    unrolled: how many characters and classes there are once each `{n,m}` is written out, those in others too.
    """

    nesting: int = 0
    bounded: int = 0
    unrolled: int = 0


def read(pattern: str) -> Pattern:
    """UserError for a group or a class that does not close, and for a quantifier of nothing."""
    found, before = Pattern(), "open"
    sizes = [0]  # unrolled: of the pattern, then of each open group
    last = 0  # of what a quantifier would repeat
    for token in _TOKEN.finditer(pattern):
        kind, where = token.lastgroup, f"at character {token.start()}"
        if token[0] in ("[", "\\"):
            raise UserError(f"has a {token[0]} that does not end, {where}")
        if kind == "open":
            sizes.append(0)
            found.nesting = max(found.nesting, len(sizes) - 1)
        elif kind == "close":
            last = sizes.pop()
            if not sizes:
                raise UserError(f"closes a group that is not open, {where}")
            sizes[-1] += last
        elif kind == "quantifier" and before in ("open", "alternative"):
            raise UserError(f"repeats nothing, {where}")
        elif kind == "repeat":
            most = _most(token, where)
            found.bounded = max(found.bounded, most)
            sizes[-1] += last * max(most - 1, 0)
            last *= max(most, 1)
        elif kind not in ("quantifier", "alternative"):
            last = 1
            sizes[-1] += last
        before = kind
    if len(sizes) > 1:
        raise UserError(f"has {len(sizes) - 1} groups that do not close")
    found.unrolled = sizes[0]
    return found


def _most(token: re.Match, where: str) -> int:
    """The largest number in a `{n,m}`; 0 in "{}", which is text."""
    bounds = [int(token[name]) for name in ("least", "most") if token[name]]
    if bounds != sorted(bounds):
        raise UserError(f"repeats {token[0]}, the first number above the second, {where}")
    return bounds[-1] if bounds else 0
