"""Tool calls in a model's own notation: tools as the OpenAI API has them -> a structural tag that lets the model call them rightly.

Each family has learnt to say a call in another way: Qwen writes <tool_call> and JSON, Llama JSON alone, DeepSeek and Kimi have
tokens for it, GLM and MiniMax write XML. xgrammar has a builder for each; here a builder gets clean tools, and the notation is
known by what the chat template says.

    tag = tool_tag(tools, tool_notation(engine.tokenizer.chat_template), tool_choice="required")
    engine.generate(prompt, SamplingParams(structural_tag=tag))

python -m pytest tests/test_grammar_tools.py
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from errors import UserError
from grammar import harmony, tag

# xgrammar's name of a notation -> what is in every chat template that has it and in none of those below
MARKS = {
    "qwen_3_coder": ("<tool_call>", "<function="),
    "glm_4_7": ("<tool_call>", "<arg_key>"),
    "qwen_3": ("<tool_call>", '"arguments"'),
    "deepseek_v3_2": ("<｜DSML｜function_calls>",),
    "deepseek_r1": ("<｜tool▁calls▁begin｜>", "```json"),
    "deepseek_v3_1": ("<｜tool▁calls▁begin｜>",),
    "kimi": ("<|tool_calls_section_begin|>",),
    "minimax": ("<minimax:tool_call>",),
    "harmony": ("<|channel|>", "functions."),
    "cohere": ("<cofl:tool_call",),
    "llama": ('"parameters"', "<|eot_id|>"),
}
OTHERS = ("deepseek_v4", "deepseek_v4_1", "exaone", "kimi_k3", "mimo", "minimax_m3", "qwen_3_5")  # by name only
NOTATIONS = (*MARKS, *OTHERS)
ARGUMENTS = {"tools", "notation", "tool_choice", "parallel_tool_calls", "reasoning"}
MAX_TOOLS = 128  # of a request
MAX_CHARS = 256 << 10  # of tools, as JSON: a builder works in Python, and holds up whoever has the interpreter too
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)

Reasoning = Literal["enabled", "disabled", "auto"]


def tool_notation(chat_template: str | None) -> str | None:
    """How a model says its tool calls, by its chat template; None if that is not one of those known."""
    has = ((name, all(mark in (chat_template or "") for mark in marks)) for name, marks in MARKS.items())
    return next((name for name, found in has if found), None)


def tool_tag(
    tools: Sequence[dict[str, Any]],
    notation: str | None,
    *,
    tool_choice: str | dict[str, Any] = "auto",
    parallel_tool_calls: bool = True,
    reasoning: Reasoning = "auto",
) -> dict[str, Any]:
    """A structural tag: text in which each call is to one of the tools, with arguments of its schema.

    tools, tool_choice ("none", "auto", "required", or one function) and parallel_tool_calls are the OpenAI API's. A function
    without parameters, and one with "strict": false, takes any object. reasoning: whether thoughts come first; "enabled" if
    the prompt has begun them. UserError names what is wrong.
    """
    if notation not in NOTATIONS:
        raise UserError(
            "this model's chat template has no tool calls of a known notation"
            if notation is None
            else f"the notation of tool calls is {notation!r}; it must be one of {', '.join(sorted(NOTATIONS))}"
        )
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise UserError(f"tools is a {type(tools).__name__}; it must be a list")
    if len(tools) > MAX_TOOLS:
        raise UserError(f"tools has {len(tools)} functions; {MAX_TOOLS} is the limit")
    if reasoning not in get_args(Reasoning):
        raise UserError(f"reasoning is {reasoning!r}; it must be one of {', '.join(get_args(Reasoning))}")
    if not isinstance(parallel_tool_calls, bool):
        raise UserError(f"parallel_tool_calls is {parallel_tool_calls!r}; it must be true or false")
    clean = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    names = [tool["function"]["name"] for tool in clean]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"tools has two functions of the name {name!r}")
    choice = _choice(tool_choice, names)
    if notation == "harmony":
        return {"type": "structural_tag", "format": harmony.tool_format(clean, choice, reasoning != "disabled")}
    from xgrammar import get_model_structural_tag  # takes a second

    try:
        built = get_model_structural_tag(
            notation, clean, choice, reasoning=reasoning, parallel_tool_calls=parallel_tool_calls
        )
        return built.model_dump(mode="json", exclude_none=True)
    except (ValueError, RuntimeError) as error:  # pydantic's are among them; the second of what is nested too deeply
        raise UserError(f"tools cannot be used: {' '.join(str(error).split())}") from error


def expand(text: str) -> str:
    """A structural tag with what each {"type": "tool_calls", "tools": ..., "notation": ...} in it stands for.

    Its other fields are the arguments of `tool_tag`. So tools can be said by a process that has no xgrammar, next to
    whatever else a text may be. UserError names what is wrong.
    """
    if len(text) > MAX_CHARS:
        raise UserError(
            f"tools have {len(text):,} characters, with what stands beside them; {MAX_CHARS:,} is the limit"
        )
    document = json.loads(text)
    for part in tag.read(document):
        if part.kind == tag.TOOL_CALLS:
            asked = {name: value for name, value in part.fields.items() if name != "type"}
            if unknown := asked.keys() - ARGUMENTS:
                raise UserError(f"{part.path} has the field {min(unknown)!r}, which {tag.TOOL_CALLS} does not have")
            built = tool_tag(asked.pop("tools", None), asked.pop("notation", None), **asked)
            part.fields.clear()
            part.fields |= built["format"]
    return json.dumps(document, ensure_ascii=False)


def _function(tool: Any, path: str) -> dict[str, Any]:
    """A tool with what a grammar needs of it."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    if not isinstance(function, dict):
        raise UserError(f'{path} must be {{"type": "function", "function": ...}}')
    name, parameters = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{path}.function.name is {name!r}; it must be 1 to 64 letters, digits, '_', '-' or '.'")
    if parameters is not None and not isinstance(parameters, dict):
        raise UserError(f"{path}.function.parameters is a {type(parameters).__name__}; it must be a JSON schema")
    if not parameters or function.get("strict") is False:
        parameters = {"type": "object"}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _choice(choice: Any, names: list[str]) -> str | dict[str, Any]:
    if choice in ("none", "auto"):
        return choice
    if choice == "required":
        if not names:
            raise UserError("tool_choice is 'required', but there are no tools")
        return choice
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        raise UserError(f'tool_choice is {choice!r}; it must be none, auto, required or {{"type": "function", ...}}')
    if name not in names:
        raise UserError(f"tool_choice names {name!r}; the tools are {', '.join(names) or 'none'}")
    return {"type": "function", "function": {"name": name}}
