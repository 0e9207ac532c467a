"""Paged prefill ("extend"): the new tokens of many sequences in one launch: prompts, chunks, decodes, mixed.

The new tokens of B sequences lie one sequence after the other, T in all. Each attends to everything its sequence has in
the pages: the prefix that was there before, and causally its own new tokens, which must have been written already. A
decode is a sequence with one new token. (Chunked prefill: Sarathi-Serve, Agrawal et al., 2024. One kernel for all of it
is how vLLM and SGLang do it as well; its parts are in `kernels/paged.py`.)

One program takes a block of BLOCK_Q tokens, times the query heads that share a KV head: these are the M rows of the
matrix products, so a tile of keys is read once for all of them. Tiles before the block's first token are seen by every
row, and run without a causal mask; only the last few run with one.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_attention.py
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged import (
    LOG2E,
    LOWEST,
    Config,
    attend,
    check,
    device_key,
    find_sequence,
    first_tile,
    mods_of,
    padded,
    precision,
    table_for,
)
from kernels.variants import CAUSAL, Variant

# (rows, keys, warps, stages) for each power of 2 that holds the head dim. From the compiler's report, not from a clock:
# the largest tiles without spills. On sm90 at least 64 rows for four warps, below which there is no wgmma; on gfx942
# what 64 KiB of LDS hold.
TILES = {
    "sm90": {
        16: (128, 64, 4, 2),
        32: (128, 64, 4, 2),
        64: (128, 64, 4, 2),
        128: (128, 64, 8, 2),
        256: (128, 32, 8, 2),
    },
    "sm80": {
        16: (64, 64, 4, 2),
        32: (64, 64, 4, 2),
        64: (64, 64, 4, 2),
        128: (64, 32, 4, 2),
        256: (64, 32, 8, 2),
    },
    "gfx942": {
        16: (64, 64, 4, 1),
        32: (64, 64, 4, 1),
        64: (64, 64, 4, 1),
        128: (64, 32, 4, 1),
        256: (64, 16, 8, 1),
    },
}
# float32 is for tests and small models: what does not spill.
TILES_FLOAT32 = {16: (32, 32, 4, 1), 32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)}


def config(arch: str, head_dim: int, dtype: torch.dtype) -> Config:
    tiles = TILES_FLOAT32 if dtype == torch.float32 else table_for(TILES, arch)
    return Config(*tiles[padded(head_dim)])


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "table_stride"])
def prefill_kernel(
    out,  # [T, H, V]
    q,  # [T, H, D]
    keys,  # [slots, K, D]
    values,  # [slots, K, V]
    page_table,  # [B, N]
    query_start,  # [B + 1]
    lengths,  # [B]
    sinks,  # [H] or None
    scale,
    score_args,
    mask_args,
    num_tokens,
    num_sequences,
    num_heads,
    q_stride,
    q_head_stride,
    slot_stride,
    head_stride,
    value_slot_stride,
    value_head_stride,
    table_stride,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    FIRST_KEY: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a block of tokens of one sequence, and the query heads of one KV head (or a block of them)."""
    HEADS: tl.constexpr = GROUP if GROUP < BLOCK_M else BLOCK_M  # query heads in a program
    HEAD_BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    BLOCK_Q: tl.constexpr = BLOCK_M // HEADS  # tokens in a program
    kv_head = tl.program_id(1) // HEAD_BLOCKS

    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last ones have the most to do, and go first
    b = find_sequence(block, query_start, num_sequences, 1, BLOCK_Q)
    begin = tl.load(query_start + b).to(tl.int32)
    after = tl.load(query_start + b + 1, mask=b < num_sequences, other=0).to(tl.int32)
    stop = tl.where(b < num_sequences, after, num_tokens)
    length = tl.load(lengths + b, mask=b < num_sequences, other=0).to(tl.int32)
    offset = (block - (begin // BLOCK_Q + b)) * BLOCK_Q  # of the block's first token among the sequence's new ones
    if begin + offset >= stop:
        return

    m = tl.arange(0, BLOCK_M)  # token-major: the heads of one token are neighbours
    token = begin + offset + m // HEADS
    in_group = tl.program_id(1) % HEAD_BLOCKS * HEADS + m % HEADS
    head = kv_head * GROUP + in_group
    live = (m < BLOCK_Q * HEADS) & (token < stop) & (in_group < GROUP)
    head = tl.minimum(head, num_heads - 1)
    d = tl.arange(0, BLOCK_D)
    at = token.to(tl.int64) * q_stride + head * q_head_stride
    tile = tl.load(q + at[:, None] + d[None, :], mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # [M, D]

    # The position of the block's first token; it is negative where the sequence is empty.
    first = length - (stop - begin) + offset
    end = tl.minimum(first + BLOCK_Q, length)
    begin_at = first_tile(first, mask_args, FIRST_KEY, BLOCK_N)
    # The first tile that needs a causal mask.
    edge_at = tl.maximum(tl.maximum(first + 1, 0) // BLOCK_N * BLOCK_N, begin_at)
    query = (first + m // HEADS)[:, None]
    table = page_table + tl.minimum(b, num_sequences - 1).to(tl.int64) * table_stride

    if sinks is not None:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for EDGE in tl.static_range(2):
        acc, top, total = attend(
            acc,
            top,
            total,
            tile,
            keys + kv_head * head_stride,
            values + kv_head * value_head_stride,
            table,
            edge_at if EDGE else begin_at,
            end if EDGE else edge_at,
            query,
            head[:, None],
            slot_stride,
            value_slot_stride,
            scale,
            score_args,
            mask_args,
            SCORE_MOD,
            MASK_MOD,
            PRECISION,
            EDGE == 1,
            PAGE_SIZE,
            BLOCK_N,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_D,
            BLOCK_V,
        )
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    e = tl.arange(0, BLOCK_V)
    at = (token.to(tl.int64) * num_heads + head) * VALUE_DIM
    stored = live[:, None] & (e < VALUE_DIM)[None, :]
    tl.store(out + at[:, None] + e[None, :], acc.to(out.dtype.element_ty), mask=stored)


@torch.library.custom_op("folio::triton_prefill", mutates_args=())
def _prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    score_mod: str,
    numbers: list[float],
    tensors: list[Tensor],
    mask_mod: str,
    mask_args: list[int],
    sinks: Tensor | None,
) -> Tensor:
    check(q, keys, values, page_table, lengths, page_size, scale, sinks, tensors, query_start)
    T, H, D = q.shape
    B, (K, V) = len(lengths), values.shape[1:]
    if B == 0 or T == 0:
        return q.new_zeros(T, H, V)
    out = q.new_empty(T, H, V)
    arch, _ = device_key(q)
    c = config(arch, D, q.dtype)
    heads = min(H // K, c.block_m)
    blocks = T // (c.block_m // heads) + B + 1  # enough, however T is divided; those without work end at once
    prefill_kernel[(blocks, K * triton.cdiv(H // K, heads))](
        out,
        q,
        keys,
        values,
        page_table,
        query_start,
        lengths,
        sinks,
        scale,
        (*numbers, *tensors),
        tuple(mask_args),
        T,
        B,
        H,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        page_table.stride(0),
        **mods_of(score_mod, mask_mod),
        PRECISION=precision(arch),
        GROUP=H // K,
        PAGE_SIZE=page_size,
        HEAD_DIM=D,
        VALUE_DIM=V,
        BLOCK_D=padded(D),
        BLOCK_V=padded(V),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        **c.launch,
    )
    return out


@_prefill.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(*q.shape[:2], values.shape[2])


def paged_prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    variant: Variant = CAUSAL,
    sinks: Tensor | None = None,
) -> Tensor:
    """The new tokens of B sequences: q [T, H, D] -> [T, H, V].

    keys [slots, K, D] and values [slots, K, V], slot = page * page_size + offset, where the new tokens' own have been
    written already; page_table [B, N]; query_start [B + 1]: sequence b has tokens query_start[b] ... query_start[b + 1] - 1 of q;
    lengths [B]: all its tokens, the new ones included. Tokens behind query_start[B], and those of a sequence of length
    0, get zeros. sinks [H]: see `Variant`. ValueError for what does not fit together.
    """
    return _prefill(q, keys, values, page_table, query_start, lengths, page_size, scale, *variant.flat, sinks)
