"""What a request reads of its own prompt: how likely each token was, or what the model has made of all of them.

    engine.generate(text, SamplingParams(prompt_logprobs=3))[0].prompt_logprobs
    engine.embed([text], pooling="mean")
    engine.generate(text, SamplingParams(prompt_logprobs=0, logprob_start_len=900, max_new_tokens=0))  # the first 899 may be cached

A step only needs the last hidden state of each sequence; these need those of every token. So a chunk of such a prompt is computed
even if it is cached, and its step runs as plain PyTorch, beside the compiled ones.

    python -m pytest tests/test_readings.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from device import from_host
from kernels.sampling import logprobs
from model import Transformer
from scheduler.batch import Batch
from scheduler.request import Request, TokenLogprob

TENSORS = 5  # that `read` returns
TOKENS_AT_ONCE = 256  # whose logits are there at the same time


@dataclass
class Spans:
    """Which tokens of a step are wanted, as indices into its T tokens."""

    scored: list[int] = field(default_factory=list)  # of which the next token is known
    targets: list[int] = field(default_factory=list)  # and is this
    pooled: list[tuple[int, int]] = field(default_factory=list)  # from, to: what is summed up


def spans(batch: Batch) -> Spans:
    wanted = Spans()
    for request, start, first, count in chunks(batch):
        params, end = request.params, min(start + count, request.num_prompt)
        if params.prompt_logprobs is not None:
            scored = scored_positions(request, start, end)
            wanted.scored += range(first + scored.start - start, first + scored.stop - start)
            wanted.targets += request.tokens[scored.start + 1 : scored.stop + 1]
        if params.pooling == "mean":
            wanted.pooled.append((first, first + end - start))
        elif params.pooling == "last":
            wanted.pooled.append((first + end - start - 1, first + end - start))
    return wanted


def read(model: Transformer, batch: Batch, hidden: Tensor) -> list[Tensor]:
    """On the stream: hidden [T, hidden] -> sums [chunks, hidden] and `logprobs` of the M tokens that are scored."""
    wanted = spans(batch)
    sums = [hidden[a:b].float().sum(0) for a, b in wanted.pooled]
    at, targets = (from_host(x, hidden.device, torch.int64) for x in (wanted.scored, wanted.targets))
    parts = [
        logprobs(model.logits(hidden[i]), ids)
        for i, ids in zip(at.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True)
    ]
    pooled = torch.stack(sums) if sums else hidden.new_zeros(0, hidden.shape[1])
    return [pooled, *(torch.cat(column) for column in zip(*parts, strict=True))]


def take(batch: Batch, details: list[Tensor]) -> None:
    """On the host: what `read` has returned goes to the requests."""
    pooled, chosen, rank, values, ids = (t.tolist() for t in details)
    scored = 0
    sums = iter(pooled)
    for request, start, _, count in chunks(batch):
        params, end = request.params, min(start + count, request.num_prompt)
        if params.prompt_logprobs is not None:
            for position in scored_positions(request, start, end):
                top = list(zip(ids[scored], values[scored], strict=True))[: params.prompt_logprobs]
                token = TokenLogprob(request.tokens[position + 1], chosen[scored], rank[scored], top)
                request.reading.logprobs[position + 1] = token
                scored += 1
        if params.pooling is not None:
            request.reading.add(start, next(sums), params.pooling)


def scored_positions(request: Request, start: int, end: int) -> range:
    """Of a chunk of a prompt, the tokens whose next one is known and wanted."""
    start = max(start, request.params.logprob_start_len - 1)
    return range(start, max(start, min(end, request.num_prompt - 1)))


def chunks(batch: Batch) -> Iterator[tuple]:
    """The chunks of prompts that somebody reads: request, position of the first token, its index in the step, how many tokens."""
    first = 0
    for request, start, count in zip(batch.requests, batch.starts, batch.lengths, strict=True):
        if request.reading is not None and start < request.num_prompt:
            yield request, start, first, count
        first += count
