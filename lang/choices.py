"""How `select` decides between texts, once it knows how likely the model finds each of their tokens.

    s += select("tool", ["calculator", "search engine"], choices_method=greedy_token_selection)

A method gives each choice a list of numbers; the choice whose list is greatest wins, as lists compare: by the first number, by the
second where the first are equal, and so on. Of equals it is the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass
class Score:
    """One choice: its tokens as (logprob, id, text), and the logprobs that they have without the prompt."""

    tokens: list[tuple[float, int | None, str | None]]
    unconditional: list[float] | None = None

    @property
    def logprobs(self) -> list[float]:
        return [logprob for logprob, *_ in self.tokens]


ChoicesMethod = Callable[[Sequence[Score]], list[list[float]]]


def token_length_normalized(scores: Sequence[Score]) -> list[list[float]]:
    """The mean logprob of a choice's tokens."""
    return [[fmean(score.logprobs)] for score in scores]


def greedy_token_selection(scores: Sequence[Score]) -> list[list[float]]:
    """Token by token. A choice that has ended goes on with its mean, so that it can be compared with longer ones."""
    longest = max(len(score.tokens) for score in scores)
    rows = [score.logprobs for score in scores]
    return [row + [fmean(row)] * (longest - len(row)) for row in rows]


def unconditional_likelihood_normalized(scores: Sequence[Score]) -> list[list[float]]:
    """The mean of what the prompt adds to each token's logprob (EleutherAI, Multiple Choice Normalization, 2021).

    Without a prompt nothing is known of the first token: its logprob counts as 0.
    """
    return [[fmean(a - b for a, b in zip(s.logprobs, s.unconditional, strict=True))] for s in scores]


unconditional_likelihood_normalized.needs_unconditional = True


def decide(choices: Sequence[str], scores: Sequence[Score], method: ChoicesMethod) -> tuple[str, dict[str, Any]]:
    """-> the choice, and what led to it."""
    marks = method(scores)
    best = max(range(len(choices)), key=marks.__getitem__)
    return choices[best], {
        "scores": marks,
        "normalized_prompt_logprobs": [fmean(score.logprobs) for score in scores],
        "input_token_logprobs": [score.tokens for score in scores],
        "unconditional_token_logprobs": [score.unconditional for score in scores],
    }
