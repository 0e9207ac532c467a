"""Attention over pages in plain PyTorch: what every kernel is compared with, and what runs where there is no kernel.

A page holds S consecutive tokens of one sequence. Its tokens sit at slots `page * S ... page * S + S - 1`
of two tensors a layer, keys and values [slots, K, D]. A page table [B, N] names the pages of each row in order, so
entry j of a row's history is found at slot `page_table[b, j // S] * S + j % S` (PagedAttention, Kwon et al., 2023).

A step is a rectangle: B rows (sequences) of Q new tokens each; decode has Q = 1. A padding token has position -1: it
writes to slot 0, on the page that nobody owns, and its output means nothing.

    python -m pytest tests/test_attention.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def history_slots(page_table: Tensor, page_size: int) -> Tensor:
    """page_table [B, N] -> the slot of every history entry [B, N * S], in order."""
    offsets = torch.arange(page_size, device=page_table.device)
    return (page_table[:, :, None] * page_size + offsets).flatten(1)


def write_slots(page_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """page_table [B, N], positions [B, Q] -> where each new token goes [B * Q]; padding (position < 0) to slot 0."""
    column = positions.clamp(min=0)
    slots = page_table.gather(1, column // page_size) * page_size + column % page_size
    return torch.where(positions < 0, 0, slots).flatten()


def attention_bias(positions: Tensor, history: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
    """positions [B, Q] -> [B, 1, G * Q, history]: 0 where a query sees entry j of its history, -inf elsewhere.

    The query at position p sees j <= p, and with a sliding window of W only the last W of those, itself included. The same
    for each of the `groups` G heads that share a KV head. A padding query sees entry 0, so that no row is empty.
    """
    query = positions.clamp(min=0).repeat(1, groups)[:, None, :, None]
    key = torch.arange(history, device=positions.device)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k, v [B, Q, K, D] into keys, values [slots, K, D] at `slots` [B * Q], in place."""
    keys.index_put_((slots,), k.flatten(0, 1).to(keys.dtype))
    values.index_put_((slots,), v.flatten(0, 1).to(values.dtype))


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, bias: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(softcap(q k' * scale) + bias) v over each row's pages.

    q [B, Q, H, D], keys / values [slots, K, D], slots [B, L], bias [B, 1, G * Q, L] -> [B, Q, H, D].
    The G = H / K query heads that share a KV head become rows of one product, so each key is read once.
    """
    B, Q, H, D = q.shape
    K = keys.shape[1]
    G = H // K
    k = keys[slots].transpose(1, 2)  # [B, K, L, D]
    v = values[slots].transpose(1, 2)
    q = q.view(B, Q, K, G, D).permute(0, 2, 3, 1, 4).reshape(B, K, G * Q, D)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    else:
        scores = torch.tanh((q @ k.transpose(-1, -2)) * (scale / softcap)) * softcap + bias
        out = scores.float().softmax(-1).to(v.dtype) @ v
    return out.view(B, K, G, Q, D).permute(0, 3, 1, 2, 4).reshape(B, Q, H, D)
