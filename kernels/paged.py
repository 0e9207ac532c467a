"""What paged decode and paged prefill share: the loop over tiles of keys and values, and the checks before a launch.

The loop is the heart of FlashAttention (Dao et al., 2022): M queries stay in registers and N keys and values at a time
pass by. Scores are never stored. The softmax is computed as it goes (Milakov and Gimelshein, 2018): when a larger score
turns up, what was summed so far is scaled down to it. The difference here is where a tile comes from: key j of a
sequence lies at slot `page_table[j // S] * S + j % S` of the pool (PagedAttention, Kwon et al., 2023).

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_attention.py
    python -m bench.kernel_report      what the compiler makes of it, without a GPU
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.variants import MASK_MODS, SCORE_MODS

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E), and exp2 is what the hardware has
# Where the running maximum starts. Not -inf: for a query that sees no key of its first tile, -inf - -inf would be NaN.
LOWEST = tl.constexpr(-1.0e30)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEBUG = os.environ.get("FOLIO_DEBUG") == "1"  # check every page id before every launch
MAX_HEAD_DIM = 256


@triton.jit
def attend(
    acc,  # [M, BLOCK_V] float32: sum of weight * value so far
    top,  # [M] float32: the largest score so far, in units of log2
    total,  # [M] float32: sum of weights so far, relative to `top`
    q,  # [M, BLOCK_D]
    keys,  # pointer to this KV head of slot 0
    values,
    table,  # pointer to this sequence's row of the page table
    start,  # the first key of the first tile
    end,  # one past the last key; with EDGE, somewhere inside a tile
    query,  # [M, 1] positions
    head,  # [M, 1]
    slot_stride,
    value_slot_stride,
    scale,
    score_args,
    mask_args,
    SCORE_MOD: tl.constexpr,
    MASK_MOD: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32: see `precision`
    EDGE: tl.constexpr,  # False: every query sees all of these keys, as far as causality goes
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of 2
    BLOCK_V: tl.constexpr,  # VALUE_DIM likewise
):
    """Let the queries attend to keys start ... end - 1, BLOCK_N at a time -> acc, top, total."""
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    factor = scale * LOG2E if SCORE_MOD is None else LOG2E  # without a mod, one multiplication does for both
    for tile in range(start, end, BLOCK_N):
        j = tile + tl.arange(0, BLOCK_N)  # [N]
        page = tl.load(table + j // PAGE_SIZE, mask=j < end, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + j % PAGE_SIZE
        # Slots behind the last token must not be read: NaN may lie there, and 0 * NaN is NaN.
        k = load_tile(keys + (slot * slot_stride)[:, None] + d[None, :], (j < end)[:, None], d, EDGE, HEAD_DIM, BLOCK_D)
        at = values + (slot * value_slot_stride)[:, None] + e[None, :]
        v = load_tile(at, (j < end)[:, None], e, EDGE, VALUE_DIM, BLOCK_V)

        key = j[None, :]
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [M, N] float32
        if SCORE_MOD is not None:
            score = SCORE_MOD(score * scale, query, key, head, score_args)
        if EDGE:
            score = tl.where((key <= query) & (key < end), score, float("-inf"))
        if MASK_MOD is not None:
            score = tl.where(MASK_MOD(query, key, mask_args), score, float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        weight = tl.exp2(score * factor - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit
def load_tile(at, inside, dim, EDGE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """[N, BLOCK] numbers, 0 beyond DIM; with EDGE, 0 too in the rows that are not `inside` [N, 1]."""
    if EDGE:
        return tl.load(at, mask=inside & (dim < DIM)[None, :], other=0.0)
    elif BLOCK == DIM:
        return tl.load(at)
    else:
        return tl.load(at, mask=(dim < DIM)[None, :], other=0.0)


@triton.jit
def find_sequence(block, offsets, B, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which sequence does this block of rows belong to? The last b with `first_block(b) <= block`, by binary search.

    Sequence b has ROWS rows for each of its tokens offsets[b] ... offsets[b + 1] - 1. first_block(b) = offsets[b] * ROWS
    // BLOCK_M + b leaves each sequence room for one block that is not full, so that nobody has to count blocks (the
    numbering of vLLM's unified attention). b = B stands for the padding behind the last sequence.
    """
    low = 0
    high = B + 1
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(offsets + middle).to(tl.int64) * ROWS // BLOCK_M + middle <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def first_tile(query, mask_args, FIRST_KEY: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the queries from `query` on have to begin reading, rounded down to a tile."""
    if FIRST_KEY is None:
        return 0
    else:
        return tl.maximum(FIRST_KEY(query, mask_args), 0) // BLOCK_N * BLOCK_N


# ---- on the host


@dataclass(frozen=True)
class Config:
    """Tile sizes and what Triton is told about them. M rows of queries, N keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.cache
def device_of(index: int | None) -> tuple[str, int]:
    """-> (architecture: "sm80", "sm90", "gfx942" ..., streaming multiprocessors) of a GPU; None = the interpreter."""
    if index is None:
        return "sm90", 4
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


def device_key(tensor: Tensor) -> tuple[str, int]:
    return device_of(tensor.device.index if tensor.is_cuda else None)


def table_for(tables: dict[str, dict], arch: str) -> dict:
    """The row of a table of configurations; an architecture that has none takes that of its oldest relative."""
    return tables.get(arch) or tables["gfx942" if arch.startswith("gfx") else "sm80"]


def precision(arch: str) -> str:
    """How float32 is multiplied. NVIDIA: as three tf32 products, which keep nearly all digits and use the tensor cores;
    without them the tiles spill on sm90. One tf32 product, Triton's default, would lose half of the digits.
    """
    return "ieee" if arch.startswith("gfx") else "tf32x3"


def padded(head_dim: int) -> int:
    """Tiles have powers of 2 as sizes, and a matrix product takes 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))


def mods_of(score_mod: str, mask_mod: str) -> dict[str, Callable | None]:
    """The functions behind a variant's names, as the kernels' constants."""
    mask = MASK_MODS[mask_mod] if mask_mod else None
    return {
        "SCORE_MOD": SCORE_MODS[score_mod] if score_mod else None,
        "MASK_MOD": mask.sees if mask else None,
        "FIRST_KEY": mask.first if mask else None,
    }


def check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    page_size: int,
    scale: float,
    sinks: Tensor | None,
    tensors: list[Tensor],
    query_start: Tensor | None = None,
) -> None:
    """Raise ValueError for what a kernel would read past, or compute nonsense from. Looks at no element of a tensor."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    shapes = {"q": "[T, H, D]", "keys": "[slots, K, D]", "values": "[slots, K, V]"}
    for (name, shape), tensor in zip(shapes.items(), (q, keys, values), strict=True):
        require(tensor.dim() == 3, f"{name} must be {shape}, not {list(tensor.shape)}")
        require(tensor.dtype == q.dtype, f"{name} is {tensor.dtype}, q is {q.dtype}: they must agree")
        require(tensor.stride(2) == 1, f"the numbers of a head of {name} must lie side by side: {tensor.stride()}")
    require(q.dtype in (torch.float16, torch.bfloat16, torch.float32), f"no attention kernel for {q.dtype}")
    H, D = q.shape[1:]
    slots, K, V = values.shape
    require(keys.shape[:2] == (slots, K), f"keys are {list(keys.shape)}, values {list(values.shape)}: they must agree")
    require(keys.shape[2] == D, f"head dim of q is {D}, of keys {keys.shape[2]}: they must agree")
    for dim in (D, V):
        fits = dim % 8 == 0 and 8 <= dim <= MAX_HEAD_DIM
        require(fits, f"head dim {dim}: must be a multiple of 8, at most {MAX_HEAD_DIM}")
    require(K > 0 and H % K == 0, f"{H} query heads cannot share {K} KV heads evenly")
    require(page_size > 0 and slots % page_size == 0, f"{slots} slots are not whole pages of {page_size}")
    require(scale > 0, f"scale is {scale}: must be positive")

    integers = [("page_table", page_table, 2), ("lengths", lengths, 1)]
    integers += [("query_start", query_start, 1)] if query_start is not None else []
    for name, tensor, dims in integers:
        require(tensor.dim() == dims, f"{name} must have {dims} dimensions, not {tensor.dim()}")
        require(tensor.dtype in (torch.int32, torch.int64), f"{name} is {tensor.dtype}: must be int32 or int64")
        require(tensor.stride(-1) == 1, f"{name} must be contiguous, its strides are {tensor.stride()}")
    B = len(lengths)
    require(len(page_table) == B, f"page_table has {len(page_table)} rows, lengths {B}: they must agree")
    if query_start is None:
        require(len(q) == B, f"decode takes one query for each sequence: q has {len(q)}, lengths {B}")
    else:
        require(
            len(query_start) == B + 1, f"query_start has {len(query_start)} entries: must be {B + 1}, lengths' plus one"
        )
    if sinks is not None:
        require(sinks.shape == (H,) and sinks.is_contiguous(), f"sinks must be [{H}], not {list(sinks.shape)}")

    for tensor in (keys, values, page_table, lengths, query_start, sinks, *tensors):
        require(tensor is None or tensor.device == q.device, f"q is on {q.device}, another argument on another device")
    require(q.is_cuda or INTERPRETED, f"q is on {q.device}: Triton kernels need a GPU, or TRITON_INTERPRET=1")
    if DEBUG:
        check_pages(page_table, lengths, page_size, slots)


def check_pages(page_table: Tensor, lengths: Tensor, page_size: int, slots: int) -> None:
    """For debugging (it waits for the device): raise ValueError if a page that is in use is not of this pool."""
    used = torch.arange(page_table.shape[1], device=lengths.device) * page_size < lengths[:, None]
    longest = max(lengths.tolist(), default=0)
    if longest > page_table.shape[1] * page_size:
        raise ValueError(f"a length of {longest} does not fit into {page_table.shape[1]} pages of {page_size}")
    wrong = used & ((page_table < 0) | (page_table >= slots // page_size))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        page, last = int(page_table[row, column]), slots // page_size - 1
        raise ValueError(f"page_table[{row}, {column}] is {page}: the pool has pages 0 to {last}")
