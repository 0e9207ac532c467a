"""What takes a model's text apart: the thought, the answer, and the calls in it, piece by piece as the text comes.

A model that thinks between marks and calls in an answer has two parsers, one behind the other (`ThoughtsThenCalls`); one that has
a format for all of it has one (harmony.py). Both say what is new as a `Said`.

    python -m pytest tests/test_openai_api.py
"""

from dataclasses import dataclass, field
from typing import Protocol

from reasoning import Reasoning
from serving.tool_calls import CallDelta, ToolCalls


@dataclass
class Said:
    """What has become certain of a text: some of its thought, and its answer as text and calls in their order."""

    thought: str = ""
    pieces: list[str | CallDelta] = field(default_factory=list)


class Reader(Protocol):
    """Of one text. calls: how many have begun."""

    calls: int

    def add(self, text: str) -> Said: ...

    def finish(self) -> Said:
        """The rest: nothing more will come."""


class ThoughtsThenCalls:
    """Either may be None: this model, or this request, has none."""

    def __init__(self, thinking: Reasoning | None, calls: ToolCalls | None):
        self._thinking, self._calls = thinking, calls

    @property
    def calls(self) -> int:
        return 0 if self._calls is None else self._calls.calls

    def add(self, text: str) -> Said:
        thought, answer = ("", text) if self._thinking is None else self._thinking.add(text)
        return Said(thought, [answer] if self._calls is None else self._calls.add(answer))

    def finish(self) -> Said:
        thought, answer = ("", "") if self._thinking is None else self._thinking.finish()
        return Said(thought, [answer] if self._calls is None else self._calls.add(answer) + self._calls.finish())
