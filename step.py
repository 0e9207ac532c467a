"""A step as plain functions of tensors: token ids in, token ids out. What `runner.py` re-binds to compiled and captured forms.

    extend     any mixture of decodes and chunks of prompts, T tokens of B sequences   -> logits [B, V]
    decode     one token each of n rows                                                -> logits [n, V]
    choose     logits -> tokens

A decode needs nothing from the host but which rows: the last token of each row and the length of its history stay on the
device, and both advance here. So a step can be launched before anyone knows what the one before has sampled, and
a step that was captured once can be replayed. Row 0 is padding: its history is empty and remains so.

    python -m pytest tests/test_compiled.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.dispatch import Layout, sample
from kernels.sampling import SamplingTensors, apply_bitmask
from model import KVCache, Transformer


@dataclass
class Inputs:
    """What the host says about a step of T tokens of B sequences."""

    ids: Tensor  # [T]; -row: that row's last token
    last: Tensor  # [B] index of each sequence's last token
    layout: Layout


def extend(model: Transformer, kv: KVCache, state: SamplingTensors, inputs: Inputs) -> Tensor:
    """-> the logits of each sequence's last token [B, V]."""
    return model.logits(hidden_states(model, kv, state, inputs)[inputs.last])


def hidden_states(model: Transformer, kv: KVCache, state: SamplingTensors, inputs: Inputs) -> Tensor:
    """-> those of all tokens [T, hidden]."""
    ids = torch.where(inputs.ids < 0, state.last_token[(-inputs.ids).clamp(min=0)], inputs.ids)
    return model(ids, inputs.layout, kv)


def decode(
    model: Transformer,
    kv: KVCache,
    state: SamplingTensors,
    page_table: Tensor,
    rows: Tensor,
    page_size: int,
    attention: str,
) -> Tensor:
    """rows [n], page_table [R, N] as far as the longest history reaches -> the logits of each row's next token [n, V]."""
    positions = state.length[rows]
    layout = model.lay_out_decode(positions, page_table[rows], page_size, attention)
    hidden = model(state.last_token[rows], layout, kv)
    state.length.index_put_((rows,), positions + (rows > 0))
    return model.logits(hidden)


def choose(
    state: SamplingTensors,
    logits: Tensor,
    rows: Tensor,
    attention: str,
    greedy: bool,
    bitmask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """logits [B, V], rows [B] whose token each is to be (0: it means nothing) -> tokens [B], whether the logits are finite [B].

    `greedy` is a constant of the graph: true when no request needs more than an argmax over the bare logits. `bitmask`: as
    for `apply_bitmask`.
    """
    if greedy:
        tokens = (logits if bitmask is None else apply_bitmask(logits, bitmask)).argmax(-1)
    else:
        tokens = sample(attention, logits, state, rows, state.length[rows], bitmask)
        state.seen.index_put_((rows, tokens), torch.ones_like(tokens, dtype=torch.int32), accumulate=True)
    state.last_token.index_put_((rows,), tokens)
    return tokens, logits.amax(-1).isfinite()
