"""What a program appends to its state: text, turns, generations, choices; `+` makes a sequence of them.

    s += user(question) + assistant("It is " + gen("answer", stop="\\n"))

An expression only says what is wanted. The interpreter does it, or a trace writes it down (graph.py). Names are SGLang's.

    python -m pytest tests/test_lang.py
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from errors import UserError
from lang.choices import ChoicesMethod, token_length_normalized
from reasoning import THINKS_AT_ONCE

if TYPE_CHECKING:
    from lang.interpreter import ProgramState

ALIASES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
RETURNS = frozenset(("return_logprob", "top_logprobs_num", "return_text_in_logprobs"))  # what to tell, not what to do
PARAMS = RETURNS | frozenset(
    (
        "max_new_tokens", "min_new_tokens", "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "seed",
        "presence_penalty", "repetition_penalty", "stop", "stop_token_ids", "ignore_eos", "regex", "json_schema", "ebnf",
        "json_finish", "disable_any_whitespace",
    )
)  # fmt: skip
DEFAULTS = {"max_new_tokens": 128}  # SGLang's; the rest are those of SamplingParams
DTYPES = {
    int: {"regex": r"[-+]?[0-9]+[ \n]*", "stop": [" ", "\n"]},
    float: {"regex": r"[-+]?[0-9]*\.?[0-9]+[ \n]*", "stop": [" ", "\n"]},
    bool: {"regex": "(True|False)"},
    str: {"regex": r'"[^"\\\n]*"'},
}


class Expr:
    def __add__(self, other: "Expr | str") -> "Sequel":
        return Sequel([*flat(self), *flat(other)])

    def __radd__(self, other: "Expr | str") -> "Sequel":
        return Sequel([*flat(other), *flat(self)])


@dataclass
class Sequel(Expr):
    parts: list[Expr]


@dataclass
class Text(Expr):
    value: str


@dataclass
class Gen(Expr):
    name: str | None
    params: dict[str, Any] = field(default_factory=dict)  # those given, by the names in PARAMS
    thinks: str | None = None  # a key of reasoning.THINKS_AT_ONCE: its thought is a variable of its own

    @property
    def thought(self) -> str | None:
        return f"{self.name}_reasoning_content" if self.thinks and self.name else None


@dataclass
class Select(Expr):
    name: str | None
    choices: list[str]
    method: ChoicesMethod

    @property
    def needs_unconditional(self) -> bool:
        """Does the method ask how likely the choices are by themselves?"""
        return getattr(self.method, "needs_unconditional", False)


@dataclass
class Begin(Expr):
    role: str


@dataclass
class End(Expr):
    role: str


@dataclass
class ScopeBegin(Expr):
    name: str


@dataclass
class ScopeEnd(Expr):
    """The text since ScopeBegin is the variable."""

    name: str


@dataclass
class Value(Expr):
    """What a variable of a state will be: text that is not there yet."""

    state: "ProgramState"
    of: str


@dataclass
class Fork(Expr):
    children: "list[ProgramState]"


@dataclass
class Gather(Expr):
    """What each variable has become in each of the children, as a list."""

    children: "list[ProgramState]"
    names: list[str]


@dataclass
class Concatenate(Expr):
    """What each of the children has added to the text."""

    children: "list[ProgramState]"


def flat(expr: Expr | str) -> Iterator[Expr]:
    """The parts of an expression, one after another. UserError for what is none."""
    if isinstance(expr, str):
        yield Text(expr)
    elif isinstance(expr, Sequel):
        yield from expr.parts
    elif isinstance(expr, Expr):
        yield expr
    else:
        raise UserError(f"a state takes text and expressions; {expr!r} is neither")


def names_of(expr: Expr) -> list[str]:
    """The variables that an expression sets."""
    if isinstance(expr, Gather):
        return expr.names
    names = [expr.name] if isinstance(expr, Gen | Select | ScopeEnd) else []
    names += [expr.thought] if isinstance(expr, Gen) else []
    return [name for name in names if name is not None]


# ---- what a program calls


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    *,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    dtype: type | str | None = None,
    logprobs: int | None = None,
    **params: Any,
) -> Gen | Select:
    """Let the model go on from the text so far; the result is the variable `name`.

    params: PARAMS, `max_tokens` and `min_tokens`; what is not given is as in `run`. choices: the same as `select`. dtype: int,
    float, bool or str, as they are written. logprobs: as `return_logprob` with so many `top_logprobs_num`. UserError for a
    parameter that there is not, or that a choice does not have.
    """
    given = checked({"max_tokens": max_tokens} | params, "gen")
    if choices is not None:
        if idle := sorted(given.keys() - RETURNS - {"temperature"}) + ["dtype"] * (dtype is not None):
            raise UserError(f"{idle[0]} and choices are given; a choice is one of the texts as it is")
        return select(name, choices, given.get("temperature", 0.0), choices_method or token_length_normalized)
    if logprobs is not None:
        given |= {"return_logprob": True, "top_logprobs_num": logprobs}
    if dtype is not None:
        given |= _of_type(dtype, given)
    return Gen(name, given)


def gen_int(name: str | None = None, max_tokens: int | None = None, **params: Any) -> Gen:
    return gen(name, max_tokens, dtype=int, **params)


def gen_string(name: str | None = None, max_tokens: int | None = None, **params: Any) -> Gen:
    """A text in double quotes, which are part of it."""
    return gen(name, max_tokens, dtype=str, **params)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod = token_length_normalized,
) -> Select:
    """The likeliest of the choices, by one of the methods in choices.py."""
    if not choices or isinstance(choices, str) or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"choices is {choices!r}; it must be a list of texts that are not empty")
    if not callable(choices_method):
        raise UserError(
            f"choices_method is {choices_method!r}; it must be a function, such as those of lang/choices.py"
        )
    if temperature:
        raise UserError(f"temperature is {temperature}; a choice is the likeliest one, and none is drawn")
    return Select(name, list(choices), choices_method)


def system(expr: Expr | str | None = None) -> Sequel:
    return turn("system", expr)


def user(expr: Expr | str | None = None) -> Sequel:
    return turn("user", expr)


def assistant(expr: Expr | str | None = None) -> Sequel:
    return turn("assistant", expr)


def turn(role: str, expr: Expr | str | None) -> Sequel:
    return Sequel([Begin(role), *flat("" if expr is None else expr), End(role)])


def system_begin() -> Begin:
    return Begin("system")


def system_end() -> End:
    return End("system")


def user_begin() -> Begin:
    return Begin("user")


def user_end() -> End:
    return End("user")


def assistant_begin() -> Begin:
    return Begin("assistant")


def assistant_end() -> End:
    return End("assistant")


def separate_reasoning(expr: Expr, model_type: str) -> Sequel:
    """Of each generation in `expr`, the thought is no part of the text, and goes to NAME_reasoning_content.

    model_type: one of reasoning.THINKS_AT_ONCE; "deepseek-r1", as SGLang writes it, is the same as "deepseek_r1". UserError for
    another.
    """
    thinks = model_type.replace("-", "_")
    if thinks not in THINKS_AT_ONCE:
        raise UserError(f"model_type is {model_type!r}; it must be one of {', '.join(THINKS_AT_ONCE)}")
    return Sequel([replace(part, thinks=thinks) if isinstance(part, Gen) else part for part in flat(expr)])


def checked(params: dict[str, Any], where: str) -> dict[str, Any]:
    """Parameters by their names in PARAMS, without those that are None. UserError for one that there is not."""
    given = {ALIASES.get(name, name): value for name, value in params.items() if value is not None}
    if unknown := sorted(given.keys() - PARAMS):
        raise UserError(f"{unknown[0]} is not a parameter of {where}; there are {', '.join(sorted(PARAMS))}")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if not isinstance(given.get("stop", []), list | tuple):
        raise UserError(f"stop is {given['stop']!r}; it must be a text, or a list of texts")
    if given.get("top_k") == -1:
        given["top_k"] = 0  # both mean off
    if "regex" in given:
        try:
            re.compile(given["regex"])
        except re.error as error:
            raise UserError(f"regex: {error}") from None
    schema = given.get("json_schema")
    if schema is not None and not isinstance(schema, str):
        given["json_schema"] = json.dumps(schema.model_json_schema() if isinstance(schema, type) else schema)
    return given


def _of_type(dtype: type | str, given: dict[str, Any]) -> dict[str, Any]:
    by_name = {kind.__name__: kind for kind in DTYPES}
    kind = by_name.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(by_name)}")
    if "regex" in given:
        raise UserError("dtype and regex are given; a generation has one of them at most")
    form = DTYPES[kind]
    return form | ({"stop": [*given.get("stop", ()), *form["stop"]]} if "stop" in form else {})
