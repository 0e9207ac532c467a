"""Thoughts apart from the answer: <think>...</think> becomes `reasoning_content`, piece by piece as the text comes.

    thinking = Reasoning("qwen3", thought_begun(prompt))
    thought, answer = thinking.add("so 4.</think>\\n\\nIt is 4.")

However the text is cut, the pieces add up to the same. White space around a thought belongs to nobody.

    python -m pytest tests/test_reasoning.py
"""

BEGIN, END = "<think>", "</think>"
# a model's text is a thought from its first letter, or where it says BEGIN; unless the prompt knows better
THINKS_AT_ONCE = {"deepseek_r1": True, "qwen3": False}
PARSERS = (*THINKS_AT_ONCE, "off")


def thought_begun(prompt: str) -> bool | None:
    """Does a prompt end inside of a thought (True), right behind one (False), or does it not say (None)?"""
    end = prompt.rstrip()
    return True if end.endswith(BEGIN) else False if end.endswith(END) else None


class Reasoning:
    """Splits one text. `parser` is one of PARSERS but "off"; `begun` is what `thought_begun` says of the prompt."""

    def __init__(self, parser: str, begun: bool | None = None):
        thinks = THINKS_AT_ONCE[parser] if begun is None else begun
        self._default = "thought" if thinks else "answer"  # if BEGIN does not come
        self._state = "answer" if begun is False else "start"
        self._held = ""  # what may be part of a mark, or white space at the end of a thought
        self._any_thought = False

    def add(self, text: str) -> tuple[str, str]:
        """-> the thought and the answer that have become certain; either may be empty."""
        self._held += text
        if self._state == "start":
            self._look_for_begin()
        thought = self._take_thought() if self._state == "thought" else ""
        if self._state == "gap" and (rest := self._held.lstrip()):
            self._state, self._held = "answer", rest
        answer = ""
        if self._state == "answer":
            answer, self._held = self._held, ""
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """The rest: nothing more will come."""
        state = self._default if self._state == "start" else self._state
        held, self._held = self._held, ""
        return (self._trimmed(held.rstrip()), "") if state == "thought" else ("", "" if state == "gap" else held)

    def _look_for_begin(self) -> None:
        start = self._held.lstrip()
        if start.startswith(BEGIN):
            self._state, self._held = "thought", start.removeprefix(BEGIN)
        elif not BEGIN.startswith(start):
            self._state = self._default

    def _take_thought(self) -> str:
        text, mark, rest = self._held.partition(END)
        if mark:
            self._state, self._held = "gap", rest
            return self._trimmed(text.rstrip())
        part = next((n for n in range(len(END) - 1, 0, -1) if text.endswith(END[:n])), 0)
        certain = text[: len(text) - part].rstrip()
        self._held = text[len(certain) :]
        return self._trimmed(certain)

    def _trimmed(self, thought: str) -> str:
        """Without the white space at the beginning of all."""
        thought = thought if self._any_thought else thought.lstrip()
        self._any_thought = self._any_thought or bool(thought)
        return thought
