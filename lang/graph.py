"""What a program does, as a graph: to be looked at, and to be run without waiting for Python.

    graph = judge.trace()               # arguments that are not given stay open
    print(graph); print(graph.mermaid())
    graph.run_batch([{"essay": e} for e in essays])

A trace calls the program's function with stand-ins, and writes down what is appended. A stand-in can be appended, also in an
f-string; a program that looks at a value to decide what to do next has no one graph, and is refused. A run of the graph appends
all of it at once: each branch goes on as soon as what it needs is there, whatever stands before it in the program. As with every
batch, what all begin with is computed first, and locked in the cache as long as the batch lasts.

A program that is called inside is traced too, as a branch that begins with nothing.

    python -m pytest tests/test_lang_graph.py
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from engine import Engine
from errors import UserError
from lang import ir
from lang.backend import Backend
from lang.interpreter import ProgramState, Run
from lang.transcript import Transcript

if TYPE_CHECKING:
    from lang.program import Program

MARK = re.compile("\ue002([0-9]+)\ue003")  # private use: where an f-string has a stand-in
SHOWN = 32  # characters of a text in a label


class Stopped(BaseException):
    """Only the beginning was to be traced."""


class StandIn(ir.Expr):
    """For a value that is not known yet."""

    def __init__(self, graph: "Graph", label: str):
        self._graph, self.label = graph, label
        self._at = len(graph.stand_ins)
        graph.stand_ins.append(self)

    def __str__(self) -> str:
        return f"\ue002{self._at}\ue003"

    def __format__(self, spec: str) -> str:
        return str(self) if not spec else self._refuse()

    def _refuse(self, *_: Any) -> Any:
        raise UserError(f"the program depends on the value of {self.label}, so that it has no one graph")

    __bool__ = __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __len__ = __iter__ = __getitem__ = __contains__ = __int__ = __float__ = __index__ = _refuse
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else self._refuse()


class Argument(StandIn):
    def __init__(self, graph: "Graph", name: str):
        super().__init__(graph, f"the argument {name!r}")
        self.name = name


class Result(StandIn):
    """A variable of a branch."""

    def __init__(self, graph: "Graph", state: "Tracer", name: str):
        super().__init__(graph, f"s[{name!r}]")
        self.state, self.name, self.source = state, name, state.last_set[name]


@dataclass
class Call(ir.Expr):
    """Another program, with what it was called with."""

    program: "Program"
    backend: Backend | Engine | None
    params: dict[str, Any]


@dataclass
class Step:
    """A part that a branch has appended."""

    branch: int
    part: ir.Expr | StandIn
    after: int | None  # the step before it
    needs: list[int]  # steps whose values it takes


class Tracer(ProgramState):
    """Writes down what is appended."""

    def __init__(self, graph: "Graph", after: int | None = None):
        super().__init__(Run(graph.backend, {}))
        self.graph, self.after = graph, after
        self.branch = graph.branches
        graph.branches += 1
        self.last_set: dict[str, int] = {}  # variable -> the step that sets it
        self._lists: dict[str, list[Result]] = {}

    def _append(self, parts: Iterator[ir.Expr] | Sequence[ir.Expr]) -> None:
        for whole in parts:
            for part in self._split(whole):
                self._record(part)

    def _split(self, part: ir.Expr) -> Iterator[ir.Expr]:
        """A text at its stand-ins."""
        if not isinstance(part, ir.Text):
            yield part
            return
        for i, piece in enumerate(MARK.split(part.value)):
            if i % 2:
                yield self.graph.stand_ins[int(piece)]
            elif piece:
                yield ir.Text(piece)

    def _record(self, part: ir.Expr) -> None:
        if self.graph.only_prefix and not isinstance(part, ir.Text | ir.Begin | ir.End):
            raise Stopped
        children = part.children if isinstance(part, ir.Gather | ir.Concatenate) else []
        needs = [part.source] if isinstance(part, Result) else [child.after for child in children]
        here = len(self.graph.steps)
        self.graph.steps.append(Step(self.branch, part, self.after, [step for step in needs if step is not None]))
        self.after = here
        for name in ir.names_of(part):
            self.last_set[name] = here
        self._names += ir.names_of(part)
        if isinstance(part, ir.Gather):
            self._lists |= {n: [Result(self.graph, c, n) for c in part.children if n in c.last_set] for n in part.names}
        if isinstance(part, ir.Fork):
            for child in part.children:
                child.after = here

    def _child(self) -> "Tracer":
        child = Tracer(self.graph)
        child._names, child.last_set, child._lists = list(self._names), dict(self.last_set), dict(self._lists)
        return child

    def get_var(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        if name not in self.last_set:
            raise KeyError(f"there is no variable {name!r}")
        return self._lists[name] if name in self._lists else Result(self.graph, self, name)

    __getitem__ = get_var

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise UserError("the program asks for text that is there only when it runs, so that it has no one graph")

    text = messages = get_meta_info = text_iter = text_async_iter = _refuse

    def sync(self) -> None:
        """There is nothing to wait for."""

    def error(self) -> None:
        return None


@dataclass
class Graph:
    program: "Program"
    backend: Backend = field(default_factory=Backend)
    only_prefix: bool = False
    steps: list[Step] = field(default_factory=list)
    stand_ins: list[StandIn] = field(default_factory=list)
    branches: int = 0

    def fill(self, arguments: dict[str, Any]) -> None:
        """Call the program's function, with stand-ins for what is not among the arguments."""
        names = self.program.arg_names
        given = {name: arguments[name] if name in arguments else Argument(self, name) for name in names}
        before = _traced.set(self)
        try:
            self.program.func(Tracer(self), **given)
        finally:
            _traced.reset(before)

    def call(self, call: Call) -> Tracer:
        """A branch for a program that is called by the one that is traced."""
        callee = Tracer(self)
        callee._record(call)
        return callee

    # ---- to run it

    def run(self, **kwargs: Any) -> ProgramState:
        """As `Program.run`, with the arguments that are open."""
        return self._as_program().run(**kwargs)

    def run_batch(self, batch: Sequence[Any], **options: Any) -> Any:
        """As `Program.run_batch`, with the arguments that are open."""
        return self._as_program().run_batch(batch, **options)

    def _as_program(self) -> "Program":
        opened = [x.name for x in self.stand_ins if isinstance(x, Argument)]

        def replay(s: ProgramState, **arguments: Any) -> None:
            states = {0: s}
            for step in self.steps:
                if isinstance(step.part, Call):
                    states[step.branch] = step.part.program._state(step.part.backend, step.part.params)
                else:
                    states[step.branch]._append([_bound(step.part, states, arguments, states[step.branch])])

        kinds = [inspect.Parameter("s", inspect.Parameter.POSITIONAL_ONLY)]
        kinds += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in opened]
        replay.__signature__ = inspect.Signature(kinds)
        replay.__name__ = self.program.func.__name__
        return type(self.program)(replay, self.program.num_api_spec_tokens)

    # ---- to look at it

    def __str__(self) -> str:
        lines = []
        for i, step in enumerate(self.steps):
            before = "" if step.after is None else f"%{step.after} + "
            needs = f"  needs {', '.join(f'%{n}' for n in step.needs)}" if step.needs else ""
            lines.append(f"%{i} = {before}{label(step.part)}{needs}")
        return "\n".join(lines)

    def dot(self) -> str:
        """For Graphviz. Solid: what comes after what; dashed: whose value goes where."""
        nodes = [f"  n{i} [label={_quoted(label(step.part))}];" for i, step in enumerate(self.steps)]
        edges = [f"  n{a} -> n{b}{' [style=dashed]' if dashed else ''};" for a, b, dashed in self._edges()]
        return "\n".join(["digraph program {", "  node [shape=box];", *nodes, *edges, "}"])

    def mermaid(self) -> str:
        nodes = [f"  n{i}[{_quoted(label(step.part), '#quot;')}]" for i, step in enumerate(self.steps)]
        edges = [f"  n{a} {'-.->' if dashed else '-->'} n{b}" for a, b, dashed in self._edges()]
        return "\n".join(["flowchart TD", *nodes, *edges])

    def _edges(self) -> Iterator[tuple[int, int, bool]]:
        for i, step in enumerate(self.steps):
            if step.after is not None:
                yield step.after, i, False
            for need in step.needs:
                yield need, i, True


_traced: ContextVar[Graph | None] = ContextVar("traced", default=None)


def traced() -> Graph | None:
    """The graph that is being made, inside of a program that is traced."""
    return _traced.get()


def trace(program: "Program", **arguments: Any) -> Graph:
    """The graph of a program. UserError if what it does depends on a value that is not given."""
    defaults = {name: p.default for name, p in program.signature.parameters.items() if p.default is not p.empty}
    graph = Graph(program)
    graph.fill(defaults | program.bound | arguments)
    return graph


def constant_prefix(program: "Program", backend: Backend) -> Transcript | None:
    """What the program begins with, whatever its arguments are. It is called as far as that goes, and no further."""
    graph = Graph(program, backend, only_prefix=True)
    with suppress(Stopped, Exception):  # stand-ins are not what the function was written for
        graph.fill(program.bound)
    prefix = Transcript(backend.render)
    for step in graph.steps:
        match step.part:
            case ir.Text(text):
                prefix.add(text)
            case ir.Begin(role):
                prefix.begin(role)
            case ir.End(role):
                prefix.end(role)
    return prefix if graph.steps else None


def _bound(part: Any, states: dict[int, ProgramState], arguments: dict[str, Any], state: ProgramState) -> ir.Expr:
    """A part of the trace as one of the run."""
    match part:
        case Argument():
            return ir.Text(str(arguments[part.name]))
        case Result():
            return ir.Value(states[part.state.branch], part.name)
        case ir.Fork():
            children = [state._child() for _ in part.children]
            states |= {traced.branch: child for traced, child in zip(part.children, children, strict=True)}
            return ir.Fork(children)
        case ir.Gather() | ir.Concatenate():
            return replace(part, children=[states[child.branch] for child in part.children])
    return part


def label(part: Any) -> str:
    match part:
        case ir.Text(text):
            return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
        case ir.Gen(name):
            return f"gen({name!r})"
        case ir.Select(name, choices):
            return f"select({name!r}, {choices})"
        case ir.Fork(children):
            return f"fork({len(children)})"
        case StandIn():
            return part.label
        case ir.Gather(_, names):
            return f"gather({', '.join(names)})"
        case Call(program):
            return f"{program.func.__name__}()"
        case ir.Begin(role):
            return f"{role}_begin"
        case ir.End(role):
            return f"{role}_end"
    return type(part).__name__.lower()


def _quoted(text: str, quote: str = '\\"') -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', quote) + '"'
