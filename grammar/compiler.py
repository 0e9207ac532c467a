"""A spec -> a grammar: off the loop, once, and within a time that is known.

    compiler = Compiler(vocabulary)
    compiler.compile(Spec.json_schema({"type": "integer"})).result().matcher()

What a spec goes through, in the order of what it costs: the cache; the gate (`limits`); the choice of a backend (`support`);
and the compile. All but the cache happens in threads of this module: xgrammar and llguidance let go of the interpreter's lock.
What may be slow, or may crash, compiles in a process that can be killed (`worker.py`). From there it is long in coming over,
which is why the rest stays here. Slow ones have a queue of their own, so that nobody else waits for them.

Refusals are remembered like grammars. What took too long or crashed is not: a busy machine may have been the reason.

    python -m pytest tests/test_grammar_compiler.py tests/test_grammar_hostile.py
"""

import json
import os
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, TypeVar

from errors import UserError
from grammar import limits, support, tag
from grammar.matcher import Grammar
from grammar.spec import Spec
from grammar.stats import CompilerStats
from grammar.vocabulary import Vocabulary
from grammar.worker import Backend, Crashed, TookTooLong, Worker, compile_or_refuse

BACKENDS = ("auto", "xgrammar", "llguidance")
MAX_WAITING = 256  # specs that wait for a thread; one holds its text, up to what the gate lets through
MAX_WAITING_SLOW = 16  # for the worker, which may take `timeout` for each
# of xgrammar's own cache, from which grammars take rules that they share; as it counts: what it holds is up to twenty times more
RULE_CACHE_BYTES = 8 << 20
MAX_BACKENDS = 4  # kept: two, and more for tags that spell control tokens; each has some 30 MB for a vocabulary of 152k

Value = TypeVar("Value")


class QueueFull(UserError):
    """Too many specs wait. There may be room later."""


@dataclass(eq=False)
class _Job:
    """A spec on its way, and all who wait for it."""

    spec: Spec
    backend: str | None  # None: still to be chosen
    futures: list[Future[Grammar]] = field(default_factory=list)

    @property
    def wanted(self) -> bool:
        return not all(future.cancelled() for future in self.futures)


class Compiler:
    """The compiler of one model. Safe to share between threads. One that is dropped ends its threads and its worker too.

    backend: "auto", "xgrammar" or "llguidance". cache_bytes: of grammars; refusals get a sixteenth more. timeout: seconds of one
    compile, its wait in a queue not counted. threads: that compile here, and that the worker uses; None: half the cores, at
    most four.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        backend: str = "auto",
        *,
        cache_bytes: int = 256 << 20,
        timeout: float = 30.0,
        threads: int | None = None,
    ):
        if backend not in BACKENDS:
            raise UserError(f"the grammar backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
        threads = threads or max(1, min(4, (os.cpu_count() or 1) // 2))
        self.vocabulary, self._wanted, self._timeout = vocabulary, backend, timeout
        self._lock = threading.RLock()  # of all that follows but the backends; a finalizer may run where it is held
        self._jobs: dict[Spec, _Job] = {}
        # a backend is a function of the spec, since `wanted` is the same for all: so a spec is key enough
        self._grammars: ByteCache[Grammar] = ByteCache(cache_bytes)
        self._refusals: ByteCache[UserError] = ByteCache(cache_bytes // 16)
        self._counts = dict.fromkeys(("hits", "misses", "joined", "refused", "timeouts", "crashes"), 0)
        self._lane = _Lane("grammar", threads, MAX_WAITING, self._start, self._lock)
        self._slow_lane = _Lane("grammar, slow", 1, MAX_WAITING_SLOW, self._start_slow, self._lock)
        self._worker = Worker(vocabulary.tokens, vocabulary.stop_ids, timeout, threads)
        self._closed = False
        self._backends: OrderedDict[tuple[str, *tuple[int, ...]], Backend] = (
            OrderedDict()
        )  # in the order of their last use
        self._building = threading.Lock()
        weakref.finalize(self, _end, self._lock, (self._lane, self._slow_lane), self._worker)

    def compile(self, spec: Spec, backend: str | None = None) -> Future[Grammar]:
        """A future of the spec's grammar, at once; it has its result already if the spec is known.

        backend: what `check` has said, if it was asked. Then it need not be asked again.

        Its exception is a UserError if the spec was refused, took too long, crashed the worker, or found the queue full.
        It is cancelled if the compiler is closed first. Who cancels it withdraws alone: who else waits for the spec gets theirs.
        Its callbacks run in the thread that has compiled, which they hold up; in the one that adds them if there is
        a result already; or in the one that cancels. They may call this compiler, but not wait for it. RuntimeError if closed.
        """
        future: Future[Grammar] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the grammar compiler is closed")
            outcome = self._known(spec)
            if outcome is not None:
                self._counts["hits"] += 1
            elif (job := self._jobs.get(spec)) is not None:
                self._counts["joined"] += 1
                job.futures.append(future)
            else:
                self._counts["misses"] += 1
                outcome = self._enqueue(_Job(spec, backend, [future]), self._lane)
        if outcome is not None:
            _settle(future, outcome)
        return future

    def check(self, spec: Spec) -> str:
        """The backend that compiles a spec: the gate and the choice, in the caller's thread. UserError if it is refused here.

        Costs milliseconds for a large schema that is not in the cache. A spec that passes may still be refused by its backend.
        """
        with self._lock:
            known = self._known(spec)
        if isinstance(known, UserError):
            raise _copy(known)
        if known is not None:
            return known.backend
        limits.check(spec)
        return support.choose(spec, self._wanted)

    def stats(self) -> CompilerStats:
        with self._lock:
            return CompilerStats(
                **self._counts,
                compiling=len(self._jobs),
                cached_grammars=len(self._grammars),
                cached_bytes=self._grammars.bytes,
                cached_refusals=len(self._refusals),
            )

    def close(self) -> None:
        """Cancel what is on its way and end the threads and the worker. Once more does nothing.

        A compile in this process cannot be stopped: waits for it, at most `timeout`.
        """
        lanes = self._lane, self._slow_lane
        with self._lock:
            self._closed = True
            futures = [future for job in self._jobs.values() for future in job.futures]
            self._jobs.clear()
        for future in futures:
            future.cancel()
            future.set_running_or_notify_cancel()
        _end(self._lock, lanes, self._worker)
        for lane in lanes:
            lane.join()

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _known(self, spec: Spec) -> Grammar | UserError | None:
        """Under the lock."""
        return self._grammars.get(spec) or self._refusals.get(spec)

    def _enqueue(self, job: _Job, lane: "_Lane") -> UserError | None:
        """Have a lane do it. Under the lock. An error if too many wait there."""
        if lane.full:
            for unwanted in lane.drop(lambda waiting: not waiting.wanted):
                self._drop(unwanted)
        if lane.full:
            return QueueFull(f"too many grammars are waiting to be compiled; {lane.limit} is the limit")
        self._jobs[job.spec] = job
        lane.put(job)
        return None

    def _start(self, job: _Job) -> None:
        """In a thread of the lane for all."""
        if not self._still_wanted(job):
            return
        try:
            backend = job.backend or self.check(job.spec)
            if backend == "xgrammar" and limits.may_be_slow(job.spec):
                return self._hand_over(job)
            outcome = self._compile_here(backend, job.spec)
        except Exception as error:
            outcome = error
        self._finish(job, outcome)

    def _hand_over(self, job: _Job) -> None:
        """To the lane for slow ones."""
        with self._lock:
            error = None if self._closed else self._enqueue(job, self._slow_lane)
        if error is not None:
            self._finish(job, error)

    def _start_slow(self, job: _Job) -> None:
        """In the slow lane's thread, the only one that talks to the worker."""
        if not self._still_wanted(job):
            return
        try:
            serialized = self._worker.compile(job.spec, self._spoken(job.spec))
            outcome = (
                self._compile_here("xgrammar", job.spec) if serialized is None else self._load(job.spec, serialized)
            )
        except Exception as error:
            outcome = error
        self._finish(job, outcome)

    def _still_wanted(self, job: _Job) -> bool:
        with self._lock:
            if self._jobs.get(job.spec) is not job:  # the compiler was closed
                return False
            if not job.wanted:
                self._drop(job)
            return job.wanted

    def _drop(self, job: _Job) -> None:
        """Of a job that nobody wants, all futures of which are cancelled. Under the lock."""
        del self._jobs[job.spec]
        for future in job.futures:
            future.set_running_or_notify_cancel()

    def _finish(self, job: _Job, outcome: Grammar | Exception) -> None:
        """Remember what came of it, and tell all who wait."""
        with self._lock:
            if self._jobs.get(job.spec) is not job:  # the compiler was closed
                return
            del self._jobs[job.spec]
            self._remember(job.spec, outcome)
        for future in job.futures:
            _settle(future, outcome)

    def _remember(self, spec: Spec, outcome: Grammar | Exception) -> None:
        """Under the lock."""
        match outcome:
            case TookTooLong():
                self._counts["timeouts"] += 1
            case Crashed():
                self._counts["crashes"] += 1
            case QueueFull():
                pass
            case UserError():
                self._counts["refused"] += 1
                self._refusals.put(spec, _copy(outcome), _text_bytes(spec))
            case Exception():
                pass  # a bug of ours
            case grammar:
                self._grammars.put(spec, grammar, grammar.size + _text_bytes(spec))

    def _compile_here(self, name: str, spec: Spec) -> Grammar:
        """In a thread of this process. TookTooLong too; it cannot be stopped then, and runs on unheeded."""
        backend = self._backend(name, spec)
        result: Future[Grammar] = Future()

        def run() -> None:
            try:
                result.set_result(compile_or_refuse(backend, spec))
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name="grammar compile", daemon=True).start()
        try:
            return result.result(self._timeout)
        except TimeoutError:
            raise TookTooLong.after(self._timeout) from None

    def _load(self, spec: Spec, serialized: str) -> Grammar:
        """What the worker has compiled."""
        backend = self._backend("xgrammar", spec)
        from xgrammar import CompiledGrammar

        from grammar.xgrammar_backend import XgrammarGrammar

        return XgrammarGrammar(CompiledGrammar.deserialize_json(serialized, backend.info), backend.vocabulary)

    def _backend(self, name: str, spec: Spec) -> Backend:
        """Built when it is first needed: to import xgrammar takes a second."""
        spoken = self._spoken(spec)
        key = (name, *spoken)
        with self._building:
            if key not in self._backends:
                self._backends[key] = _build(name, self.vocabulary.speaking(spoken))
            self._backends.move_to_end(key)
            while len(self._backends) > MAX_BACKENDS:
                self._backends.popitem(last=False)
            return self._backends[key]

    def _spoken(self, spec: Spec) -> dict[int, str]:
        """Control tokens that are text in this spec, since it spells them."""
        return self.vocabulary.spoken(tag.spelled(json.loads(spec.text))) if spec.kind == "structural_tag" else {}


def _end(lock: threading.RLock, lanes: Iterable["_Lane"], worker: Worker) -> None:
    with lock:
        for lane in lanes:
            lane.close()
    worker.close()


def _build(name: str, vocabulary: Vocabulary) -> Backend:
    if name == "xgrammar":
        from grammar.xgrammar_backend import XgrammarBackend

        return XgrammarBackend(vocabulary, cache_bytes=RULE_CACHE_BYTES)
    from grammar.llguidance_backend import LlguidanceBackend

    return LlguidanceBackend(vocabulary)


def _settle(future: Future[Grammar], outcome: Grammar | Exception) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, UserError):
        future.set_exception(_copy(outcome))
    elif isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _copy(error: UserError) -> UserError:
    """Without a traceback, to which each who raises it adds, and which keeps alive what its frames hold."""
    return type(error)(*error.args)


def _text_bytes(spec: Spec) -> int:
    return sys.getsizeof(spec.text) + 1024  # and all the objects around it, roughly


class _Lane:
    """A queue and the threads that serve it, first come, first served. The threads start when there is work for them."""

    def __init__(self, name: str, threads: int, limit: int, work: Callable[[_Job], None], lock: threading.RLock):
        """limit: jobs that may wait. lock: the compiler's, which the methods that say so must be called under."""
        self.limit = limit
        self._name, self._most = name, threads
        self._work = weakref.WeakMethod(work)  # a thread that waits must not keep the compiler from being dropped
        self._waiting: deque[_Job] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False
        self._changed = threading.Condition(lock)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self.limit

    def put(self, job: _Job) -> None:
        """Under the lock."""
        self._waiting.append(job)
        if self._idle < len(self._waiting) and len(self._threads) < self._most:
            self._threads.append(threading.Thread(target=self._run, name=self._name, daemon=True))
            self._threads[-1].start()
        self._changed.notify()

    def drop(self, unwanted: Callable[[_Job], bool]) -> list[_Job]:
        """Take jobs out of the queue. Under the lock."""
        waiting, self._waiting = self._waiting, deque()
        dropped = []
        for job in waiting:
            (dropped if unwanted(job) else self._waiting).append(job)
        return dropped

    def close(self) -> None:
        """Under the lock. What waits is left undone."""
        self._closed = True
        self._waiting.clear()
        self._changed.notify_all()

    def join(self) -> None:
        """Wait until the threads have ended. Not under the lock."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._do(job)
            del job

    def _do(self, job: _Job) -> None:
        if (work := self._work()) is not None:
            work(job)

    def _next(self) -> _Job | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._idle -= 1
            return None if self._closed else self._waiting.popleft()


class ByteCache(Generic[Value]):
    """What was used last, as long as all of it has room in `limit` bytes. For one thread at a time."""

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._entries: OrderedDict[Spec, tuple[Value, int]] = OrderedDict()  # in the order of their last use

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Spec) -> Value | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Spec, value: Value, size: int) -> None:
        """size: bytes, the key's included. What is larger than the limit is not kept, and throws nothing else out."""
        if size > self.limit:
            return
        self._entries[key] = value, size
        self.bytes += size
        while self.bytes > self.limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
