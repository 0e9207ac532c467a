"""Tokens -> text, a few at a time, so that the pieces always add up to the whole.

    stream = tokenizer.detokenizer()
    for token in generate(ids):
        print(stream.add([token]), end="")
    print(stream.finish())

Tests: `pytest tests/test_tokenizer.py` (property tests over any ids; cases in which simpler methods fail).
"""

import codecs
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizer import Tokenizer


class Detokenizer:
    """Streams the text of one sequence: all `add` results + `finish()` == `Tokenizer.decode(all ids)`, for any ids.

    The prefix-offset method of TGI and vLLM: decode a short window of recent tokens, and send what goes beyond the text
    of the window that was sent before. Here it keeps the sum exact, and its cost is O(1) a token, because:

    - Skipped tokens never enter the window. (As its first token, one makes the decoder strip the next word's space.)
    - One U+FFFD at the end may still become a character, and is held; any before it is final and is sent. What the
      last bytes are the start of depends on three bytes, so four tokens behind are context enough, however broken.
    - `<0xE2>` byte-fallback tokens: a run of them is decoded as one string, and a wrong byte turns ALL of the run into
      U+FFFD. So a run is held while it is valid UTF-8, until a text token ends it, and flows freely once it is broken.
    """

    CONTEXT, WINDOW = 4, 16  # the window grows to WINDOW tokens, then is cut back to CONTEXT: 2 decodes in 12, not in 2

    def __init__(self, tokenizer: "Tokenizer", skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._sent = 0  # how many characters of the window's text have gone out
        self._run: codecs.IncrementalDecoder | None = None  # validates the byte-fallback run that is open
        self._broken: list[int] | None = None  # the end of the run that broke it: context for the rest of that run
        self._unclean = ""  # text not yet cleaned up
        self._parts: list[str] = []

    @property
    def vocab_size(self) -> int:
        """Ids from here on have no text; `add` refuses them."""
        return self._tokenizer.vocab_size

    @property
    def text(self) -> str:
        """All text emitted so far."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def add(self, ids: Sequence[int]) -> str:
        """The text that these ids make certain, maybe "". Raises TokenizerError as `Tokenizer.decode` does."""
        self._tokenizer.check(ids)
        return self._emit("".join([self._step(i) for i in ids]))

    def finish(self) -> str:
        """The rest: what was held, an incomplete character as U+FFFD. Nothing may be added after it."""
        rest = self._decode()[self._sent :]
        self._sent += len(rest)
        return self._emit(rest, last=True)

    def _decode(self) -> str:
        return self._tokenizer.backend.decode(self._window, skip_special_tokens=False)

    def _step(self, id: int) -> str:
        token = self._tokenizer.backend.id_to_token(id)
        if id in self._skip or not token:
            return ""
        self._window.append(id)
        if self._extends_valid_run(token):
            return ""
        final = self._decode().removesuffix("\ufffd")
        new, self._sent = final[self._sent :], len(final)
        if len(self._window) > self.WINDOW:
            self._window = list(self._broken or self._window[-self.CONTEXT :])
            self._sent = len(self._decode().removesuffix("\ufffd"))
        return new

    def _extends_valid_run(self, token: str) -> bool:
        """Follows runs of byte-fallback tokens; True while a later byte could still change the text of the run."""
        byte = self._tokenizer._byte_fallback and re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
        if not byte:
            self._run = self._broken = None
            return False
        if self._broken is None:
            self._run = self._run or codecs.getincrementaldecoder("utf-8")()
            try:
                self._run.decode(bytes.fromhex(byte[1]))
                return True
            except UnicodeDecodeError:
                self._broken = self._window[-self.CONTEXT :]  # the wrong byte, and the character it broke off
        return False

    def _emit(self, text: str, last: bool = False) -> str:
        if self._tokenizer._clean:
            text = self._unclean + text
            cut = len(text) if last else max((m.end() for m in _CLEAN_CUT.finditer(text)), default=0)
            text, self._unclean = clean_up(text[:cut]), text[cut:]
        self._parts.append(text)
        return text


_CLEAN_UPS = (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")
_CLEAN_UPS += (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")
# Where no replacement, nor one that another makes possible (" n ' t"), can reach across: behind eight characters that
# are no space, or between a space and a character that no pattern has before its last.
_CLEAN_CUT = re.compile(r"(?<=[^ ]{8})|(?<=[^ 'nvr])(?= )")


def clean_up(text: str) -> str:
    """transformers' `clean_up_tokenization`, the same replacements in the same order."""
    for old, new in _CLEAN_UPS:
        text = text.replace(old, new)
    return text
