"""The runner: a planned batch -> device tensors -> step -> sampled tokens, with as little work between as there can be.

`step.py` has the step as plain functions. This is the only place that makes them fast, by re-binding them:

    self.decode = torch.compile(decode, fullgraph=True)          as one graph, which `fullgraph=True` asserts
    self.replays[n, "greedy"] = CudaReplay(...)                  as one launch, for each bucket of rows

Eager, compiled and replayed are the same code. Sizes that change are marked dynamic, so there are three graphs of the model (one
row, many rows, any mixture with chunks of prompts) and two to eight of the sampling. `warm_up` meets all of them; after that
nothing is compiled or captured, which `compiled_graphs` and `len(runner.replays)` can prove.

What lies on the device stays there: pages, page table, sampling parameters, each row's last token and length. A step brings only
what has changed, in one copy; a decode of the rows of the step before, with no new page, brings nothing.

    python -m pytest tests/test_compiled.py
"""

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

import readings
from device import Pending, from_host, open_stream
from graphs import Recorder, Replay, buckets, recorder
from kernels.dispatch import choose_backend
from kernels.sampling import PROMPT_BIT, SamplingTensors, logprobs
from machine import cache_dir
from model import Transformer
from scheduler.batch import Batch, Changes
from scheduler.request import Request, SamplingParams, TokenLogprob
from step import Inputs, choose, decode, extend, hidden_states

INDUCTOR_CACHE_DIR = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # the user's; torch soon sets one of its own
COMPILE_MODES = {"default": {}, "max-autotune": {"max_autotune": True}}
TYPICAL_HISTORY = 1024  # tokens, and
TYPICAL_CHUNK = 256  # of a prompt: sizes for the warm-up, by which the compiler decides what is worth two threads


@dataclass
class StepResults:
    """What the host gets to know of a step of B requests."""

    tokens: list[int]
    finite: list[bool]  # False where the logits were NaN or infinite
    logprobs: list[TokenLogprob | None]
    span: tuple[float, float]  # when it ran, in seconds of `time.perf_counter`
    read: list[Tensor] = field(default_factory=list)  # what `readings.read` has of the prompts


class Runner:
    """Owns what lies on the device: weights, pages, sampling parameters. Knows nothing of who gets what, or why."""

    def __init__(
        self,
        model: Transformer,
        page_size: int,
        max_batch_size: int,
        attention: str = "auto",
        graphs: bool | None = None,
    ):
        self.model, self.page_size, self.max_batch_size = model, page_size, max_batch_size
        self.device = model.norm.weight.device
        latent = model.config.latent
        dims = None if latent is None else (latent.rank, latent.rope)
        self.attention = choose_backend(attention, self.device, model.config.head_dim, dims)
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.state = SamplingTensors.empty(max_batch_size + 1, model.config.vocab_size, self.device)
        self.stream = open_stream(self.device)
        self.decode: Callable[..., Tensor] = decode
        self.extend: Callable[..., Tensor] = extend
        self.choose: Callable[..., tuple[Tensor, Tensor]] = choose
        self.compiled = False
        self.replays: dict[
            tuple[int, str], Replay
        ] = {}  # by rows, and "greedy", "sampled" or "forward", which chooses nothing
        self.buckets = buckets(max_batch_size)
        self.steps_replayed = 0
        self._warming_up = False
        with torch.inference_mode():  # as all else that a step is given
            self._rows = torch.zeros(max_batch_size, dtype=torch.int64, device=self.device)  # of the decode before
            words = -(-model.config.vocab_size // 32)  # of a mask, and a row more than there are requests, for padding
            self.bitmask = torch.zeros(max_batch_size + 1, words, dtype=torch.int32, device=self.device)
        self._rows_known: list[int] = []  # what the host knows to be there

    def allocate(self, pages: int, max_model_len: int) -> None:
        """Make the pages, and a page table for sequences of that length."""
        self.kv = self.model.config.cache.allocate(pages * self.page_size, self.model.dtype, self.device)
        self.max_model_len = max_model_len
        needed = max(2, -(-max_model_len // self.page_size))
        columns = needed + 1  # one to spare, so that no step is given the whole table, whose strides are others
        self.page_table = torch.zeros(self.max_batch_size + 1, columns, dtype=torch.int64, device=self.device)

    def memory_of_largest_step(self, prompt_tokens: int) -> int:
        """Bytes that a GPU needs beyond weights and pages for a step of all rows and so many prompt tokens, by running one."""
        self.allocate(pages=1, max_model_len=prompt_tokens)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        lengths = [1] * self.max_batch_size + [prompt_tokens]
        self.stream.submit(partial(self.run, padding(False, [0] * len(lengths), lengths))).result()
        return torch.cuda.max_memory_allocated(self.device) - before

    # ---- a step

    def launch(self, batch: Batch) -> "LaunchedStep":
        """Start a step and return; nothing here waits for the device. A masked batch goes as far as the logits."""
        return LaunchedStep(self, batch)

    def run(self, batch: Batch) -> list[Tensor]:
        """On the stream: the whole of a step. -> tokens [B], finite [B], and `logprobs` of them if somebody wants any."""
        if (results := self.replay(batch, "greedy" if batch.greedy else "sampled")) is not None:
            return results
        logits, rows = self.forward(batch)
        if self._warming_up:
            will_change(0, logits, rows)
        return self.finish(batch, logits, *self.choose(self.state, logits, rows, self.attention, batch.greedy))

    def run_forward(self, batch: Batch) -> list[Tensor]:
        """On the stream: a step up to its logits."""
        results = self.replay(batch, "forward")
        self._held = self.forward(batch) if results is None else (*results, self._rows[: self.bucket(batch)])
        return []

    def run_choose(self, batch: Batch, bitmask: Tensor) -> list[Tensor]:
        """On the stream: the rest of that step. bitmask: of the host, at least as many rows as there are logits."""
        logits, rows = self._held
        mask = self.bitmask[: len(rows)]
        mask.copy_(bitmask[: len(rows)], non_blocking=True)
        if self._warming_up:
            will_change(0, logits, rows, mask)
        return self.finish(batch, logits, *self.choose(self.state, logits, rows, self.attention, batch.greedy, mask))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> logits [B, V], and the rows [B] whose next tokens they are about (0: nobody's)."""
        if batch.decodes_only:
            rows, table = self.bring_rows(batch, len(batch.requests)), self.columns(max(batch.starts) + 1)
            if self._warming_up:
                will_change(0, rows)
                will_change(1, table)
            return self.decode(self.model, self.kv, self.state, table, rows, self.page_size, self.attention), rows
        inputs, rows = self.bring_inputs(batch)
        if self._warming_up:
            for dim in (0, 1):
                will_change(dim, *tensors_in(inputs))
        n = min(len(rows), self.max_batch_size)  # an engine of one row leaves the padding out: one graph less to choose
        if batch.reads:
            hidden = hidden_states(self.model, self.kv, self.state, inputs)
            self._readings = readings.read(self.model, batch, hidden)
            return self.model.logits(hidden[inputs.last[:n]]), rows[:n]
        return self.extend(self.model, self.kv, self.state, inputs)[:n], rows[:n]

    def replay(self, batch: Batch, kind: str) -> list[Tensor] | None:
        """Replay what is recorded of that kind for as many rows; None if nothing is."""
        bucket = self.bucket(batch)
        if (replay := self.replays.get((bucket, kind))) is None:
            return None
        self.bring_rows(batch, bucket)
        self.steps_replayed += 1
        return replay()

    def bucket(self, batch: Batch) -> int:
        """The rows that a batch is padded to in a replay; 0 for a kind that is not recorded."""
        recorded = batch.decodes_only and not batch.logprobs
        return self.buckets[bisect_left(self.buckets, len(batch.requests))] if recorded else 0

    def finish(self, batch: Batch, logits: Tensor, tokens: Tensor, finite: Tensor) -> list[Tensor]:
        details = logprobs(logits, tokens) if batch.logprobs else ()
        return [tokens, finite, *details, *(self._readings if batch.reads else ())]

    def columns(self, longest: int) -> Tensor:
        """The page table as far as sequences of that length need it; torch.compile would make a constant of a size of 1."""
        return self.page_table[:, : max(2, -(-longest // self.page_size))]

    # ---- what a step brings, in one copy

    def bring_rows(self, batch: Batch, n: int) -> Tensor:
        """For a step of decodes: its rows [n], padded with row 0. Nothing is copied if they are those of the step before."""
        rows = [r.row for r in batch.requests] + [0] * (n - len(batch.requests))
        if rows == self._rows_known[:n]:
            self.apply(batch.changes)
        else:
            (new,) = self.apply(batch.changes, rows)
            self._rows[:n] = new
            self._rows_known = rows
        return self._rows[:n]

    def bring_inputs(self, batch: Batch) -> tuple[Inputs, Tensor]:
        """For a step with chunks of prompts: its Inputs, and the rows [B] that get a token. T and B are at least 2."""
        starts, lengths, ids = batch.starts, batch.lengths, batch.ids
        rows = [r.row for r in batch.requests]
        sampled = [row if samples else 0 for row, samples in zip(rows, batch.samples, strict=True)]
        if len(rows) == 1:  # padding on row 0
            starts, lengths, rows, sampled, ids = [*starts, 0], [*lengths, 1], [*rows, 0], [*sampled, 0], [*ids, 0]
        start, length, row, sampled_row, id = self.apply(batch.changes, starts, lengths, rows, sampled, ids)
        end = start + length
        self.state.length[row] = torch.where(row > 0, end, 0)
        table = self.columns(max(map(sum, zip(starts, lengths, strict=True))))[row]
        spans = torch.stack((start, length))
        layout = self.model.lay_out(starts, lengths, table, self.page_size, self.attention, spans)
        return Inputs(id, length.cumsum(0) - 1, layout), sampled_row

    def apply(self, changes: Changes, *lists: list[int]) -> list[Tensor]:
        """Do what a batch wants done before it computes. -> these lists on the device."""
        for source, target in changes.copies:
            self.copy(source, target)
        for request, tokens in changes.admitted.items():
            self.set_row(request, tokens)
        cells = [(row, column + i, page) for row, column, pages in changes.tables for i, page in enumerate(pages)]
        lists = [*transposed(cells, 3), *transposed(changes.forced, 2), *lists]
        values = [value for values in lists for value in values]
        if not values:
            return []
        sizes = [len(values) for values in lists]
        row, column, page, forced_row, token, *sent = from_host(values, self.device).split(sizes)
        if cells:
            self.page_table[row, column] = page
        if changes.forced:
            once = torch.ones_like(token, dtype=torch.int32)
            self.state.seen.index_put_((forced_row, token), once, accumulate=True)
        return sent

    def copy(self, source: int, target: int) -> None:
        """Copy one page, in every layer."""
        size = self.page_size
        for layer in self.kv:
            for t in layer:
                t[target * size : (target + 1) * size] = t[source * size : (source + 1) * size]

    def set_row(self, request: Request, tokens: int) -> None:
        """Write a request's sampling parameters to its row, and which tokens it had when it was admitted: the first so many."""
        p, s, row = request.params, self.state, request.row
        s.temperature[row], s.top_k[row], s.top_p[row], s.min_p[row] = p.temperature, p.top_k, p.top_p, p.min_p
        s.repetition_penalty[row] = p.repetition_penalty
        s.presence_penalty[row], s.frequency_penalty[row] = p.presence_penalty, p.frequency_penalty
        s.seed[row] = request.seed
        s.stop_ids[row] = self._padded(request.stop_ids, s.stop_ids.shape[1], -1)
        s.stop_from[row] = request.num_prompt + p.min_new_tokens
        s.bias_ids[row] = self._padded(p.logit_bias.keys(), s.bias_ids.shape[1], 0)
        s.bias_values[row] = self._padded(p.logit_bias.values(), s.bias_values.shape[1], 0)
        s.seen[row] = 0
        s.seen[row, from_host(request.prompt_ids, self.device)] = PROMPT_BIT
        if tokens > request.num_prompt:  # it comes back from a preemption
            output = from_host(request.tokens[request.num_prompt : tokens].tolist(), self.device)
            s.seen[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _padded(self, values: Iterable[float], size: int, fill: float) -> Tensor:
        values = list(values)
        return from_host(values + [fill] * (size - len(values)), self.device)

    # ---- compiling and recording

    def compile(self, mode: str = "default") -> None:
        """Re-bind the step to its compiled form. Compiled code is kept in the cache folder for the next run."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_code_dir())
        self.stream.submit(compiler_settings).result()
        if self.max_batch_size == 1:
            self.model.unpack()  # the compiler's own loop over plain weights is faster for one row
        # Inductor would check every buffer of every call, Dynamo every attribute of the model.
        options = {"size_asserts": False, "guard_filter_fn": may_change, **COMPILE_MODES[mode]}
        self.decode, self.extend, self.choose = (
            torch.compile(own_copy(function), fullgraph=True, options=options) for function in (decode, extend, choose)
        )
        self.compiled = True

    def warm_up(
        self, greedy_variants: Collection[bool] = (True, False), masked_variants: Collection[bool] = (False, True)
    ) -> Iterator[str]:
        """Meet every shape once, on padding, then record the decodes. Yields the name of each before it.

        masked_variants: whether batches will come with requests that are limited in what they may take, and without.
        """
        history, chunk = min(TYPICAL_HISTORY, self.max_model_len), min(TYPICAL_CHUNK, self.max_model_len)
        self._warming_up = self.compiled
        for greedy, masked in product(greedy_variants, masked_variants):
            shapes = [padding(greedy, [history - 1] * n) for n in sorted({self.max_batch_size, 1}, reverse=True)]
            for batch in [
                *shapes,
                padding(greedy, [0, 0, 0][: self.max_batch_size], [1, 1, chunk][-self.max_batch_size :]),
            ]:
                name = f"{'greedy' if greedy else 'sampled'}{', masked' if masked else ''}"
                yield f"{len(batch.requests)} rows, {len(batch.ids)} tokens, {name}"
                self.stream.submit(partial(self.run_forward if masked else self.run, batch)).result()
                if masked:
                    everything = torch.full(self.bitmask.shape, -1, dtype=torch.int32)
                    self.stream.submit(partial(self.run_choose, batch, everything)).result()
        self._warming_up = False
        if self.graphs:
            record, pool = recorder(self.device)
            kinds = ["greedy"] * (True in greedy_variants) + ["sampled"] * (False in greedy_variants)
            kinds = kinds * (False in masked_variants) + ["forward"] * (True in masked_variants)
            for n, kind in product(reversed(self.buckets), kinds):
                yield f"graph of {n} rows, {kind}"
                self.stream.submit(partial(self.record, record, pool, n, kind)).result()

    def record(self, record: Recorder, pool: Any, n: int, kind: str) -> list[Tensor]:
        """On the stream: record a decode of n rows, with the choice of tokens or without."""
        rows, table = self.bring_rows(padding(True, [0] * n), n), self.columns(self.max_model_len)

        def step() -> tuple[Tensor, ...]:
            logits = self.decode(self.model, self.kv, self.state, table, rows, self.page_size, self.attention)
            if kind == "forward":
                return (logits,)
            return self.choose(self.state, logits, rows, self.attention, kind == "greedy")

        self.replays[n, kind] = record(step, pool)
        return []


class LaunchedStep:
    """A step on its way through the device."""

    def __init__(self, runner: Runner, batch: Batch):
        self._runner, self._batch = runner, batch
        self.pending: Pending = runner.stream.submit(partial(runner.run_forward if batch.masked else runner.run, batch))
        self._first = self.pending

    def sample(self, masks: Tensor) -> None:
        """masks: bitmask int32 of the host, a row for each of the batch and for its padding."""
        self.pending = self._runner.stream.submit(partial(self._runner.run_choose, self._batch, masks))

    def wait(self) -> StepResults:
        """Wait for the results: tokens, whether their logits were finite, logprobs where they were asked for."""
        requests = self._batch.requests
        self._first.result()  # of a masked batch: raises what the forward has raised
        tensors, read = self.pending.result(), []
        if self._batch.reads:
            tensors, read = tensors[: -readings.TENSORS], tensors[-readings.TENSORS :]
        tokens, finite, *details = (t.tolist()[: len(requests)] for t in tensors)
        span = self._first.span()[0], self.pending.span()[1]
        results = StepResults(tokens, finite, [None] * len(requests), span, read)
        for i, request in enumerate(requests if details else ()):
            most = request.params.logprobs
            if most is not None and self._batch.samples[i]:
                chosen, rank, values, ids = (column[i] for column in details)
                top = list(zip(ids[:most], values[:most], strict=True))
                results.logprobs[i] = TokenLogprob(tokens[i], chosen, rank, top)
        return results


def compiler_settings() -> list[Tensor]:
    """To be run on the stream: torch keeps settings for each thread."""
    torch._dynamo.config.recompile_limit = 64  # more than the shapes of one engine
    torch.fx.experimental._config.use_duck_shape = False  # two sizes that are equal once are not the same size
    torch._dynamo.config.specialize_float = (
        True  # a number that another model has otherwise is still a constant of this one
    )
    return []


def own_copy(function: FunctionType) -> FunctionType:
    """The same function with a code object of its own. That is where torch.compile keeps what it has made of it, and another
    runner, with another model, must not find it there."""
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)


def may_change(guards: Sequence[Any]) -> list[bool]:
    """Which of the compiler's assumptions are worth a look at each call: those about what a step is given, not those about
    what a runner owns for good."""
    return [re.match(r"(rows|page_table|inputs|logits|greedy|bitmask)\b|$", guard.name) is not None for guard in guards]


def padding(greedy: bool, starts: list[int], lengths: list[int] | None = None) -> Batch:
    """A batch of nobody's: it computes like any other, on row 0 and page 0. Without lengths, decodes."""
    nobody = Request([0], SamplingParams(temperature=0 if greedy else 1), frozenset(), max_new_tokens=1, seed=0)
    n, each = len(starts), lengths or [1] * len(starts)
    return Batch([nobody] * n, [0] * sum(each), starts, each, [False] * n, decodes=0 if lengths else n)


def will_change(dim: int, *tensors: Tensor) -> None:
    """Tell the compiler which sizes will, so that it need not find out by compiling again. A size of 1 is always a constant."""
    for tensor in tensors:
        if tensor.dim() > dim and tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def transposed(tuples: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    """[n] tuples of `width` -> `width` lists of n."""
    return [[each[i] for each in tuples] for i in range(width)]


def tensors_in(thing: object) -> list[Tensor]:
    """All tensors of a dataclass, of those inside it, and of its dicts."""
    if isinstance(thing, Tensor):
        return [thing]
    if is_dataclass(thing):
        thing = vars(thing)
    return [tensor for part in thing.values() for tensor in tensors_in(part)] if isinstance(thing, dict) else []


def compiled_code_dir() -> Path:
    """Where compiled code is kept between runs."""
    return Path(INDUCTOR_CACHE_DIR or cache_dir() / "inductor")


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
