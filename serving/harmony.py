"""gpt-oss's Harmony: thoughts, answer and calls out of one text, piece by piece as it comes.

    reader = Harmony(tools)
    reader.add("<|channel|>analysis<|message|>So 4.<|end|><|start|>assistant<|channel|>final<|mess")

An answer is a list of messages; the head of each says to whom it goes. The channel `analysis` is a thought, and so is a message to
anybody who is not one of the tools; `functions.NAME` is a call; all else is for the user. Between two messages of a kind there
is a line break. What has no head is for the user as it is. However the text is cut, the pieces add up to the same.

The marks are control tokens: they must not be left out of the text (`skip_special_tokens`).

    python -m pytest tests/test_harmony.py
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from grammar.harmony import CALL, CHANNEL, END, MESSAGE, RETURN, START
from serving.reader import Said
from serving.tool_calls import CallDelta, new_call_id

PARSERS = ("gpt-oss", "openai", "openai_gptoss")  # what SGLang and vLLM call it
MARKS = (END, RETURN, CALL, START, CHANNEL)  # that end a message; with the last two another one has begun
MARK = re.compile("|".join(map(re.escape, MARKS)))
HEADS = (START, CHANNEL, "to=")  # what a head begins with: the prompt may have said <|start|>assistant already
MOST_HEAD = 256  # characters
RECIPIENT, CHANNEL_NAME = re.compile(r"\bto=([^\s<]+)"), re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
THOUGHT, ANSWER, CALLED = "thought", "answer", "call"


class Harmony:
    """Reads one text. `tools` as in the request."""

    def __init__(self, tools: Sequence[dict[str, Any]], new_id: Callable[[], str] = new_call_id):
        self._names, self._new_id = {tool["function"]["name"] for tool in tools}, new_id
        self._held = ""
        self._kind: str | None = None  # of the message that is being read; None: its head is
        self._empty = True  # nothing has come of this message
        self._before: set[str] = set()  # kinds of which there is something
        self._said = Said()
        self.calls = 0

    def add(self, text: str) -> Said:
        """What has become certain."""
        self._held += text
        while self._head() if self._kind is None else self._body():
            pass
        said, self._said = self._said, Said()
        return said

    def finish(self) -> Said:
        """The rest: nothing more will come. Of a head that is not whole there is none."""
        if self._kind is not None:
            self._say(self._held)
        elif "<" not in self._held and self._held.strip():
            self._begin(ANSWER)
            self._say(self._held)
        self._held, said = "", self._said
        return said

    def _head(self) -> bool:
        held = self._held.lstrip()
        if (begin := next((head for head in HEADS if held.startswith(head)), None)) is not None:
            at = held.find(MESSAGE, 0, MOST_HEAD)
            if at >= 0:
                self._held = held[at + len(MESSAGE) :]
                self._begin(*self._addressed(held[:at]))
                return True
            if len(held) < MOST_HEAD:
                return False
            self._begin(ANSWER)  # with a mark that marks nothing
            self._say(begin)
            self._held = held[len(begin) :]
            return True
        if any(head.startswith(held) for head in HEADS):
            return False
        self._begin(ANSWER)
        return True

    def _body(self) -> bool:
        if (mark := MARK.search(self._held)) is not None:
            self._say(self._held[: mark.start()])
            if self._kind == CALLED and self._empty:
                self._say("{}")
            behind = mark.start() if mark[0] in HEADS else mark.end()
            self._held, self._kind = self._held[behind:], None
            return True
        at = self._held.rfind("<")
        part = at if at >= 0 and any(m.startswith(self._held[at:]) for m in MARKS) else len(self._held)
        self._say(self._held[:part])
        self._held = self._held[part:]
        return False

    def _addressed(self, head: str) -> tuple[str, str]:
        """What kind of message has this head, and of a call the function's name."""
        channel = CHANNEL_NAME.search(head)
        if (recipient := RECIPIENT.search(head)) is not None:
            name = recipient[1].removeprefix("functions.")
            return (CALLED, name) if name in self._names else (THOUGHT, "")
        return (THOUGHT if channel is not None and channel[1] == "analysis" else ANSWER), ""

    def _begin(self, kind: str, name: str = "") -> None:
        self._kind, self._empty = kind, True
        if kind == CALLED:
            self._said.pieces.append(CallDelta(self.calls, self._new_id(), name))
            self.calls += 1

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._kind == CALLED:
            self._said.pieces.append(CallDelta(self.calls - 1, arguments=text))
        else:
            text = "\n" + text if self._empty and self._kind in self._before else text
            if self._kind == THOUGHT:
                self._said.thought += text
            else:
                self._said.pieces.append(text)
        self._empty = False
        self._before.add(self._kind)


def for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A message of a chat as gpt-oss's template has it: it calls a thought `thinking`, and beside a call it takes no words."""
    thought = message.pop("reasoning_content", None)
    if thought and message.get("tool_calls") and message.get("content"):
        thought += "\n" + message.pop("content")
    return message | ({"thinking": thought} if thought else {})
