"""The engine as the HTTP process sees it: requests go in, Deltas come out, and when its process dies there is a new one.

    client = EngineClient({"model": "assets/folio-tiny"})
    await client.start()
    async for delta in client.generate("r1", [1, 2, 3], {"max_new_tokens": 16}):
        print(delta.text)
    await client.close()

All of it is one asyncio loop's: nothing here is called from another thread. If the engine's process ends, for whatever reason,
every open request ends with EngineDown, and a new process is started, at once the first time and later with a back-off.

    python -m pytest tests/test_server_client.py
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from errors import UserError
from serving import messages as m
from serving.answers import Answer
from serving.api_errors import EngineDown, RequestFailed, ServerBusy
from serving.child import Child
from serving.metrics import Metrics
from serving.params import flat, sampling_params
from serving.watchers import WATCH_SECONDS, Watchers
from stats import Stats

log = logging.getLogger("uvicorn.error")

# seconds before the first restart, the second ... the last: before all others
BACK_OFF = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
LIVED = 60.0  # seconds after which a process that dies counts as a first one again
STOP_SECONDS = 5.0  # that the engine has to end by itself
MAX_RID = 128  # characters


class EngineClient:
    """options: keywords of `Engine.from_pretrained`, and its `model`. compile: a mode of `Engine.compile`, or None.

    restart: start another process when one dies. max_queue: sequences that may wait, beyond those that run.
    request_timeout: seconds for a request, its wait included. watchdog: seconds without a word while there are requests, after
    which the process is taken for dead and killed. metrics: what is told about requests as they go.
    """

    def __init__(
        self,
        options: dict[str, Any],
        compile: str | None = None,
        *,
        restart: bool = True,
        max_queue: int = 1024,
        request_timeout: float = 600.0,
        watchdog: float = 300.0,
        metrics: Metrics | None = None,
    ):
        self._start, self._restart = m.Start(options, compile), restart
        self._max_queue, self._timeout, self._watchdog = max_queue, request_timeout, watchdog
        self.metrics = metrics or Metrics()
        self.facts: m.ModelFacts | None = None
        self.restarts = 0
        self.watchers = Watchers(self._be_watched)
        self._child: Child | None = None  # one that is ready
        # a request's id -> the one that the engine knows it by, which never comes again
        self._names: dict[str, str] = {}
        self._answers: dict[str, Answer] = {}  # of open requests, by the engine's id
        self._samples: dict[str, int] = {}  # of these, that have not ended
        self._questions: dict[int, asyncio.Future] = {}
        self._ids = itertools.count()
        self._last_word = 0.0  # when the engine has said something
        self._why = "the engine has not been started"  # there is none
        self._tasks: list[asyncio.Task] = []
        self._closing = False

    # ---- life

    async def start(self) -> None:
        """Load the model. UserError if the engine refuses it or an option; EngineDown if the process dies."""
        child, frames = await self._spawn()
        self._tasks = [
            asyncio.create_task(self._supervise(child, frames)),
            asyncio.create_task(self._watch()),
        ]

    async def close(self) -> None:
        """Stop the engine. What is still open ends with EngineDown."""
        self._closing = True
        if not self._tasks:
            return
        supervisor, watch = self._tasks
        watch.cancel()
        if (child := self._child) is None:
            supervisor.cancel()  # it waits for the next try, or for one that is loading
        else:
            child.send(m.Stop())
            _, late = await asyncio.wait([supervisor], timeout=STOP_SECONDS)
            if late:
                child.kill()
        await asyncio.gather(supervisor, watch, return_exceptions=True)

    @property
    def healthy(self) -> bool:
        return self._child is not None

    @property
    def model(self) -> m.ModelFacts:
        """What the engine has said when it was ready. RuntimeError before `start`."""
        if self.facts is None:
            raise RuntimeError("the engine has not been started")
        return self.facts

    @property
    def why_unhealthy(self) -> str | None:
        return None if self.healthy else self._why

    @property
    def pid(self) -> int | None:
        """Of the engine's process, while it is ready."""
        return self._child and self._child.pid

    @property
    def open_requests(self) -> int:
        return len(self._answers)

    # ---- requests

    def generate(
        self,
        rid: str,
        prompt_ids: list[int],
        params: dict[str, Any] | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Answer:
        """Submit a prompt at once; iterate over the answer. Closing or dropping it aborts.

        params: fields of SamplingParams by name (params.py). UserError for what is wrong with it; ServerBusy if the queue is
        full; EngineDown. What the engine finds wrong is raised by the iteration, before the first Delta.
        """
        checked = sampling_params(params or {})
        if not isinstance(rid, str) or not 0 < len(rid) <= MAX_RID:
            raise UserError(f"rid must be a text of 1 to {MAX_RID} characters")
        if rid in self._names:
            raise UserError(f"rid {rid!r} is in use")
        if self._child is None or self._closing:
            raise EngineDown(self._why)
        self._refuse_if_full(checked.n)
        id = f"{next(self._ids)}"
        try:
            self._child.send(m.Submit(id, prompt_ids, flat(params or {}), priority, cache_salt))
        except ValueError as error:  # half a surrogate pair
            raise UserError(f"the request cannot be encoded: {error}") from None
        answer = Answer(rid, checked.n, self._timeout, partial(self._forget, id))
        if not self._answers:
            self._last_word = asyncio.get_running_loop().time()
        self._names[rid], self._answers[id], self._samples[id] = id, answer, checked.n
        self.metrics.submitted(id)
        return answer

    def abort(self, rid: str) -> None:
        """End a request, whose reader gets finish_reason "abort". An id that is unknown: nothing happens."""
        if self._child is not None and rid in self._names:
            self._child.send(m.Abort(self._names[rid]))

    def abort_all(self) -> None:
        for rid in self._names:
            self.abort(rid)

    def _refuse_if_full(self, samples: int) -> None:
        limit = self.model.max_running_requests + self._max_queue
        waiting = sum(self._samples.values())
        if waiting and waiting + samples > limit:  # one that is alone may be as wide as it likes
            self.metrics.refused()
            raise ServerBusy(f"{waiting} sequences are here already; {limit} is the limit")

    def _forget(self, id: str) -> None:
        """The reader of an answer has gone."""
        if self._close(id, "abort") is not None and self._child is not None:
            self._child.send(m.Abort(id))

    def _close(self, id: str, reason: str) -> Answer | None:
        """A request has ended; None if it had before."""
        if (answer := self._answers.pop(id, None)) is not None:
            del self._samples[id], self._names[answer.rid]
            self.metrics.ended(id, reason)
        return answer

    # ---- questions

    async def stats(self, check: bool = False) -> Stats:
        """The engine's gauges. check: prove first that no page is lost; an engine for which that fails is restarted."""
        return (await self._ask(lambda id: m.AskStats(id, check))).stats

    async def flush(self) -> int:
        """Drop all cached prefixes that nobody runs on. -> pages that stay because somebody does."""
        return (await self._ask(m.Flush)).pages_held

    def _be_watched(self, on: bool) -> None:
        """Somebody has begun to look, or nobody looks any more."""
        if self._child is not None:
            self._child.send(m.Watch(WATCH_SECONDS) if on else m.Unwatch())

    async def _ask(self, question: Callable[[int], m.ToEngine]) -> Any:
        """EngineDown if there is no engine, or if it dies over it."""
        if self._child is None:
            raise EngineDown(self._why)
        id = next(self._ids)
        reply = self._questions[id] = asyncio.get_running_loop().create_future()
        try:
            self._child.send(question(id))
            return await reply
        finally:
            del self._questions[id]

    # ---- what the engine says

    async def _spawn(self) -> tuple[Child, Any]:
        """A process that is ready, and its frames from there on."""
        child = await Child.start(self._start)
        frames = child.frames()
        try:
            first, *rest = await anext(frames, [None])
        except BaseException:
            child.kill()
            await child.wait(0)
            raise
        if not isinstance(first, m.Ready):
            code = await child.wait(STOP_SECONDS)
            if isinstance(first, m.Failed) and first.user:
                raise UserError(first.message)
            raise EngineDown(f"the engine's process ended while it was loading (exit code {code})")
        self.facts, self._child = first.model, child
        if self.watchers.count:
            self._be_watched(True)
        for message in rest:
            self._hear(message)
        return child, frames

    async def _supervise(self, child: Child, frames: Any) -> None:
        """Listen to a process until it ends, then to the next one."""
        clock, tried = asyncio.get_running_loop().time, 0
        while True:
            started = clock()
            await self._listen(child, frames)
            if self._closing or not self._restart:
                return
            tried = 0 if clock() - started > LIVED else tried
            while self._child is None:
                await asyncio.sleep(BACK_OFF[min(tried, len(BACK_OFF) - 1)])
                tried += 1
                try:
                    child, frames = await self._spawn()
                except (UserError, EngineDown) as error:
                    log.error("the engine does not start: %s", error)
            self.restarts += 1
            self.metrics.restarted()
            log.warning("the engine has been restarted, as process %d", child.pid)

    async def _listen(self, child: Child, frames: Any) -> None:
        loop, why = asyncio.get_running_loop(), None
        try:
            async for messages in frames:
                self._last_word = loop.time()
                for message in messages:
                    if isinstance(message, m.Failed):
                        why = message.message
                    else:
                        self._hear(message)
        except ValueError as error:
            why = f"it said what makes no sense: {error}"
        finally:
            self._child = None
            self._why = "the server is closing" if self._closing else "the engine's process has died"
            self._fail_all()
        code = await child.wait(STOP_SECONDS if self._closing else 0)
        if not self._closing:
            log.error("the engine's process has ended with code %s%s", code, f": {why}" if why else "")

    def _fail_all(self) -> None:
        for id in list(self._answers):
            self._close(id, "error").fail(EngineDown(f"{self._why} while the request ran"))
        for reply in self._questions.values():
            if not reply.done():
                reply.set_exception(EngineDown(self._why))

    def _hear(self, message: m.AnyMessage) -> None:
        match message:
            case m.Delta(rid=id):
                if (answer := self._answers.get(id)) is not None:
                    self.metrics.delta(message)
                    answer.put(message)
                    self._samples[id] -= message.finish_reason is not None
                    if not self._samples[id]:
                        self._close(id, message.finish_reason)
            case m.Error(rid=id, kind=kind, message=text):
                if (answer := self._close(id, "error")) is not None:
                    self._child.send(m.Abort(id))  # its other samples
                    answer.fail({"refused": UserError, "busy": ServerBusy, "failed": RequestFailed}[kind](text))
            case m.Seen(snapshot=snapshot):
                self.watchers.show(snapshot, {id: answer.rid for id, answer in self._answers.items()})
            case m.StatsReply(id=id) | m.Flushed(id=id):
                if (reply := self._questions.get(id)) is not None and not reply.done():
                    reply.set_result(message)

    async def _watch(self) -> None:
        """Kill a process that has requests and has not said a word for too long."""
        clock = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(min(5.0, self._watchdog / 4))
            if self._child is not None and self._answers and clock() - self._last_word > self._watchdog:
                log.error("the engine has said nothing for %g s: it is killed", self._watchdog)
                self._child.kill()
