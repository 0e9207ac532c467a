"""What the engine says becomes what the OpenAI API answers: pieces for a stream, and the same pieces added up for a whole.

An answer has a choice for each sample of each prompt; `feed` takes a delta of one, and returns what is new of it.

    python -m pytest tests/test_openai_api.py
"""

import base64
import math
import sys
import time
from array import array
from collections.abc import Sequence
from typing import Any

from scheduler.request import TokenLogprob
from serving.chat import Chats, Prompt
from serving.logprobs import chat_logprobs, completion_logprobs
from serving.messages import Delta
from serving.openai_shapes import CompletionLogprobs, Message, Usage
from serving.tool_calls import CallDelta
from tokenizer import Tokenizer


class Tally:
    """The usage of a request, by what the deltas say. One prompt may have several samples, and counts once."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._completion = 0

    def add(self, prompt: int, delta: Delta) -> None:
        self._completion += len(delta.token_ids)
        if delta.index == 0 or prompt not in self._prompts:
            self._prompts[prompt] = delta.prompt_tokens, delta.cached_tokens

    @property
    def usage(self) -> Usage:
        prompt, cached = (
            (sum(column) for column in zip(*self._prompts.values(), strict=True)) if self._prompts else (0, 0)
        )
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion,
            "total_tokens": prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChatChoice:
    """One answer of a chat, as it comes."""

    def __init__(self, index: int, chats: Chats, prompt: Prompt):
        self.index = index
        self._reader = chats.reader(prompt)
        self._tokenizer = chats.tokenizer
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._logprobs: list[Any] | None = None
        self._finish_reason: str | None = None

    def first(self) -> dict[str, Any]:
        """What begins a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def feed(self, delta: Delta) -> list[dict[str, Any]]:
        """-> chunks: what is new of the message, if anything is; and the end."""
        message = self._read(delta)
        logprobs = None if delta.logprobs is None else chat_logprobs(self._tokenizer, said(delta))
        self._keep(message, logprobs)
        chunks = [self._chunk(message or {"content": ""}, logprobs)] if message or logprobs else []
        if delta.finish_reason is not None:
            called = self._reader.calls > 0 and delta.finish_reason == "stop"
            self._finish_reason = "tool_calls" if called else delta.finish_reason
            chunks.append(self._chunk({}, finish_reason=self._finish_reason))
        return chunks

    def whole(self) -> dict[str, Any]:
        """All of it, once it has ended."""
        message = self._message
        if message["content"] is None and "tool_calls" not in message:
            message["content"] = ""
        for call in message.get("tool_calls", ()):
            del call["index"]
        return {
            "index": self.index,
            "message": message,
            "logprobs": None if self._logprobs is None else {"content": self._logprobs},
            "finish_reason": self._finish_reason,
        }

    def _read(self, delta: Delta) -> Message:
        """Text -> thought, answer and calls."""
        parts = [self._reader.add(delta.text)]
        if delta.finish_reason is not None:
            parts.append(self._reader.finish())
        pieces = [piece for part in parts for piece in part.pieces]
        message: Message = {}
        if thought := "".join(part.thought for part in parts):
            message["reasoning_content"] = thought
        if content := "".join(piece for piece in pieces if isinstance(piece, str)):
            message["content"] = content
        calls: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            if isinstance(piece, CallDelta):
                _extend_call(calls, piece)
        if calls:
            message["tool_calls"] = list(calls.values())
        return message

    def _keep(self, message: Message, logprobs: list[Any] | None) -> None:
        """Add it to the whole."""
        for field in ("content", "reasoning_content"):
            if field in message:
                self._message[field] = (self._message.get(field) or "") + message[field]
        kept = self._message.setdefault("tool_calls", []) if "tool_calls" in message else []
        for call in message.get("tool_calls", ()):
            if call["index"] == len(kept):
                kept.append(call | {"function": dict(call["function"])})
            else:
                kept[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if logprobs is not None:
            self._logprobs = (self._logprobs or []) + logprobs

    def _chunk(
        self, delta: dict[str, Any], logprobs: list[Any] | None = None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        content = None if logprobs is None else {"content": logprobs}
        return {"index": self.index, "delta": delta, "logprobs": content, "finish_reason": finish_reason}


class CompletionChoice:
    """One completion, as it comes. echo: the prompt's text, if it is to come first; first_id: of its tokens."""

    def __init__(self, index: int, tokenizer: Tokenizer, echo: str = "", first_id: int = 0):
        self.index = index
        self._tokenizer, self._echo, self._first_id = tokenizer, echo, first_id
        self._text, self._finish_reason = "", None
        self._offset = len(echo)
        self._logprobs: CompletionLogprobs | None = None

    def feed(self, delta: Delta) -> list[dict[str, Any]]:
        """-> a chunk, if anything is new."""
        text, self._echo = self._echo + delta.text, ""
        logprobs = None
        if delta.logprobs is not None:
            logprobs = completion_logprobs(self._tokenizer, said(delta), self._offset)
            self._offset += sum(map(len, logprobs["tokens"]))
            if delta.prompt_logprobs is not None:
                echoed = completion_logprobs(self._tokenizer, [self._first_id, *delta.prompt_logprobs], 0)
                most = len(text) - len(delta.text)  # what begins a prompt may have no text in it
                echoed["text_offset"] = [min(at, most) for at in echoed["text_offset"]]
                logprobs = {name: values + logprobs[name] for name, values in echoed.items()}
            self._keep(logprobs)
        self._text += text
        self._finish_reason = delta.finish_reason
        if not text and delta.finish_reason is None and not (logprobs and logprobs["tokens"]):
            return []
        return [{"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}]

    def whole(self) -> dict[str, Any]:
        """All of it, once it has ended."""
        return {
            "index": self.index,
            "text": self._text,
            "logprobs": self._logprobs,
            "finish_reason": self._finish_reason,
        }

    def _keep(self, logprobs: CompletionLogprobs) -> None:
        if self._logprobs is None:
            self._logprobs = {name: [] for name in logprobs}
        for name, values in logprobs.items():
            self._logprobs[name] += values


def said(delta: Delta) -> Sequence[TokenLogprob]:
    """The logprobs of what is text: the token that only ends a text is none."""
    ended_by_token = delta.finish_reason == "stop" and isinstance(delta.stop_reason, int)
    return delta.logprobs[:-1] if ended_by_token else delta.logprobs


def embedding(values: list[float], as_base64: bool) -> list[float] | str:
    """At length 1, as the OpenAI API has them."""
    length = math.hypot(*values) or 1.0
    unit = array("f", (x / length for x in values))
    if not as_base64:
        return unit.tolist()
    if sys.byteorder == "big":
        unit.byteswap()
    return base64.b64encode(unit.tobytes()).decode()


def envelope(kind: str, id: str, model: str) -> dict[str, Any]:
    """What every chunk and every answer begins with."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def _extend_call(calls: dict[int, dict[str, Any]], piece: CallDelta) -> None:
    """Pieces of one call that have come at once are one piece."""
    call = calls.setdefault(piece.index, {"index": piece.index, "function": {"arguments": ""}})
    if piece.id is not None:
        call |= {"id": piece.id, "type": "function"}
        call["function"] = {"name": piece.name, "arguments": ""}
    call["function"]["arguments"] += piece.arguments
