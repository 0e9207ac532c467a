"""The compiler of grammars: what it remembers, shares, bounds and gives up; and the process that it can kill.

The first part has a backend that does as it is told; the second the real ones, and a real worker.

    python -m pytest tests/test_grammar_compiler.py
"""

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from waiting import HANG, until

import grammar.compiler
import grammar.worker
from errors import UserError
from grammar import limits, support
from grammar.compiler import ByteCache, Compiler
from grammar.matcher import Grammar
from grammar.spec import Spec
from grammar.vocabulary import Vocabulary
from grammar.worker import Crashed, TookTooLong, Worker
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "assets" / "folio-tiny"
VOCABULARY = Vocabulary([b"", *(bytes([i]) for i in range(256))], [0], encode=list)


def spec(text: str) -> Spec:
    return Spec("regex", text)


def answer(future: Future) -> Grammar:
    return future.result(HANG)


def error_of(future: Future) -> BaseException:
    error = future.exception(HANG)
    assert error is not None
    return error


# A compiler with a backend that does as it is told


@dataclass
class Compiled:
    spec: Spec
    size: int
    backend: str = "xgrammar"


class Backend:
    """It refuses what says "bad", waits at what says "wait" until `go` is set, and notes what it is asked."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.go = threading.Event()
        self.at_once = self.most_at_once = 0
        self._counting = threading.Lock()

    def compile(self, spec: Spec) -> Compiled:
        with self._counting:
            self.started.append(spec.text)
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        if "wait" in spec.text:
            assert self.go.wait(HANG)
        with self._counting:
            self.at_once -= 1
        if "bad" in spec.text:
            raise RuntimeError("it is\nbad")
        return Compiled(spec, size=1000)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Backend()
    monkeypatch.setattr(grammar.compiler, "_build", lambda name, vocabulary: backend)
    monkeypatch.setattr(limits, "check", lambda spec: None)
    monkeypatch.setattr(limits, "may_be_slow", lambda spec: "slow" in spec.text)
    monkeypatch.setattr(support, "choose", lambda spec, wanted: "xgrammar")
    return backend


@pytest.fixture
def make(backend: Backend) -> Iterator[Callable[..., Compiler]]:
    made = []

    def make(**options: object) -> Compiler:
        made.append(Compiler(VOCABULARY, **{"threads": 1, **options}))
        return made[-1]

    yield make
    backend.go.set()
    for compiler in made:
        compiler.close()


def test_a_spec_is_compiled_once(make, backend):
    compiler = make()
    first = answer(compiler.compile(spec("a")))
    again = compiler.compile(spec("a"))
    assert again.done() and again.result() is first
    assert backend.started == ["a"]
    assert answer(compiler.compile(Spec("ebnf", "a"))) is not first
    stats = compiler.stats()
    assert (stats.hits, stats.misses, stats.joined, stats.compiling, stats.cached_grammars) == (1, 2, 0, 0, 2)


def test_two_who_ask_at_once_share_a_compile(make, backend):
    compiler = make()
    one, two = compiler.compile(spec("wait")), compiler.compile(spec("wait"))
    assert not one.done() and compiler.stats().compiling == 1
    backend.go.set()
    assert answer(one) is answer(two)
    assert backend.started == ["wait"] and compiler.stats().joined == 1


def test_what_was_not_used_for_longest_makes_room(make, backend):
    compiler = make(cache_bytes=7000)  # three, with their specs
    for text in ("a", "b", "c", "a", "d"):
        answer(compiler.compile(spec(text)))
    for text in ("a", "c", "d", "b"):
        answer(compiler.compile(spec(text)))
    assert backend.started == ["a", "b", "c", "d", "b"]
    stats = compiler.stats()
    assert stats.cached_grammars == 3 and 3000 < stats.cached_bytes <= 7000


@given(limit=st.integers(0, 30), puts=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12))))
def test_the_cache_holds_the_last_used_that_have_room(limit, puts):
    cache: ByteCache[int] = ByteCache(limit)
    model: dict[Spec, int] = {}  # in the order of use
    for number, size in puts:
        key = spec(str(number))
        assert (cache.get(key) is None) == (key not in model)
        if key in model:
            model[key] = model.pop(key)
            continue
        cache.put(key, number, size)
        if size <= limit:
            model[key] = size
        while sum(model.values()) > limit:
            del model[next(iter(model))]
        assert cache.bytes == sum(model.values()) and len(cache) == len(model)


def test_a_refusal_is_remembered_and_is_one_line(make, backend):
    compiler = make()
    first, again = error_of(compiler.compile(spec("bad"))), error_of(compiler.compile(spec("bad")))
    assert isinstance(first, UserError) and str(first) == str(again) == "regex cannot be compiled: it is bad"
    assert again is not first, "who raises an error adds to its traceback"
    assert backend.started == ["bad"]
    with pytest.raises(UserError, match="it is bad"):
        compiler.check(spec("bad"))
    stats = compiler.stats()
    assert (stats.refused, stats.hits, stats.cached_refusals, stats.cached_grammars) == (1, 1, 1, 0)


def test_refusals_are_bounded_and_throw_no_grammar_out(make, backend):
    compiler = make(cache_bytes=64 << 10)
    answer(compiler.compile(spec("good")))
    for i in range(50):
        error_of(compiler.compile(spec(f"bad {i}")))
    assert 0 < compiler.stats().cached_refusals < 5
    assert compiler.compile(spec("good")).done()


@pytest.mark.parametrize("where", ["check", "choose"])
def test_the_gate_and_the_choice_refuse_in_the_future_and_in_check(make, backend, monkeypatch, where):
    def refuse(*_: object) -> str:
        raise UserError("the schema has 7 levels; 6 is the limit")

    monkeypatch.setattr(*((limits, "check") if where == "check" else (support, "choose")), refuse)
    compiler = make()
    with pytest.raises(UserError, match="7 levels"):
        compiler.check(spec("a"))
    future = compiler.compile(spec("a"))
    with pytest.raises(UserError, match="7 levels"):
        answer(future)
    assert backend.started == []


def test_check_names_the_backend(make, backend):
    compiler = make()
    assert compiler.check(spec("a")) == "xgrammar"
    answer(compiler.compile(spec("a")))
    assert compiler.check(spec("a")) == "xgrammar"


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="'outlines'; it must be one of auto, xgrammar, llguidance"):
        Compiler(VOCABULARY, "outlines")


def test_a_bug_reaches_who_waits_and_is_not_remembered(make, backend, monkeypatch):
    compiler = make()
    monkeypatch.setattr(limits, "check", lambda spec: 1 / 0)
    assert isinstance(error_of(compiler.compile(spec("a"))), ZeroDivisionError)
    monkeypatch.setattr(limits, "check", lambda spec: None)
    assert answer(compiler.compile(spec("a"))).size == 1000


def test_what_is_late_here_is_given_up_and_not_remembered(make, backend):
    compiler = make(timeout=0.05)
    error = error_of(compiler.compile(spec("wait")))
    assert isinstance(error, UserError) and str(error) == "compiling the grammar took longer than 0.05 s"
    assert answer(compiler.compile(spec("quick"))).size == 1000
    backend.go.set()
    assert answer(compiler.compile(spec("wait"))).size == 1000
    assert compiler.stats().timeouts == 1


def test_who_cancels_withdraws_alone(make, backend):
    compiler = make()
    one, two = compiler.compile(spec("wait")), compiler.compile(spec("wait"))
    assert one.cancel()
    backend.go.set()
    assert answer(two).size == 1000
    assert one.cancelled() and wait([one], HANG).done


def test_what_nobody_wants_any_more_is_not_compiled(make, backend):
    compiler = make()
    first, unwanted, last = (compiler.compile(spec(text)) for text in ("wait", "unwanted", "last"))
    unwanted.cancel()
    backend.go.set()
    answer(first), answer(last)
    assert backend.started == ["wait", "last"] and compiler.stats().compiling == 0
    assert wait([unwanted], HANG).done


def test_who_asks_after_the_last_has_withdrawn_is_served(make, backend):
    compiler = make()
    compiler.compile(spec("wait"))
    compiler.compile(spec("again")).cancel()
    future = compiler.compile(spec("again"))
    backend.go.set()
    assert answer(future).size == 1000


def test_first_come_first_served_and_no_more_at_once_than_threads(make, backend):
    compiler = make()
    answer_all = [compiler.compile(spec(f"wait {i}")) for i in range(20)]
    backend.go.set()
    wait(answer_all, HANG)
    assert backend.started == [f"wait {i}" for i in range(20)] and backend.most_at_once == 1


def test_several_threads_compile_at_once(make, backend):
    compiler = make(threads=3)
    futures = [compiler.compile(spec(f"wait {i}")) for i in range(20)]
    until(lambda: backend.at_once == 3)
    backend.go.set()
    wait(futures, HANG)
    assert backend.most_at_once == 3


def test_a_queue_that_is_full_refuses_until_there_is_room(make, backend, monkeypatch):
    monkeypatch.setattr(grammar.compiler, "MAX_WAITING", 3)
    compiler = make()
    running = compiler.compile(spec("wait"))
    until(lambda: backend.started)
    waiting = [compiler.compile(spec(f"{i}")) for i in range(3)]
    error = error_of(compiler.compile(spec("one more")))
    assert str(error) == "too many grammars are waiting to be compiled; 3 is the limit"
    assert not compiler.compile(spec("0")).done(), "who asks for what waits already takes no room"
    waiting[1].cancel()
    more = compiler.compile(spec("one more"))
    backend.go.set()
    assert [answer(future).size for future in (running, waiting[0], waiting[2], more)] == [1000] * 4
    assert "1" not in backend.started


def test_callbacks_run_where_it_was_compiled_and_may_ask_for_more(make, backend):
    compiler = make()
    threads, more = [], Future()

    def then(future: Future) -> None:
        threads.append(threading.current_thread())
        compiler.compile(spec("more")).add_done_callback(lambda future: more.set_result(future.result()))

    compiler.compile(spec("wait")).add_done_callback(then)
    backend.go.set()
    assert answer(more).size == 1000
    assert threads[0] is not threading.current_thread()
    compiler.compile(spec("wait")).add_done_callback(lambda _: threads.append(threading.current_thread()))
    assert threads[1] is threading.current_thread()


class SlowWorker:
    """Instead of a process."""

    def __init__(self, *_: object):
        self.go, self.asked = threading.Event(), []

    def compile(self, spec: Spec, spoken: dict | None = None) -> str:
        self.asked.append(spec.text)
        assert self.go.wait(HANG)
        if "crash" in spec.text:
            raise Crashed("the grammar compiler crashed on it")
        if "late" in spec.text:
            raise TookTooLong.after(7)
        raise UserError("it is refused")

    def close(self) -> None:
        self.go.set()


def test_nobody_waits_for_slow_ones(make, backend, monkeypatch):
    monkeypatch.setattr(grammar.compiler, "Worker", SlowWorker)
    monkeypatch.setattr(grammar.compiler, "MAX_WAITING_SLOW", 2)
    compiler = make()
    slow = [compiler.compile(spec("slow crash"))]
    until(lambda: compiler._worker.asked)
    slow += [compiler.compile(spec(text)) for text in ("slow late", "slow bad")]
    assert answer(compiler.compile(spec("quick"))).size == 1000
    assert "2 is the limit" in str(error_of(compiler.compile(spec("slow 3"))))
    assert not any(future.done() for future in slow)
    compiler._worker.go.set()
    said = ["the grammar compiler crashed on it", "compiling the grammar took longer than 7 s", "it is refused"]
    assert [str(error_of(future)) for future in slow] == said
    assert not compiler.compile(spec("slow late")).done(), "only the refusal is remembered"
    assert compiler.compile(spec("slow bad")).done()
    stats = compiler.stats()
    assert (stats.crashes, stats.timeouts, stats.refused, stats.cached_refusals) == (1, 1, 1, 1)


def test_close_cancels_what_waits_and_leaves_no_thread(make, backend):
    before = set(threading.enumerate())
    compiler = make(threads=2)
    futures = [compiler.compile(spec(f"wait {i}")) for i in range(5)]
    closing = threading.Thread(target=compiler.close)
    closing.start()
    for future in futures:
        with pytest.raises(CancelledError):
            answer(future)
    backend.go.set()
    closing.join(HANG)
    compiler.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="closed"):
        compiler.compile(spec("a"))


def test_a_compiler_that_is_dropped_leaves_no_thread_and_no_worker(backend, monkeypatch):
    monkeypatch.setattr(grammar.compiler, "Worker", SlowWorker)
    before = set(threading.enumerate())
    compiler = Compiler(VOCABULARY)
    worker = compiler._worker
    worker.go.set()
    answer(compiler.compile(spec("a")))
    error_of(compiler.compile(spec("slow")))
    worker.go.clear()
    threads = set(threading.enumerate()) - before
    del compiler
    gc.collect()
    for thread in threads:
        thread.join(HANG)
    assert worker.go.is_set() and not set(threading.enumerate()) - before


@pytest.mark.parametrize("again", range(3))
def test_whatever_is_asked_at_once_everybody_gets_their_own(make, backend, again):
    """Eight threads ask for a few specs, in a cache too small for all, and cancel some."""
    seed = int(os.environ.get("FOLIO_SEED", random.randrange(1 << 30))) + again
    print(f"FOLIO_SEED={seed - again}")
    backend.go.set()
    compiler = make(threads=3, cache_bytes=8000)
    asked: list[tuple[str, Future]] = []

    def ask(rng: random.Random) -> None:
        for _ in range(100):
            text = rng.choice(["a", "b", "c", "d", "e", "bad f", "bad g"])
            future = compiler.compile(spec(text))
            asked.append((text, future))
            if rng.random() < 0.2:
                future.cancel()

    threads = [threading.Thread(target=ask, args=(random.Random(seed + i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert not wait([future for _, future in asked], HANG).not_done
    for text, future in asked:
        if future.cancelled():
            continue
        if "bad" in text:
            assert isinstance(future.exception(), UserError)
        else:
            assert future.result().spec.text == text
    stats = compiler.stats()
    assert stats.compiling == 0 and stats.hits + stats.misses + stats.joined == 800


# A real worker


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(Tokenizer.from_pretrained(BUNDLED), 1024, [2, 0])


@pytest.fixture
def let_all_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "check", lambda spec: None)
    monkeypatch.setattr(limits, "may_be_slow", lambda spec: True)
    monkeypatch.setattr(support, "choose", lambda spec, wanted: "xgrammar")


NEVER_ENDS = Spec.json_schema({"const": "x" * 1_000_000})
TAKES_MEMORY = Spec.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(600)}})
CRASHES = Spec("json_schema", '{"type": "string", "pattern": "%s"}' % ("(" * 1_000_000 + "a" + ")" * 1_000_000))
PERSON = Spec.json_schema({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})
SAME_MASKS = [
    PERSON,
    Spec.json_schema({"enum": ["red", "green", "blue", 7, None]}, any_whitespace=False),
    Spec.json_schema({"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
    Spec.regex("[a-f]{2,9}-(café|[0-9]+)"),
    Spec.ebnf('root ::= "(" root ")" | [a-z]+ ", " root | "."'),
    Spec.choices(["yes", "no", "perhaps"]),
]


@pytest.fixture(scope="module")
def worker(vocabulary: Vocabulary) -> Iterator[Worker]:
    worker = Worker(vocabulary.tokens, vocabulary.stop_ids, timeout=2.0)
    yield worker
    worker.close()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """All that are started from now on."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[-1])
    return started


def test_grammars_of_the_worker_have_the_same_masks_and_close_ends_it_in_the_middle(
    vocabulary, let_all_pass, processes
):
    from grammar.xgrammar_backend import XgrammarBackend

    here = XgrammarBackend(vocabulary)
    before = set(threading.enumerate())
    compiler = Compiler(vocabulary, timeout=600.0)
    rng = random.Random(7)
    futures = [compiler.compile(spec) for spec in SAME_MASKS]
    for wanted, future in zip(SAME_MASKS, futures, strict=True):
        _walk_together(here.compile(wanted), answer(future), rng)
    assert len(processes) == 1 and answer(futures[0]).size == here.compile(PERSON).size

    futures = [compiler.compile(NEVER_ENDS), compiler.compile(Spec.regex("a"))]
    threading.Event().wait(0.2)
    compiler.close()
    assert all(future.cancelled() for future in futures)
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    assert set(threading.enumerate()) == before


def _walk_together(one: Grammar, other: Grammar, rng: random.Random, steps: int = 40) -> None:
    """At random through both: the same tokens are allowed everywhere."""
    matchers = one.matcher(), other.matcher()
    masks = torch.zeros(2, 32, dtype=torch.int32)
    for _ in range(steps):
        masks.fill_(-1)
        for row, matcher in enumerate(matchers):
            matcher.fill(masks, row)
        assert torch.equal(masks[0], masks[1])
        allowed = [i for i in range(1024) if masks[0, i // 32] >> (i % 32) & 1]
        token = rng.choice(allowed)
        assert all(matcher.accept(token) for matcher in matchers)
        if matchers[0].ended:
            return


def test_a_late_compile_is_killed_and_the_next_works(worker, processes):
    with pytest.raises(TookTooLong, match="^compiling the grammar took longer than 2 s$"):
        worker.compile(NEVER_ENDS)
    assert [process.returncode for process in processes] == [-signal.SIGKILL]
    worker.compile(PERSON)
    assert len(processes) == 2


def test_a_crash_is_an_answer_and_the_next_works(worker, processes):
    worker.compile(PERSON)
    with pytest.raises(Crashed, match="^the grammar compiler crashed on it$"):
        worker.compile(CRASHES)
    started = len(processes)
    worker.compile(PERSON)
    assert len(processes) == started + 1


def test_the_worker_refuses_in_one_line(worker):
    with pytest.raises(UserError, match="^regex cannot be compiled: [^\n]+$") as info:
        worker.compile(Spec.regex("(a"))
    assert not isinstance(info.value, Crashed)
    worker.compile(PERSON)


def test_processor_time_and_memory_are_bounded(vocabulary, processes):
    worker = Worker(vocabulary.tokens, vocabulary.stop_ids, timeout=600.0)
    worker._setup["cpu_seconds"] = 1
    for i in range(5):
        worker.compile(Spec.json_schema({"const": f"{i}" * 10_000}))  # each for itself
    with pytest.raises(Crashed, match="crashed"):
        worker.compile(NEVER_ENDS)
    assert processes[0].returncode == -signal.SIGXCPU
    worker._setup |= {"cpu_seconds": 600, "memory_bytes": 1 << 28, "quick_seconds": 0.0}
    with pytest.raises(Crashed, match="takes more memory than 0.25 GiB"):
        worker.compile(TAKES_MEMORY)
    worker.close()
    assert len(processes) == 2


def test_a_compiled_grammar_that_is_too_large_is_refused(vocabulary, monkeypatch):
    from grammar.xgrammar_backend import XgrammarBackend

    here = XgrammarBackend(vocabulary)
    assert grammar.worker._answer(here, PERSON, HANG) == grammar.worker.QUICK
    whole = grammar.worker._answer(here, PERSON, 0.0)
    assert whole[:1] == grammar.worker.COMPILED
    monkeypatch.setattr(grammar.worker, "MAX_ANSWER_BYTES", 10_000)
    message = f"the compiled grammar has {len(whole) - 1} bytes; 10000 is the limit"
    assert grammar.worker._answer(here, PERSON, 0.0) == grammar.worker.REFUSED + message.encode()


def test_what_was_quick_in_the_worker_compiles_here(make, backend, monkeypatch):
    monkeypatch.setattr(Worker, "compile", lambda self, spec, spoken: None)
    assert answer(make().compile(spec("slow"))).size == 1000
    assert backend.started == ["slow"]


def test_a_worker_that_does_not_start_is_no_mistake_of_the_request(vocabulary, let_all_pass, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Compiler(vocabulary) as compiler:
        error = error_of(compiler.compile(PERSON))
    assert not isinstance(error, UserError) and "does not start" in str(error)


def test_the_worker_dies_with_its_parent():
    """Killed in the middle of a compile. They share stderr, which ends only when both are gone."""
    program = """
        import os, signal, threading
        from grammar.spec import Spec
        from grammar.worker import Worker

        worker = Worker([b"", b"a", b"x"], [0], timeout=600.0)
        worker.compile(Spec.regex("a"))
        never_ends = Spec.json_schema({"const": "x" * 1_000_000})
        threading.Thread(target=worker.compile, args=(never_ends,), daemon=True).start()
        threading.Event().wait(1)
        print("compiling", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, timeout=HANG)
    assert done.stdout == b"compiling\n", done.stderr.decode()
