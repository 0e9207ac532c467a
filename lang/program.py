"""A program: a function of a state `s` and arguments, that is run once, many times, as a stream, or in asyncio.

@function
def qa(s, question):
    s += "Q: " + question + "\\nA:" + gen("answer", stop="\\n")

qa.run("Why?")["answer"]
qa.run_batch([{"question": q} for q in questions], progress_bar=True)

python -m pytest tests/test_lang.py
"""

import asyncio
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

from engine import Engine
from errors import UserError
from lang import graph, ir
from lang.backend import Backend, BackendError, Cancel, as_backend
from lang.interpreter import ProgramState, Run

LEAST_PREFIX = 64  # characters of what all programs of a batch begin with, for which it is computed first (SGLang)
LAST_WAIT = 1.0  # seconds that an interrupted batch waits for its programs

_within: ContextVar[Cancel | None] = ContextVar("within", default=None)  # of the program that this thread is running

Arguments = tuple[Sequence[Any], dict[str, Any]]
Job, Result = TypeVar("Job"), TypeVar("Result")


def function(func: Callable | None = None, num_api_spec_tokens: int | None = None) -> Any:
    """Make a program of a function whose first argument is the state. num_api_spec_tokens: see speculation.py."""
    if func is None:
        return lambda func: Program(func, num_api_spec_tokens)
    return Program(func, num_api_spec_tokens)


class Program:
    def __init__(self, func: Callable, num_api_spec_tokens: int | None = None, bound: dict[str, Any] | None = None):
        self.func, self.num_api_spec_tokens, self.bound = func, num_api_spec_tokens, bound or {}
        self.signature = inspect.signature(func)
        if num_api_spec_tokens is not None and (not isinstance(num_api_spec_tokens, int) or num_api_spec_tokens < 1):
            raise UserError(f"num_api_spec_tokens is {num_api_spec_tokens!r}; it must be a whole number, at least 1")
        names = list(self.signature.parameters)
        if not names:
            raise UserError(f"{func.__name__} must take the state as its first argument")
        self.arg_names = names[1:]

    def bind(self, **arguments: Any) -> "Program":
        """The same program with some of its arguments."""
        if unknown := sorted(arguments.keys() - set(self.arg_names)):
            raise UserError(
                f"{unknown[0]} is no argument of {self.func.__name__}; there are {', '.join(self.arg_names)}"
            )
        return Program(self.func, self.num_api_spec_tokens, self.bound | arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """With a state as its first argument, it goes on in that state; otherwise the same as `run`."""
        if args and isinstance(args[0], ProgramState):
            return self.func(*args, **(self.bound | kwargs))
        return self.run(*args, **kwargs)

    def run(
        self, *args: Any, stream: bool = False, backend: "Backend | Engine | None" = None, **kwargs: Any
    ) -> ProgramState:
        """Run it. kwargs: its arguments, and parameters (ir.PARAMS) for the generations that do not say otherwise.

        Returns when the function has, while the last generations may still run; with `stream`, at once. UserError for arguments
        and parameters that there are not; what else fails is raised where a value is asked for.
        """
        arguments, params = self._sorted(args, kwargs)
        state = self._state(backend, params, stream)
        if stream:
            threading.Thread(target=self._attempt, args=(state, arguments, Cancel()), daemon=True).start()
        else:
            self._call(state, arguments)
        return state

    async def run_async(self, *args: Any, backend: "Backend | Engine | None" = None, **kwargs: Any) -> ProgramState:
        """`run`, and wait until all is done. Whoever cancels the task ends what runs."""
        arguments, params = self._sorted(args, kwargs)
        state = self._state(backend, params)
        try:
            await asyncio.to_thread(self._call, state, arguments)
            await asyncio.to_thread(state.sync)
        except asyncio.CancelledError:
            state.run.cancel()
            raise
        return state

    def run_batch(
        self,
        batch: Sequence[dict[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        backend: "Backend | Engine | None" = None,
        generator_style: bool = False,
        **params: Any,
    ) -> list[ProgramState] | Iterator[ProgramState]:
        """Run it once for each set of arguments, `num_threads` at a time -> the states, in that order.

        What all begin with is computed first, and kept in the cache until the last has ended. One that fails keeps its place: its
        `error()` says why. Ctrl-C ends all of them. generator_style: each state as soon as those before it are there.
        """
        states = self._many(batch, num_threads, progress_bar, as_backend(backend), params, Cancel(_within.get()))
        return states if generator_style else list(states)

    async def run_batch_async(
        self,
        batch: Sequence[dict[str, Any] | Sequence[Any]],
        *,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        backend: "Backend | Engine | None" = None,
        **params: Any,
    ) -> list[ProgramState]:
        cancel = Cancel(_within.get())
        states = self._many(batch, num_threads, progress_bar, as_backend(backend), params, cancel)
        try:
            return await asyncio.to_thread(list, states)
        except asyncio.CancelledError:
            cancel()
            raise

    def trace(self, **arguments: Any) -> "graph.Graph":
        """The graph of what it does, where an argument that is not given stays open. UserError if it depends on values."""
        return graph.trace(self, **arguments)

    # ---- inside

    def _sorted(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
        """Arguments of the function, and parameters. What the function has itself is an argument."""
        own = {name: value for name, value in kwargs.items() if name in self.arg_names}
        params = {name: value for name, value in kwargs.items() if name not in own}
        own = self.bound | own
        try:
            self.signature.bind(None, *args, **own)
        except TypeError as error:
            raise UserError(f"{self.func.__name__}: {error}") from None
        return (args, own), ir.DEFAULTS | ir.checked(params, "run")

    def _job(self, job: dict[str, Any] | Sequence[Any], params: dict[str, Any]) -> tuple[Arguments, dict[str, Any]]:
        if isinstance(job, dict):
            return self._sorted((), job | params)
        if isinstance(job, list | tuple):
            return self._sorted(job, params)
        raise UserError(f"run_batch takes dicts or lists of arguments; {job!r} is neither")

    def _state(self, backend: "Backend | Engine | None", params: dict[str, Any], stream: bool = False) -> ProgramState:
        """A new one; called by a program that is traced, a branch of its graph."""
        if stream and self.num_api_spec_tokens:
            raise UserError("stream and num_api_spec_tokens: what is speculated comes in one piece")
        if (outer := graph.traced()) is not None:
            if stream:
                raise UserError(f"{self.func.__name__} is streamed by another program, which so has no one graph")
            return outer.call(graph.Call(self, backend, params))
        cancel = Cancel(_within.get())
        return ProgramState(Run(as_backend(backend), params, stream, self.num_api_spec_tokens, cancel))

    def _call(self, state: ProgramState, arguments: Arguments) -> None:
        """Raises what the function raises. Programs that it calls end with it."""
        before = _within.set(state.run.cancel)
        try:
            state.ret_value = self.func(state, *arguments[0], **arguments[1])
        except BaseException as error:
            state.fail(error)
            state.run.cancel()
            raise
        finally:
            _within.reset(before)
            state.run.close()

    def _attempt(self, state: ProgramState, arguments: Arguments, cancel: Cancel) -> None:
        """To its end, however it ends; `cancel` ends it, too."""
        try:
            with cancel.ends(state.run.cancel):
                self._call(state, arguments)
                state.sync()
        except BaseException as error:
            state.fail(error)

    def _many(
        self,
        batch: Sequence[dict[str, Any] | Sequence[Any]],
        num_threads: int | str,
        progress_bar: bool,
        backend: Backend,
        params: dict[str, Any],
        cancel: Cancel,
    ) -> Iterator[ProgramState]:
        if graph.traced() is not None:
            raise UserError(f"{self.func.__name__} is run as a batch by another program, which so has no one graph")
        jobs = [self._job(job, params) for job in batch]
        threads = max(96, 16 * (os.cpu_count() or 1)) if num_threads == "auto" else num_threads
        if not isinstance(threads, int) or threads < 1:
            raise UserError(f"num_threads is {num_threads!r}; it must be a whole number, at least 1, or 'auto'")

        def attempt(job: tuple[Arguments, dict[str, Any]]) -> ProgramState:
            arguments, values = job
            state = self._state(backend, values)
            self._attempt(state, arguments, cancel)
            return state

        with ExitStack() as inside, tqdm(total=len(jobs), disable=not progress_bar) as bar:
            with suppress(UserError, BackendError):  # each program meets it itself, and keeps its place
                prefix = graph.constant_prefix(self, backend) if len(jobs) > 1 else None
                if prefix is not None and len(prefix.text) > LEAST_PREFIX:
                    inside.enter_context(backend.hold(prefix))
            yield from in_order(attempt, jobs, threads, bar.update, cancel)


def in_order(
    do: Callable[[Job], Result], jobs: Sequence[Job], threads: int, tick: Callable[[], Any], cancel: Cancel
) -> Iterator[Result]:
    """`do` of each job, in so many threads; each result as soon as those before it are there. tick: called for each that is done.

    Whoever leaves before the end, or is interrupted, cancels: no other job is begun, and those that run get LAST_WAIT to end.
    """
    done: dict[int, Result] = {}
    changed, todo = threading.Condition(), iter(enumerate(jobs))

    def work() -> None:
        while True:
            with changed:
                i, job = next(todo, (None, None))
            if i is None:
                return
            result = do(job)
            with changed:
                done[i] = result
                tick()
                changed.notify_all()

    pool = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(jobs)))]
    try:
        for thread in pool:
            thread.start()
        for i in range(len(jobs)):
            with changed:
                changed.wait_for(lambda: i in done)  # noqa: B023
                result = done.pop(i)
            yield result
    except BaseException:
        cancel()
        with changed:
            todo = iter(())
        end = time.monotonic() + LAST_WAIT
        for thread in pool:
            if thread.ident is not None:
                thread.join(max(0, end - time.monotonic()))
        raise
