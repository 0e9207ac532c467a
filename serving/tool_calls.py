"""Tool calls out of a model's text, in its own notation, piece by piece as the text comes.

    calls = ToolCalls("qwen_3", tools)
    for piece in calls.add('Well.\\n<tool_call>\\n{"name": "weather", "arguments": {"ci'):
        ...  "Well.", then CallDelta(0, id="call_...", name="weather"), then CallDelta(0, arguments='{"ci')

A call begins when its name is that of a tool and its arguments follow; from there on they are passed on as they come. What only
looks like a call is text. White space around calls is nobody's. However the text is cut, the pieces add up to the same.

A notation is written down as what a call begins with, how it says its arguments, and what it ends with. Where those are XML
they become JSON, a parameter at a time; which of them is a string, the tool's schema says, as it does in xgrammar's grammars.

    python -m pytest tests/test_tool_calls.py
"""

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SPACE, NAME, DIGITS = r"\s{0,16}", r"[\w.-]{1,64}", r"\d{1,9}"


@dataclass(frozen=True)
class CallDelta:
    """What is new of call `index`: at first its id and name, then its arguments, as pieces of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Atom = str | tuple[str, str]


class Pattern:
    """A regex that also knows what may still become a match: a list of atoms, each of which is "=" and a literal, or a class of
    characters and how many of them, or (group, such a class)."""

    def __init__(self, *atoms: Atom, then: str = ""):
        """then: what must follow, seen but not taken."""
        steps: list[tuple[str, str]] = []
        for atom in atoms:
            group, regex = atom if isinstance(atom, tuple) else ("", atom)
            if regex.startswith("="):
                steps += [(re.escape(char), "") for char in regex[1:]]
            else:
                steps.append((regex, group))
        whole = "".join(f"(?P<{group}>{regex})" if group else regex for regex, group in steps)
        self._whole = re.compile(whole + (f"(?={then})" if then else ""))
        part = ""
        for regex, _ in reversed(steps):
            part = f"(?:{regex}{part})?"
        self._part = re.compile(part)

    def match(self, text: str, at: int = 0) -> re.Match[str] | None:
        return self._whole.match(text, at)

    def may_become(self, text: str, at: int = 0) -> bool:
        """Is all of the text from there on the beginning of a match?"""
        return self._part.fullmatch(text, at) is not None


@dataclass(frozen=True)
class Parameters:
    """Arguments as XML. begin: of one, with its name as "key", and maybe whether it is a "string"; line: its value stands on lines
    of its own."""

    begin: Pattern
    end: str
    line: bool = False


@dataclass(frozen=True)
class Notation:
    """How a call is said. heads: what it begins with, with its "name", behind the mark that begins all calls or not."""

    heads: tuple[Pattern, ...]
    tail: Pattern
    parameters: Parameters | None  # None: the arguments are JSON
    section_end: str  # the mark behind all calls, if there is one
    id: str = ""  # how a model numbers its calls itself, of the groups of the head


def _notation(
    *head: Atom,
    tail: Sequence[Atom],
    parameters: Parameters | None = None,
    section: tuple[str, str] | None = None,
    id: str = "",
) -> Notation:
    """section: the marks before and behind all calls."""
    atoms, then = ([*head, SPACE], r"\{") if parameters is None else (head, r"[\s<]")
    heads = [Pattern(*atoms, then=then)]
    if section is not None:
        heads.append(Pattern("=" + section[0], SPACE, *atoms, then=then))
    return Notation(tuple(heads), Pattern(SPACE, *tail), parameters, section[1] if section else "", id)


NAMED, KEY = ("name", NAME), ("key", r"[^<>\"]{1,256}")
_DSML = "｜DSML｜"


def _dsml(section: str, space: str = "") -> Notation:
    """DeepSeek's XML: each parameter says itself whether it is a string."""
    begin = Pattern(f'=<{_DSML}{space}parameter name="', KEY, '=" string="', ("string", "[a-z]{1,5}"), '=">')
    return _notation(
        f'=<{_DSML}{space}invoke name="', NAMED, '=">',
        tail=[f"=</{_DSML}{space}invoke>"],
        parameters=Parameters(begin, f"</{_DSML}{space}parameter>"),
        section=(f"<{_DSML}{section}>", f"</{_DSML}{section}>"),
    )  # fmt: skip


_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_QWEN = _notation(
    "=<tool_call>", SPACE, '={"name":', SPACE, '="', NAMED, '=",', SPACE, '="arguments":',
    tail=["=}", SPACE, "=</tool_call>"],
)  # fmt: skip
_QWEN_XML = _notation(
    "=<tool_call>", SPACE, "=<function=", NAMED, "=>",
    tail=["=</function>", SPACE, "=</tool_call>"],
    parameters=Parameters(Pattern("=<parameter=", KEY, "=>"), "</parameter>", line=True),
)  # fmt: skip
NOTATIONS = {
    "qwen_3": _QWEN,
    "hermes": _QWEN,  # who spoke so first
    "exaone": _QWEN,
    "qwen_3_coder": _QWEN_XML,
    "qwen_3_5": _QWEN_XML,
    "mimo": _QWEN_XML,
    "llama": _notation('={"name":', SPACE, '="', NAMED, '=",', SPACE, '="parameters":', tail=["=}"]),
    "deepseek_r1": _notation(
        "=<｜tool▁call▁begin｜>function<｜tool▁sep｜>", NAMED, SPACE, "=```json",
        tail=["=```", SPACE, "=<｜tool▁call▁end｜>"], section=_CALLS,
    ),
    "deepseek_v3_1": _notation(
        "=<｜tool▁call▁begin｜>", NAMED, "=<｜tool▁sep｜>", tail=["=<｜tool▁call▁end｜>"], section=_CALLS
    ),
    "deepseek_v3_2": _dsml("function_calls"),
    "deepseek_v4": _dsml("tool_calls"),
    "deepseek_v4_1": _dsml(" calls", space=" "),
    "kimi": _notation(
        "=<|tool_call_begin|>functions.", NAMED, "=:", ("number", DIGITS), "=<|tool_call_argument_begin|>",
        tail=["=<|tool_call_end|>"], section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        id="functions.{name}:{number}",
    ),
    "glm_4_7": _notation(
        "=<tool_call>", NAMED, SPACE,
        tail=["=</tool_call>"],
        parameters=Parameters(Pattern("=<arg_key>", KEY, "=</arg_key>", SPACE, "=<arg_value>"), "</arg_value>"),
    ),
    "minimax": _notation(
        '=<invoke name="', NAMED, '=">',
        tail=["=</invoke>"],
        parameters=Parameters(Pattern('=<parameter name="', KEY, '=">'), "</parameter>"),
        section=("<minimax:tool_call>", "</minimax:tool_call>"),
    ),
}  # fmt: skip

ALIASES = {"hermes": "qwen_3"}  # names that grammar/tools.py does not have


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ToolCalls:
    """Parses one text. `tools` as in the request."""

    def __init__(self, notation: str, tools: Sequence[dict[str, Any]], new_id: Callable[[], str] = new_call_id):
        self._notation = NOTATIONS[notation]
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._new_id = new_id
        self._held = ""
        self._pieces: list[str | CallDelta] = []
        self._state: Callable[[], bool] = self._text
        self.calls = 0
        self._after_call = False  # nothing but white space has come since
        self._schema: dict[str, Any] = {}  # of the call that is being read
        self._arguments = 0  # that it has so far
        self._depth, self._in_string, self._escaped = 0, False, False

    def add(self, text: str) -> list[str | CallDelta]:
        """What has become certain: text, and what is new of calls."""
        self._held += text
        while self._state():
            pass
        return self._take()

    def finish(self) -> list[str | CallDelta]:
        """The rest: nothing more will come. A call that was cut off stays as it is."""
        if self._state == self._text and not (self._after_call and self._held.isspace()):
            self._say(self._held)
        return self._take()

    def _take(self) -> list[str | CallDelta]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # ---- the states; each takes what it can of what is held, and says whether another is to go on with the rest

    def _text(self) -> bool:
        held, end = self._held, self._notation.section_end
        start = len(held) - len(held.lstrip())
        if self._after_call and end and held.startswith(end, start):
            self._held = held[start + len(end) :]
            return True
        if self._after_call and end and end.startswith(held[start:]):
            return False
        for at in (m.start() for m in re.finditer(r"[<{]", held)):
            for head in self._notation.heads:
                if (match := head.match(held, at)) is not None and match["name"] in self._schemas:
                    self._say(held[:at].rstrip())
                    self._begin(match)
                    return True
                if head.may_become(held, at):
                    return self._say_all_before(at)
        return self._say_all_before(len(held))

    def _json(self) -> bool:
        for i, char in enumerate(self._held):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            else:
                self._in_string = char == '"'
                self._depth += (char in "{[") - (char in "}]")
            if self._depth == 0:
                self._argue(self._held[: i + 1])
                self._held = self._held[i + 1 :]
                return self._go(self._tail)
        self._argue(self._held)
        self._held = ""
        return False

    def _tail(self) -> bool:
        tail = self._notation.tail
        if (match := tail.match(self._held)) is not None:
            self._held = self._held[match.end() :]
        elif tail.may_become(self._held):
            return False
        self._after_call = True
        return self._go(self._text)

    def _xml(self) -> bool:
        parameters, held = self._notation.parameters, self._held.lstrip()
        if (match := parameters.begin.match(held)) is not None:
            value, end, rest = held[match.end() :].partition(parameters.end)
            if not end:
                return False
            text = _json_value(value, match, self._schema.get("properties"), parameters.line)
            self._argue(("{" if not self._arguments else ", ") + f"{json.dumps(match['key'])}: {text}")
            self._arguments += 1
            self._held = rest
            return True
        if self._notation.tail.match(held) is None and (
            self._notation.tail.may_become(held) or parameters.begin.may_become(held)
        ):
            return False
        self._argue("}" if self._arguments else "{}")
        return self._go(self._tail)

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    # ---- what they do

    def _begin(self, match: re.Match[str]) -> None:
        """A call, from behind its head."""
        name = match["name"]
        id = self._notation.id.format(**match.groupdict()) or self._new_id()
        self._pieces.append(CallDelta(self.calls, id, name))
        self.calls += 1
        self._held = match.string[match.end() :]
        self._schema, self._arguments = self._schemas[name], 0
        self._state = self._json if self._notation.parameters is None else self._xml

    def _argue(self, text: str) -> None:
        if text:
            self._pieces.append(CallDelta(self.calls - 1, arguments=text))

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._after_call = False

    def _say_all_before(self, at: int) -> bool:
        """White space at its end is held: a call may follow."""
        text = self._held[:at].rstrip()
        self._say(text)
        self._held = self._held[len(text) :]
        return False


def _json_value(text: str, match: re.Match[str], properties: Any, line: bool) -> str:
    """A parameter's value as JSON. It is a string if the notation says so, or if its schema wants one and it is nothing else."""
    if line:
        text = text.removeprefix("\n").removesuffix("\n")
    said = match.groupdict().get("string")
    schema = properties.get(match["key"]) if isinstance(properties, dict) else None
    types = _types(schema) if said is None else {"string"} if said == "true" else None
    if types != {"string"}:
        try:
            value = json.loads(text, parse_constant=_refuse)
            if types is None or "string" not in types or _type(value) in types:
                return text.strip()
        except (ValueError, RecursionError):
            pass  # it is text
    return json.dumps(text, ensure_ascii=False)


def _types(schema: Any) -> set[str] | None:
    """The JSON types that a schema allows; None if it does not say."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema or isinstance(schema.get("enum"), list):
        return {_type(value) for value in schema.get("enum", [schema.get("const")])}
    for forms in (schema.get("anyOf"), schema.get("oneOf")):
        if isinstance(forms, list):
            each = [_types(form) for form in forms]
            return None if None in each else set().union(*each)
    types = schema.get("type")
    types = {types} if isinstance(types, str) else set(types) if isinstance(types, list) else None
    return types and types | ({"integer"} if "number" in types else set())


def _type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
