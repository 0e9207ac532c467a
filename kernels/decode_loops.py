"""Decode attention in plain PyTorch, written so that the compiler makes loops of it which walk the pages of a CPU.

One new token a sequence makes attention a matter of reading the history once. Gathering it first (`reference.py`) reads it,
writes it, and reads it again. Here `keys[slots]` stands inside of a sum, so Inductor loads each row from its slot right where it
is multiplied, and nothing is gathered. The rows are visited in the order in which they lie: a slot, then its KV heads.

Eager it gives the same numbers, slowly: call it within `torch.compile`. It can trace all variants but those whose score mod
takes a tensor (ALiBi), because of `Pointer` in `variants.py`.

    python -m pytest tests/test_decode_loops.py
"""

import torch
from torch import Tensor

from kernels.variants import Variant, apply_in_torch

LANES = 16  # float32 in the widest vector register of a CPU


def decode_in_loops(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    variant: Variant,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k' * scale) v of one query a sequence: q [B, H, D], keys [slots, K, D], values [slots, K, V] -> [B, H, V].

    slots [B, L] of each history entry, positions [B] of the queries: entries behind it must repeat a slot that may be read.
    sinks [H]: see `Variant`.
    """
    B, H, D = q.shape
    L, K = slots.shape[1], keys.shape[1]
    exact = torch.promote_types(q.dtype, torch.float32)
    query = q.view(B, 1, K, H // K, D).to(exact)
    scores = (query * keys[slots][..., None, :].to(exact)).sum(-1) * scale  # [B, L, K, G]
    scores = scores.flatten(2).transpose(1, 2)  # [B, H, L]
    head = torch.arange(H, device=q.device)[:, None]
    entry = torch.arange(L, device=q.device)
    scores = apply_in_torch(variant, scores, positions.view(B, 1, 1), entry, head)

    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)  # not -inf: -inf - -inf is NaN
    if sinks is not None:
        top = top.maximum(sinks[:, None])
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks[:, None] - top).exp()
    weights = weights / torch.where(total == 0, 1, total)  # a query that sees nothing gets zeros
    return weighted_values(weights.transpose(1, 2), values, slots).to(q.dtype)


def weighted_values(weights: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """weights [B, L, H], values [slots, K, V], slots [B, L] -> their sums over L [B, H, V].

    As one sum this becomes a walk over the slots for every 16 numbers of V. As several sums side by side, of pieces of V,
    it is one walk that keeps them all.
    """
    B, L, H = weights.shape
    K, V = values.shape[1:]
    pieces = next((n for n in (8, 4, 2) if V % (n * LANES) == 0), 1)
    v = values[slots].to(weights.dtype).view(B, L, K, 1, pieces, V // pieces)
    w = weights.view(B, L, K, H // K, 1)
    sums = [(w * v[..., piece, :]).sum(1) for piece in range(pieces)]  # [B, K, G, V / pieces]
    return torch.cat(sums, -1).view(B, H, V)
