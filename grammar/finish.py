"""The short way to a valid end, so that JSON is whole when a request's tokens run out.

Let n be the length of an end: tokens after which the text is complete. A request can be finished as long as n <= remaining.
One sampled token can lengthen the end by any amount: it opens an object, and the object has required properties. So before
a token is sampled, these must fit: the ends behind all tokens that may be sampled, n <= remaining - 1 each. Where one does
not, the first token of the end in hand is forced instead, and n - 1 <= remaining - 1 holds again. What fits at the
beginning is thus finished in time, whatever is sampled.

Three things are approximate. The search is bounded. Of tokens that differ only in plain text one stands for all. And while
there is room, ends are looked up only now and then: those of the tokens sampled meanwhile may grow by three tokens each, and
once by 2 * GROWTH. Where more than that is begun at once, out of the blue, the text may be cut off after all.

    python -m pytest tests/test_grammar_finish.py
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from grammar.matcher import Matcher
from grammar.vocabulary import Vocabulary

WIDTHS = (1, 4)  # of the search's beam: the obvious way first, then more of them
BUDGET = 400  # masks and tokens for each
MOST_TRIED = 8  # tokens tried at one place
MOST_LOOKED_BEHIND = 12  # tokens whose ends are looked up before one is sampled
MANY = 256  # allowed tokens that are too many to look at all
GROWTH = 32  # tokens by which one token may lengthen an end, until more was seen
SPLIT = 8  # and where the text is forced, so that it is only spelled otherwise
LEVEL = 16  # how many better choices one open bracket outweighs
LONGEST = 16  # bytes of a token of plain text, where a string must be filled

# In JSON these stand in strings only.
PLAIN = b"ABCDFGHIJKLMNOPQRSTUVWXYZbcdghijkmopqvwxyz!#$%&'()*;<=>?@^_`|~/\\"
# What a pattern is most likely to wait for, then the rest.
MARKS = b"@\\:/-.TZ"
SIGNS = b"1023456789aAbcdefghijklmnopqrstuvwxyzBCDEFGHIJKLMNOPQRSTUVWXYZ" + bytes(range(33, 256))


def shortest_end(matcher: Matcher, vocabulary: Vocabulary, bitmask: Tensor, limit: int) -> list[int] | None:
    """At most `limit` tokens after which the text is complete: few, not always the fewest. [] if it is complete now.

    None if none were found: there may still be some, because the search is bounded. The matcher stays as it is.
    bitmask: int32 [1, ceil(V / 32)] on the CPU, to be written over.
    """
    if matcher.complete or limit <= 0:
        return [] if matcher.complete else None
    moves = _moves(vocabulary)
    for width in WIDTHS:
        search = _Search(moves, bitmask, 4 * limit + 16, narrow=width == 1)  # of tokens that get fewer when rewritten
        ways = search.along([_Way(matcher.fork())])
        while ways:
            if ways[0].complete:
                return _rewritten(matcher, vocabulary, ways[0].tokens, limit)
            ways = search.along(way.fork(rank, token) for way in ways for rank, token in enumerate(way.choices))[:width]
    return None


class _Way:
    """Some tokens, and where they lead: how many brackets are open beyond those at the start, how far down the lists of choices."""

    def __init__(self, matcher: Matcher, tokens: Sequence[int] = (), level: int = 0, detours: int = 0):
        self.matcher, self.tokens, self.level, self._detours = matcher, list(tokens), level, detours
        self.complete = matcher.complete
        self.choices: list[int] = []  # of tokens to go on with, where it stops

    def fork(self, rank: int, token: int) -> "_Way":
        """One that will go on by the token, this one's rank-th choice."""
        way = _Way(self.matcher.fork(), self.tokens, self.level, self._detours + rank)
        way.choices = [token]
        return way

    def go(self, token: int, text: bytes) -> bool:
        if not self.matcher.accept(token):
            return False
        self.tokens.append(token)
        self.level += text.count(b"{") + text.count(b"[") - text.count(b"}") - text.count(b"]")
        self.complete = self.matcher.complete
        return True

    def cost(self) -> tuple:
        return not self.complete, self.level * LEVEL + self._detours, len(self.tokens)


class _Search:
    """Takes ways to where they are complete or have a choice, as far as a budget goes."""

    def __init__(self, moves: "_Moves", bitmask: Tensor, most: int, narrow: bool):
        self._moves, self._bitmask, self._most, self._narrow, self._budget = moves, bitmask, most, narrow, BUDGET

    def along(self, ways: Iterable[_Way]) -> list[_Way]:
        """Those that are worth going on, the best first."""
        return sorted(filter(self._go, ways), key=_Way.cost)

    def _go(self, way: _Way) -> bool:
        """Go on while there is one choice, but not beyond a bracket: where the last choice leads to is known then."""
        level = way.level
        while True:
            if not self._take(way, way.choices):
                return False
            while not way.complete and self._budget > 0 and (text := way.matcher.forced()):
                tokens = self._moves.spell(text[: LONGEST * self._most])
                if not tokens or not self._take(way, tokens):
                    return False
            if way.complete:
                return True
            if len(way.tokens) > self._most or self._budget <= 0:
                return False
            way.choices = self._moves.of(way.matcher, self._bitmask, self._narrow)
            self._budget -= 1
            if len(way.choices) != 1 or way.level != level:
                return bool(way.choices)

    def _take(self, way: _Way, tokens: list[int]) -> bool:
        self._budget -= len(tokens)
        return all(way.go(token, self._moves.tokens[token]) for token in tokens)


def _rewritten(matcher: Matcher, vocabulary: Vocabulary, ids: list[int], limit: int) -> list[int] | None:
    """The same text in the tokenizer's own tokens, if these spell it; None if there are more than `limit`."""
    spelled = vocabulary.tokens
    begun = next((i for i, token in enumerate(ids) if spelled[token][0] & 0xC0 != 0x80), len(ids))
    text = b"".join(spelled[token] for token in ids[begun:])  # without the rest of a character
    own = ids[:begun] + vocabulary.encode(text.decode(errors="replace"))
    fork = matcher.fork()
    if b"".join(spelled[token] for token in own[begun:]) != text or not all(map(fork.accept, own)):
        own = ids
    return own if len(own) <= limit else None


class _Moves:
    """The tokens of a vocabulary that matter to an end, the best first."""

    def __init__(self, vocabulary: Vocabulary):
        self.tokens = vocabulary.tokens
        self._ids = {token: i for i, token in enumerate(vocabulary.tokens) if token}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._plain, self._quote = self._each(PLAIN), self._those([b'"'])
        self._close = self._those(token for token in longest_first if not token.strip(b"}]"))
        self._next = self._those([b",", b":"])
        marks, signs = ([bytes([sign]) for sign in signs] for signs in (MARKS.replace(b"-", b""), SIGNS))
        self._begin = self._those([b'"', *marks, b"0", b"null", b"[]", b"{}", b"true", b"false", b"-", *signs])
        self._fill = self._those([token for token in longest_first if token.isalnum() and len(token) <= LONGEST][:64])
        self._inside = self._each(MARKS + SIGNS + b" ")
        kinds: dict[int, list[bytes]] = {}
        for token in longest_first:
            kinds.setdefault(_left(token), []).append(token)
        self._kinds_outside = [self._those(sorted(kind, key=_begun, reverse=True)[:4096]) for kind in kinds.values()]
        for kind in kinds.values():
            kind.sort(key=lambda token: _begun(token.partition(b'"')[2]), reverse=True)  # before the quote it is plain
        self._kinds_inside = [self._those(kind[:4096]) for kind in kinds.values()]

    def _those(self, texts: Iterable[bytes]) -> "_Tokens":
        return _Tokens([self._ids[text] for text in dict.fromkeys(texts) if text in self._ids])

    def _each(self, signs: bytes) -> "_Tokens":
        return self._those(bytes([sign]) for sign in signs)

    def spell(self, text: bytes) -> list[int]:
        """Tokens of this text, each the longest that there is; no further than there are tokens."""
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + LONGEST), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[at:end]])
            at = end
        return ids

    def of(self, matcher: Matcher, bitmask: Tensor, narrow: bool) -> list[int]:
        """The tokens to try next, the best first. Narrow: only one where it is plain what brings an end nearer."""
        row = _mask(matcher, bitmask)
        plain = self._plain.allowed(row)
        if plain:
            sure = self._quote.allowed(row)
            choice = self._fill if narrow and len(plain) >= len(self._plain.ids) - 1 else self._inside
        else:
            sure = self._close.allowed(row) or self._next.allowed(row)
            choice = self._begin
        if sure and narrow:
            return sure[:1]
        found = sure[:1] + choice.allowed(row)
        if not found:
            found = sorted(self._texts(_ids(row)[:4096]), key=lambda token: len(self.tokens[token]))
        return found[: 1 if narrow and len(found) > MOST_TRIED else MOST_TRIED]  # of so many, any leads to the same

    def one_of_each(self, matcher: Matcher, bitmask: Tensor) -> list[int]:
        """Tokens that may come next, so that any other leaves the text much like one of these."""
        row = _mask(matcher, bitmask)
        allowed = _ids(row)
        if len(allowed) > MANY:
            by_kind = self._kinds_inside if self._plain.allowed(row) else self._kinds_outside
            return [token for kind in by_kind for token in kind.allowed(row)[:1]]
        texts = self._texts(allowed)
        if len(texts) <= MOST_LOOKED_BEHIND:
            return texts
        kinds: dict[tuple, int] = {}  # by the first sign too, which may tell one key or value from another
        for token in sorted(texts, key=lambda token: (_begun(self.tokens[token]), len(self.tokens[token]))):
            text = self.tokens[token]
            kinds[_left(text), b"0" if text.isdigit() else text[:1]] = token
        return [*kinds.values()][-MOST_LOOKED_BEHIND:]

    def within(self, text: bytes, matcher: Matcher, bitmask: Tensor) -> bool:
        """Does no token that may come next go beyond this text, which is forced?"""
        allowed = _ids(_mask(matcher, bitmask))
        return len(allowed) <= MANY and all(len(self.tokens[token]) <= len(text) for token in self._texts(allowed))

    def _texts(self, ids: np.ndarray) -> list[int]:
        return [token for token in ids.tolist() if token < len(self.tokens) and self.tokens[token]]


def _left(text: bytes) -> int:
    """Where it leaves what it is in: behind a sign that matters, within a character (-1 to -3, the missing bytes), or 0."""
    if text[-1] < 0x80:
        return text[-1] if text[-1] in b'{[,:"\\-.eEu' else 0
    for place in range(1, min(3, len(text)) + 1):
        if (lead := text[-place]) >= 0xC0:
            return place - (2 + (lead >= 0xE0) + (lead >= 0xF0))
    return 0


def _begun(text: bytes) -> int:
    """How much it begins that must be gone on with."""
    return len(text) - len(text.translate(None, b'{[,:"'))


def _mask(matcher: Matcher, bitmask: Tensor) -> np.ndarray:
    """int32 [ceil(V / 32)]: a bit for each token that may come next."""
    row = bitmask[0].numpy()
    if not matcher.fill(bitmask, 0):
        row[:] = -1
    return row


def _ids(row: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


class _Tokens:
    """Some ids, in an order, ready to be looked up in masks."""

    def __init__(self, ids: Sequence[int]):
        self.ids = np.array(ids, dtype=np.int64)
        self._word = self.ids >> 5
        self._bit = (1 << (self.ids & 31)).astype(np.uint32).view(np.int32)

    def allowed(self, row: np.ndarray) -> list[int]:
        """Those whose bit is set in int32 [ceil(V / 32)]."""
        return self.ids[(row[self._word] & self._bit) != 0].tolist()


@lru_cache(maxsize=4)
def _moves(vocabulary: Vocabulary) -> _Moves:
    return _Moves(vocabulary)


class Finisher:
    """For one request: samples as long as an end still fits, then has one written."""

    def __init__(self, vocabulary: Vocabulary, max_new_tokens: int):
        self._vocabulary, self._moves = vocabulary, _moves(vocabulary)
        self._look_at = max_new_tokens  # remaining tokens down to which there is nothing to do
        self._end: list[int] = []  # found last, or the rest of it if its first token was forced
        self._seen: tuple[bytes, list[int]] | None = None  # the mask and the end of the last time,
        self._longest = 0  # and the longest end behind a token then
        self._growth = GROWTH  # the most that a token was seen to lengthen an end by

    def next(self, matcher: Matcher, remaining: int, bitmask: Tensor) -> int | None:
        """The token that must come next, or None if any may. To be called before each token that is sampled.

        remaining: tokens that the request may still have, this one included. A stop token is forced only where the text
        is complete and might not be behind another token. None as well if no end fits: then the text will be cut off.
        bitmask: int32 [1, ceil(V / 32)] on the CPU, to be written over.
        """
        if remaining > self._look_at or matcher.ended:
            return None
        end = self._find(matcher, remaining, bitmask)
        if end is None:
            self._look_at = remaining - max(4, remaining // 8)
            return None
        room = self._room(matcher, remaining, end, bitmask)
        if room < 0:
            self._end = end[1:]
            return end[0] if end else self._vocabulary.stop_ids[0]
        self._end = end
        self._look_at = remaining - max(1, (room - 2 * self._growth) // 4)
        return None

    def _find(self, matcher: Matcher, remaining: int, bitmask: Tensor) -> list[int] | None:
        known = self._still(matcher, self._end[1:]) or self._still(matcher, self._end)
        if known and len(known) <= remaining:
            return known
        return shortest_end(matcher, self._vocabulary, bitmask, remaining)

    @staticmethod
    def _still(matcher: Matcher, end: list[int]) -> list[int] | None:
        """An end that was found elsewhere, if it is one here."""
        fork = matcher.fork()
        return end if all(map(fork.accept, end)) and fork.complete else None

    def _room(self, matcher: Matcher, remaining: int, end: list[int], bitmask: Tensor) -> int:
        """Tokens to spare behind any token that may come next; less than none if an end may not fit any more."""
        spare = remaining - 1 - len(end)
        if spare > 2 * self._growth:
            return spare
        if spare > SPLIT and (text := matcher.forced()) and self._moves.within(text, matcher, bitmask):
            return spare - SPLIT
        seen = _mask(matcher, bitmask).tobytes(), end
        if seen != self._seen:
            longest = self._longest_behind(matcher, remaining, end, bitmask)
            if longest is None:
                return -1
            self._seen, self._longest, self._growth = seen, longest, max(self._growth, longest - len(end))
        return remaining - 1 - self._longest

    def _longest_behind(self, matcher: Matcher, remaining: int, end: list[int], bitmask: Tensor) -> int | None:
        """Of the ends behind the tokens that may come next; None if there is one that does not fit."""
        longest = 0
        for token in self._moves.one_of_each(matcher, bitmask):
            fork = matcher.fork()
            if fork.accept(token):
                behind = self._still(fork, end) or self._still(fork, end[1:])
                behind = behind or shortest_end(fork, self._vocabulary, bitmask, remaining - 1)
                if behind is None or len(behind) >= remaining:
                    return None
                longest = max(longest, len(behind))
        return longest
