"""What gpt-oss may say, as formats of a structural tag: OpenAI's Harmony, in which an answer is a list of messages.

    <|channel|>analysis<|message|>It is about Oslo.<|end|><|start|>assistant
    <|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>

(without the line breaks). Thoughts come first, in the channel `analysis`, with words for the user between them in `commentary`;
then one call, or the answer in the channel `final`, which ends with a token that ends the text. xgrammar has a builder for this
notation, too: with that one a call that is required may be left out, and the head above, which is what the model writes by
itself, is not among those that it allows.

Source: OpenAI, "OpenAI harmony response format" (2025).

    python -m pytest tests/test_grammar_harmony.py
"""

from collections.abc import Sequence
from typing import Any

Format = dict[str, Any]

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
FINAL = f"{CHANNEL}final{MESSAGE}"
HEADS = (  # of a call: what the model writes, and what it has read in its own template
    f"{CHANNEL}commentary to=functions.{{}} {CONSTRAIN}json{MESSAGE}",
    f"{CHANNEL}commentary to=functions.{{}}{CONSTRAIN}json{MESSAGE}",
    f" to=functions.{{}}{CHANNEL}commentary {CONSTRAIN}json{MESSAGE}",
    f" to=functions.{{}}{CHANNEL}commentary json{MESSAGE}",
)


def behind_thoughts(form: Format) -> Format:
    """Any number of thoughts and of words between them, and then what `form` says."""
    words = {"type": "any_text", "excludes": [START, CHANNEL, CONSTRAIN, MESSAGE, CALL]}
    channels = [f"{CHANNEL}{name}{MESSAGE}" for name in ("analysis", "commentary")]
    message = {"type": "or", "elements": [{"type": "tag", "begin": c, "content": words, "end": END} for c in channels]}
    messages = {"type": "star", "content": {"type": "sequence", "elements": [message, _const(f"{START}assistant")]}}
    return {"type": "sequence", "elements": [messages, form]}


def answer(form: Format | None = None) -> Format:
    """The last message: any text, or what `form` says."""
    words = {"type": "any_text", "excludes": [START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL]}
    return {"type": "sequence", "elements": [_const(FINAL), form or words]}


def call(tool: dict[str, Any]) -> Format:
    """A call of this function, however it begins."""
    heads = [_const(head.format(tool["function"]["name"])) for head in HEADS]
    arguments = {"type": "json_schema", "json_schema": tool["function"]["parameters"]}
    return {"type": "sequence", "elements": [{"type": "or", "elements": heads}, arguments, _const(CALL)]}


def tool_format(tools: Sequence[dict[str, Any]], choice: str | dict[str, Any], thinks: bool) -> Format:
    """tools and choice as grammar.tools has checked them. thinks: thoughts may come first."""
    if isinstance(choice, dict):
        tools = [tool for tool in tools if tool["function"]["name"] == choice["function"]["name"]]
    forms = [] if choice == "none" else [call(tool) for tool in tools]
    if choice in ("none", "auto"):
        forms.append(answer())
    form = {"type": "or", "elements": forms}
    return behind_thoughts(form) if thinks else form


def _const(text: str) -> Format:
    return {"type": "const_string", "value": text}
