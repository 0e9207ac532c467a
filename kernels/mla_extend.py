"""MLA on a GPU for steps with chunks of prompts: each sequence in the form that costs it less.

A short chunk is absorbed, as a decode is (`mla.py`). For a long one the expanded form has up to 3.4 times fewer operations
(`reference_mla.py` counts): the rows of its history are gathered once, each head's keys and values are made of them, and
the prefill kernel of ordinary attention does the rest (`prefill.py`), whose pages are then the gathered ones in a row. Heads
are independent of each other, so they are expanded some at a time, and a history of any length takes bounded memory.

The choice is made on the host, from numbers that it knows: nothing here waits for the device.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_mla.py -k step

Shapes: B sequences, T new tokens, H heads, R latent rank, S page size.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.latent import expanded, expanded_is_cheaper
from kernels.mla import mla_extend
from kernels.paged import MAX_HEAD_DIM
from kernels.prefill import paged_prefill
from kernels.reference_mla import absorb_query, project_output

MOST_NUMBERS = 1 << 28  # of expanded keys and values at a time: half a gibibyte in bfloat16


@torch.library.custom_op("folio::mla_step", mutates_args=())
def mla_step(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    page_table: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    on_host: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    """Any number of new tokens of each of B sequences: q_nope [T, H, nope], q_rope [T, H, rope] -> [T, H, V].

    kv_up [H, nope + V, R] are the projections W_K and W_V of each head. on_host [2 * B], on the CPU: position of each sequence's
    first new token, then how many there are. The rest as in `mla_extend`.
    """
    (T, H, nope), V = q_nope.shape, kv_up.shape[1] - q_nope.shape[2]
    out, token = q_nope.new_zeros(T, H, V), 0
    starts, new = on_host.view(2, -1).tolist()
    sizes = (H, nope, q_rope.shape[2], V, kv_up.shape[2])
    can_expand = all(dim % 8 == 0 and dim <= MAX_HEAD_DIM for dim in (nope + q_rope.shape[2], V))  # as `prefill.py` can
    choice = [can_expand and expanded_is_cheaper(*sizes, n, start + n) for start, n in zip(starts, new, strict=True)]
    for run in runs(choice):
        at = slice(token, token := token + sum(new[run]))
        step = page_table[run], offsets[run.start : run.stop + 1] - at.start, lengths[run], page_size, scale
        if choice[run.start]:
            pages = sum(-(-(start + n) // page_size) for start, n in zip(starts[run], new[run], strict=True))
            out[at] = attend_expanded(q_nope[at], q_rope[at], kv_up, cache, pages, *step)
        else:
            query = absorb_query(q_nope[at], kv_up[:, :nope])
            out[at] = project_output(mla_extend(query, q_rope[at], cache, *step), kv_up[:, nope:])
    return out


@mla_step.register_fake
def _(q_nope: Tensor, q_rope: Tensor, kv_up: Tensor, *_: object) -> Tensor:
    return q_nope.new_empty(*q_nope.shape[:2], kv_up.shape[1] - q_nope.shape[2])


def runs(choice: Sequence[bool]) -> Iterator[slice]:
    """Neighbours that agree."""
    first = 0
    for at in range(1, len(choice) + 1):
        if at == len(choice) or choice[at] != choice[first]:
            yield slice(first, at)
            first = at


def attend_expanded(
    q_nope: Tensor,
    q_rope: Tensor,
    kv_up: Tensor,
    cache: Tensor,
    pages: int,
    page_table: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
) -> Tensor:
    """`pages`: how many the histories have together. -> [T, H, V]."""
    H, nope = q_nope.shape[1:]
    gathered, table = side_by_side(page_table, lengths, page_size, pages)
    rows = cache.view(-1, page_size, cache.shape[1])[gathered].flatten(0, 1)  # [pages * S, R + rope]
    query, parts = torch.cat((q_nope, q_rope), -1), []
    most = max(1, MOST_NUMBERS // (len(rows) * (kv_up.shape[1] + q_rope.shape[2])))
    for first in range(0, H, most):
        heads = slice(first, first + most)
        keys, values = (t.transpose(0, 1) for t in expanded(rows, kv_up[heads], nope))
        parts.append(paged_prefill(query[:, heads], keys, values, table, offsets, lengths, page_size, scale))
    return torch.cat(parts, 1)


def side_by_side(page_table: Tensor, lengths: Tensor, page_size: int, pages: int) -> tuple[Tensor, Tensor]:
    """-> the pages of all histories, one after the other [pages], and a page table [B, N] that finds them there."""
    count = (lengths + page_size - 1) // page_size
    first = count.cumsum(0) - count
    column = torch.arange(page_table.shape[1], device=page_table.device)
    sequence = torch.repeat_interleave(count, output_size=pages)
    inside = torch.arange(pages, device=page_table.device) - first[sequence]
    return page_table[sequence, inside], (first[:, None] + column).clamp(max=pages - 1)
