"""The engine: the one public object. It owns model, pages and scheduler, and runs the step loop.

    from engine import Engine, SamplingParams
    engine = Engine.from_pretrained("assets/folio-tiny")
    print(engine.generate("Once upon a time", SamplingParams(temperature=0))[0].outputs[0].text)

There is one way through a step, for one prompt and for many, and scheduler/loop.py is its shape:

    plan -> launch -> wait -> commit -> text

Any thread may add and abort; what they ask for is done between two steps. `generate` and `stream` start a thread that steps while
there is work; whoever uses `add` calls `step`.

    python -m pytest tests/test_engine.py
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import readings
from cache.pages import PagePool
from cache.radix import EVICTION
from checkpoint import Checkpoint, load
from errors import EngineFailed, UserError
from grammar.compiler import BACKENDS
from grammar.constraint import Constraint
from grammar.grammars import Grammars
from grammar.masks import Ask, MaskFiller
from grammar.matcher import Grammar
from intake import Group, Intake, Prompt, namespace_of
from machine import cpp_compiler, free_memory, pick_device, pick_dtype, release_openmp_team
from model import Transformer
from output import Delta, RequestOutput
from profiling import Recorder
from runner import COMPILE_MODES, Runner, StepResults, compiled_graphs
from scheduler.batch import Batch
from scheduler.loop import normal_loop, overlap_loop
from scheduler.policy import REORDER
from scheduler.request import Request, SamplingParams, TokenLogprob
from scheduler.scheduler import Scheduler
from snapshot import MOST_SPANS, Snapshot, take
from stats import Stats, Throughput
from streams import Stream
from timeline import RecentSpans, Spans, Timeline
from tokenizer import Tokenizer

__all__ = ["Engine", "SamplingParams"]

PATIENCE = 0.05  # seconds that a step waits for a grammar when there is nothing else to do


class Engine:
    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        *,
        max_batch_size: int = 16,
        max_model_len: int | None = None,
        max_total_tokens: int | None = None,
        page_size: int = 16,
        chunk_size: int = 2048,
        schedule_policy: str = "lpm",
        radix: bool = True,
        radix_eviction_policy: str = "lru",
        chunked_prefill: bool = True,
        overlap: bool = True,
        graphs: bool | None = None,
        attention: str = "auto",
        grammar_backend: str = "auto",
        jump_forward: bool = True,
        trace: str | Path | None = None,
    ):
        """Serve a model that is loaded already. Without a tokenizer, prompts are token ids and texts are empty.

        max_batch_size: rows that run together. max_total_tokens: tokens in the cache (default: what all rows can use,
        as far as the memory goes). max_model_len: longest sequence (default: the model's, as far as the cache goes).
        chunk_size: the token budget of a step. schedule_policy: fcfs, lpm, dfs-weight or priority. radix_eviction_policy: lru,
        lfu or fifo. radix, chunked_prefill, overlap: switches for what each is worth. graphs: `warm_up` records decodes as CUDA
        graphs (default: on a GPU; on a CPU a stand-in pads and copies alike). attention: reference, sdpa or triton (auto: triton
        on a GPU, else sdpa). grammar_backend: xgrammar or llguidance (auto: whichever means what a schema says).
        jump_forward: append what a grammar forces without a step for each token. trace: a file for a timeline of the steps.
        """
        _check_options(model, max_batch_size, max_model_len, page_size, chunk_size)
        _check_choice("schedule_policy", schedule_policy, REORDER)
        _check_choice("radix_eviction_policy", radix_eviction_policy, EVICTION)
        _check_choice("grammar_backend", grammar_backend, BACKENDS)
        self.model, self.tokenizer, self.eos_token_ids = model, tokenizer, list(eos_token_ids)
        self.runner = Runner(model, page_size, max_batch_size, attention, graphs)
        largest = chunk_size if chunked_prefill else max_model_len or model.config.max_position
        fit = self._tokens_in_memory(largest) if max_total_tokens is None else max_total_tokens
        self.max_model_len = max_model_len or max(1, min(model.config.max_position, fit))
        if max_total_tokens is None:
            row = -(-self.max_model_len // page_size) * page_size
            max_total_tokens = max(row, min(max_batch_size * row, fit))
        self.pool = PagePool(1 + max_total_tokens // page_size, page_size)
        if self.pool.total < max_batch_size:
            have = f"a cache of {max_total_tokens} tokens has {self.pool.total} pages of {page_size}"
            raise UserError(f"{have}; {max_batch_size} rows need at least one each")
        self.runner.allocate(1 + self.pool.total, self.max_model_len)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_size,
            chunk_size,
            policy=schedule_policy,
            radix=radix,
            chunked_prefill=chunked_prefill,
            eviction=radix_eviction_policy,
        )
        self.intake = Intake(tokenizer, eos_token_ids, model.config.vocab_size, self.max_model_len, self.scheduler)
        self.masker = MaskFiller(1 + max_batch_size, model.config.vocab_size, pinned=self.runner.device.type == "cuda")
        self.grammars = Grammars(tokenizer, model.config.vocab_size, eos_token_ids, grammar_backend)
        self.jump_forward = jump_forward
        self.forced_tokens = 0  # that took no step of their own
        self._compiling = 0  # prompts that wait for their grammar
        self._posted = threading.Event()  # something is in the inbox
        self.steps = 0
        self.notes: list[str] = []  # what the user should know of how the checkpoint was read
        self.failure: BaseException | None = None  # of the device; the engine is unhealthy then
        self._groups: dict[str, Group] = {}  # of the requests that have not ended, by id
        self._live: dict[Request, Group] = {}
        self._inbox: deque[Callable[[], None]] = deque()  # what other threads want done before the next step
        self._deltas: list[Delta] = []  # of the step that is being taken
        self._throughput = Throughput()
        self._batch_size = 0
        self._recorder: Recorder | None = None  # while a profile is taken
        self._breakdown: dict[str, float] | None = None  # of the last one
        self._lock = threading.RLock()  # of _groups and _driver; a stream may be collected, and abort, while it is held
        self._stepping = threading.Lock()  # one step at a time
        self._driver: threading.Thread | None = None
        self._spans: list[Spans] = []  # who wants to know when host and device work
        self._recent: RecentSpans | None = None  # while somebody watches
        self.timeline = None if trace is None else self._start_timeline(trace)
        self._loop = (overlap_loop if overlap else normal_loop)(self.scheduler, self.runner, self)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        **options: Any,
    ) -> "Engine":
        """A checkpoint folder or hub id, ready to run. UserError says what is wrong with it or with an option."""
        on = pick_device(device)
        checkpoint = Checkpoint.open(model)
        tokenizer = Tokenizer.from_pretrained(checkpoint.path)
        weights = load(checkpoint, pick_dtype(dtype, checkpoint.dtype, on), on, max_model_len)
        eos = sorted({*checkpoint.eos_token_ids, *tokenizer.eos_token_ids})
        engine = cls(weights, tokenizer, eos, max_model_len=max_model_len, **options)
        engine.notes = checkpoint.notes
        if on.type == "cpu":
            release_openmp_team()  # of whoever has loaded, who need not be the one that submits
        return engine

    def compile(self, greedy: bool | None = None, mode: str = "default", masked: bool | None = None) -> Iterator[str]:
        """Compile every shape that serving will meet; yields the name of each before it, for a progress bar.

        greedy: compile only the greedy (True) or only the sampling variant (False), when no other request will come; masked: the
        same for requests that are limited in what they may take. mode: one of `runner.COMPILE_MODES`; "max-autotune" takes
        longer, and tries several kernels for each product.
        """
        _check_choice("mode", mode, COMPILE_MODES)
        if self.runner.device.type == "cpu" and cpp_compiler() is None:
            raise UserError("--compile needs a C++ compiler: install g++ (apt install g++, or xcode-select --install)")
        if self.runner.attention != "triton" and any(v.has_tensors for v in self.model.variants):
            raise UserError("--compile: a score mod with a tensor among its arguments compiles on a GPU only")
        self.runner.compile(mode)
        return self.warm_up(greedy, masked)

    def warm_up(self, greedy: bool | None = None, masked: bool | None = None) -> Iterator[str]:
        """Meet every shape once, and record the CUDA graphs if there are to be any; yields as `compile` does."""
        both = (True, False)
        return self.runner.warm_up(*(both if variant is None else (variant,) for variant in (greedy, masked)))

    # ---- requests in, text out

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many (texts or token ids); all run together. One set of params, or one for each.

        Waits for all of them. cache_salt: share cached prefixes only with requests of the same salt.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but {len(each)} sampling params")
        groups = [self.intake.group(x, p, None, priority, cache_salt) for x, p in zip(prompts, each, strict=True)]
        try:
            self._submit(groups)
            self._drive()
            for group in groups:
                group.done.wait()
        finally:
            for group in groups:
                self._abort_soon(group)
        return [group.output() for group in groups]

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: str = "mean") -> list[list[float]]:
        """What the model makes of each prompt: its hidden states [hidden], the mean of all tokens or that of the last."""
        outputs = [out.outputs[0] for out in self.generate(prompts, SamplingParams(pooling=pooling))]
        for output in outputs:
            if output.finish_reason != "stop":
                raise EngineFailed(str(output.stop_reason))
        return [output.embedding for output in outputs]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> Stream:
        """Complete one prompt, a Delta at a time: iterate over it, or `async for`. Closing it aborts what still runs.

        A prompt that cannot be served is refused here, before the first Delta is asked for.
        """
        group = self.intake.group(prompt, params or SamplingParams(), request_id, priority, cache_salt)
        stream = Stream(group.id, len(group.requests), lambda _: self._abort_soon(group))
        group.stream = weakref.ref(stream)
        self._submit([group])
        self._drive()
        return stream

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> str:
        """Queue a prompt for whoever calls `step`; returns its id. UserError if it cannot be served, or the id is in use."""
        group = self.intake.group(prompt, params or SamplingParams(), request_id, priority, cache_salt)
        self._submit([group])
        return group.id

    def abort(self, request_id: str) -> None:
        """End a request before the next step, from any thread. An id that is unknown or has ended: nothing happens."""
        if (group := self._groups.get(request_id)) is not None:
            self._abort_soon(group)

    @contextmanager
    def hold(self, prompt: Prompt, *, cache_salt: str | None = None) -> Iterator[int]:
        """Compute a prefix that many prompts will have, and keep it in the cache while inside -> how many tokens are kept.

        Whole pages only. A request that could not run otherwise takes it away; and without the radix tree there is none.
        """
        if not self.scheduler.radix:
            yield 0
            return
        [output] = self.generate([prompt], SamplingParams(max_new_tokens=0), cache_salt=cache_salt)
        hold = self._between_steps(partial(self.scheduler.hold, output.prompt_token_ids, namespace_of(cache_salt)))
        try:
            yield hold.tokens
        finally:
            self._between_steps(partial(self.scheduler.let_go, hold))

    # ---- the step

    @property
    def has_work(self) -> bool:
        return bool(self._inbox) or (self.failure is None and (self.scheduler.has_work or self._compiling > 0))

    def step(self) -> list[Delta]:
        """One step of whatever there is to do. Returns what became of it, for all requests.

        If the device fails, all requests end with an error, and `failure` says why.
        """
        with self._stepping:
            self._deltas = []
            try:
                while self._inbox:
                    try:
                        self._inbox[0]()
                    finally:
                        self._inbox.popleft()
                if self.failure is None:
                    next(self._loop)
                    if self._compiling and not self.scheduler.has_work and self._posted.wait(PATIENCE):
                        self._posted.clear()
            except BaseException as error:
                self._fail(error)
                if not isinstance(error, Exception):  # Ctrl-C
                    raise
            return self._deltas

    def commit(self, batch: Batch, results: StepResults) -> None:
        """Take the results of a step; the loop calls this."""
        now = time.perf_counter()
        if results.read:
            readings.take(batch, results.read)
        taken = self.scheduler.commit(batch, results.tokens, results.finite)
        for i in taken:
            self._take_token(batch.requests[i], results.tokens[i], results.logprobs[i], now)
        if not all(results.finite):
            for request in batch.requests:
                if request.finish_reason == "error":
                    self._emit(request, [])
        self.steps += 1
        self._batch_size = len(batch.requests)
        self._throughput.add(now, len(taken))
        for spans in self._spans:
            spans.add(
                "device", f"step {self.steps}", *results.span, requests=len(batch.requests), tokens=len(batch.ids)
            )
        if self._recorder is not None:
            self._recorder.add(results.span, idle=not self.scheduler.has_work)

    def masks(self, batch: Batch) -> Tensor:
        """The mask step; the loop calls this. What each request of a batch may take next, now that all before it is committed.

        -> bitmask int32 [rows, ceil(V / 32)]. What needs no sampling is appended here. Who gives no answer ends with an error.
        """
        asked = [
            (r, Ask(i, r.constraint, r.tokens, r.num_prompt + r.max_new_tokens - len(r.tokens)))
            for i, r in enumerate(batch.requests)
            if r.constraint is not None and batch.samples[i] and r.finish_reason is None
        ]
        answers = self.masker.fill([ask for _, ask in asked])
        now = time.perf_counter()
        for (request, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, Exception):
                self._end(request, "error", f"{type(answer).__name__}: {answer}")
            elif answer is None:
                self._end(request, "stop")
            for n, token in enumerate(answer if isinstance(answer, list) else ()):
                if request.finish_reason is None:
                    self.forced_tokens += n > 0
                    self.scheduler.force(request, token, sampled=n == 0)
                    self._take_token(request, token, None, now)
        return self.masker.bitmask

    def _take_token(self, request: Request, token: int, logprob: TokenLogprob | None, now: float) -> None:
        """The text side of a commit: detokenize, look for stop strings, pass it on."""
        if request.params.only_reads:
            request.finish_reason, request.stop_reason = "length" if request.params.pooling is None else "stop", None
            self._emit(request, [])
            return
        request.metrics.token_times.append(now)
        if logprob is not None:
            request.logprobs.append(logprob)
        if request.constraint is not None and (why := _refusal(request.constraint, token)) is not None:
            self._end(request, "error", why)
            return
        group = self._live[request]
        text, ended = group.texts[request.index], request.finish_reason
        if ended in (None, "length"):  # the token of a stop id is not text
            text.add(token, may_stop=request.new_tokens >= request.params.min_new_tokens)
        if ended is not None:
            text.finish()
        elif text.stopped_by is not None:
            self.scheduler.end(request, "stop", text.stopped_by)
        if ended == "length" and (
            text.stopped_by is not None or (request.constraint is not None and request.constraint.whole)
        ):
            request.finish_reason, request.stop_reason = "stop", text.stopped_by  # both at once: the better reason
        self._emit(request, [token])

    def _end(
        self, request: Request, reason: str, detail: str | None = None, error: BaseException | None = None
    ) -> None:
        """End a request that runs, with the text it has."""
        self.scheduler.end(request, reason, detail)
        if (group := self._live.get(request)) is not None:
            group.texts[request.index].finish()
        self._emit(request, [], error)

    def _emit(self, request: Request, ids: list[int], error: BaseException | None = None) -> None:
        """Tell whoever waits what is new of a request; once it has ended, forget it."""
        group = self._live.get(request)
        if group is None:  # has ended before
            return
        text, reason = group.texts[request.index].take(), request.finish_reason
        logprobs = None if request.params.logprobs is None else request.logprobs[len(request.logprobs) - len(ids) :]
        delta = Delta(
            group.id, request.index, text, ids, reason, request.stop_reason, logprobs, request.num_prompt,
            request.metrics.cached_tokens, error=error,
        )  # fmt: skip
        if request.reading is not None and request.new_tokens and not request.reading.told:
            request.reading.told = True
            delta.prompt_logprobs, delta.embedding = request.prompt_logprobs, request.embedding
        self._deltas.append(delta)
        if reason is not None:
            del self._live[request]
            if not any(r in self._live for r in group.requests):
                with self._lock:
                    self._groups.pop(group.id, None)
                group.done.set()
        if group.stream is not None and (stream := group.stream()) is not None:
            stream.put(delta)

    def _fail(self, error: BaseException) -> None:
        """The device has failed: nothing on it can be trusted. All requests end, and whoever waits is told."""
        with self._lock:
            self.failure = error
            groups = list(self._groups.values())
        for group in groups:
            for request in group.requests:
                if request.finish_reason is None:
                    request.finish("error", f"the engine failed: {type(error).__name__}: {error}")
                    self._live[request] = group  # also if no step has taken it in yet
                self._emit(request, [])

    # ---- the thread that steps

    def _drive(self) -> None:
        with self._lock:
            if self._driver is None and self.has_work:
                self._driver = threading.Thread(target=self._run, name="folio-engine", daemon=True)
                self._driver.start()

    def _run(self) -> None:
        """Step while there is work."""
        while True:
            self.step()
            with self._lock:
                if not self.has_work:
                    self._driver = None
                    return

    def _between_steps(self, work: Callable[[], Any]) -> Any:
        """Run it when no step is being taken: in the thread that steps, or here if there is none."""
        done: Future[Any] = Future()
        with self._lock:
            driven = self._driver is not None
            if driven:
                self._post(partial(_fulfil, done, work))
        if not driven:
            with self._stepping:
                _fulfil(done, work)
        return done.result()

    # ---- what goes on

    def stats(self) -> Stats:
        """The gauges of this moment."""
        s = self.scheduler
        return Stats(
            healthy=self.failure is None,
            running=len(s.running) + len(s.prefilling),
            waiting=len(s.waiting),
            batch_size=self._batch_size,
            pages_total=self.pool.total,
            pages_free=self.pool.free_pages,
            pages_held=s.tree.pages,
            pages_locked=s.tree.locked_pages,
            hit_rate=s.cached_tokens / max(1, s.prompt_tokens),
            prompt_tokens=s.prompt_tokens,
            cached_tokens=s.cached_tokens,
            preemptions=s.preemptions,
            new_token_ratio=s.ratio,
            steps=self.steps,
            steps_replayed=self.runner.steps_replayed,
            forced_tokens=self.forced_tokens,
            grammars=self.grammars.stats(),
            compiled_graphs=compiled_graphs(),
            captured_graphs=len(self.runner.replays),
            tokens_per_second=self._throughput.rate(),
            breakdown=self._breakdown,
        )

    def watch(self, on: bool) -> None:
        """Begin or cease to note when host and device work, for `snapshot`."""
        self._between_steps(partial(self._watch, on))

    def _watch(self, on: bool) -> None:
        if on and self._recent is None:
            self._recent = RecentSpans(MOST_SPANS)
            self._add_spans(self._recent)
        elif not on and self._recent is not None:
            self._remove_spans(self._recent)
            self._recent = None

    def snapshot(self) -> Snapshot:
        """Tree, pool, requests and the last steps as they are between two steps; bounded. Without `watch`, no steps."""
        return self._between_steps(
            lambda: take(self.scheduler, self.stats(), self._recent.spans if self._recent is not None else ())
        )

    @contextmanager
    def profile(self, path: str | Path | None = None) -> Iterator[Recorder]:
        """Record the steps taken inside; after it, `stats().breakdown` says how the time of a step divides.

        path: also write the trace, for ui.perfetto.dev (.gz: compressed); UserError if that cannot be. One at a time.
        """
        if self._recorder is not None:
            raise UserError("a profile is being taken already")
        recorder = Recorder(self.runner.stream, self.runner.device, path)
        self._between_steps(recorder.start)
        self._recorder = recorder
        try:
            yield recorder
        finally:
            self._recorder = None
            self._between_steps(recorder.stop)
            self._breakdown = recorder.breakdown

    def flush_cache(self) -> int:
        """Drop all cached prefixes that nobody runs on. Returns how many pages of the tree stay, because somebody does."""
        return self._between_steps(self.scheduler.flush)

    def check(self) -> None:
        """Prove that no page, no row and no lock is lost or owned twice; RuntimeError otherwise."""
        if self.failure is not None:
            raise EngineFailed(str(self.failure)) from self.failure
        self._between_steps(self._check)

    def _check(self) -> None:
        self.scheduler.check()
        have = self.scheduler.available_pages + self.scheduler.tree.locked_pages  # when idle, locked is what is held
        if not self.scheduler.has_work and have != self.pool.total:
            raise RuntimeError(f"idle, but only {have} of {self.pool.total} pages are to be had")

    # ---- inside

    def _submit(self, groups: list[Group]) -> None:
        """Queue groups, all or none, for the next step to take in."""
        if self.runner.device.type == "cpu":
            release_openmp_team()  # the caller's: its threads would get in the way of the device's
        grammars = [None if group.spec is None else self.grammars.compile(group.spec) for group in groups]
        with self._lock:
            if self.failure is not None:
                raise EngineFailed(f"the engine has failed and takes no requests: {self.failure}")
            for group in groups:
                if group.id in self._groups:
                    raise UserError(f"request id {group.id!r} is in use")
            now = time.perf_counter()
            for group, compiled in zip(groups, grammars, strict=True):
                self._groups[group.id] = group
                for request in group.requests:
                    request.metrics.queued_at = now
                self._post(partial(self._take_in, group, compiled))

    def _take_in(self, group: Group, compiled: "Future[Grammar] | None") -> None:
        """Queue the requests of a group, or wait for their grammar first."""
        if self.failure is not None:
            return
        for request in group.requests:
            self._live[request] = group
            if compiled is None:
                self.scheduler.add(request)
        if compiled is not None:
            self._compiling += 1
            compiled.add_done_callback(lambda _: self._post(partial(self._join, group, compiled)))

    def _join(self, group: Group, compiled: "Future[Grammar]") -> None:
        """A grammar is ready, or has failed."""
        self._compiling -= 1
        for request in group.requests:
            if request.finish_reason is not None:
                continue
            if (error := compiled.exception()) is not None:
                self._end(request, "error", str(error), error)
            else:
                jump = self.jump_forward and request.params.logprobs is None  # a forced token has no logits of its own
                finish_within = request.max_new_tokens if request.params.json_finish else None
                request.constraint = self.grammars.constrain(compiled.result(), jump, finish_within)
                self.scheduler.add(request)

    def _post(self, work: Callable[[], Any]) -> None:
        """Have something done before the next step."""
        self._inbox.append(work)
        self._posted.set()

    def _abort_soon(self, group: Group) -> None:
        """This very group: its id may be another's by now."""
        with self._lock:
            if self._groups.get(group.id) is group:
                self._post(partial(self._abort, group))

    def _abort(self, group: Group) -> None:
        for request in group.requests:
            self.scheduler.end(request, "abort")
            self._emit(request, [])

    def _tokens_in_memory(self, largest_step: int) -> int:
        """How many tokens fit into half of a CPU's free memory, or into 9/10 of what a GPU's largest step leaves."""
        device, bytes_per_token = self.runner.device, self.model.config.cache.bytes_per_token(self.model.dtype)
        if device.type == "cpu":
            return free_memory(device) // 2 // bytes_per_token
        step = self.runner.memory_of_largest_step(largest_step)
        return int(0.9 * (free_memory(device) - step)) // bytes_per_token

    def _start_timeline(self, path: str | Path) -> Timeline:
        try:
            timeline = Timeline(path)
        except OSError as error:
            raise UserError(f"cannot write the trace {path}: {error}") from error
        self._add_spans(timeline)
        weakref.finalize(self, timeline.close)  # at the latest when the process ends
        return timeline

    def _add_spans(self, spans: Spans) -> None:
        self._spans.append(spans)
        self._time_host()

    def _remove_spans(self, spans: Spans) -> None:
        self._spans.remove(spans)
        self._time_host()

    def _time_host(self) -> None:
        """Re-bind the host's share of a step to versions of itself that are timed for whoever wants to know, or to itself."""
        shares = ((self.scheduler, "plan"), (self.runner, "launch"), (self, "commit"), (self, "masks"))
        for owner, method in shares:
            vars(owner).pop(method, None)  # what was bound here before; the class has the function itself
            for spans in self._spans:
                setattr(owner, method, spans.timed("mask" if method == "masks" else method, getattr(owner, method)))


def _refusal(constraint: Constraint, token: int) -> str | None:
    """Why a request cannot go on by a token; None if it can, and does."""
    try:
        return None if constraint.accept(token) else f"token {token} was chosen, which the grammar refuses"
    except Exception as error:  # whatever it is, it is this request's alone
        return f"{type(error).__name__}: {error}"


def _fulfil(promise: Future, work: Callable[[], Any]) -> None:
    try:
        promise.set_result(work())
    except Exception as error:
        promise.set_exception(error)


def _check_options(
    model: Transformer, max_batch_size: int, max_model_len: int | None, page_size: int, chunk_size: int
) -> None:
    for name, value in (("max_batch_size", max_batch_size), ("chunk_size", chunk_size)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} is {value}; it must be a whole number, at least 1")
    if not 1 <= page_size <= 128:
        raise UserError(f"page_size is {page_size}; it must be between 1 and 128")
    longest = model.config.max_position
    if max_model_len is not None and not 2 <= max_model_len <= longest:
        raise UserError(f"max_model_len is {max_model_len}; it must be between 2 and the model's {longest}")


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
