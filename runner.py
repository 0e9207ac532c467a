"""The runner: a planned batch -> device tensors -> forward -> sampled tokens.

`step` is one plain function, from token ids to sampled ids. `--compile` re-binds it:

    self.step = torch.compile(step, fullgraph=True)

so eager and compiled share one code path, and `fullgraph=True` is an assertion that nothing in it falls back to Python. Decodes,
chunks of prompts and mixes of both are the same T tokens of B sequences; the sizes are marked dynamic. There are four graphs: one
token or many, greedy or with everything; with the Triton kernels many decodes are apart from mixes, which makes six. `warm_up`
meets all of them; after that nothing compiles (`compiled_graphs` counts).

What lies on the device stays there: the pages, the page table, the sampling parameters and the last token of each row. A batch
brings only what has changed. Its ids may be future tokens: -row stands for the last token sampled for that row, which the
host need not have seen.

    python -m pytest tests/test_runner.py
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cache.pages import kv_cache
from device import Pending, from_host, open_stream
from kernels.dispatch import Layout, Pages, choose_backend, sample
from kernels.sampling import PROMPT_BIT, SamplingTensors, apply_bitmask, logprobs, pack_bitmask
from machine import cache_dir
from model import KVCache, Transformer
from scheduler.batch import Batch, Changes
from scheduler.request import Request, TokenLogprob

INDUCTOR_CACHE_DIR = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # the user's; torch soon sets one of its own


@dataclass
class Inputs:
    """One step on the device."""

    ids: Tensor  # [T]; -row: that row's last token
    rows: Tensor  # [B] whose sampling parameters apply; 0 = the sampled token means nothing
    layout: Layout


@dataclass
class StepResults:
    """What the host gets to know of a step of B requests."""

    tokens: list[int]
    finite: list[bool]  # False where the logits were NaN or infinite
    logprobs: list[TokenLogprob | None]
    span: tuple[float, float]  # when it ran, in seconds of `time.perf_counter`


def forward(model: Transformer, kv: KVCache, sampling: SamplingTensors, inputs: Inputs) -> Tensor:
    """-> the logits of each sequence's last token [B, V]."""
    ids = torch.where(inputs.ids < 0, sampling.last_token[(-inputs.ids).clamp(min=0)], inputs.ids)
    return model.logits(model(ids, inputs.layout, kv)[inputs.layout.last])


def choose(
    sampling: SamplingTensors, logits: Tensor, inputs: Inputs, greedy: bool, bitmask: Tensor | None = None
) -> list[Tensor]:
    """logits [B, V] -> a new token for each sequence [B], whether its logits are finite [B], and `logprobs` unless greedy.

    `greedy` is a constant of the graph: true when no request needs more than an argmax over the bare logits. `bitmask`: as
    for `apply_bitmask`.
    """
    finite = logits.amax(-1).isfinite()
    if greedy:
        tokens = (logits if bitmask is None else apply_bitmask(logits, bitmask)).argmax(-1)
        details = ()
    else:
        positions = inputs.layout.positions[inputs.layout.last] + 1
        tokens = sample(inputs.layout, logits, sampling, inputs.rows, positions, bitmask)
        ones = torch.ones_like(tokens, dtype=torch.int32)
        sampling.seen.index_put_((inputs.rows, tokens), ones, accumulate=True)
        details = logprobs(logits, tokens)
    sampling.last_token.index_put_((inputs.rows,), tokens)
    return [tokens, finite, *details]


def step(model: Transformer, kv: KVCache, sampling: SamplingTensors, inputs: Inputs, greedy: bool) -> list[Tensor]:
    """One step: token ids in, token ids out."""
    return choose(sampling, forward(model, kv, sampling, inputs), inputs, greedy)


class Runner:
    """Owns what lies on the device: weights, pages, sampling parameters. Knows nothing of who gets what, or why."""

    def __init__(self, model: Transformer, page_size: int, max_batch_size: int, attention: str = "auto"):
        self.model, self.page_size, self.max_batch_size = model, page_size, max_batch_size
        self.device = model.norm.weight.device
        self.attention = choose_backend(attention, self.device, model.config.head_dim)
        self.sampling = SamplingTensors.empty(max_batch_size + 1, model.config.vocab_size, self.device)
        self.stream = open_stream(self.device)
        self.step: Callable[..., list[Tensor]] = step
        self.compiled = False

    def allocate(self, pages: int, max_model_len: int) -> None:
        """Make the pages, and a page table for sequences of that length."""
        c = self.model.config
        self.kv = kv_cache(
            c.num_layers, pages * self.page_size, c.num_kv_heads, c.head_dim, self.model.dtype, self.device
        )
        columns = max(2, -(-max_model_len // self.page_size))
        self.page_table = torch.zeros(self.max_batch_size + 1, columns, dtype=torch.int64, device=self.device)

    def memory_of_largest_step(self, prompt_tokens: int) -> int:
        """Bytes that a GPU needs beyond weights and pages for a step of all rows and so many prompt tokens, by running one."""
        self.allocate(pages=1, max_model_len=prompt_tokens)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.stream.submit(partial(self._run_padding, [1] * self.max_batch_size + [prompt_tokens], False)).result()
        return torch.cuda.max_memory_allocated(self.device) - before

    # ---- a step

    def launch(self, batch: Batch) -> "LaunchedStep":
        """Start a step and return; nothing here waits for the device. A masked batch goes as far as the logits."""
        return LaunchedStep(self, batch)

    def run(self, batch: Batch) -> list[Tensor]:
        """On the stream: the whole of a step. -> what `choose` returns."""
        self.apply(batch.changes)
        return self.step(self.model, self.kv, self.sampling, self.inputs(batch), batch.greedy)

    def run_forward(self, batch: Batch) -> list[Tensor]:
        """On the stream: a step up to its logits. Eager: such steps wait for the host, and so are slow anyway."""
        self.apply(batch.changes)
        self._held = self.inputs(batch)
        self._logits = forward(self.model, self.kv, self.sampling, self._held)
        return []

    def run_choose(self, batch: Batch, masks: list[Sequence[int] | None]) -> list[Tensor]:
        """On the stream: the rest of that step. masks [B]: the tokens that each may take; None = all."""
        padding = [None] * (len(self._logits) - len(masks))
        bitmask = pack_bitmask(masks + padding, self._logits.shape[1]).to(self.device)
        return choose(self.sampling, self._logits, self._held, batch.greedy, bitmask)

    def inputs(self, batch: Batch) -> Inputs:
        """A batch as tensors. One token has graphs of its own, else T and B are at least 2: padding on row 0 fills up."""
        starts, lengths = batch.starts, batch.lengths
        rows = [r.row for r in batch.requests]
        sampled = [row if samples else 0 for row, samples in zip(rows, batch.samples, strict=True)]
        ids = batch.ids
        if len(rows) == 1 and len(ids) > 1:
            starts, lengths, rows, sampled, ids = [*starts, 0], [*lengths, 1], [*rows, 0], [*sampled, 0], [*ids, 0]
        ids_on, rows_on, sampled_on = (from_host(x, self.device) for x in (ids, rows, sampled))
        return Inputs(ids_on, sampled_on, self.lay_out(starts, lengths, rows_on))

    def lay_out(self, starts: Sequence[int], lengths: Sequence[int], rows: Tensor) -> Layout:
        """rows [B] of the page table -> the step's layout; of the table only the columns that the longest sequence needs."""
        longest = max(map(sum, zip(starts, lengths, strict=True)))
        columns = max(2, -(-longest // self.page_size))  # torch.compile would make a constant of a size of 1
        table = self.page_table[:, :columns][rows]
        return self.model.lay_out(starts, lengths, table, self.page_size, self.attention)

    # ---- what changes between steps

    def apply(self, changes: Changes) -> None:
        """On the stream: do what a batch wants done before it computes."""
        for source, target in changes.copies:
            self.copy(source, target)
        for request in changes.admitted:
            self.set_row(request)
        for row, column, pages in changes.tables:
            self.page_table[row, column : column + len(pages)] = from_host(pages, self.device)

    def copy(self, source: int, target: int) -> None:
        """Copy one page, in every layer."""
        size = self.page_size
        for layer in self.kv:
            for t in layer:
                t[target * size : (target + 1) * size] = t[source * size : (source + 1) * size]

    def set_row(self, request: Request) -> None:
        """Write a request's sampling parameters to its row, and which tokens it has so far."""
        p, s, row = request.params, self.sampling, request.row
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
        if request.new_tokens:  # it comes back from a preemption
            output = from_host(request.output_ids, self.device)
            s.seen[row].index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _padded(self, values: Iterable[float], size: int, fill: float) -> Tensor:
        values = list(values)
        return from_host(values + [fill] * (size - len(values)), self.device)

    # ---- compiling

    def compile(self) -> None:
        """Re-bind the step to its compiled form. Compiled code is kept in the cache folder for the next run."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_code_dir())
        torch._dynamo.config.recompile_limit = 64  # more than the shapes of several engines in one process
        options = {"size_asserts": False}  # inductor would check every buffer of every call, for 1 % of the time
        if self.max_batch_size == 1 and self.model.dtype == torch.float32:
            self.model.unpack()  # the compiler's own loop over plain weights is faster for one row
        self.step = torch.compile(step, fullgraph=True, options=options)
        self.compiled = True

    def warm_up(self, greedy_variants: Iterable[bool] = (True, False)) -> Iterable[str]:
        """Run every graph once, on padding (row 0, page 0). Yields the name of each before it."""
        steps = {"one token": [1], "many tokens": [1, 1, 5]}  # equal sizes would pass for one
        if self.attention == "triton":
            steps["decodes"] = [1, 1, 1]
        for greedy in greedy_variants:
            for name, lengths in steps.items():
                yield f"{name}, {'greedy' if greedy else 'sampled'}"
                self.stream.submit(partial(self._run_padding, lengths, greedy)).result()

    def _run_padding(self, lengths: list[int], greedy: bool) -> list[Tensor]:
        rows = from_host([0] * len(lengths), self.device)
        layout = self.lay_out([0] * len(lengths), lengths, rows)
        inputs = Inputs(from_host([0] * sum(lengths), self.device), rows, layout)
        if self.compiled:
            self._mark_dynamic(inputs)
        return self.step(self.model, self.kv, self.sampling, inputs, greedy)

    @staticmethod
    def _mark_dynamic(inputs: Inputs) -> None:
        """Say which sizes will change, so that the compiler need not find out by compiling again."""
        layout, history = inputs.layout, inputs.layout.history
        paged = isinstance(history, Pages)
        varying = [history.page_table] if paged else [history.read_slots, *history.bias.values()]
        if len(inputs.ids) > 1:
            varying += [inputs.ids, inputs.rows, layout.positions, layout.write_slots, layout.last]
            varying += [history.query_start, history.lengths] if paged else [history.shapes]
        for tensor in varying:
            for dim in [d for d, size in enumerate(tensor.shape) if size > 1]:
                torch._dynamo.mark_dynamic(tensor, dim)


class LaunchedStep:
    """A step on its way through the device."""

    def __init__(self, runner: Runner, batch: Batch):
        self._runner, self._batch = runner, batch
        self.pending: Pending = runner.stream.submit(partial(runner.run_forward if batch.masked else runner.run, batch))
        self._first = self.pending

    def sample(self, masks: list[Sequence[int] | None]) -> None:
        self.pending = self._runner.stream.submit(partial(self._runner.run_choose, self._batch, masks))

    def wait(self) -> StepResults:
        """Wait for the results: tokens, whether their logits were finite, logprobs where they were asked for."""
        requests = self._batch.requests
        self._first.result()  # of a masked batch: raises what the forward has raised
        tokens, finite, *details = (t.tolist()[: len(requests)] for t in self.pending.result())
        results = StepResults(tokens, finite, [None] * len(requests), (self._first.span()[0], self.pending.span()[1]))
        for i, request in enumerate(requests if details else ()):
            most = request.params.logprobs
            if most is not None and self._batch.samples[i]:
                chosen, rank, values, ids = (column[i] for column in details)
                top = list(zip(ids[:most], values[:most], strict=True))
                results.logprobs[i] = TokenLogprob(tokens[i], chosen, rank, top)
        return results


def compiled_code_dir() -> Path:
    """Where compiled code is kept between runs."""
    return Path(INDUCTOR_CACHE_DIR or cache_dir() / "inductor")


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
