"""Runs what a program appends: each state works through it in the background, and Python goes on until it needs a value.

    s += "Name:" + gen("name")      returns at once
    s["name"]                       waits

A state has a queue, and a thread as long as the queue is not empty. A fork takes its place in the queue of its parent, so that
branches can be written before the parent has come that far; then each works through its own. What fails ends its state: whoever
waits for one of its values gets a ProgramError with the name of the variable.

    python -m pytest tests/test_lang.py
"""

import asyncio
import threading
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from errors import UserError
from lang import ir
from lang.backend import Backend, Cancel, Piece
from lang.choices import decide
from lang.speculation import Surplus
from lang.transcript import Messages, Transcript
from reasoning import Reasoning, thought_begun

QUICK = (ir.Text, ir.Begin, ir.End, ir.ScopeBegin, ir.ScopeEnd)  # done at once, by the caller, if nothing waits
END = object()  # of an iteration


class ProgramError(RuntimeError):
    """What was appended to a state has failed; `name` is the variable that it was for, if it was for one; `__cause__` says why."""

    def __init__(self, name: str | None, cause: BaseException):
        super().__init__(f"{name or 'the program'}: {str(cause) or type(cause).__name__}")
        self.name, self.__cause__ = name, cause


@dataclass
class Run:
    """What all states of one run have in common."""

    backend: Backend
    defaults: dict[str, Any]  # of generations that do not say otherwise
    stream: bool = False
    spec_tokens: int | None = None
    cancel: Cancel = field(default_factory=Cancel)
    open: bool = True  # the program's function has not returned: it may append more
    changed: threading.Condition = field(default_factory=threading.Condition)  # anything, in any of the states

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()


class ProgramState:
    """What a program writes to and reads from; it calls it `s`."""

    def __init__(self, run: Run, transcript: Transcript | None = None):
        self.ret_value: Any = None  # of the program's function, once it has returned
        self.run = run
        self._transcript = transcript or Transcript(run.backend.render)
        self._forked_at = 0  # length of the text that the parent had
        self._queue: deque[ir.Expr] = deque()
        self._changed = run.changed
        self._busy = False  # something is being done; a child: its parent has not come to the fork
        self._branches: list[ProgramState] = []
        self._error: ProgramError | None = None
        self._coming: Counter[str] = Counter()  # variables in the queue
        self._names: list[str] = []  # of all variables that were ever appended
        self._values: dict[str, Any] = {}
        self._meta: dict[str, dict[str, Any]] = {}
        self._scopes: dict[str, int] = {}
        self._surplus = Surplus(run.spec_tokens) if run.spec_tokens else None

    # ---- to be written to

    def __iadd__(self, expr: ir.Expr | str) -> "ProgramState":
        self._append(ir.flat(expr))
        return self

    def system(self, expr: ir.Expr | str | None = None):
        """`s.system("...")`, or `with s.system(): ...`; likewise `user` and `assistant`."""
        return self._turn("system", expr)

    def user(self, expr: ir.Expr | str | None = None):
        return self._turn("user", expr)

    def assistant(self, expr: ir.Expr | str | None = None):
        return self._turn("assistant", expr)

    def _turn(self, role: str, expr: ir.Expr | str | None):
        return self._between(ir.Begin(role), ir.End(role)) if expr is None else self._append(ir.turn(role, expr).parts)

    def var_scope(self, name: str):
        """`with s.var_scope("name"): ...`: what is appended inside is the variable."""
        return self._between(ir.ScopeBegin(name), ir.ScopeEnd(name))

    @contextmanager
    def _between(self, begin: ir.Expr, end: ir.Expr) -> Iterator[None]:
        self._append([begin])
        yield
        self._append([end])

    def fork(self, size: int = 1) -> "Forks":
        """States that go on from here, each for itself."""
        if not isinstance(size, int) or size < 1:
            raise UserError(f"fork: the size is {size!r}; it must be a whole number, at least 1")
        children = [self._child() for _ in range(size)]
        self._append([ir.Fork(children)])
        return Forks(children, self)

    def _child(self) -> "ProgramState":
        """It waits until this one has come to the fork."""
        child = ProgramState(self.run)
        child._busy, child._names = True, list(self._names)
        self._branches.append(child)
        return child

    @contextmanager
    def copy(self) -> Iterator["ProgramState"]:
        """One that goes on from here; its variables come back as lists, as those of a fork."""
        forks = self.fork(1)
        yield forks[0]
        forks.join()

    def set_var(self, name: str, value: Any) -> None:
        with self._changed:
            self._names.append(name)
            self._values[name] = value

    __setitem__ = set_var

    def _append(self, parts: Iterable[ir.Expr]) -> None:
        parts = list(parts)
        for part in parts:
            self._check(part)
        with self._changed:
            self._raise_error()
            names = [name for part in parts for name in ir.names_of(part)]
            self._coming.update(names)
            self._names += names
            if not self._busy and self._surplus is None and all(isinstance(part, QUICK) for part in parts):
                self._work(parts)
                return
            self._queue += parts
            if not self._busy and parts:
                self._start()

    def _check(self, part: ir.Expr) -> None:
        """Refuse what the backend cannot do, before anything is sent."""
        if isinstance(part, ir.Gen):
            self.run.backend.check(self.run.defaults | part.params)
        elif isinstance(part, ir.Select):
            self.run.backend.check_select(part.needs_unconditional)

    # ---- to be read from

    def get_var(self, name: str) -> Any:
        """A variable, once it is there. KeyError if nothing sets it, ProgramError if what sets it has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._coming[name])
            if name in self._values and not self._coming[name]:
                return self._values[name]
            self._raise_error()
            raise KeyError(f"there is no variable {name!r}; there are {', '.join(self._values) or 'none'}")

    __getitem__ = get_var

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get_meta_info(self, name: str) -> dict[str, Any]:
        """What the backend says of a variable: its tokens, why it ended, logprobs; a list of them where n > 1."""
        self.get_var(name)
        return self._meta.get(name, {})

    def text(self) -> str:
        """All of it, once it is there. ProgramError if a part of it has failed."""
        self.sync()
        with self._changed:
            self._raise_error()
            return self._transcript.text

    def messages(self) -> Messages:
        """The turns that have ended, as the OpenAI API has them."""
        self.sync()
        with self._changed:
            self._raise_error()
            return [dict(message) for message in self._transcript.messages]

    def sync(self) -> None:
        """Wait until all is done that was appended so far."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy)

    def error(self) -> ProgramError | None:
        """What has failed here or in a branch, if anything has, once all is done."""
        self.sync()
        errors = [self._error, *(branch.error() for branch in self._branches)]
        return next((error for error in errors if error is not None), None)

    def text_iter(self, var_name: str | None = None) -> Iterator[str]:
        """The text, or one variable, as it comes, until the program ends. Then ProgramError if it has failed."""
        return (piece for piece, _ in self._pieces(var_name))

    async def text_async_iter(
        self, var_name: str | None = None, return_meta_data: bool = False
    ) -> AsyncIterator[str | tuple[str, dict[str, Any]]]:
        """The same for asyncio; return_meta_data: with what the backend says of it."""
        pieces = self._pieces(var_name)
        while (piece := await asyncio.to_thread(next, pieces, END)) is not END:
            yield piece if return_meta_data else piece[0]

    def _pieces(self, name: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over(name) or len(self._so_far(name)) > seen)  # noqa: B023
                over, text, meta = self._over(name), self._so_far(name), self._meta.get(name, {})
            if len(text) > seen:
                yield text[seen:], meta
                seen = len(text)
            if over:
                break
        with self._changed:
            if name is None or name not in self._values:
                self._raise_error()
        if name is not None:
            self.get_var(name)

    def _so_far(self, name: str | None) -> str:
        if name is None:
            return self._transcript.text
        value = self._values.get(name, "")
        return value if isinstance(value, str) else ""

    def _over(self, name: str | None) -> bool:
        ready = name is not None and name in self._values and not self._coming[name]
        return ready or self._error is not None or not (self.run.open or self._busy)

    def __repr__(self) -> str:
        return f"ProgramState({self.text()})"

    def _raise_error(self) -> None:
        if self._error is not None:
            raise ProgramError(self._error.name, self._error.__cause__)

    # ---- inside: what the background does

    def _start(self) -> None:
        self._busy = True
        threading.Thread(target=self._drain, name="folio-state", daemon=True).start()

    def _drain(self) -> None:
        while True:
            with self._changed:
                if not self._queue or self._error is not None:
                    self._busy = False
                    self._changed.notify_all()
                    return
                part = self._queue.popleft()
            self._work([part])

    def _work(self, parts: Iterable[ir.Expr]) -> None:
        for part in parts:
            try:
                self.run.cancel.check()
                DO[type(part)](self, part)
            except BaseException as error:
                self.fail(error, part)
                return
            with self._changed:
                self._coming.subtract(ir.names_of(part))
                self._changed.notify_all()

    def fail(self, error: BaseException, part: ir.Expr | None = None) -> None:
        """End here: whoever waits for something of this state, or of a fork of it that has not begun, gets the error."""
        with self._changed:
            if self._error is None:
                named = None if part is None else next(iter(ir.names_of(part)), None)
                self._error = error if isinstance(error, ProgramError) else ProgramError(named, error)
            left, self._queue = [part, *self._queue], deque()
            self._busy = False
            for name in self._coming.keys() & self._values.keys():
                if self._coming[name]:
                    del self._values[name]  # no more than a part of it
            self._coming.clear()
            for child in [child for part in left if isinstance(part, ir.Fork) for child in part.children]:
                child.fail(self._error)
            self._changed.notify_all()

    def _do_text(self, part: ir.Text) -> None:
        self._add(part.value)

    def _do_value(self, part: ir.Value) -> None:
        self._add(part.state.get_var(part.of))

    def _add(self, text: str) -> None:
        with self._changed:
            if self._surplus is not None:
                self._surplus.meet(text)
            self._transcript.add(text)

    def _do_begin(self, part: ir.Begin) -> None:
        with self._changed:
            self._transcript.begin(part.role)

    def _do_end(self, part: ir.End) -> None:
        with self._changed:
            self._transcript.end(part.role)

    def _do_scope_begin(self, part: ir.ScopeBegin) -> None:
        self._scopes[part.name] = len(self._transcript.text)

    def _do_scope_end(self, part: ir.ScopeEnd) -> None:
        self._set(part.name, self._transcript.text[self._scopes[part.name] :])

    def _do_gen(self, part: ir.Gen) -> None:
        params = self.run.defaults | part.params
        samples = [Piece("", {}, i) for i in range(params.get("n", 1))]
        self._set_samples(part, samples)
        pieces = self._generate(params)
        for piece in self._separated(pieces, part.thinks) if part.thinks else pieces:
            so_far = samples[piece.index]
            samples[piece.index] = replace(piece, text=so_far.text + piece.text, thought=so_far.thought + piece.thought)
            with self._changed:
                if piece.index == 0:
                    self._transcript.add(piece.text)
                self._set_samples(part, samples)
                self._changed.notify_all()

    def _set_samples(self, part: ir.Gen, samples: Sequence[Piece]) -> None:
        """The variables, as far as they have come: a value if there is one sample, lists if there are more."""
        columns = [s.text for s in samples], [s.thought for s in samples], [s.meta for s in samples]
        text, thought, meta = (column[0] if len(samples) == 1 else column for column in columns)
        self._set(part.name, text, meta)
        self._set(part.thought, thought)

    def _separated(self, pieces: Iterator[Piece], parser: str) -> Iterator[Piece]:
        """The same, with the thoughts taken out of the texts."""
        begun = thought_begun(self._transcript.text)
        readers, last = defaultdict(lambda: Reasoning(parser, begun)), {}
        for piece in pieces:
            thought, answer = readers[piece.index].add(piece.text)
            last[piece.index] = replace(piece, text=answer, thought=thought)
            yield last[piece.index]
        for i, piece in last.items():
            thought, answer = readers[i].finish()
            yield replace(piece, text=answer, thought=thought)

    def _generate(self, params: dict[str, Any]) -> Iterator[Piece]:
        backend, asked, cancel = self.run.backend, self._transcript, self.run.cancel
        if params["max_new_tokens"] == 0 and params.get("return_logprob"):  # what might come next, and nothing of it
            for piece in backend.generate(asked, params | {"max_new_tokens": 1}, False, cancel):
                yield replace(piece, text="")
        elif self._surplus is not None:
            yield from self._surplus.generate(backend, asked, params, cancel)
        else:
            yield from backend.generate(asked, params, self.run.stream, cancel)

    def _do_select(self, part: ir.Select) -> None:
        scores = self.run.backend.score(self._transcript, part.choices, part.needs_unconditional)
        choice, meta = decide(part.choices, scores, part.method)
        self._set(part.name, choice, meta)
        self._add(choice)

    def _do_fork(self, part: ir.Fork) -> None:
        with self._changed:
            for child in part.children:
                child._begin_at(self)

    def _begin_at(self, parent: "ProgramState") -> None:
        self._transcript, self._forked_at = parent._transcript.copy(), len(parent._transcript.text)
        self._values |= parent._values
        self._meta |= parent._meta
        self._start()

    def _do_gather(self, part: ir.Gather) -> None:
        for name in part.names:
            have = [child for child in part.children if name in child]
            self._set(name, [child.get_var(name) for child in have], [child.get_meta_info(name) for child in have])
        for child in part.children:
            child.text()  # raises what else has failed

    def _do_concatenate(self, part: ir.Concatenate) -> None:
        self._add("".join(child.text()[child._forked_at :] for child in part.children))

    def _set(self, name: str | None, value: Any, meta: Any = None) -> None:
        if name is not None:
            with self._changed:
                self._values[name], self._meta[name] = value, {} if meta is None else meta


DO: dict[type[ir.Expr], Callable[[ProgramState, Any], None]] = {
    ir.Text: ProgramState._do_text,
    ir.Value: ProgramState._do_value,
    ir.Begin: ProgramState._do_begin,
    ir.End: ProgramState._do_end,
    ir.ScopeBegin: ProgramState._do_scope_begin,
    ir.ScopeEnd: ProgramState._do_scope_end,
    ir.Gen: ProgramState._do_gen,
    ir.Select: ProgramState._do_select,
    ir.Fork: ProgramState._do_fork,
    ir.Gather: ProgramState._do_gather,
    ir.Concatenate: ProgramState._do_concatenate,
}


class Forks:
    """The branches of a fork: `forks[i]`, or `forks += ...` for all of them."""

    def __init__(self, states: list[ProgramState], parent: ProgramState):
        self.states, self.parent = states, parent

    def __getitem__(self, i: int) -> ProgramState:
        return self.states[i]

    def __setitem__(self, i: int, state: ProgramState) -> None:
        """`forks[i] += ...` ends with this."""
        if self.states[i] is not state:
            raise UserError("a branch can be appended to, but not replaced")

    def __len__(self) -> int:
        return len(self.states)

    def __iadd__(self, what: ir.Expr | str | Sequence[Any] | Callable[[int], Any]) -> "Forks":
        """The same to all; of a list, one to each; what a function makes of the branch's number."""
        if isinstance(what, list | tuple) and len(what) != len(self):
            raise UserError(f"{len(what)} parts for {len(self)} branches")
        for i, state in enumerate(self.states):
            state += what(i) if callable(what) else what[i] if isinstance(what, list | tuple) else what
        return self

    def join(self, mode: str = "gather_variable") -> None:
        """gather_variable: what the branches have set are lists now; concate_and_append: what they have written is appended."""
        if mode == "gather_variable":
            names = dict.fromkeys(name for state in self.states for name in state._names)
            self.parent._append([ir.Gather(self.states, [n for n in names if n not in self.parent._names])])
        elif mode == "concate_and_append":
            self.parent._append([ir.Concatenate(self.states)])
        else:
            raise UserError(f"mode is {mode!r}; it must be gather_variable or concate_and_append")
