"""Attention over pages in plain PyTorch: what every kernel is compared with, and what runs where there is no kernel.

A page holds S consecutive tokens of one sequence. Its tokens sit at slots `page * S ... page * S + S - 1`
of two tensors a layer, keys [slots, K, D] and values [slots, K, V]. A page table [B, N] names the pages of each sequence in
order, so entry j of its history is found at slot `page_table[b, j // S] * S + j % S` (PagedAttention, Kwon et al., 2023).

A step is ragged: T new tokens of B sequences, one sequence after the other. PyTorch wants rectangles. So the step is cut
into sequences with equally many new tokens: all decodes together are one rectangle, each chunk of a prompt is one. Of each
the histories are gathered once, a few sequences at a time, so that they are still near when they are attended to. A long chunk
is then cut into blocks of queries, and a block sees no entries behind its own last query: most of what the causal mask would
throw away is never computed. There are two forms: `paged_sdpa` hands the blocks to PyTorch's own attention, and
`paged_reference` writes the softmax out, so that scores can be changed on the way (`kernels/variants.py`).

    python -m pytest tests/test_attention.py
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.variants import Mask, Variant, apply_in_torch

QUERIES = 128  # of a chunk that read their history together
NEAR = 2**21  # bytes of keys that are gathered at a time, unless one history is longer: a core's own cache


@dataclass
class Rectangles:
    """A ragged step as rectangles. Flat, so that the lengths of these tensors are all that changes from step to step."""

    shapes: Tensor  # [3 R] on the CPU: sequences, new tokens of each, history entries, of each rectangle
    read_slots: Tensor  # [sum of sequences * history] where each history lies
    bias: dict[
        Mask, Tensor
    ]  # [sum over blocks of sequences * G * queries * seen], 0 or -inf; for layers that take SDPA


def cut(
    starts: Sequence[int],
    lengths: Sequence[int],
    positions: Tensor,
    page_table: Tensor,
    page_size: int,
    masks: Iterable[Mask],
    groups: int,
    dtype: torch.dtype,
) -> Rectangles:
    """starts, lengths [B]: position of each sequence's first new token, and how many there are; positions [T] of all of them;
    page_table [B, N] -> Rectangles. `groups`: query heads of one KV head.
    """
    shapes: list[int] = []
    reads: list[Tensor] = []
    bias: dict[Mask, list[Tensor]] = {mask: [] for mask in masks}
    token = 0
    for at, count in rectangles(lengths):
        new = positions[token : token + count * lengths[at]].view(count, -1)
        history = max(starts[at : at + count]) + lengths[at]
        columns = max(2, -(-history // page_size))  # torch.compile would make a constant of a size of 1
        slots = history_slots(page_table[at : at + count, :columns], new[:, -1], page_size)
        shapes += [count, lengths[at], slots.shape[1]]
        reads.append(slots.flatten())
        for mask, parts in bias.items():
            for queries, seen in query_blocks(lengths[at], slots.shape[1]):
                parts.append(attention_bias(new[:, queries], seen, mask, groups, dtype).flatten())
        token += count * lengths[at]
    return Rectangles(torch.tensor(shapes), torch.cat(reads), {mask: torch.cat(parts) for mask, parts in bias.items()})


def one_rectangle(
    slots: Tensor, positions: Tensor, masks: Iterable[Mask], groups: int, dtype: torch.dtype
) -> Rectangles:
    """A decode: slots [B, L] of the histories, positions [B] of one new token each."""
    B, L = slots.shape
    bias = {mask: attention_bias(positions[:, None], L, mask, groups, dtype).flatten() for mask in masks}
    return Rectangles(torch.tensor([B, 1, L]), slots.flatten(), bias)


def rectangles(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut B sequences into (first, count): runs of single tokens together, every longer chunk by itself."""
    at = 0
    while at < len(lengths):
        count = 1
        while lengths[at] == 1 and at + count < len(lengths) and lengths[at + count] == 1:
            count += 1
        yield at, count
        at += count


def query_blocks(new: int, history: int) -> Iterator[tuple[slice, int]]:
    """Cut the `new` last queries of a history into blocks -> (queries, how many entries reach to the last of them)."""
    for first in range(0, new, QUERIES):
        end = min(first + QUERIES, new)
        yield slice(first, end), history - new + end


def history_slots(page_table: Tensor, last: Tensor, page_size: int) -> Tensor:
    """page_table [B, N], last [B]: position of each sequence's last token -> the slot of each history entry [B, N * S].

    Entries behind the last token repeat it: what lies there is somebody else's, and may be NaN, which no mask stops
    (0 * NaN is NaN). A kernel must likewise load nothing there.
    """
    entry = torch.arange(page_table.shape[1] * page_size, device=page_table.device).minimum(last[:, None])
    return slots_at(page_table, entry, page_size)


def slots_at(page_table: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """page_table [B, N], positions [B, M] in each sequence -> the slots where they lie [B, M]."""
    return page_table.gather(1, positions // page_size) * page_size + positions % page_size


def attention_bias(positions: Tensor, history: int, mask: Mask, groups: int, dtype: torch.dtype) -> Tensor:
    """positions [B, Q] -> [B, 1, G * Q, history]: 0 where a query sees entry j of its history, -inf elsewhere.

    The same for each of the `groups` G heads that share a KV head.
    """
    query = positions.repeat(1, groups)[:, None, :, None]
    key = torch.arange(history, device=positions.device)
    zeros = torch.zeros(*query.shape[:3], history, dtype=dtype, device=positions.device)
    return apply_in_torch(Variant(mask_mod=mask[0], mask_args=mask[1]), zeros, query, key, head=query.new_zeros(1))


# ---- the two forms

_library = torch.library.Library("folio", "FRAGMENT")
_library.define(
    "paged_sdpa(Tensor q, Tensor keys, Tensor values, Tensor read_slots, Tensor shapes, float scale, Tensor bias, "
    "Tensor? sinks) -> Tensor"
)
_library.define(
    "paged_reference(Tensor q, Tensor keys, Tensor values, Tensor read_slots, Tensor shapes, float scale, Tensor positions, "
    "str score_mod, float[] numbers, Tensor[] tensors, str mask_mod, int[] mask_args, Tensor? sinks) -> Tensor"
)


def _paged_sdpa(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    read_slots: Tensor,
    shapes: Tensor,
    scale: float,
    bias: Tensor,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(q k' * scale + bias) v over each sequence's pages: q [T, H, D] -> [T, H, V]. The rest as in `Rectangles`.

    One op, opaque to the compiler, so that one graph serves every mix of decodes and chunks.
    """
    parts = []
    cell = 0
    for x, k, v, _ in histories(q, keys, values, read_slots, shapes):
        B, rows, L = len(x), x.shape[2], k.shape[2]
        mask = bias.narrow(0, cell, B * rows * L).view(B, 1, rows, L)
        if sinks is None:
            parts.append(F.scaled_dot_product_attention(x, k, v, attn_mask=mask, scale=scale))
        else:
            parts.append(sdpa_with_sinks(x, k, v, mask, scale, sinks))
        cell += mask.numel()
    return joined(parts, q.shape[1])


def sdpa_with_sinks(x: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sinks: Tensor) -> Tensor:
    """Of one block, on a CPU. A sink only adds e^sink to the sum of weights, which ordinary attention knows: it is the log of it
    that the backward pass wants. So out * sum / (sum + e^sink) = out * sigmoid(log sum - sink).
    """
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, k, v, attn_mask=mask, scale=scale)
    B, K, rows = log_sum.shape
    share = torch.sigmoid(log_sum.view(B, K, len(sinks) // K, -1) - sinks.to(log_sum.dtype).view(K, -1, 1))
    return out * share.view(B, K, rows, 1).to(out.dtype)


def _paged_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    read_slots: Tensor,
    shapes: Tensor,
    scale: float,
    positions: Tensor,
    score_mod: str,
    numbers: list[float],
    tensors: list[Tensor],
    mask_mod: str,
    mask_args: list[int],
    sinks: Tensor | None,
) -> Tensor:
    """The same with the softmax written out, and any variant: positions [T] of the queries, then `Variant.flat`, then sinks.

    A query that sees nothing, and has no sink, gets zeros.
    """
    variant = Variant(score_mod, (*numbers, *tensors), mask_mod, tuple(mask_args))
    H = q.shape[1]
    head = torch.arange(H, device=q.device)[:, None, None]
    parts = []
    for x, k, v, tokens in histories(q, keys, values, read_slots, shapes):
        B, K, L, _ = k.shape
        scores = (x @ k.transpose(-1, -2)).view(B, H, -1, L)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
        query = positions[tokens].view(B, 1, -1, 1)
        scores = apply_in_torch(variant, scores, query, torch.arange(L, device=q.device), head)
        top = scores.amax(-1, keepdim=True).clamp(min=-1e30)  # not -inf: -inf - -inf is NaN
        if sinks is not None:
            top = top.maximum(sinks[:, None, None])
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + (sinks[:, None, None] - top).exp()
        weights = weights / torch.where(total == 0, 1, total)
        parts.append(weights.to(v.dtype).view(B, K, -1, L) @ v)
    return joined(parts, H)


def histories(
    q: Tensor, keys: Tensor, values: Tensor, read_slots: Tensor, shapes: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, slice]]:
    """Of each block of Q queries of B sequences: queries [B, K, G * Q, D], keys [B, K, L, D], values [B, K, L, V], its tokens.

    The G = H / K query heads that share a KV head become rows of one product, so each key is read once. Keys and values are to be
    used before the next block is asked for.
    """
    H, D = q.shape[1:]
    K = keys.shape[1]
    row = K * D * keys.element_size()
    token = entry = 0
    for B, new, history in pieces(shapes, row):
        slots = read_slots.narrow(0, entry, B * history)
        k = gathered(keys, slots, "keys").view(B, history, K, -1).transpose(1, 2)
        v = gathered(values, slots, "values").view(B, history, K, -1).transpose(1, 2)
        for queries, seen in query_blocks(new, history):
            tokens = slice(token + queries.start * B, token + queries.stop * B)  # B is 1 where there are many blocks
            x = q[tokens].view(B, -1, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
            yield x, k[:, :, :seen], v[:, :, :seen], tokens
        token, entry = token + B * new, entry + B * history


def pieces(shapes: Tensor, row: int) -> Iterator[tuple[int, int, int]]:
    """Cut rectangles into ones of as many sequences as have keys of NEAR bytes together, at `row` bytes an entry."""
    for B, new, history in shapes.view(-1, 3).tolist():
        most = max(1, NEAR // (history * row))
        for first in range(0, B, most):
            yield min(most, B - first), new, history


_scratch = threading.local()


def gathered(x: Tensor, slots: Tensor, name: str) -> Tensor:
    """x [all slots, ...], slots [N] -> [N, -1]; on a CPU until the next call with that name.

    There it is always the same memory, as long as the thread lives: page faults of fresh memory cost more than the copy itself.
    index_select of whole rows is nearly twice as fast as x[slots].
    """
    x = x.flatten(1)
    if x.device.type != "cpu":
        return x.index_select(0, slots)
    size = len(slots) * x.shape[1]
    kept = getattr(_scratch, name, None)
    if kept is None or kept.dtype != x.dtype or len(kept) < size:
        with torch.inference_mode(False):
            kept = torch.empty(size, dtype=x.dtype)
        setattr(_scratch, name, kept)
    return torch.index_select(x, 0, slots, out=kept[:size].view(len(slots), -1))


def joined(parts: list[Tensor], heads: int) -> Tensor:
    """The blocks' outputs [B, K, G * Q, V] -> [T, H, V]."""
    flat = [p.reshape(len(p), heads, -1, p.shape[-1]).transpose(1, 2).flatten(0, 1) for p in parts]
    return torch.cat(flat) if len(flat) > 1 else flat[0].contiguous()


_library.impl("paged_sdpa", _paged_sdpa, "CompositeExplicitAutograd")
_library.impl("paged_reference", _paged_reference, "CompositeExplicitAutograd")


def _shape_of_output(q: Tensor, keys: Tensor, values: Tensor, *_: object) -> Tensor:
    return q.new_empty(*q.shape[:2], values.shape[2])


torch.library.register_fake("folio::paged_sdpa", _shape_of_output, lib=_library)
torch.library.register_fake("folio::paged_reference", _shape_of_output, lib=_library)

paged_sdpa, paged_reference = torch.ops.folio.paged_sdpa, torch.ops.folio.paged_reference
