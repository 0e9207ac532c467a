"""The process that the engine has for itself, so that its loop never shares an interpreter with HTTP.

    python -m serving.engine_process FD      # client.py starts it; FD is its end of a socket pair

Three threads. One reads: it takes requests in and refuses them. The main thread drives the engine, and what must happen between
two steps happens there. One writes: a pipe that is full holds it, and nobody else. When the HTTP process has gone, however
it went, the socket ends, and this process too. When the device has failed, it tells everybody and ends: another one
will be started.

    python -m pytest tests/test_server_client.py
"""

import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from typing import BinaryIO

from checkpoint import Checkpoint
from engine import Engine
from errors import EngineFailed, UserError
from frames import read_frame, write_frame
from grammar.compiler import QueueFull
from output import Delta
from scheduler.request import TokenLogprob
from serving import messages as m
from serving.params import sampling_params

IDLE = 1.0  # seconds without work, after which the engine proves that nothing is lost
WATCH_SHARE = 0.02  # of the engine's time, at most, goes to those who watch it
MOST_UNREAD = 16  # parts of what was said that wait for the other side; beyond, it gets no snapshots
LEAST_LOGPROB = -9999.0  # of what could not come at all; JSON has no -inf, and the OpenAI API says it so


class EngineProcess:
    """An engine, and what it is asked and what it says."""

    def __init__(self, engine: Engine, requests: BinaryIO, replies: BinaryIO):
        self.engine = engine
        self._requests, self._replies = requests, replies
        self._asked: deque[m.ToEngine] = deque()  # what must not happen during a step
        self._watch_seconds: float | None = None  # between two snapshots; None: nobody looks
        self._next_look = 0.0
        self._outbox: queue.SimpleQueue[list[m.FromEngine] | None] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False

    def run(self, facts: m.ModelFacts) -> int:
        """Serve until told to stop. -> exit code: 1 if the engine has failed."""
        writer = threading.Thread(target=self._write, name="writer", daemon=True)
        writer.start()
        self._outbox.put([m.Ready(facts)])
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        try:
            self._drive()
        except Exception as error:  # a step's own is in engine.failure; another is a check that has not held, or a bug
            traceback.print_exc()
            self._outbox.put([m.Failed(f"{type(error).__name__}: {error}")])
        failed = not self._stopping
        self._outbox.put(None)
        writer.join(5)
        return int(failed)

    # ---- the main thread

    def _drive(self) -> None:
        engine, checked = self.engine, True
        while True:
            self._wake.clear()
            while self._asked:
                self._answer(self._asked.popleft())
            if self._stopping:
                return
            idle = None if checked else IDLE
            if self._watch_seconds is not None:
                idle = self._look()
            if engine.has_work:
                checked = False
                if deltas := engine.step():
                    self._outbox.put([tell(delta) for delta in deltas])
            elif not self._wake.wait(idle) and not checked:
                engine.check()
                checked = True
            if engine.failure is not None:
                raise EngineFailed(f"{type(engine.failure).__name__}: {engine.failure}") from engine.failure

    def _look(self) -> float:
        """Send a snapshot if it is time; -> seconds until the next. Who does not read them gets no more."""
        now = time.perf_counter()
        if now >= self._next_look and self._outbox.qsize() < MOST_UNREAD:
            self._outbox.put([m.Seen(self.engine.snapshot())])
            cost = time.perf_counter() - now
            self._next_look = now + max(self._watch_seconds, cost / WATCH_SHARE)
        return max(0.01, self._next_look - now)

    def _answer(self, question: m.ToEngine) -> None:
        match question:
            case m.Flush(id=id):
                self._outbox.put([m.Flushed(id, self.engine.flush_cache())])
            case m.AskStats(id=id, check=check):
                if check:
                    self.engine.check()
                self._outbox.put([m.StatsReply(id, self.engine.stats())])
            case m.Watch(seconds=seconds):
                self._watch_seconds = seconds
                self.engine.watch(True)
            case m.Unwatch():
                self._watch_seconds = None
                self.engine.watch(False)
            case m.Stop():
                self._stopping = True

    # ---- the thread that reads

    def _read(self) -> None:
        try:
            with suppress(EOFError, ConnectionError):
                while True:
                    for message in m.decode(read_frame(self._requests)):
                        self._take(message)
                        self._wake.set()
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # the HTTP process has gone, or what it says makes no sense

    def _take(self, message: m.AnyMessage) -> None:
        match message:
            case m.Submit():
                self._submit(message)
            case m.Abort(rid=rid):
                self.engine.abort(rid)
            case m.Flush() | m.AskStats() | m.Watch() | m.Unwatch() | m.Stop():
                self._asked.append(message)
            case _:
                raise ValueError(f"a message that is for the other side: {message}")

    def _submit(self, asked: m.Submit) -> None:
        try:
            params = sampling_params(asked.params)
            self.engine.add(
                asked.prompt_ids,
                params,
                request_id=asked.rid,
                priority=asked.priority,
                cache_salt=asked.cache_salt,
            )
        except Exception as error:
            self._outbox.put([error_of(asked.rid, error)])

    # ---- the thread that writes

    def _write(self) -> None:
        with suppress(BrokenPipeError, ConnectionError):  # the reader's thread will notice, too
            ended = False
            while not ended:
                said = [self._outbox.get()]
                while not self._outbox.empty():  # the other side has been slow: one frame for all
                    said.append(self._outbox.get())
                ended = None in said
                write_frame(self._replies, m.encode(*(message for part in said for message in part or ())))


def tell(delta: Delta) -> m.Delta | m.Error:
    """What the engine says, as a message."""
    if delta.finish_reason == "error":
        return error_of(delta.request_id, delta.error or RuntimeError(str(delta.stop_reason)))
    return m.Delta(
        rid=delta.request_id,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=None if delta.logprobs is None else [_finite(logprob) for logprob in delta.logprobs],
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        prompt_tokens=delta.prompt_tokens,
        cached_tokens=delta.cached_tokens,
        prompt_logprobs=None
        if delta.prompt_logprobs is None
        else [_finite(logprob) for logprob in delta.prompt_logprobs],
        embedding=delta.embedding,
    )


def error_of(rid: str, error: BaseException) -> m.Error:
    if isinstance(error, QueueFull):
        return m.Error(rid, "busy", str(error))
    if isinstance(error, UserError):
        return m.Error(rid, "refused", str(error))
    if not isinstance(error, RuntimeError):
        traceback.print_exception(error)
    return m.Error(rid, "failed", str(error) or type(error).__name__)


def _finite(x: TokenLogprob) -> TokenLogprob:
    top = [(id, max(logprob, LEAST_LOGPROB)) for id, logprob in x.top]
    return TokenLogprob(x.token_id, max(x.logprob, LEAST_LOGPROB), x.rank, top)


def load(start: m.Start) -> tuple[Engine, m.ModelFacts]:
    """UserError says what of it cannot be had."""
    path = start.options["model"]
    checkpoint = Checkpoint.open(path)
    engine = Engine.from_pretrained(**start.options | {"model": checkpoint.path})
    if start.compile is not None:
        deque(engine.compile(mode=start.compile), maxlen=0)
    elif engine.runner.graphs:
        deque(engine.warm_up(), maxlen=0)
    facts = m.ModelFacts(
        model_path=str(path),
        checkpoint=str(checkpoint.path.absolute()),
        model_type=checkpoint.raw_config["model_type"],
        dtype=str(engine.model.dtype).removeprefix("torch."),
        device=str(engine.runner.device),
        vocab_size=engine.model.config.vocab_size,
        max_model_len=engine.max_model_len,
        max_running_requests=engine.scheduler.max_batch_size,
        max_total_tokens=engine.scheduler.capacity,
        page_size=engine.pool.page_size,
        eos_token_ids=engine.eos_token_ids,
    )
    return engine, facts


def main() -> int:
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the HTTP process, which drains first
    with socket.socket(fileno=int(sys.argv[1])) as ours:
        requests, replies = ours.makefile("rb"), ours.makefile("wb")
        (start,) = m.decode(read_frame(requests))
        try:
            engine, facts = load(start)
        except UserError as error:
            write_frame(replies, m.encode(m.Failed(str(error), user=True)))
            return 2
        return EngineProcess(engine, requests, replies).run(facts)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of the device or of a grammar may still be at it
