"""The runner: a planned batch -> device tensors -> forward -> sampled tokens.

`step` is one plain function, from token ids to sampled ids; `forward` is its first half, from ids to logits. `--compile`
re-binds them:

    self.step = torch.compile(step, fullgraph=True)
    self.forward = torch.compile(forward, fullgraph=True)

so eager and compiled share one code path, and `fullgraph=True` is an assertion that nothing in them falls back to Python.
Decode is one call of `step`, in four graphs: one row or many, greedy or with everything. A chunk of a prompt runs `forward`
compiled and chooses its one token eagerly: a millisecond a request, against a graph that takes as long to compile as all of
decode. The number of rows, of new tokens and of pages is marked dynamic. `warm_up` meets every shape that serving will meet;
after that nothing compiles (`compiled_graphs` counts).

    python -m pytest tests/test_runner.py
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cache.pages import kv_cache
from kernels.sampling import PROMPT_BIT, SamplingTensors, logprobs, sample
from machine import cache_dir
from model import KVCache, Transformer
from scheduler.request import Request, TokenLogprob
from scheduler.scheduler import Batch

INDUCTOR_CACHE_DIR = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # the user's; torch soon sets one of its own


@dataclass
class StepOutput:
    """What a step leaves on the device."""

    tokens: Tensor  # [B]
    finite: Tensor  # [B] False where the logits are NaN or infinite
    logprobs: tuple[Tensor, ...] | None  # of `kernels.sampling.logprobs`; None in a greedy step


def forward(
    model: Transformer, kv: KVCache, page_size: int, ids: Tensor, positions: Tensor, page_table: Tensor
) -> Tensor:
    """ids, positions [B, Q], page_table [B, N] -> logits of each row's last token [B, V]."""
    return model.logits(model(ids, positions, page_table, kv, page_size)[:, -1])


def choose(sampling: SamplingTensors, logits: Tensor, positions: Tensor, rows: Tensor, greedy: bool) -> StepOutput:
    """logits [B, V], positions [B, Q] of the step's tokens, rows [B] -> a new token for each row.

    `greedy` is a constant of the graph: true when no row needs more than an argmax over the bare logits.
    """
    finite = logits.amax(-1).isfinite()
    if greedy:
        return StepOutput(logits.argmax(-1), finite, None)
    tokens = sample(logits, sampling.select(rows), positions[:, -1] + 1)
    sampling.seen.index_put_((rows, tokens), torch.ones_like(tokens, dtype=torch.int32), accumulate=True)
    return StepOutput(tokens, finite, logprobs(logits, tokens))


def step(
    model: Transformer,
    kv: KVCache,
    page_size: int,
    sampling: SamplingTensors,
    ids: Tensor,
    positions: Tensor,
    page_table: Tensor,
    rows: Tensor,
    greedy: bool,
) -> StepOutput:
    """One step of B rows: token ids in, token ids out."""
    return choose(sampling, forward(model, kv, page_size, ids, positions, page_table), positions, rows, greedy)


class Runner:
    """Owns what lies on the device: weights, pages, sampling parameters. Knows nothing of who gets what, or why."""

    def __init__(self, model: Transformer, pages: int, page_size: int, max_batch_size: int, chunk_size: int):
        c = model.config
        self.model, self.page_size = model, page_size
        self.max_batch_size, self.chunk_size = max_batch_size, chunk_size
        self.device = model.norm.weight.device
        self.kv = kv_cache(c.num_layers, pages * page_size, c.num_kv_heads, c.head_dim, model.dtype, self.device)
        self.sampling = SamplingTensors.empty(max_batch_size + 1, c.vocab_size, self.device)
        self.step: Callable[..., StepOutput] = step
        self.forward: Callable[..., Tensor] = forward
        self.compiled = False

    def set_row(self, request: Request) -> None:
        """Write a request's sampling parameters to its row of the device."""
        p, s, row = request.params, self.sampling, request.row
        s.temperature[row], s.top_k[row], s.top_p[row], s.min_p[row] = p.temperature, p.top_k, p.top_p, p.min_p
        s.repetition_penalty[row] = p.repetition_penalty
        s.presence_penalty[row], s.frequency_penalty[row] = p.presence_penalty, p.frequency_penalty
        s.seed[row] = request.seed
        s.stop_ids[row] = self._padded(request.stop_ids, s.stop_ids.shape[1], -1)
        s.stop_from[row] = len(request.prompt_ids) + p.min_new_tokens
        s.bias_ids[row] = self._padded(p.logit_bias.keys(), s.bias_ids.shape[1], 0)
        s.bias_values[row] = self._padded(p.logit_bias.values(), s.bias_values.shape[1], 0)
        s.seen[row] = 0
        s.seen[row, torch.tensor(request.prompt_ids, device=self.device)] = PROMPT_BIT

    @torch.inference_mode()
    def clear(self, pages: list[int]) -> None:
        """Zero pages that hold NaN: masked or not, it would spread to whoever owns them next."""
        at = torch.tensor(pages, device=self.device)[:, None] * self.page_size
        slots = (at + torch.arange(self.page_size, device=self.device)).flatten()
        for keys, values in self.kv:
            keys[slots], values[slots] = 0, 0

    @torch.inference_mode()
    def launch(self, batch: Batch) -> StepOutput:
        """Run one step. Returns at once on a GPU; nothing here waits for the result."""
        rows = [r.row if batch.samples else 0 for r in batch.requests]
        columns = max(2, *(len(r.pages) for r in batch.requests), 2)  # torch.compile would make a constant of 1
        tables = [r.pages + [0] * (columns - len(r.pages)) for r in batch.requests]
        positions = [list(range(start, start + len(ids))) for start, ids in zip(batch.start, batch.ids, strict=True)]
        return self._call(batch.ids, positions, tables, rows, batch.greedy)

    def read(self, output: StepOutput, batch: Batch) -> tuple[list[int], list[bool], list[TokenLogprob | None]]:
        """Wait for a step's results: tokens, whether their logits were finite, logprobs where they were asked for."""
        tokens, finite = output.tokens.tolist(), output.finite.tolist()
        details: list[TokenLogprob | None] = [None] * len(tokens)
        if output.logprobs is not None:
            chosen, rank, values, ids = (t.tolist() for t in output.logprobs)
            for i, request in enumerate(batch.requests):
                most = request.params.logprobs
                if most is not None and batch.samples:
                    top = list(zip(ids[i][:most], values[i][:most], strict=True))
                    details[i] = TokenLogprob(tokens[i], chosen[i], rank[i], top)
        return tokens, finite, details

    def compile(self) -> None:
        """Re-bind the step to its compiled form. Compiled code is kept in the cache folder for the next run."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_code_dir())
        torch._dynamo.config.recompile_limit = 64  # more than the shapes of several engines in one process
        options = {"size_asserts": False}  # inductor would check every buffer of every call, for 1 % of the time
        self.step = torch.compile(step, fullgraph=True, options=options)
        self.forward = torch.compile(forward, fullgraph=True, options=options)
        self.compiled = True

    @torch.inference_mode()
    def warm_up(self, greedy_variants: Iterable[bool] = (True, False)) -> Iterable[str]:
        """Run every shape that serving will meet once, on padding (row 0, page 0). Yields the name of each before it."""
        rows = {"decode 1 row": 1} | ({"decode many rows": 3} if self.max_batch_size > 1 else {})
        shapes = [(name, B, 1, greedy) for greedy in greedy_variants for name, B in rows.items()]
        for name, B, Q, greedy in [
            ("prefill", 1, 7, True),
            *shapes,
        ]:  # primes: equal sizes would pass for one dimension
            yield name if Q > 1 else f"{name}, {'greedy' if greedy else 'sampled'}"
            self._call([[0] * Q] * B, [[-1] * Q] * B, [[0] * 11] * B, [0] * B, greedy, mark=True)

    def _call(
        self,
        ids: list[list[int]],
        positions: list[list[int]],
        tables: list[list[int]],
        rows: list[int],
        greedy: bool,
        mark: bool = False,
    ) -> StepOutput:
        inputs = [torch.tensor(x, device=self.device) for x in (ids, positions, tables, rows)]
        if mark and self.compiled:
            self._mark_dynamic(*inputs)
        if len(ids[0]) == 1:
            return self.step(self.model, self.kv, self.page_size, self.sampling, *inputs, greedy)
        logits = self.forward(self.model, self.kv, self.page_size, *inputs[:3])
        return choose(self.sampling, logits, inputs[1], inputs[3], greedy)

    @staticmethod
    def _mark_dynamic(ids: Tensor, positions: Tensor, page_table: Tensor, rows: Tensor) -> None:
        """Say which sizes will change, so that the compiler need not find out by compiling again."""
        B, Q = ids.shape
        torch._dynamo.mark_dynamic(page_table, 1)
        for tensor in (ids, positions):
            if Q > 1:
                torch._dynamo.mark_dynamic(tensor, 1)
        for tensor in (ids, positions, page_table, rows):
            if B > 1:
                torch._dynamo.mark_dynamic(tensor, 0)

    def _padded(self, values: Iterable[float], size: int, fill: float) -> Tensor:
        values = list(values)
        return torch.tensor(values + [fill] * (size - len(values)), device=self.device)


def compiled_code_dir() -> Path:
    """Where compiled code is kept between runs."""
    return Path(INDUCTOR_CACHE_DIR or cache_dir() / "inductor")


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
