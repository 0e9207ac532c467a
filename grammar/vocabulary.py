"""The model's tokens as bytes, which is how grammars see them.

A grammar spells text, so each id needs the bytes that it adds to the text. Three kinds add none: control tokens, which a
person must never read (as text they would be allowed inside any JSON string), ids that no tokenizer has, and the stop ids.
Where a grammar spells a control token itself, as the tool calls of some models do, `speaking` has a vocabulary with that one.

    python -m pytest tests/test_grammar_vocabulary.py
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from errors import UserError
from tokenizer import Tokenizer


class Vocabulary:
    """tokens [V]: the bytes of each id, b"" for one that is no text. V is the width of the model's output layer.

    encode: text to the ids that spell it, without the tokens that begin a prompt. control: the names of tokens that are no
    text; only with an encode that `of` has made.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        stop_ids: Sequence[int],
        encode: Callable[[str], list[int]],
        control: Mapping[int, str] | None = None,
    ):
        self.tokens, self.stop_ids, self.encode = list(tokens), sorted(set(stop_ids)), encode
        self.control = dict(control or {})
        if not self.stop_ids:
            raise UserError("this checkpoint names no token that ends a text, and structured output needs one")

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> "Vocabulary":
        """vocab_size: the width of the output layer, often more than the tokenizer has. stop_ids: all of the checkpoint's."""
        spell = _spelling(tokenizer)
        no_text = tokenizer.special_ids | set(stop_ids)
        pieces = [tokenizer.backend.id_to_token(i) for i in range(vocab_size)]
        added = {i: token.content for i, token in tokenizer.backend.get_added_tokens_decoder().items()}
        tokens = [
            b"" if piece is None or i in no_text else added[i].encode() if i in added else spell(piece)
            for i, piece in enumerate(pieces)
        ]
        control = {i: pieces[i] for i in sorted(no_text) if i < vocab_size and pieces[i]}
        return cls(tokens, stop_ids, _Encoder(tokenizer, tokens), control)

    def __len__(self) -> int:
        return len(self.tokens)

    def spoken(self, texts: Iterable[str]) -> dict[int, str]:
        """The control tokens that occur in some texts, by id. UserError if nothing would be left that ends a text."""
        spoken = {i: name for text in texts for i, name in self.control.items() if name in text}
        if spoken.keys() >= set(self.stop_ids):
            raise UserError(f"it spells {spoken[self.stop_ids[0]]!r}, without which nothing ends a text of this model")
        return spoken

    def speaking(self, spoken: Mapping[int, str]) -> "Vocabulary":
        """The same, in which these control tokens are text, even those that end one."""
        if not spoken:
            return self
        tokens = [spoken[i].encode() if i in spoken else token for i, token in enumerate(self.tokens)]
        stop_ids = [i for i in self.stop_ids if i not in spoken]
        return Vocabulary(tokens, stop_ids, replace(self.encode, tokens=tokens))

    @cached_property
    def ids_by_bytes(self) -> list[int]:
        """The ids of all text, in the order of their bytes."""
        return sorted((i for i, token in enumerate(self.tokens) if token), key=self.tokens.__getitem__)

    def starting_with(self, prefix: bytes) -> list[int]:
        """The ids whose bytes start with a prefix, itself included."""
        first = bisect_left(self.ids_by_bytes, prefix, key=self.tokens.__getitem__)
        behind = _next_prefix(prefix)
        end = None if behind is None else bisect_left(self.ids_by_bytes, behind, key=self.tokens.__getitem__)
        return self.ids_by_bytes[first:end]


@dataclass(frozen=True, eq=False)
class _Encoder:
    tokenizer: Tokenizer
    tokens: Sequence[bytes]

    def __call__(self, text: str) -> list[int]:
        """The ids that spell a text, byte by byte if the tokenizer's own do not: it may normalize what it reads.

        Sentencepiece puts a space before a text, as if it were a prompt's beginning; behind something else it does not.
        """
        for before in ("", "\n"):
            start = self.tokenizer.encode(before, add_special_tokens=False)
            ids = self.tokenizer.encode(before + text, add_special_tokens=False)[len(start) :]
            if b"".join(self.tokens[i] for i in ids) == text.encode():
                return ids
        return [self._of_byte[bytes([byte])] for byte in text.encode()]

    @cached_property
    def _of_byte(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens) if len(token) == 1}


def _next_prefix(prefix: bytes) -> bytes | None:
    """The smallest bytes behind all that start with `prefix`; None if there are none."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def _spelling(tokenizer: Tokenizer):
    """piece -> bytes, by how the tokenizer's decoder puts pieces together. UserError for a kind that is not known."""
    state = tokenizer.backend.decoder.__getstate__() if tokenizer.backend.decoder is not None else b""
    if b'"ByteLevel"' in state:
        byte_of = {char: byte for byte, char in byte_level_alphabet().items()}
        return lambda piece: bytes(byte_of[char] for char in piece)
    if b'"ByteFallback"' in state or b'"Metaspace"' in state or "\u2581".encode() in state:
        return _spell_sentencepiece
    raise UserError("structured output knows byte-level and sentencepiece vocabularies; this checkpoint's is neither")


def _spell_sentencepiece(piece: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()


def byte_level_alphabet() -> dict[int, str]:
    """byte -> the character that stands for it in a byte-level vocabulary (GPT-2): itself if it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {byte: chr(256 + i) for i, byte in enumerate(unseen)}
