"""The experts of a mixture in Triton: products of many small matrices in one launch, whatever each expert got.

A token takes k of E experts, so a step has T * k choices (token, expert), and how many fall on an expert is known on the
device alone. The host must not wait for that, and a CUDA graph fixes the grid. So there are four launches of known size:

    sort_kernel      puts the choices in order of their experts, and cuts each expert's into blocks of BLOCK_M rows. N choices
                     fill at most N // BLOCK_M + E blocks; programs that find no block return at once
    gate_up_kernel   gathers the tokens of a block, multiplies them by the two halves of that expert's gate_up, and applies the
                     activation before anything is stored
    down_kernel      multiplies by `down`, and puts each row where its choice was
    combine_kernel   adds up each token's k rows by weight

(Sorting tokens into padded blocks of one expert each: MegaBlocks, Gale et al., 2023; vLLM's fused MoE.) A row of a product
depends on its own numbers alone and the last sum has its own order, so a token's output does not depend on its company.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_experts.py
    python -m bench.kernel_report --kernel experts

Shapes: T tokens, k choices of each, N = T * k, E experts, I intermediate size.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import paged
from kernels.paged import device_key, precision, table_for
from kernels.variants import tanh


@dataclass(frozen=True)
class Tile:
    """block_n: columns of gate, with as many of up beside them; `down`, which has one half, takes twice as many."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# By architecture, then by the mean number of rows of an expert. From the compiler's report, not from a clock. Few rows: the
# weights stream past, so narrow tiles, many programs, and much on its way. Many rows: 64 are the fewest that wgmma takes.
TILES = {
    "sm80": {16: Tile(16, 32, 128, 4, 4), 64: Tile(64, 64, 64, 4, 3), 128: Tile(128, 64, 64, 8, 3)},
    "gfx942": {16: Tile(16, 32, 128, 4, 2), 64: Tile(64, 64, 64, 4, 2), 128: Tile(64, 64, 64, 4, 2)},
}
TILE_FLOAT32 = Tile(16, 32, 32, 4, 2)
FEW, MANY = 256, 2048  # choices that the sort looks at together
COMBINE = 1024  # columns that a program of the last sum adds


def tile(arch: str, rows: float, dtype: torch.dtype) -> Tile:
    """`rows`: the mean number that an expert gets."""
    if dtype == torch.float32:
        return TILE_FLOAT32
    return table_for(TILES, arch)[16 if rows <= 16 else 64 if rows <= 64 else 128]


@triton.jit(do_not_specialize=["N"])
def sort_kernel(
    chosen,  # [N]
    order,  # [N] out: the choices of expert 0, those of expert 1, ...
    end,  # [E] out: where each expert's rows end
    block_expert,  # [blocks] out
    block_row,  # [blocks] out: the first row of each block
    blocks,  # [1] out: how many there are
    N,
    E: tl.constexpr,
    BINS: tl.constexpr,  # more than E
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program for each expert: it counts all choices and places its own, in the order in which they come."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, N, CHUNK):
        i = start + tl.arange(0, CHUNK)
        counts += tl.histogram(tl.load(chosen + i, mask=i < N, other=E).to(tl.int32), BINS)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    row = tl.sum(tl.where(bins < expert, counts, 0), 0)
    block = tl.sum(tl.where(bins < expert, tl.cdiv(counts, BLOCK_M), 0), 0)
    tl.store(end + expert, row + count)
    for own in range(0, tl.cdiv(count, BLOCK_M)):
        tl.store(block_expert + block + own, expert)
        tl.store(block_row + block + own, row + own * BLOCK_M)
    if expert == E - 1:
        tl.store(blocks, block + tl.cdiv(count, BLOCK_M))
    for start in range(0, N, CHUNK):
        i = start + tl.arange(0, CHUNK)
        mine = (tl.load(chosen + i, mask=i < N, other=E).to(tl.int32) == expert).to(tl.int32)
        tl.store(order + row + tl.cumsum(mine, 0) - 1, i, mask=mine == 1)
        row += tl.sum(mine, 0)


@triton.jit
def rows_of(block, order, end, block_expert, block_row, BLOCK_M: tl.constexpr):
    """-> a block's expert, its rows [BLOCK_M], which of them are there, and the choice of each."""
    expert = tl.load(block_expert + block).to(tl.int64)
    row = tl.load(block_row + block) + tl.arange(0, BLOCK_M)
    inside = row < tl.load(end + expert)
    choice = tl.load(order + row, mask=inside, other=0)
    return expert, row.to(tl.int64), inside, choice.to(tl.int64)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """As `gated` of `kernels/activations.py`, in float32. LIMIT None: nothing is clamped."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
        gate = gate * tl.sigmoid(gate * ALPHA)
    elif ACTIVATION == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu":
        gate = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        gate = gate * 0.5 * (1.0 + tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    return gate * up


@triton.jit
def gate_up_kernel(
    x,  # [T, HIDDEN]
    weights,  # [N] float32
    gate_up,  # [E, 2 * SIZE, HIDDEN]
    bias,  # [E, 2 * SIZE] or None
    out,  # [N, SIZE] in order of experts
    order,
    end,
    block_expert,
    block_row,
    blocks,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    WEIGH: tl.constexpr,  # multiply the tokens by their weights
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of rows, BLOCK_N gates and their ups. Grid: (blocks, columns); blocks of an expert are neighbours, and
    share its weights in L2."""
    block = tl.program_id(0)
    if block >= tl.load(blocks):
        return
    expert, row, inside, choice = rows_of(block, order, end, block_expert, block_row, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = x + (choice // K)[:, None] * HIDDEN
    gate_at = gate_up + expert * (2 * SIZE * HIDDEN) + n[None, :] * HIDDEN
    if WEIGH:
        weight = tl.load(weights + choice, mask=inside, other=0.0)[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a = tl.load(token + d[None, :], mask=inside[:, None] & (d < HIDDEN)[None, :], other=0.0)
        if WEIGH:
            a = (a.to(tl.float32) * weight).to(a.dtype)
        there = (n < SIZE)[None, :] & (d < HIDDEN)[:, None]
        w = tl.load(gate_at + d[:, None], mask=there, other=0.0)
        v = tl.load(gate_at + SIZE * HIDDEN + d[:, None], mask=there, other=0.0)
        gate = tl.dot(a, w, acc=gate, input_precision=PRECISION)
        up = tl.dot(a, v, acc=up, input_precision=PRECISION)
    if bias is not None:
        at = bias + expert * (2 * SIZE) + n
        gate += tl.load(at, mask=n < SIZE, other=0.0).to(tl.float32)[None, :]
        up += tl.load(at + SIZE, mask=n < SIZE, other=0.0).to(tl.float32)[None, :]
    y = activate(gate, up, ACTIVATION, ALPHA, LIMIT)
    mask = inside[:, None] & (n < SIZE)[None, :]
    tl.store(out + row[:, None] * SIZE + n[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    h,  # [N, SIZE] in order of experts
    down,  # [E, HIDDEN, SIZE]
    bias,  # [E, HIDDEN] or None
    out,  # [N, HIDDEN] in order of choices
    order,
    end,
    block_expert,
    block_row,
    blocks,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of rows, BLOCK_N columns. Grid: (blocks, columns)."""
    block = tl.program_id(0)
    if block >= tl.load(blocks):
        return
    expert, row, inside, choice = rows_of(block, order, end, block_expert, block_row, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    down_at = down + expert * (HIDDEN * SIZE) + n[None, :] * SIZE
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        a = tl.load(h + row[:, None] * SIZE + d[None, :], mask=inside[:, None] & (d < SIZE)[None, :], other=0.0)
        w = tl.load(down_at + d[:, None], mask=(n < HIDDEN)[None, :] & (d < SIZE)[:, None], other=0.0)
        acc = tl.dot(a, w, acc=acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + expert * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)[None, :]
    mask = inside[:, None] & (n < HIDDEN)[None, :]
    tl.store(out + choice[:, None] * HIDDEN + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    rows,  # [T, K, HIDDEN]
    weights,  # [T, K] float32, or None: all are 1
    out,  # [T, HIDDEN]
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tokens, columns)."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K):
        y = tl.load(rows + (token * K + k) * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
        if weights is not None:
            y *= tl.load(weights + token * K + k)
        acc += y
    tl.store(out + token * HIDDEN + n, acc.to(out.dtype.element_ty), mask=n < HIDDEN)


# ---- on the host


@torch.library.custom_op("folio::grouped_experts", mutates_args=())
def _grouped_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    clamp: list[float],
    weigh_input: bool,
) -> Tensor:
    check(x, chosen, weights, gate_up, down, gate_up_bias, down_bias)
    (T, hidden), k, (E, double, _) = x.shape, chosen.shape[1], gate_up.shape
    N, size = T * k, double // 2
    if N == 0:
        return torch.empty_like(x)
    arch = device_key(x)[0]
    t = tile(arch, N / E, x.dtype)
    launch = dict(num_warps=t.num_warps, num_stages=t.num_stages)
    most = min(N, N // t.block_m + E)
    sizes = (N, E, most, most, 1)  # each a tensor of its own: Triton compiles anew for an address that is not aligned
    order, end, block_expert, block_row, blocks = (x.new_empty(n, dtype=torch.int32) for n in sizes)
    chunk = FEW if N <= FEW else MANY
    bins = triton.next_power_of_2(E + 1)
    sort = (order, end, block_expert, block_row, blocks)
    sort_kernel[(E,)](chosen, *sort, N, E=E, BINS=bins, CHUNK=chunk, BLOCK_M=t.block_m)

    h, rows, out = x.new_empty(N, size), x.new_empty(N, hidden), torch.empty_like(x)
    alpha, limit = clamp or (None, None)
    shape = dict(HIDDEN=hidden, SIZE=size, PRECISION=precision(arch), BLOCK_M=t.block_m, BLOCK_K=t.block_k, **launch)
    gate = dict(ACTIVATION=activation, ALPHA=alpha, LIMIT=limit, WEIGH=weigh_input)
    grid = (most, triton.cdiv(size, t.block_n))
    gate_up_kernel[grid](x, weights, gate_up, gate_up_bias, h, *sort, K=k, BLOCK_N=t.block_n, **gate, **shape)
    grid = (most, triton.cdiv(hidden, 2 * t.block_n))
    down_kernel[grid](h, down, down_bias, rows, *sort, BLOCK_N=2 * t.block_n, **shape)
    block = min(COMBINE, triton.next_power_of_2(hidden))
    grid = (T, triton.cdiv(hidden, block))
    combine_kernel[grid](rows, None if weigh_input else weights, out, K=k, HIDDEN=hidden, BLOCK=block)
    return out


@_grouped_experts.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def grouped_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    clamp: tuple[float, ...] = (),
    weigh_input: bool = False,
) -> Tensor:
    """As `kernels.experts.experts`, on plain weights; all tensors are contiguous. ValueError for what does not fit together."""
    x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.contiguous()
    biases = (gate_up_bias, down_bias)
    return _grouped_experts(x, chosen, weights, gate_up, down, *biases, activation, list(clamp), weigh_input)


def check(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    """Raise ValueError for what a kernel would read past. Looks at no element, except of `chosen` where FOLIO_DEBUG=1."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    require(
        gate_up.dim() == 3 and gate_up.shape[1] % 2 == 0, f"gate_up must be [E, 2I, hidden], not {list(gate_up.shape)}"
    )
    (T, hidden), (E, double, _) = x.shape, gate_up.shape
    k = chosen.shape[1]
    shapes = {
        "chosen": (chosen, (T, k)),
        "weights": (weights, (T, k)),
        "gate_up": (gate_up, (E, double, hidden)),
        "down": (down, (E, hidden, double // 2)),
        "gate_up_bias": (gate_up_bias, (E, double)),
        "down_bias": (down_bias, (E, hidden)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            require(tensor.shape == shape, f"{name} is {list(tensor.shape)}: must be {list(shape)}")
            require(tensor.is_contiguous(), f"{name} must be contiguous, its strides are {tensor.stride()}")
            require(tensor.device == x.device, f"{name} is on {tensor.device}, x on {x.device}")
    for name, tensor in (
        ("gate_up", gate_up),
        ("down", down),
        ("gate_up_bias", gate_up_bias),
        ("down_bias", down_bias),
    ):
        require(tensor is None or tensor.dtype == x.dtype, f"{name} has another dtype than x, which is {x.dtype}")
    require(x.dtype in (torch.float16, torch.bfloat16, torch.float32), f"no kernel for experts in {x.dtype}")
    require(weights.dtype == torch.float32, f"weights are {weights.dtype}: must be float32")
    require(chosen.dtype in (torch.int32, torch.int64), f"chosen is {chosen.dtype}: must be int32 or int64")
    require(T * k < 1 << 31, f"{T * k} choices: must fit 31 bits")
    require(x.is_cuda or paged.INTERPRETED, f"x is on {x.device}: Triton kernels need a GPU, or TRITON_INTERPRET=1")
    if paged.DEBUG:
        require(
            bool(((chosen >= 0) & (chosen < E)).all()), f"chosen names experts that are not among the {E} there are"
        )
