"""The mask step: while the device computes the logits of a batch, the host fills in what each row may take.

Rows without a constraint are left out, and keep a mask that allows all. The native fill lets go of the interpreter's lock, so many
rows are shared out to a pool of threads that is there from the start; a few are quicker without.

One buffer is enough, and it is pinned on a GPU: the loop fills the masks of a step when the one before has come home, and that
has read its masks by then.

    python -m pytest tests/test_grammar_engine.py
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from grammar.constraint import Constraint

FEW = 16  # rows for one thread


@dataclass(slots=True)
class Ask:
    """Row `index` of a batch: what limits it, its tokens so far, and how many more there may be."""

    index: int
    constraint: Constraint
    tokens: Sequence[int]
    remaining: int


Answer = list[int] | None | Exception  # of `Constraint.next`, or what it has raised


class MaskFiller:
    """Owns bitmask int32 [rows, ceil(V / 32)] on the host."""

    def __init__(self, rows: int, vocab_size: int, pinned: bool):
        self.bitmask = torch.full((rows, -(-vocab_size // 32)), -1, dtype=torch.int32, pin_memory=pinned)
        self._words = self.bitmask.numpy()
        self._filled: list[int] = []
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), thread_name_prefix="folio-masks")

    def fill(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer for each; the rows of those that gave none allow all."""
        self._words[self._filled] = -1
        self._filled = [ask.index for ask in asks]
        if len(asks) <= FEW:
            return self._answer(asks)
        parts = [asks[i : i + FEW] for i in range(0, len(asks), FEW)]
        return [answer for part in self._pool.map(self._answer, parts) for answer in part]

    def _answer(self, asks: Sequence[Ask]) -> list[Answer]:
        return [self._one(ask) for ask in asks]

    def _one(self, ask: Ask) -> Answer:
        try:
            return ask.constraint.next(ask.tokens, ask.remaining, self._words[ask.index])
        except Exception as error:  # whatever it is, it is this request's alone
            self._words[ask.index] = -1
            return error
