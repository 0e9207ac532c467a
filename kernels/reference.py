"""Attention over pages in plain PyTorch: what every kernel is compared with, and what runs where there is no kernel.

A page holds S consecutive tokens of one sequence. Its tokens sit at slots `page * S ... page * S + S - 1`
of two tensors a layer, keys and values [slots, K, D]. A page table [B, N] names the pages of each sequence in order, so
entry j of its history is found at slot `page_table[b, j // S] * S + j % S` (PagedAttention, Kwon et al., 2023).

A step is ragged: T new tokens of B sequences, one sequence after the other. What all layers share of it is laid out once,
outside of the compiled graph (`lay_out`): where the new tokens go, and the step cut into rectangles of sequences with equally many
new tokens. All decodes together are one, each chunk of a prompt is one; each rectangle is one call of SDPA.
Padding is a sequence whose page table names page 0, which nobody owns.

    python -m pytest tests/test_attention.py
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from device import from_host


@dataclass
class Layout:
    """How a step lies in memory, for all layers. Flat, so that its sizes are all that changes from step to step."""

    positions: Tensor  # [T] of each new token in its sequence
    write_slots: Tensor  # [T] where its key and value go
    last: Tensor  # [B] index of each sequence's last new token
    shapes: Tensor  # [3 R] on the CPU: sequences, new tokens of each, history entries, of each rectangle
    read_slots: Tensor  # [sum of sequences * history] where each history lies
    bias: dict[int | None, Tensor]  # for each window: [sum of sequences * G * new * history], 0 or -inf


def lay_out(
    starts: Sequence[int],
    lengths: Sequence[int],
    page_table: Tensor,
    page_size: int,
    windows: Iterable[int | None],
    groups: int,
    dtype: torch.dtype,
) -> Layout:
    """starts, lengths [B]: position of each sequence's first new token, and how many there are; page_table [B, N] -> Layout.

    The table's columns must reach as far as the longest history. `groups`: query heads of one KV head.
    """
    device = page_table.device
    start, length = from_host([starts, lengths], device)
    end = length.cumsum(0)
    sequence = torch.repeat_interleave(length, output_size=sum(lengths))
    positions = torch.arange(sum(lengths), device=device) + (start - end + length)[sequence]
    shapes: list[int] = []
    reads: list[Tensor] = []
    bias: dict[int | None, list[Tensor]] = {w: [] for w in windows}
    token = 0
    for at, count in rectangles(lengths):
        new = positions[token : token + count * lengths[at]].view(count, -1)
        history = max(starts[at : at + count]) + lengths[at]
        columns = max(2, -(-history // page_size))  # torch.compile would make a constant of a size of 1
        slots = history_slots(page_table[at : at + count, :columns], new[:, -1], page_size)
        shapes += [count, lengths[at], slots.shape[1]]
        reads.append(slots.flatten())
        for window, parts in bias.items():
            parts.append(attention_bias(new, slots.shape[1], window, groups, dtype).flatten())
        token += count * lengths[at]
    return Layout(
        positions,
        page_table[sequence, positions // page_size] * page_size + positions % page_size,
        end - 1,
        torch.tensor(shapes),
        torch.cat(reads),
        {window: torch.cat(parts) for window, parts in bias.items()},
    )


def rectangles(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut B sequences into (first, count): runs of single tokens together, every longer chunk by itself."""
    at = 0
    while at < len(lengths):
        count = 1
        while lengths[at] == 1 and at + count < len(lengths) and lengths[at + count] == 1:
            count += 1
        yield at, count
        at += count


def history_slots(page_table: Tensor, last: Tensor, page_size: int) -> Tensor:
    """page_table [B, N], last [B]: position of each sequence's last token -> the slot of each history entry [B, N * S].

    Entries behind the last token repeat it: what lies there is somebody else's, and may be NaN, which no mask stops
    (0 * NaN is NaN). A kernel must likewise load nothing there.
    """
    entry = torch.arange(page_table.shape[1] * page_size, device=page_table.device).minimum(last[:, None])
    return page_table.gather(1, entry // page_size) * page_size + entry % page_size


def attention_bias(positions: Tensor, history: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
    """positions [B, Q] -> [B, 1, G * Q, history]: 0 where a query sees entry j of its history, -inf elsewhere.

    The query at position p sees j <= p, and with a sliding window of W only the last W of those, itself included. The same
    for each of the `groups` G heads that share a KV head.
    """
    query = positions.repeat(1, groups)[:, None, :, None]
    key = torch.arange(history, device=positions.device)
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k, v [T, K, D] into keys, values [slots, K, D] at `slots` [T], in place."""
    keys.index_put_((slots,), k.to(keys.dtype))
    values.index_put_((slots,), v.to(values.dtype))


_library = torch.library.Library("folio", "FRAGMENT")
_library.define(
    "paged_attention(Tensor q, Tensor keys, Tensor values, Tensor read_slots, Tensor bias, Tensor shapes, float scale, "
    "float? softcap=None) -> Tensor"
)


def _paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    read_slots: Tensor,
    bias: Tensor,
    shapes: Tensor,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(softcap(q k' * scale) + bias) v over each sequence's pages: q [T, H, D] -> [T, H, D].

    keys, values [slots, K, D]; the rest as in `Layout`. One op, opaque to the compiler, so that one graph serves every mix of
    decodes and chunks.
    """
    H, D = q.shape[1:]
    groups = H // keys.shape[1]
    parts = []
    token = entry = cell = 0
    for count, new, history in shapes.view(-1, 3).tolist():
        tokens, entries, cells = count * new, count * history, count * groups * new * history
        part = rectangle_attention(
            q.narrow(0, token, tokens).view(count, new, H, D),
            keys,
            values,
            read_slots.narrow(0, entry, entries).view(count, history),
            bias.narrow(0, cell, cells).view(count, 1, groups * new, history),
            scale,
            softcap,
        )
        parts.append(part.reshape(tokens, H, D))
        token, entry, cell = token + tokens, entry + entries, cell + cells
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


_library.impl("paged_attention", _paged_attention, "CompositeExplicitAutograd")


@torch.library.register_fake("folio::paged_attention", lib=_library)
def _(q: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(q.shape)


paged_attention = torch.ops.folio.paged_attention


def rectangle_attention(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, bias: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """B sequences of Q new tokens each: q [B, Q, H, D], slots [B, L], bias [B, 1, G * Q, L] -> [B, Q, H, D].

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
