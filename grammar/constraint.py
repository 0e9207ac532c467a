"""What limits the tokens of one request, as the loop sees it: a grammar, or a function of the caller's.

A step asks `next` once for each constrained row, while the device computes the logits: which tokens may come, and whether
a choice is left at all. There are three ways to need no sampling: the grammar forces what comes (jump.py), the text is
complete and nothing may follow, or it must be brought to its end before the tokens run out (finish.py).

    python -m pytest tests/test_grammar_engine.py
"""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from errors import UserError
from grammar.finish import Finisher
from grammar.jump import forced_tokens
from grammar.matcher import Matcher
from grammar.vocabulary import Vocabulary

# An ambiguous grammar can be slower with each token. Seconds of the processor's: a busy machine is not the grammar's doing.
SLOW, MOST_SLOW = 0.1, 20  # seconds of an answer, and how many may take longer


class Constraint(Protocol):
    def next(self, tokens: Sequence[int], remaining: int, words: np.ndarray) -> list[int] | None:
        """Write what may come next to words [ceil(V / 32)] int32, a bit for each token.

        tokens: prompt and output so far; remaining: how many more there may be. -> tokens that need no sampling (words
        then allow only the first), maybe []. None: the text is whole and ends here. UserError, RuntimeError: it cannot go on.
        """

    def accept(self, token: int) -> bool:
        """Go on by one token. False: it is not allowed."""

    @property
    def whole(self) -> bool:
        """Is the text whole, and was it asked for to be brought to an end?"""


class GrammarConstraint:
    """The matcher of one request, and how it is used."""

    def __init__(self, matcher: Matcher, vocabulary: Vocabulary, jump: bool, finisher: Finisher | None):
        self.matcher, self.vocabulary, self.jump, self.finisher = matcher, vocabulary, jump, finisher
        self._goes_on = goes_on(vocabulary)
        self._scratch = torch.empty(1, len(self._goes_on), dtype=torch.int32)
        self._slow = 0

    def next(self, tokens: Sequence[int], remaining: int, words: np.ndarray) -> list[int] | None:
        start = time.thread_time()
        answer = self._next(tokens, remaining, words)
        self._slow += time.thread_time() - start > SLOW
        if self._slow > MOST_SLOW:
            raise UserError(
                f"the grammar is too slow: {MOST_SLOW} times it took more than {SLOW} s to say what may come next"
            )
        return answer

    def _next(self, tokens: Sequence[int], remaining: int, words: np.ndarray) -> list[int] | None:
        matcher = self.matcher
        if matcher.ended:
            return None
        if not matcher.fill(torch.from_numpy(words)[None], 0):
            words.fill(-1)
        if not (words & self._goes_on).any():
            if matcher.complete:
                return None
            raise UserError("the grammar allows no token")
        forced = self._forced(tokens, remaining)
        if forced:
            allow_only(words, forced[0])
        return forced

    def _forced(self, tokens: Sequence[int], remaining: int) -> list[int]:
        if self.jump and (forced := forced_tokens(self.matcher, self.vocabulary, tokens, self._scratch)):
            return forced
        last = self.finisher and self.finisher.next(self.matcher, remaining, self._scratch)
        return [] if last is None else [last]

    def accept(self, token: int) -> bool:
        return self.matcher.accept(token)

    @property
    def whole(self) -> bool:
        if not self.matcher.complete or self.matcher.ended:
            return self.matcher.ended
        if self.finisher is not None:
            return True
        self.matcher.fill(self._scratch, 0)
        return not (self._scratch.numpy()[0] & self._goes_on).any()


@lru_cache(maxsize=2)
def goes_on(vocabulary: Vocabulary) -> np.ndarray:
    """The bits [ceil(V / 32)] int32 of all tokens but those that end a text. Bits behind the last token mean nothing in a mask."""
    tokens = np.zeros(-(-len(vocabulary) // 32) * 32, dtype=bool)
    tokens[: len(vocabulary)] = True
    tokens[vocabulary.stop_ids] = False
    return np.packbits(tokens, bitorder="little").view(np.int32)


class AllowedTokens:
    """A function of the caller's: the ids so far -> those that may come next."""

    whole = False

    def __init__(self, ask: Callable[[list[int]], Sequence[int]], check: Callable[[Sequence[int]], None]):
        """check: raises for ids that are none."""
        self.ask, self.check = ask, check

    def next(self, tokens: Sequence[int], remaining: int, words: np.ndarray) -> list[int]:
        allowed = list(self.ask(list(tokens)))
        self.check(allowed)
        if not allowed:
            raise UserError("allowed_tokens_fn allows no token")
        bits = np.zeros(len(words) * 32, dtype=bool)
        bits[[int(i) for i in allowed]] = True
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)
        return []

    def accept(self, token: int) -> bool:
        return True


def allow_only(words: np.ndarray, token: int) -> None:
    words.fill(0)
    words.view(np.uint32)[token // 32] = 1 << token % 32
