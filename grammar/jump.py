"""Jump-forward decoding: text that the grammar forces becomes tokens without a forward pass for each.

The grammar forces bytes, the model speaks tokens, and the same bytes can be cut into tokens in many ways. The model was
trained on one of them, the tokenizer's own (the canonical one); behind another its next choice is worse. So a token is
jumped to only if it is the canonical one whatever follows:

hold back   The end of the forced text may be the beginning of a longer token. Wherever in it a token may start that the
            grammar allows to go on behind the end, the text is encoded as if it ended there; only tokens on which all
            these encodings agree are returned.
front       What is forced is encoded behind the last tokens of the sequence. If they would not come out again as they
            are, there is no jump.

The danger is SGLang's ("Compressed finite state machines", 2024); holding back is from llguidance (docs/fast_forward.md).
`docs/jump_forward.md` has an example.

    python -m pytest tests/test_grammar_jump.py
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
from torch import Tensor

from grammar.matcher import Matcher, whole_characters
from grammar.vocabulary import Vocabulary

CONTEXT = 8  # tokens before the forced text that are encoded with it
UNCHANGED = 4  # of those, the last ones, which must come out again; the first may suffer from the cut before them
LOOK_BACK = 16  # bytes of the forced text's end in which a longer token may start
MOST_TRIED = 16  # longer tokens that are tried one by one; where there are more, a mask tells
MOST_BYTES = 1024  # of forced text taken at once; the rest is still forced in the next step


def forced_tokens(matcher: Matcher, vocabulary: Vocabulary, recent: Sequence[int], bitmask: Tensor) -> list[int]:
    """The tokens that may be appended now, [] if there are none; never a stop token. The matcher stays as it is.

    recent: the last ids of the sequence, prompt included; CONTEXT of them are enough.
    bitmask: int32 [1, ceil(V / 32)] on the CPU, to be written over.
    """
    text = matcher.forced()
    if not text:
        return []
    text = whole_characters(text[:MOST_BYTES])
    context = _context(vocabulary, recent)
    ids = kept = _encode_behind(vocabulary, context, text)
    string = text.decode()
    if string[-2:].isspace():  # pre-tokenizers part the last of some spaces from the others, whatever word comes next
        kept = _agreed(kept, _encode_behind(vocabulary, context, string[:-1].encode()))
    walk = _Walk(matcher, vocabulary, text, ids, bitmask)
    for place, longer in _places(vocabulary, text):
        if not kept:
            break
        shorter = walk.tokens_to(place)
        if shorter is None:
            shorter = _encode_behind(vocabulary, context, whole_characters(text[:place]))
        agreed = _agreed(kept, shorter)
        if len(agreed) < len(kept) and walk.crosses(place, longer):
            kept = agreed
    return _accepted(matcher, kept)


def _context(vocabulary: Vocabulary, recent: Sequence[int]) -> list[int]:
    """The last tokens that are text, from the first that starts with a whole character."""
    context = list(recent[-CONTEXT:])
    for i in range(len(context) - 1, -1, -1):
        if not vocabulary.tokens[context[i]]:
            context = context[i + 1 :]
            break
    while context and vocabulary.tokens[context[0]][0] & 0xC0 == 0x80:
        del context[0]
    return context


def _encode_behind(vocabulary: Vocabulary, context: list[int], text: bytes) -> list[int]:
    """The canonical ids of `text` behind the context; [] if it would change the context, or cannot be spelled."""
    try:
        ids = vocabulary.encode((_spelled(vocabulary, context) + text).decode())
    except UnicodeDecodeError:  # the sequence ends within a character
        return []
    length, start = 0, len(ids)
    while length < len(text) and start:
        start -= 1
        length += len(vocabulary.tokens[ids[start]])
    unchanged = ids[:start][-UNCHANGED:] == context[-UNCHANGED:]
    # a tokenizer that normalizes, or takes the text for a control token, spells something else
    return ids[start:] if unchanged and _spelled(vocabulary, ids[start:]) == text else []


def _spelled(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(map(vocabulary.tokens.__getitem__, ids))


def _places(vocabulary: Vocabulary, text: bytes) -> Iterator[tuple[int, list[int]]]:
    """Where in the text, in order, a token may start that goes on behind its end; and the first of the tokens that do."""
    tokens = _in_order(vocabulary)
    for place in range(max(0, len(text) - LOOK_BACK), len(text)):
        rest = text[place:]
        behind = end = bisect_right(tokens, rest)
        while end < len(tokens) and end <= behind + MOST_TRIED and tokens[end].startswith(rest):
            end += 1
        if behind < end:
            yield place, vocabulary.ids_by_bytes[behind:end]


class _Walk:
    """A matcher on its way through the forced text, by tokens, and byte by byte where a place lies within one."""

    def __init__(self, matcher: Matcher, vocabulary: Vocabulary, text: bytes, ids: list[int], bitmask: Tensor):
        self._matcher, self._vocabulary, self._text, self._ids, self._bitmask = matcher, vocabulary, text, ids, bitmask
        self._fork: Matcher | None = None
        self._at = 0
        ends = accumulate((len(vocabulary.tokens[token]) for token in ids), initial=0)
        self._index = {place: i for i, place in enumerate(ends)}  # where a token starts -> which one

    def tokens_to(self, place: int) -> list[int] | None:
        """The tokens before a place, None if it lies within one."""
        return self._ids[: self._index[place]] if place in self._index else None

    def crosses(self, place: int, longer: list[int]) -> bool:
        """Does the grammar allow a token there that goes on behind the text? Places must be asked for in order."""
        if not self._go_to(place):
            return True
        if len(longer) <= MOST_TRIED:  # cheaper than a mask, and llguidance's may leave out what its `accept` takes
            taken = any(map(self._fork.accept, longer))
            self._fork.rollback(taken)
            return taken
        if not self._fork.fill(self._bitmask, 0):
            return True
        return bool((self._bitmask[0].numpy() & _longer(self._vocabulary)[len(self._text) - place]).any())

    def _go_to(self, place: int) -> bool:
        self._fork = self._fork or self._matcher.fork()
        while self._at < place:
            token = self._ids[self._index[self._at]] if self._at in self._index else None
            if token is None or self._at + len(self._vocabulary.tokens[token]) > place:
                token = _of_byte(self._vocabulary).get(self._text[self._at])
            if token is None or not self._fork.accept(token):
                return False
            self._at += len(self._vocabulary.tokens[token])
        return True


def _agreed(a: list[int], b: list[int]) -> list[int]:
    """How both begin."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _accepted(matcher: Matcher, ids: list[int]) -> list[int]:
    """As many of the ids as the grammar takes, one by one."""
    if not ids:
        return []
    fork = matcher.fork()
    return ids[: next((i for i, token in enumerate(ids) if not fork.accept(token)), len(ids))]


@lru_cache(maxsize=4)
def _in_order(vocabulary: Vocabulary) -> list[bytes]:
    return [vocabulary.tokens[i] for i in vocabulary.ids_by_bytes]


@lru_cache(maxsize=4)
def _longer(vocabulary: Vocabulary) -> np.ndarray:
    """int32 [LOOK_BACK + 1, ceil(V / 32)]: row n has a bit for each token of more than n bytes."""
    lengths = np.array([len(token) for token in vocabulary.tokens])
    lengths = np.pad(lengths, (0, -len(lengths) % 32))
    rows = lengths > np.arange(LOOK_BACK + 1)[:, None]
    return np.packbits(rows, axis=1, bitorder="little").view(np.int32)


@lru_cache(maxsize=4)
def _of_byte(vocabulary: Vocabulary) -> dict[int, int]:
    """byte -> the token that is just this byte."""
    return {token[0]: i for i, token in enumerate(vocabulary.tokens) if len(token) == 1}
