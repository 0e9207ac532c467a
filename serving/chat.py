"""A chat becomes a prompt: rendered by the checkpoint's template, with what the answer must be.

Three things meet here. Tools bring a structural tag, which keeps calls to those tools and their schemas (grammar/tools.py). A
schema or another constraint may stand beside them: then the answer is either. And where the model thinks first, neither begins
before the thought has ended.

    python -m pytest tests/test_openai_chat.py
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import reasoning
from errors import UserError
from grammar import harmony as harmony_format
from grammar import tag
from grammar.tools import tool_notation
from reasoning import Reasoning
from serving import harmony
from serving.api_errors import ApiError
from serving.harmony import Harmony
from serving.openai_protocol import ChatRequest, json_text
from serving.reader import Reader, ThoughtsThenCalls
from serving.tool_calls import ALIASES, NOTATIONS, ToolCalls
from tokenizer import Tokenizer

HARMONY = "harmony"  # the notation's name
TEXT_ARGUMENTS = ("deepseek_r1", "deepseek_v3_1")  # whose templates write a call's arguments out as text
# variables of a template
OURS = frozenset(("messages", "tools", "add_generation_prompt", "reasoning_effort", "documents"))


@dataclass(frozen=True)
class Prompt:
    """What the engine is asked, and how its text is to be read."""

    ids: list[int]
    params: dict[str, Any]  # fields of SamplingParams
    tools: list[dict[str, Any]]  # that may be called; none if tool_choice is "none"
    thought_begun: bool | None  # has the prompt begun the thought, or ended it?


class Chats:
    """The chats of one checkpoint. UserError for a parser that there is not."""

    def __init__(self, tokenizer: Tokenizer, tool_call_parser: str | None = None, reasoning_parser: str | None = None):
        """How the model says calls and thoughts. None: as its chat template tells; of thoughts only gpt-oss's does."""
        _refuse_unknown("tool_call_parser", tool_call_parser, {*NOTATIONS, HARMONY, *harmony.PARSERS})
        _refuse_unknown("reasoning_parser", reasoning_parser, {*reasoning.PARSERS, *harmony.PARSERS})
        self.tokenizer, self.template = tokenizer, tokenizer.chat_template or ""
        notation = tool_call_parser or (
            HARMONY if reasoning_parser in harmony.PARSERS else tool_notation(self.template)
        )
        notation = HARMONY if notation in harmony.PARSERS else ALIASES.get(notation, notation)
        self.notation = notation if notation in NOTATIONS or notation == HARMONY else None
        self.harmony = notation == HARMONY
        self.thinks = reasoning_parser or (harmony.PARSERS[0] if self.harmony else "off")
        if self.harmony != (self.thinks in harmony.PARSERS):
            raise UserError(
                f"tool_call_parser is {tool_call_parser or self.notation} and reasoning_parser is {self.thinks}; gpt-oss says "
                "calls and thoughts in one format, and both must be gpt-oss"
            )
        self._control = {tokenizer.backend.id_to_token(i) for i in tokenizer.special_ids}

    def prompt(self, body: ChatRequest) -> Prompt:
        """UserError or ApiError says what cannot be had. May take a while: not for the event loop."""
        params = body.params()
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.calls_tools else []
        messages = [message.for_template(self.notation in TEXT_ARGUMENTS) for message in body.messages]
        messages = list(map(harmony.for_template, messages)) if self.harmony else messages
        text = self.tokenizer.render_chat(messages, tools or None, **self._variables(body))
        begun = reasoning.thought_begun(text)
        if begun is None and reasoning.THINKS_AT_ONCE.get(self.thinks):
            begun = True
        if tools:
            self._limit_calls(params, body, tools, begun)
        elif self.thinks != "off" and (form := _take_format(params)) is not None:
            params["structural_tag"] = json_text(
                _tag(self._behind_thought(self._answer(form), begun)), "response_format"
            )
        if self.harmony or (self.thinks != "off" and self._control & {reasoning.BEGIN, reasoning.END}):
            params["skip_special_tokens"] = False
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return Prompt(ids, params, tools, begun)

    def reader(self, prompt: Prompt) -> Reader:
        """What takes the thought and the calls out of one text."""
        if self.harmony:
            return Harmony(prompt.tools)
        thinking = None if self.thinks == "off" else Reasoning(self.thinks, prompt.thought_begun)
        return ThoughtsThenCalls(thinking, ToolCalls(self.notation, prompt.tools) if prompt.tools else None)

    def _variables(self, body: ChatRequest) -> dict[str, Any]:
        """What a request gives to the template. ApiError for a name that the template does not have."""
        given = {f"chat_template_kwargs.{name}": name for name in body.chat_template_kwargs or ()}
        given |= {"reasoning_effort": "reasoning_effort"} if body.reasoning_effort is not None else {}
        for field, name in given.items():
            ours = name in OURS and field != name
            if ours or not re.search(rf"\b{re.escape(name)}\b", self.template):
                raise ApiError(
                    400, f"{field} is not supported: this model's chat template has no such variable", param=field
                )
        effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
        return (body.chat_template_kwargs or {}) | effort

    def _limit_calls(
        self, params: dict[str, Any], body: ChatRequest, tools: list[dict[str, Any]], begun: bool | None
    ) -> None:
        """Put into `params` what keeps the answer to these tools, and to what else it must be."""
        if self.notation is None:
            raise UserError("tools: this model's chat template has no tool calls of a known notation")
        choice = body.tool_choice or "auto"
        choice = choice if isinstance(choice, str) else choice.model_dump()
        either = _take_format(params) if choice == "auto" else None
        if choice != "auto":
            _take_format(params)  # the answer is a call, and nothing beside it
        thinks = self.thinks != "off" or reasoning.BEGIN in self.template
        form = {
            "type": tag.TOOL_CALLS,
            "notation": self.notation,
            "tools": [_bare(tool) for tool in tools],
            "tool_choice": choice,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": "enabled" if begun else "auto" if begun is None and thinks else "disabled",
        }
        if either is not None:  # both stand behind the thought
            form |= {"tool_choice": "required", "reasoning": "disabled"}
            form = self._behind_thought({"type": "or", "elements": [self._answer(either), form]}, begun)
        params["structural_tag"] = json_text(_tag(form), "tools")
        params["skip_special_tokens"] = False  # some notations have them; a grammar allows no others

    def _answer(self, form: dict[str, Any]) -> dict[str, Any]:
        return harmony_format.answer(form) if self.harmony else form

    def _behind_thought(self, form: dict[str, Any], begun: bool | None) -> dict[str, Any]:
        if self.harmony:
            return harmony_format.behind_thoughts(form)
        if begun is False or self.thinks == "off":
            return form
        marks = [reasoning.BEGIN, reasoning.END]
        free = {"type": "any_text", "excludes": marks}
        thought = {"type": "tag", "begin": "" if begun else reasoning.BEGIN, "content": free, "end": reasoning.END}
        thought = thought if begun else {"type": "optional", "content": thought}
        return {"type": "sequence", "elements": [thought, {"type": "regex", "pattern": r"\n{0,2}"}, form]}


def _bare(tool: dict[str, Any]) -> dict[str, Any]:
    """What a grammar needs of a tool."""
    function = {name: value for name, value in tool["function"].items() if name != "description"}
    return {"type": "function", "function": function}


def _refuse_unknown(name: str, value: str | None, known: set[str]) -> None:
    if value is not None and value not in known:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(sorted(known))}")


def _tag(form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": form}


def _take_format(params: dict[str, Any]) -> dict[str, Any] | None:
    """What the answer must be, taken out of `params` as a format of structural tags; None if that is nothing."""
    if params.pop("json_object", False):
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if (schema := params.pop("json_schema", None)) is not None:
        return {"type": "json_schema", "json_schema": _parsed(schema, "json_schema")}
    if (pattern := params.pop("regex", None)) is not None:
        return {"type": "regex", "pattern": pattern}
    if (grammar := params.pop("ebnf", None)) is not None:
        return {"type": "grammar", "grammar": grammar}
    if (choices := params.pop("choices", None)) is not None:
        return {"type": "or", "elements": [{"type": "const_string", "value": choice} for choice in choices]}
    if (document := params.pop("structural_tag", None)) is not None:
        document = _parsed(document, "structural_tag")
        if not isinstance(document, dict) or not isinstance(document.get("format"), dict):
            raise UserError('structural_tag must be {"type": "structural_tag", "format": ...}')
        return document["format"]
    return None


def _parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{field} is not valid JSON: {error}") from error
