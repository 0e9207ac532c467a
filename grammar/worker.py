"""A process in which a grammar compiles that may take long, or take its process with it.

Native code cannot be stopped in the middle, and where it crashes it ends the process that it is in. So what
`limits.may_be_slow` points out compiles in a process that may die: it is killed when it is late, its memory and its
processor time are bounded, and the next grammar gets a new one. It costs seconds to start, so it starts when it is first
needed and is kept. It answers with the grammar as text, which the engine's process parses: nothing that it says is executed.
That text is long, up to fifty times what the grammar takes in memory. So what turned out to be quick is not sent: the engine's
process may safely do it again.

The thread that reads its stdin is not the one that compiles: when the engine's process is gone, however it went, stdin ends
and the worker ends too, in the middle of a compile if need be.

    python -m pytest tests/test_grammar_compiler.py
"""

import json
import math
import os
import queue
import resource
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, Protocol

from errors import UserError
from frames import read_frame, write_frame
from grammar.matcher import Grammar, one_line
from grammar.spec import Spec

START_SECONDS = 120.0  # a machine that has much else to do may need twenty times as long as one that has not
QUICK_SECONDS = 0.5  # a compile; to write a grammar as text and read it takes as long, or longer
MEMORY_BYTES = 2 << 30  # of address space, on top of what the imports take
MAX_ANSWER_BYTES = 128 << 20  # to read so much takes the engine's process 4 s of a thread and 0.7 GB for a moment
NICENESS = 10  # it gives way to the engine: where all cores are busy it gets a tenth of what another process gets
STACK_BYTES = 64 << 20  # of address space; the parsers are recursive

# the first byte of an answer
READY, COMPILED, QUICK, REFUSED, TOO_LARGE = b"y", b"c", b"q", b"r", b"l"


class TookTooLong(UserError):
    """The compile was given up. What is too long today may not be tomorrow."""

    @classmethod
    def after(cls, seconds: float) -> "TookTooLong":
        return cls(f"compiling the grammar took longer than {seconds:g} s")


class Crashed(UserError):
    """The compile ended the worker, or took all the memory that it has."""


class Backend(Protocol):
    def compile(self, spec: Spec) -> Grammar: ...


def compile_or_refuse(backend: Backend, spec: Spec, longest: int = 300) -> Grammar:
    """A backend's grammar. UserError, in one line, for what it does not take."""
    try:
        return backend.compile(spec)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = one_line(str(error))  # it may quote all of the spec
        reason = reason if len(reason) <= longest else reason[: longest - 3] + "..."
        raise UserError(f"{spec.kind} cannot be compiled: {reason}") from error


class Worker:
    """The engine's side of it. One thread at a time may `compile`; any may `close`."""

    def __init__(self, tokens: list[bytes], stop_ids: list[int], timeout: float, threads: int = 1):
        """tokens, stop_ids: a Vocabulary's. timeout: seconds that one compile may take. threads: that one compile may use."""
        self._timeout = timeout
        self._setup = dict(
            tokens=[token.decode("latin-1") for token in tokens],  # a byte is the character of its number
            stop_ids=stop_ids,
            threads=threads,
            cpu_seconds=math.ceil(timeout * threads),
            memory_bytes=MEMORY_BYTES,
            quick_seconds=QUICK_SECONDS,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()  # of the two above

    def compile(self, spec: Spec, spoken: Mapping[int, str] | None = None) -> str | None:
        """A grammar of xgrammar's, serialized for the same vocabulary; None if it is quick to compile, and does no harm.

        spoken: as for `Vocabulary.speaking`.

        UserError if it was refused, was late, or crashed. RuntimeError if no worker can be had.
        """
        if self._process is None or self._process.poll() is not None:  # somebody else may have killed it
            self._start()
        try:
            answer = self._exchange({"spec": asdict(spec), "spoken": list((spoken or {}).items())}, self._timeout)
        except TimeoutError:
            raise TookTooLong.after(self._timeout) from None
        except EOFError:
            raise Crashed("the grammar compiler crashed on it") from None
        kind, text = answer[:1], answer[1:].decode()
        if kind == REFUSED:
            raise UserError(text)
        if kind == TOO_LARGE:
            self._stop()  # what it has taken it does not give back
            raise Crashed(f"compiling the grammar takes more memory than {self._setup['memory_bytes'] / 2**30:g} GiB")
        return None if kind == QUICK else text

    def close(self) -> None:
        """Kill it. A compile that is under way ends with Crashed, and there is no other. Once more does nothing."""
        with self._lock:
            self._closed = True
        self._stop()

    def _start(self) -> None:
        self._stop()
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._closed:
                raise RuntimeError("the grammar compiler is closed")
            self._process = subprocess.Popen(
                # -P: no module of the current folder is taken for one of ours
                [sys.executable, "-P", "-m", "grammar.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # else Ctrl-C, which is for the engine, ends it in the middle of an answer
            )
        try:
            self._exchange(self._setup, START_SECONDS)
        except (TimeoutError, EOFError) as error:
            raise RuntimeError("the process that compiles grammars does not start") from error

    def _stop(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what was still to be written
                    pipe.close()

    def _exchange(self, message: dict, seconds: float) -> bytes:
        """Say something to it, and its answer. If none comes it is dead: TimeoutError if it was killed for that, else EOFError."""
        with self._lock:
            process = self._process
        if process is None:
            raise EOFError
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, give_up)
        timer.start()
        try:
            write_frame(process.stdin, json.dumps(message).encode())
            answer = read_frame(process.stdout)
        except (OSError, ValueError, EOFError):  # ValueError: closed by another thread
            answer = None
        timer.cancel()
        timer.join()
        if answer is None or late.is_set():  # a process that is dying may look alive: never ask it again
            self._stop()
        if answer is None:
            raise TimeoutError if late.is_set() else EOFError
        return answer


def main() -> None:
    os.nice(NICENESS)
    # what anybody prints goes to stderr: stdout carries answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    setup = json.loads(read_frame(sys.stdin.buffer))

    backend = _backend(setup, {})
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, _mapped_bytes() + setup["memory_bytes"] + STACK_BYTES)
    write_frame(answers, READY)

    asked: queue.SimpleQueue[dict] = queue.SimpleQueue()
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_serve, args=(backend, asked, answers, setup), daemon=True).start()
    with suppress(EOFError):
        while True:
            asked.put(json.loads(read_frame(sys.stdin.buffer)))
    os._exit(0)


def _backend(setup: dict, spoken: dict[int, str]) -> Backend:
    # these take seconds, and the engine's process waits until its setup has been read
    from grammar.vocabulary import Vocabulary
    from grammar.xgrammar_backend import XgrammarBackend

    tokens = [spoken[i].encode() if i in spoken else token.encode("latin-1") for i, token in enumerate(setup["tokens"])]
    stop_ids = [i for i in setup["stop_ids"] if i not in spoken]
    # no cache: xgrammar's grows with every compile, and what comes from here is cached where it goes
    return XgrammarBackend(Vocabulary(tokens, stop_ids, _no_encode), threads=setup["threads"], cache_bytes=0)


def _serve(backend: Backend, asked: "queue.SimpleQueue[dict]", answers: BinaryIO, setup: dict) -> None:
    try:
        while True:
            message = asked.get()
            spec, spoken = Spec(**message["spec"]), dict(message["spoken"])
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + setup["cpu_seconds"])
            able = _backend(setup, spoken) if spoken else backend
            write_frame(answers, _answer(able, spec, setup["quick_seconds"]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _answer(backend: Backend, spec: Spec, quick_seconds: float) -> bytes:
    start = time.monotonic()
    try:
        grammar = compile_or_refuse(backend, spec)
        if time.monotonic() - start < quick_seconds:
            return QUICK
        text = grammar.compiled.serialize_json().encode()
    except (MemoryError, RuntimeError, UserError) as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            return TOO_LARGE
        if isinstance(error, UserError):
            return REFUSED + str(error).encode()
        raise
    if len(text) > MAX_ANSWER_BYTES:
        return REFUSED + b"the compiled grammar has %d bytes; %d is the limit" % (len(text), MAX_ANSWER_BYTES)
    return COMPILED + text


def _limit(resource_id: int, bound: int) -> None:
    """Bound what this process may use, for now: it may be more next time, up to what the system allows."""
    _, hard = resource.getrlimit(resource_id)
    resource.setrlimit(resource_id, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


def _mapped_bytes() -> int:
    """Address space in use; where the system does not say, a guess."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 8 << 30


def _no_encode(text: str) -> list[int]:
    raise NotImplementedError("the worker has no tokenizer")


if __name__ == "__main__":
    main()
