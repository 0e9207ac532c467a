"""Speculative calls: a completion runs past the first stop, and what is left over serves what the program says next.

    @function(num_api_spec_tokens=64)
    def character(s):
        s += "Name:" + gen("name", stop="\\n") + "\\nBirthday:" + gen("birthday", stop="\\n")

One call brings the name, and goes on with "\\nBirthday: ..."; if that is what the program says too, the birthday is there already.
If not, it is dropped, and the next generation is a call of its own. (SGLang, section 3.3 of Zheng et al., 2024.)

Nothing is taken for a value that the plain call could not have given: a stop that did not come, more tokens than were asked
for, other parameters, or a constraint lead to the plain call. A chat API does not go on from words put into the assistant's mouth:
there the whole turn is asked for, and must begin with the program's words.

    python -m pytest tests/test_lang_remote.py
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lang.backend import Backend, BackendError, Cancel, Piece
from lang.transcript import Transcript

SLICED = ("stop", "max_new_tokens")  # what a surplus can be cut to
FREE = frozenset((*SLICED, "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "seed"))


class Surplus:
    """What the last call of a state has brought beyond what was needed."""

    def __init__(self, tokens: int):
        self.tokens = tokens
        self._drop()

    def _drop(self) -> None:
        self._text, self._params, self._meta, self._ended = "", None, {}, False

    def meet(self, literal: str) -> None:
        """The program says this itself."""
        if self._text.startswith(literal):
            self._text = self._text[len(literal) :]
        else:
            self._drop()

    def generate(self, backend: Backend, prompt: Transcript, params: dict[str, Any], cancel: Cancel) -> Iterator[Piece]:
        wanted = {name: value for name, value in params.items() if name not in SLICED}
        if self._params == wanted and (value := self._cut(params)) is not None:
            spared = self._meta.get("prompt_tokens") or 0
            backend.token_usage.add(saved_calls=1, saved_prompt_tokens=spared)
            yield Piece(value, self._meta | {"speculated": True})
            return
        self._drop()
        if params.get("stop") and params.keys() <= FREE:
            most = max(self.tokens, params["max_new_tokens"])
            piece = self._ask(backend, prompt, wanted | {"max_new_tokens": most}, cancel)
            self._text, self._params, self._meta = piece.text, wanted, piece.meta
            self._ended = (piece.meta.get("finish_reason") or {}).get("type") == "stop"
            if (value := self._cut(params)) is not None:
                yield Piece(value, self._meta)
                return
            self._drop()
        yield from backend.generate(prompt, params, False, cancel)

    def _cut(self, params: dict[str, Any]) -> str | None:
        """The beginning of the surplus, as far as these parameters go; None if that cannot be told."""
        found = [at for stop in params.get("stop", ()) if (at := self._text.find(stop)) >= 0]
        if not found and not self._ended:
            return None
        at = min(found, default=len(self._text))
        tokens = min(len(self._text[:at].encode()), self._meta.get("completion_tokens") or 2**31)  # at most
        if tokens > params["max_new_tokens"]:
            return None
        value, self._text = self._text[:at], self._text[at:]
        return value

    def _ask(self, backend: Backend, prompt: Transcript, params: dict[str, Any], cancel: Cancel) -> Piece:
        lead = prompt.turn if prompt.is_chat and not backend.continues_turns else ""
        if not lead:
            [piece] = backend.generate(prompt, params, False, cancel)
            return piece
        [piece] = backend.generate(replace(prompt, turn=""), params, False, cancel)
        text = piece.text.lstrip()
        if not text.startswith(lead.lstrip()):
            raise BackendError(f"the answer should begin with {lead!r}, as the program does; it is {text[:80]!r}")
        return replace(piece, text=text.removeprefix(lead.lstrip()))
