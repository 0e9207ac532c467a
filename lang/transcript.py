"""The text of a state so far: plain, or the turns of a chat, of which the last may be open.

A chat becomes text through the chat template of whoever runs it; a remote API gets the messages as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from errors import UserError

Messages = list[dict[str, str]]
Render = Callable[[Messages, bool], str]  # messages -> text; True: up to where the assistant begins
MARK = "\ue000folio\ue001"  # private use: stands for what follows in a turn that is open


@dataclass
class Transcript:
    render: Render
    before: str = ""  # text that is no turn
    messages: Messages = field(default_factory=list)
    role: str | None = None  # of the open turn
    turn: str = ""  # its text
    rendered: int = 0  # messages that are part of `before`

    def copy(self) -> "Transcript":
        return replace(self, messages=list(self.messages))

    def add(self, text: str) -> None:
        if self.role is not None:
            self.turn += text
        elif text:
            if self.chat:  # text between two turns: what follows is a chat of its own
                self.before, self.rendered = self.text, len(self.messages)
            self.before += text

    def begin(self, role: str) -> None:
        if self.role is not None:
            raise UserError(f"a turn of the {role} begins inside of one of the {self.role}")
        self.role, self.turn = role, ""

    def end(self, role: str) -> None:
        if self.role != role:
            raise UserError(f"a turn of the {role} ends, but {self.role or 'none'} is open")
        self.messages.append({"role": role, "content": self.turn})
        self.role, self.turn = None, ""

    @property
    def chat(self) -> Messages:
        """The turns that are not plain text yet, but the open one."""
        return self.messages[self.rendered :]

    @property
    def is_chat(self) -> bool:
        return bool(self.chat) or self.role is not None

    @property
    def text(self) -> str:
        """All of it, up to where the next token would come."""
        if not self.is_chat:
            return self.before
        if self.role is None:
            return self.before + self.render(self.chat, False)
        if self.role == "assistant" and self.chat:
            return self.before + self.render(self.chat, True) + self.turn
        open_turn = {"role": self.role, "content": self.turn + MARK}
        return self.before + self.render([*self.chat, open_turn], False).partition(MARK)[0]
