"""How far one request is in its grammar: the interface that both backends fill, and all that the engine knows of them.

python -m pytest tests/test_grammar_backends.py
"""

import re
from typing import Protocol

import torch
from torch import Tensor

from grammar.vocabulary import Vocabulary


class Matcher(Protocol):
    """The state of one request. It belongs to one thread at a time; those of different requests are independent."""

    @property
    def complete(self) -> bool:
        """Is what has been accepted a whole text of the language? It may still be one that goes on."""

    @property
    def ended(self) -> bool:
        """Has a stop token been accepted? Then nothing more can be."""

    def fill(self, bitmask: Tensor, index: int) -> bool:
        """Write the tokens that may come next to row `index` of int32 [B, ceil(V / 32)] on the CPU, a bit each.

        Bits behind the last token mean nothing. False: all may, and the row was not necessarily written.
        Lets go of the interpreter's lock. Changes nothing.
        RuntimeError if the backend gives up, or if the text has ended.
        """

    def accept(self, token: int) -> bool:
        """Go on by one token. False if the grammar does not allow it: nothing has changed then.

        RuntimeError if the backend gives up.
        """

    def rollback(self, tokens: int) -> None:
        """Take the last tokens back, stop tokens included."""

    def fork(self) -> "Matcher":
        """One of its own, in the same state."""

    def forced(self) -> bytes:
        """The text without which the grammar has no way on, in whole characters; b"" where it leaves a choice, or may end."""


class Grammar(Protocol):
    """What a spec has been compiled to. Any number of matchers and threads may share it."""

    @property
    def backend(self) -> str:
        """ "xgrammar" or "llguidance"."""

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the tokens that its matchers know."""

    @property
    def size(self) -> int:
        """Bytes of memory, roughly."""

    def matcher(self) -> Matcher:
        """A new request's, at the beginning."""


def whole_characters(text: bytes) -> bytes:
    """Without the bytes at the end that only begin a character of UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return text[: error.start]
    return text


def check_matches(grammar: Grammar, vocab_size: int) -> None:
    """RuntimeError if no token at all may begin the text: `{"$ref": "#"}`, `root ::= root`.

    Both libraries compile a language without texts; a model that is asked to write one has nothing to sample from.
    A language that turns out to be empty only further on is not seen here.
    """
    bitmask = torch.zeros(1, (vocab_size + 31) // 32, dtype=torch.int32)
    filled = grammar.matcher().fill(bitmask, 0)
    bitmask[:, -1] &= (1 << vocab_size % 32) - 1 if vocab_size % 32 else -1
    if filled and not bitmask.any():
        raise RuntimeError("the grammar matches nothing")


def one_line(error: str) -> str:
    """What a native library says, without its backtraces, its dumps of a state, and the lines of its own source.

    xgrammar: "[17:35:01] /cpp/grammar.cc:9: Check failed: (x) is false: words"; llguidance: "words\\n<state>...".
    """
    words = re.split(r"\n<\w+>|<backtrace>|\nStack trace", error)[0]
    words = re.sub(r"(\[[\d:]+\] )?\S+\.(cc|h):\d+: ", "", words)
    words = re.sub(r"Check failed: \(.*?\) is (false|true): ?", "", words)
    return " ".join(words.split()) or "it gives no reason"
