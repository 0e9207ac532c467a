"""Paged decode attention: one query for each sequence, its history cut into splits that run side by side.

A decode step reads every key and value once and computes little with them, so its floor is bytes / memory bandwidth.
Two things keep a GPU from it, and the shape of this kernel answers both:

- Few sequences cannot fill 132 multiprocessors. So a sequence's keys are divided into splits, each a program of its own
  (Flash-Decoding, Dao et al., 2023). A split leaves its part of the output and the log of its sum of weights; a second
  kernel merges them.
- H / K query heads want the same KV head (GQA, Ainslie et al., 2023). They become the rows of one matrix product, so it
  is read once.

How many splits depends on the batch, and with it the order of summation, so the last bits of a row change with its
neighbours. With `fixed_split` every split has that many tokens, whatever else runs: a row's result is then the same,
bit for bit, in any batch.

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
    first_tile,
    mods_of,
    padded,
    precision,
    table_for,
)
from kernels.variants import CAUSAL, Variant

MERGE_BLOCK = 16  # partial results that the merge reads at a time

# Tiles of keys, for each power of 2 that holds the head dim. From the compiler's report, not from a clock: no spills,
# and shared memory and registers for at least two programs a multiprocessor, whose loads then overlap. Two stages:
# behind a page table, 3 and 4 give the same code, and 5 costs twice the memory. float32 takes smaller tiles, and 64
# rows of 256 twice the warps.
TILES = {
    "sm90": {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (64, 4), 256: (64, 4)},
    "sm80": {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (64, 4), 256: (32, 4)},
    "gfx942": {16: (64, 4), 32: (64, 4), 64: (64, 4), 128: (32, 4), 256: (16, 4)},
}
PROGRAMS_PER_SM = 4  # that the automatic split count aims at
MIN_SPLIT = 128  # tokens; a smaller split would be mostly start and merge


def config(arch: str, head_dim: int, group: int, dtype: torch.dtype) -> Config:
    """`group`: query heads of a KV head. A matrix product takes 16 rows at least, a program holds 64 at most."""
    block_n, warps = table_for(TILES, arch)[padded(head_dim)]
    if dtype == torch.float32:
        block_n, warps = (16, 8) if head_dim > 128 else (block_n // 2, warps)
    block_m = min(64, max(16, triton.next_power_of_2(group)))
    return Config(block_m, block_n, max(warps, block_m * padded(head_dim) // 2048), 2)


def plan(programs: int, sms: int, longest: int, fixed_split: int | None, block_n: int) -> tuple[int, int]:
    """-> splits of each sequence, and the fewest tokens of a split.

    `programs`: what one split each would take (sequences times KV heads). `longest`: no sequence is longer. A graph
    that was captured with these numbers stays right for shorter sequences: they use fewer splits.
    """
    if fixed_split is not None:
        if fixed_split < 1 or fixed_split % block_n:
            raise ValueError(f"a split of {fixed_split} tokens: must be a multiple of the tile, {block_n}")
        return max(1, triton.cdiv(longest, fixed_split)), fixed_split
    fill = max(1, sms * PROGRAMS_PER_SM // max(1, programs))
    return max(1, min(fill, triton.cdiv(longest, MIN_SPLIT))), MIN_SPLIT


@triton.jit
def split_span(length, splits, min_split, mask_args, FIRST_KEY: tl.constexpr, BLOCK_N: tl.constexpr):
    """-> the first key that is read, and the tokens of each split: whole tiles, from the sequence's own length."""
    first = first_tile(length - 1, mask_args, FIRST_KEY, BLOCK_N)
    tiles = tl.cdiv(length - first, BLOCK_N)
    return first, tl.maximum(tl.cdiv(tiles, splits) * BLOCK_N, min_split)


@triton.jit(do_not_specialize=["splits", "min_split", "table_stride"])
def decode_kernel(
    out,  # [B, H, splits, V]: float32, or the output itself where there is one split
    log_sums,  # [B, H, splits] float32, in units of log2; None with DIRECT
    q,  # [B, H, D]
    keys,  # [slots, K, D]
    values,  # [slots, K, V]
    page_table,  # [B, N]
    lengths,  # [B]
    sinks,  # [H] or None; only with DIRECT, else the merge counts them
    scale,
    score_args,
    mask_args,
    splits,
    min_split,
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
    DIRECT: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: one KV head (or a block of its query heads), one split, one sequence."""
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // HEAD_BLOCKS
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + b).to(tl.int32)
    first, size = split_span(length, splits, min_split, mask_args, FIRST_KEY, BLOCK_N)
    start = first + split * size
    end = tl.minimum(start + size, length)
    if not DIRECT and start >= end:
        return  # the merge knows that there is nothing here

    in_group = tl.program_id(0) % HEAD_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)  # [M]
    head = kv_head * GROUP + in_group
    live = in_group < GROUP
    d = tl.arange(0, BLOCK_D)
    at = q + b * q_stride + head[:, None] * q_head_stride + d[None, :]
    tile = tl.load(at, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # [M, D]

    if DIRECT and sinks is not None:
        top = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc, top, total = attend(
        tl.zeros([BLOCK_M, BLOCK_V], tl.float32),
        top,
        total,
        tile,
        keys + kv_head * head_stride,
        values + kv_head * value_head_stride,
        page_table + b * table_stride,
        start,
        end,
        tl.zeros([BLOCK_M, 1], tl.int32) + (length - 1),
        tl.minimum(head, num_heads - 1)[:, None],
        slot_stride,
        value_slot_stride,
        scale,
        score_args,
        mask_args,
        SCORE_MOD,
        MASK_MOD,
        PRECISION,
        True,
        PAGE_SIZE,
        BLOCK_N,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_D,
        BLOCK_V,
    )
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    row = (b * num_heads + head) * splits + split  # [M]
    e = tl.arange(0, BLOCK_V)
    stored = live[:, None] & (e < VALUE_DIM)[None, :]
    tl.store(out + row[:, None] * VALUE_DIM + e[None, :], acc.to(out.dtype.element_ty), mask=stored)
    if not DIRECT:
        tl.store(log_sums + row, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["splits", "min_split"])
def merge_kernel(
    out,  # [B, H, V]
    partial,  # [B, H, splits, V] float32
    log_sums,  # [B, H, splits] float32
    lengths,
    sinks,
    mask_args,
    splits,
    min_split,
    num_heads,
    FIRST_KEY: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of the decode kernel, which decides where splits begin
    BLOCK_S: tl.constexpr,
):
    """One program: one head of one sequence. A part counts as much as the sum of its weights.

    Only splits that exist are read, in an order that depends on nothing but the sequence's length.
    """
    b = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    length = tl.load(lengths + b).to(tl.int32)
    first, size = split_span(length, splits, min_split, mask_args, FIRST_KEY, BLOCK_N)
    used = tl.cdiv(length - first, size)
    row = (b * num_heads + head) * splits
    e = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.full([], 1.0, tl.float32)
    else:
        top = tl.full([], LOWEST, tl.float32)
        total = tl.full([], 0.0, tl.float32)
    for at in range(0, used, BLOCK_S):
        s = at + tl.arange(0, BLOCK_S)
        log_sum = tl.load(log_sums + row + s, mask=s < used, other=float("-inf"))
        parts = partial + (row + s)[:, None] * VALUE_DIM + e[None, :]
        part = tl.load(parts, mask=(s < used)[:, None] & (e < VALUE_DIM)[None, :], other=0.0)  # [S, D]
        new_top = tl.maximum(top, tl.max(log_sum, 0))
        weight = tl.exp2(log_sum - new_top)  # [S]
        fade = tl.exp2(top - new_top)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        top = new_top
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + (b * num_heads + head) * VALUE_DIM + e, acc.to(out.dtype.element_ty), mask=e < VALUE_DIM)


@torch.library.custom_op("folio::triton_decode", mutates_args=())
def _decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    fixed_split: int | None,
    score_mod: str,
    numbers: list[float],
    tensors: list[Tensor],
    mask_mod: str,
    mask_args: list[int],
    sinks: Tensor | None,
) -> Tensor:
    check(q, keys, values, page_table, lengths, page_size, scale, sinks, tensors)
    B, H, D = q.shape
    K, V = values.shape[1:]
    out = q.new_empty(B, H, V)
    if B == 0:
        return out
    arch, sms = device_key(q)
    c = config(arch, D, H // K, q.dtype)
    head_blocks = K * triton.cdiv(H // K, c.block_m)
    longest = page_table.shape[1] * page_size
    splits, min_split = plan(B * head_blocks, sms, longest, fixed_split, c.block_n)
    direct = splits == 1 and fixed_split is None
    partial = out if direct else torch.empty(B, H, splits, V, dtype=torch.float32, device=q.device)
    log_sums = None if direct else torch.empty(B, H, splits, dtype=torch.float32, device=q.device)
    mods = mods_of(score_mod, mask_mod)
    decode_kernel[(head_blocks, splits, B)](
        partial,
        log_sums,
        q,
        keys,
        values,
        page_table,
        lengths,
        sinks if direct else None,
        scale,
        (*numbers, *tensors),
        tuple(mask_args),
        splits,
        min_split,
        H,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        page_table.stride(0),
        **mods,
        DIRECT=direct,
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
    if not direct:
        merge_kernel[(H, B)](
            out,
            partial,
            log_sums,
            lengths,
            sinks,
            tuple(mask_args),
            splits,
            min_split,
            H,
            mods["FIRST_KEY"],
            VALUE_DIM=V,
            BLOCK_V=padded(V),
            BLOCK_N=c.block_n,
            BLOCK_S=MERGE_BLOCK,
        )
    return out


@_decode.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(*q.shape[:2], values.shape[2])


def paged_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    variant: Variant = CAUSAL,
    fixed_split: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """One query for each of B sequences, the last of its tokens: q [B, H, D] -> [B, H, V].

    keys [slots, K, D] and values [slots, K, V], slot = page * page_size + offset; page_table [B, N], where the fewer columns
    there are, the fewer splits are made; lengths [B] tokens of each sequence, the query's included; 0 leaves zeros.
    `fixed_split`: tokens of each split, for results that do not depend on the batch. sinks [H]: see `Variant`. ValueError for
    what does not fit together.
    """
    return _decode(q, keys, values, page_table, lengths, page_size, scale, fixed_split, *variant.flat, sinks)
