"""What the user gets: text that grows token by token, and the records handed out. Names as in vLLM.

python -m pytest tests/test_output.py
"""

from dataclasses import dataclass, field
from typing import Any

from detokenizer import Detokenizer
from scheduler.request import RequestMetrics, TokenLogprob


class TextStream:
    """Turns tokens into text that may be shown: whole characters only, and nothing that may still become a stop string.

    A stop string ends the text at its first character; it may begin in one token and end in another.
    """

    def __init__(self, detokenizer: Detokenizer | None, stops: list[str]):
        self.detokenizer, self.stops = detokenizer, stops
        self.text = ""  # all of it, without the stop string
        self.stopped_by: str | None = None
        self._shown = 0
        self._closed = False
        self._search_from = 0
        self._longest = max(map(len, stops), default=0)

    def add(self, token: int, may_stop: bool = True) -> None:
        """`may_stop` False: what is text so far cannot be part of a stop string (min_new_tokens)."""
        if self.detokenizer is None or token >= self.detokenizer.vocab_size:  # padding of the model's vocabulary
            return
        new = self.detokenizer.add([token])
        if may_stop:
            self._extend(new)
        else:
            self.text += new
            self._search_from = len(self.text)

    def finish(self) -> None:
        """No more tokens: what was held back for a character's missing bytes is text now."""
        self._closed = True
        if self.detokenizer is not None and self.stopped_by is None:
            self._extend(self.detokenizer.finish())

    def take(self) -> str:
        """The text that has become certain since the last call."""
        end = len(self.text) - (0 if self._closed or self.stopped_by else self._held_back())
        delta, self._shown = self.text[self._shown : end], max(end, self._shown)
        return delta

    def _extend(self, new: str) -> None:
        start = max(self._search_from, len(self.text) - self._longest + 1)  # a stop string must end inside `new`
        self.text += new
        found = [(at, stop) for stop in self.stops if (at := self.text.find(stop, start)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        return max(
            (n for s in self.stops for n in range(1, min(len(s), len(self.text) + 1)) if self.text.endswith(s[:n])),
            default=0,
        )


@dataclass
class CompletionOutput:
    """One of the n texts. `stop_reason` is the stop id or string that ended it, or the error's message."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    parsed: Any = None  # an object, where json_schema is a pydantic model and the text is whole
    embedding: list[float] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass
class RequestOutput:
    """All of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None  # of all tokens but the first


@dataclass
class Delta:
    """What one step added to sample `index` of a request; the last one of a sample carries its finish_reason."""

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None  # of token_ids, if they were asked for
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those: found in the tree
    prompt_logprobs: list[TokenLogprob] | None = None  # with the first token, if they were asked for
    embedding: list[float] | None = None  # instead of all tokens, if it was asked for
    error: BaseException | None = None  # that ended it, if it was one; a UserError: what was asked for was refused
