"""Multi-head Latent Attention in Triton, absorbed: all heads read the same 1,152 bytes of a token, once.

MLA (DeepSeek-V2, 2024) caches of each token one latent vector c [R] and one rotated key k_r [rope], for all heads
together: with R = 512, rope = 64 and bfloat16 1,152 bytes, where keys and values of 128 heads would be 81,920. With the
key and value projections absorbed into the query and the output (`kernels/reference_mla.py` has the algebra), every
head attends to the same row [c | k_r], and its value is the first R numbers of that row. So there is ONE key head, and
what is loaded as a key is the value too: a tile of the cache goes through the tensor cores twice and through the memory
bus once.

Since all heads share their keys, a query is a query, whichever token and head it is of. The rows of a sequence are
numbered `token * H + head`, as they lie in memory, and cut into blocks of BLOCK_M: one decoding token with 128 heads is
two blocks of 64, four tokens with 16 heads are one. Decode, speculative verify, prefill and any mixture of them are
this one kernel.

Few sequences do not fill a GPU, so a long history is cut into splits that run side by side (split-KV: Flash-Decoding,
Dao et al., 2023). Each leaves its own softmax-weighted mean and the logarithm of its sum of exponentials;
`mla_merge_kernel` weighs them together.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_mla.py

Shapes: B sequences, T new tokens, H heads, R latent rank, S page size; a slot is `page * S + offset`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import paged
from kernels.mla_splits import Splits, balanced_splits, config
from kernels.paged import LOG2E, LOWEST, Config, check_pages, device_key, find_sequence

MERGE_BLOCK = 16  # partial results that the merge adds at a time; a constant, or the order of the sum would change
MERGE_COLUMNS = 128  # of the R that a program of the merge adds


@triton.jit
def locate(block, offsets, lengths, T, B, H: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> sequence, its first new token, how many it has, its history, and which of its own blocks this is.

    Head blocks of one sequence have neighbouring programs, so that they share its tiles in L2.
    """
    if offsets is None:
        sequence = block // tl.cdiv(H, BLOCK_M)
        length = tl.load(lengths + sequence).to(tl.int32)
        return sequence, sequence, 1, length, block % tl.cdiv(H, BLOCK_M)
    else:
        sequence = find_sequence(block, offsets, B, H, BLOCK_M)
        first_token = tl.load(offsets + sequence).to(tl.int32)
        new = tl.load(offsets + sequence + 1, mask=sequence < B, other=T).to(tl.int32) - first_token
        length = tl.load(lengths + sequence, mask=sequence < B, other=0).to(tl.int32)
        own = block - (first_token.to(tl.int64) * H // BLOCK_M).to(tl.int32) - sequence
        return sequence, first_token, new, length, own


@triton.jit
def attend_latent(
    ql,  # [BLOCK_M, R]
    qr,  # [BLOCK_M, ROPE]
    cache,
    pages,  # pointer to this sequence's row of the page table
    begin,
    end,  # one past the last entry that any row sees
    position,  # [BLOCK_M] the last entry that each row sees
    scale,
    stride_slot,
    CAUSAL: tl.constexpr,  # False: every row sees all entries before `end`
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Entries begin ... end - 1, BLOCK_N at a time -> weighted sum [BLOCK_M, R], sum of weights, largest score.

    Online softmax (Milakov and Gimelshein, 2018), in powers of 2, as `attend` in `kernels/paged.py`.
    """
    r, p = tl.arange(0, R), tl.arange(0, ROPE)
    factor = scale * LOG2E
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, R], tl.float32)
    for start in range(begin, end, BLOCK_N):
        entry = start + tl.arange(0, BLOCK_N)
        # What lies behind must not be read: NaN may lie there, and 0 * NaN is NaN. So the last entry is, again.
        at = tl.minimum(entry, end - 1)
        page = tl.load(pages + at // S).to(tl.int64)
        slot = (page * S + at % S) * stride_slot
        c = tl.load(cache + slot[:, None] + r[None, :])  # [BLOCK_N, R]
        kr = tl.load(cache + slot[:, None] + R + p[None, :])  # [BLOCK_N, ROPE]

        # "ieee" is for float32: three tf32 products spill hundreds of registers at R = 512, in every tile tried.
        score = tl.dot(ql, tl.trans(c), input_precision="ieee")
        score = tl.dot(qr, tl.trans(kr), acc=score, input_precision="ieee")
        visible = entry[None, :] <= position[:, None] if CAUSAL else (entry < end)[None, :]
        score = tl.where(visible, score, float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(c.dtype), c, acc=acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["T", "B", "splits", "stride_table"])
def mla_kernel(
    q_latent,  # [T, H, R]
    q_rope,  # [T, H, ROPE]
    cache,  # [slots, R + ROPE]
    page_table,  # [B, N]
    offsets,  # [B + 1] sequence b has the new tokens offsets[b] ... offsets[b + 1] - 1; None: one each
    lengths,  # [B] the history of each sequence, its new tokens included
    split_tokens,  # [1], or None: nothing is split
    out,  # [T, H, R], or with splits [splits, T, H, R] float32
    log_sums,  # [splits, T, H] float32: log2 of each row's sum of exponentials
    scale,
    T,
    B,
    splits,
    stride_latent_t,
    stride_latent_h,
    stride_rope_t,
    stride_rope_h,
    stride_slot,
    stride_table,
    H: tl.constexpr,
    R: tl.constexpr,
    ROPE: tl.constexpr,
    S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of rows of one sequence against one split of its history. Grid: (blocks of all sequences, splits)."""
    sequence, first_token, new, length, block = locate(tl.program_id(0), offsets, lengths, T, B, H, BLOCK_M)
    if block * BLOCK_M >= new * H:
        return
    m = tl.arange(0, BLOCK_M)
    row = block * BLOCK_M + m
    valid = row < new * H
    token = (first_token + row // H).to(tl.int64)
    head = row % H
    position = length - new + row // H

    # No row of this block sees beyond the position of its last. An empty sequence, and the padding, have a length of 0
    # and positions below. Results are counted from the block's first row: what is added to that fits 32 bits.
    begin = 0
    end = tl.max(tl.where(valid, position, -1), 0) + 1
    first_row = first_token.to(tl.int64) * H + block * BLOCK_M
    if split_tokens is not None:
        # Whole tiles, so that none has entries of two splits.
        size = tl.maximum(tl.load(split_tokens).to(tl.int32), tl.cdiv(length, splits))
        size = tl.cdiv(size, BLOCK_N) * BLOCK_N
        begin = tl.program_id(1) * size
        end = tl.minimum(begin + size, end)
        first_row += tl.program_id(1).to(tl.int64) * T * H
        if begin >= end:
            tl.store(log_sums + first_row + m, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=valid)
            return

    r, p = tl.arange(0, R), tl.arange(0, ROPE)
    at = token * stride_latent_t + head * stride_latent_h
    ql = tl.load(q_latent + at[:, None] + r[None, :], mask=valid[:, None], other=0.0)
    at = token * stride_rope_t + head * stride_rope_h
    qr = tl.load(q_rope + at[:, None] + p[None, :], mask=valid[:, None], other=0.0)
    pages = page_table + sequence.to(tl.int64) * stride_table
    CAUSAL: tl.constexpr = offsets is not None
    acc, total, top = attend_latent(
        ql, qr, cache, pages, begin, end, position, scale, stride_slot, CAUSAL, S, BLOCK_M, BLOCK_N, R, ROPE
    )

    empty = total == 0  # and not total > 0, which would hide a NaN
    mean = acc / tl.where(empty, 1.0, total)[:, None]
    if split_tokens is not None:
        tl.store(log_sums + first_row + m, tl.where(empty, float("-inf"), top + tl.log2(total)), mask=valid)
        valid = valid & (total != 0)  # the merge does not read what weighs nothing
    tl.store(out + first_row * R + (m * R)[:, None] + r[None, :], mean.to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["rows", "splits"])
def mla_merge_kernel(
    partial,  # [splits, rows, R] float32
    log_sums,  # [splits, rows] float32
    out,  # [rows, R]
    rows,
    splits,
    R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program: COLUMNS of one row. Grid: (rows, blocks of columns).

    Splits are added in blocks of constant size and in order, and an empty one adds exactly 0: so the sum is the same to
    the last bit however many empty ones follow.
    """
    row = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.full([], LOWEST, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        at = split.to(tl.int64) * rows + row
        log_sum = tl.load(log_sums + at, mask=split < splits, other=float("-inf"))
        here = log_sum != float("-inf")
        part = tl.load(partial + at[:, None] * R + r[None, :], mask=here[:, None], other=0.0)  # [BLOCK_S, COLUMNS]
        new_top = tl.maximum(top, tl.max(log_sum, 0))
        weight = tl.exp2(log_sum - new_top)
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        top = new_top
    mean = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + row * R + r, mean.to(out.dtype.element_ty))


# ---- on the host


def launch(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    offsets: Tensor | None,
    lengths: Tensor,
    page_size: int,
    scale: float,
    splits: Splits | None,
    tile: Config,
    blocks: int,
) -> Tensor:
    """`blocks` of rows, of all sequences; `splits` None: histories stay whole."""
    T, H, R = q_latent.shape
    out = torch.empty(T, H, R, dtype=q_latent.dtype, device=q_latent.device)
    if out.numel() == 0:
        return out
    most = 1 if splits is None else splits.most
    partial, log_sums = out, None
    if most > 1:
        partial = torch.empty(most, T, H, R, dtype=torch.float32, device=out.device)
        log_sums = torch.empty(most, T, H, dtype=torch.float32, device=out.device)
    mla_kernel[(blocks, most)](
        q_latent,
        q_rope,
        cache,
        page_table,
        offsets,
        lengths,
        splits.tokens if most > 1 else None,
        partial,
        log_sums,
        scale,
        T,
        len(page_table),
        most,
        *q_latent.stride()[:2],
        *q_rope.stride()[:2],
        cache.stride(0),
        page_table.stride(0),
        H=H,
        R=R,
        ROPE=q_rope.shape[2],
        S=page_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.launch,
    )
    if most > 1:
        columns = min(R, MERGE_COLUMNS)
        blocks = dict(BLOCK_S=MERGE_BLOCK, COLUMNS=columns)
        mla_merge_kernel[(T * H, R // columns)](partial, log_sums, out, T * H, most, R=R, **blocks)
    return out


@torch.library.custom_op("folio::mla_decode", mutates_args=())
def _decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    split_tokens: Tensor | None,
    most_splits: int,
) -> Tensor:
    check(q_latent, q_rope, cache, page_table, lengths, page_size, scale)
    B, H, _ = q_latent.shape
    if len(page_table) != B:
        raise ValueError(f"decode takes one query for each sequence: q_latent has {B}, page_table {len(page_table)}")
    if split_tokens is None:
        splits = balanced_splits(lengths, H, page_table.shape[1] * page_size, q_latent.dtype)
    else:
        splits = Splits(split_tokens, most_splits)
    tile = config(device_key(q_latent)[0], H, q_latent.dtype)
    blocks = triton.cdiv(H, tile.block_m) * B
    return launch(q_latent, q_rope, cache, page_table, None, lengths, page_size, scale, splits, tile, blocks)


@torch.library.custom_op("folio::mla_extend", mutates_args=())
def _extend(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    split_tokens: Tensor | None,
    most_splits: int,
) -> Tensor:
    check(q_latent, q_rope, cache, page_table, lengths, page_size, scale, offsets)
    (T, H, _), B = q_latent.shape, len(page_table)
    splits = None if split_tokens is None else Splits(split_tokens, most_splits)
    # As for 64 rows whatever they are, so that a row's result does not depend on how many tokens its batch has.
    tile = config(device_key(q_latent)[0], 64, q_latent.dtype)
    blocks = T * H // tile.block_m + B + 1  # first_block(B + 1): the padding's last one included
    return launch(q_latent, q_rope, cache, page_table, offsets, lengths, page_size, scale, splits, tile, blocks)


@_decode.register_fake
@_extend.register_fake
def _(q_latent: Tensor, *_: object) -> Tensor:
    return q_latent.new_empty(q_latent.shape)


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    splits: Splits | None = None,
) -> Tensor:
    """One new token of each of B sequences: q_latent [B, H, R], q_rope [B, H, rope] -> [B, H, R], still in latent
    space.

    cache [slots, R + rope], page_table [B, N], lengths [B] with the new token included; a length of 0 gives zeros.
    Strides are free but for the last dim. `splits`: `balanced_splits` (the default; made once a step, it serves all
    layers) or `fixed_splits`. ValueError for what does not fit together.
    """
    tokens, most = (None, 1) if splits is None else (splits.tokens, splits.most)
    return _decode(q_latent, q_rope, cache, page_table, lengths, page_size, scale, tokens, most)


def mla_extend(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    splits: Splits | None = None,
) -> Tensor:
    """Any number of new tokens of each of B sequences: q_latent [T, H, R], q_rope [T, H, rope] -> [T, H, R].

    Sequence b owns the tokens offsets[b] ... offsets[b + 1] - 1 (offsets [B + 1], ascending), which are the last of its
    lengths[b] entries; each sees the entries up to its own. Tokens from offsets[B] on are padding and give zeros.
    Without `splits` histories stay whole. The rest as in `mla_decode`.
    """
    tokens, most = (None, 1) if splits is None else (splits.tokens, splits.most)
    return _extend(q_latent, q_rope, cache, page_table, offsets, lengths, page_size, scale, tokens, most)


def check(
    q_latent: Tensor,
    q_rope: Tensor,
    cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    offsets: Tensor | None = None,
) -> None:
    """Raise ValueError for what the kernel would read past, or compute nonsense from. Looks at no element of a tensor,
    except of page tables where FOLIO_DEBUG=1."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    for name, tensor, dims in (("q_latent", q_latent, 3), ("q_rope", q_rope, 3), ("cache", cache, 2)):
        require(tensor.dim() == dims, f"{name} must have {dims} dimensions, not {tensor.dim()}")
        require(tensor.dtype == q_latent.dtype, f"{name} is {tensor.dtype}, q_latent {q_latent.dtype}: they must agree")
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    require(q_latent.dtype in dtypes, f"no MLA kernel for {q_latent.dtype}")
    (T, H, R), rope = q_latent.shape, q_rope.shape[2]
    require(q_rope.shape[:2] == (T, H), f"q_rope is {list(q_rope.shape)}: must be [{T}, {H}, rope], as q_latent is")
    require(cache.shape[1] == R + rope, f"cache has rows of {cache.shape[1]}: must be {R} + {rope}, as the queries")
    for name, size in (("latent rank", R), ("rope dim", rope)):
        require(size >= 16 and size & (size - 1) == 0, f"{name} {size}: must be a power of two, at least 16")
    require(page_size > 0 and len(cache) % page_size == 0, f"{len(cache)} slots are not whole pages of {page_size}")
    require(scale > 0, f"scale is {scale}: must be positive")

    integers = [("page_table", page_table, 2), ("lengths", lengths, 1)]
    integers += [("offsets", offsets, 1)] if offsets is not None else []
    for name, tensor, dims in integers:
        require(tensor.dim() == dims, f"{name} must have {dims} dimensions, not {tensor.dim()}")
        require(tensor.dtype in (torch.int32, torch.int64), f"{name} is {tensor.dtype}: must be int32 or int64")
    B = len(page_table)
    require(len(lengths) == B, f"lengths has {len(lengths)} entries, page_table {B} rows: they must agree")
    if offsets is not None:
        require(len(offsets) == B + 1, f"offsets has {len(offsets)} entries: must be {B + 1}, lengths' plus one")

    for name, tensor, *_ in (("q_latent", q_latent), ("q_rope", q_rope), ("cache", cache), *integers):
        side_by_side = tensor.shape[-1] < 2 or tensor.stride(-1) == 1
        require(side_by_side, f"{name}: its last dimension must be contiguous, its strides are {tensor.stride()}")
        require(tensor.device == q_latent.device, f"{name} is on {tensor.device}, q_latent on {q_latent.device}")
    on_gpu = q_latent.is_cuda or paged.INTERPRETED
    require(on_gpu, f"q_latent is on {q_latent.device}: Triton kernels need a GPU, or TRITON_INTERPRET=1")
    if paged.DEBUG:
        check_pages(page_table, lengths, page_size, len(cache))
