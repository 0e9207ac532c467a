"""Multi-head Latent Attention in plain PyTorch, in both of its forms: what `kernels/mla.py` is compared with.

Of each token MLA (DeepSeek-V2, 2024) keeps a latent c [R] and a key k_r [rope] that carries the position, shared by all
heads. What a head calls key and value are projections of c, with W_K [H, nope, R] and W_V [H, V, R]:

    k_h = [W_K,h c | k_r]         v_h = W_V,h c         q_h = [q_nope,h | q_rope,h]

Expanded form: make those keys and values and attend as usual, with head dims nope + rope and V. Absorbed form: a score
is

    q_nope,h . (W_K,h c) + q_rope,h . k_r  =  (W_K,h' q_nope,h) . c + q_rope,h . k_r

so W_K can be folded into the query [R], once a query instead of once a cache entry; and since W_V is linear, the
weighted mean of values is W_V of the weighted mean of latents. All heads then attend to the same rows [c | k_r], whose
first R numbers are the value:

    expanded:  2 H (nope + rope + V) operations an entry and query, and 2 H R (nope + V) an entry to expand it
    absorbed:  2 H (2 R + rope) operations an entry and query; R + rope numbers to read, not H (nope + rope + V)

With DeepSeek's R 512, nope = V = 128, rope 64 the absorbed form has 3.4 times the operations and reads a 71st: it is
for decoding. The expanded form is for prompts, where one expansion serves many queries.

    python -m pytest tests/test_reference_mla.py

Shapes: B sequences, T new tokens, L history, H heads, R latent rank; `offsets` [B + 1] as in `kernels/mla.py`.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def absorb_query(q_nope: Tensor, w_k: Tensor) -> Tensor:
    """q_nope [T, H, nope], w_k [H, nope, R] -> the query in latent space [T, H, R]."""
    return torch.einsum("thn,hnr->thr", q_nope, w_k)


def project_output(out: Tensor, w_v: Tensor) -> Tensor:
    """out [T, H, R] of the absorbed form, w_v [H, V, R] -> [T, H, V]."""
    return torch.einsum("thr,hvr->thv", out, w_v)


def mla_absorbed(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    """q_latent [T, H, R], q_rope [T, H, rope], cache [slots, R + rope] -> [T, H, R], still in latent space.

    Sequence b has lengths[b] entries on the pages that page_table[b] names; its new tokens offsets[b] ... offsets[b +
    1] - 1 are the last of them, and each sees the entries up to its own. Nothing else is read. Tokens that see nothing
    give zeros.
    """
    R = q_latent.shape[-1]
    out = torch.zeros_like(q_latent)
    for tokens, rows, hidden in _sequences(cache, page_table, offsets, lengths, page_size):
        query = torch.cat((q_latent[tokens], q_rope[tokens]), -1)  # [new, H, R + rope]
        scores = torch.einsum("qhd,ld->qhl", query, rows) * scale
        weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("qhl,lr->qhr", weights, rows[:, :R])
    return out


def mla_expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cache: Tensor,
    page_table: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    """q_nope [T, H, nope], w_k [H, nope, R], w_v [H, V, R] -> [T, H, V], with each head's own keys and values.

    The rest as in `mla_absorbed`.
    """
    H, V, R = w_v.shape
    out = q_nope.new_zeros(q_nope.shape[0], H, V)
    query = torch.cat((q_nope, q_rope), -1)  # [T, H, nope + rope]
    for tokens, rows, hidden in _sequences(cache, page_table, offsets, lengths, page_size):
        latent, k_rope = rows[:, :R], rows[:, R:]
        k_nope = torch.einsum("lr,hnr->lhn", latent, w_k)
        keys = torch.cat((k_nope, k_rope[:, None].expand(-1, H, -1)), -1)  # [L, H, nope + rope]
        values = torch.einsum("lr,hvr->lhv", latent, w_v)
        scores = torch.einsum("qhd,lhd->qhl", query[tokens], keys) * scale
        weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        out[tokens] = torch.einsum("qhl,lhv->qhv", weights, values)
    return out


def _sequences(
    cache: Tensor, page_table: Tensor, offsets: Tensor, lengths: Tensor, page_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each sequence with something to do: its new tokens, its rows of the cache [L, R + rope], which are hidden."""
    for pages, (first, last), length in zip(page_table, pairwise(offsets.tolist()), lengths.tolist(), strict=True):
        if first == last or length == 0:
            continue
        entry = torch.arange(length, device=cache.device)
        rows = cache[pages[entry // page_size].long() * page_size + entry % page_size]
        position = entry[length - (last - first) :]
        yield slice(first, last), rows, entry > position[:, None]
