"""RoPE and the way into the pages, in one launch: rotate queries and keys, put new keys and values where they belong.

Done by separate operators, a layer reads and writes the new keys three times (rotate, concatenate, scatter) in half a
dozen launches; for a decode step each of those is some microseconds of doing almost nothing. Here a program takes one
token and a block of heads: a query head is turned and written to a new tensor, a key head is turned and written to its
slot, a value head is copied to its slot.

MLA is the same with other names: ONE key head, the rotated key that all heads share, and ONE value head, the latent.
Both lie in one row of the cache, [latent | key], and views of it say so: see `rope_and_write_latent`. Layers without
RoPE, and those that have more to do between it and the pages, take `write_kv`.

Products and sums are rounded one by one, as PyTorch does, and not fused: so the result is that of
`kernels/reference_write.py` to the last bit.

RoPE: Su et al., RoFormer (2021). The writing side of PagedAttention: Kwon et al. (2023).

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_write.py

Shapes: T new tokens, H query heads, K KV heads, D head dim of queries and keys, V of values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import paged
from kernels.reference_write import latent_as_heads

BLOCK_HEADS = 8  # of a program, at most


@triton.jit
def rotate(
    source,  # [BLOCK_HEADS, 1] pointers to heads
    target,
    cos,  # [DIM / 2] of this token
    sin,
    mask,  # [BLOCK_HEADS, 1]
    D: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,  # DIM / 2, rounded up to a power of 2
    REST: tl.constexpr,  # D - DIM, likewise
):
    """Turn the first DIM dims pair by pair, in float32, and copy the others."""
    pair = tl.arange(0, HALF)[None, :]
    there = mask & (pair < DIM // 2)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + DIM // 2
    c = tl.load(cos + pair, mask=pair < DIM // 2, other=0.0)
    s = tl.load(sin + pair, mask=pair < DIM // 2, other=0.0)
    x = tl.load(source + first, mask=there, other=0.0)
    dtype = x.dtype  # rounded to the model's dtype before the cache's, as `rotate` in PyTorch does
    a, b = x.to(tl.float32), tl.load(source + second, mask=there, other=0.0).to(tl.float32)
    tl.store(target + first, (a * c - b * s).to(dtype).to(target.dtype.element_ty), mask=there)
    tl.store(target + second, (b * c + a * s).to(dtype).to(target.dtype.element_ty), mask=there)
    if D > DIM:
        copy(source + DIM, target + DIM, mask, D - DIM, REST)


@triton.jit
def copy(source, target, mask, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """SIZE numbers of each head. source, target, mask: as in `rotate`."""
    d = tl.arange(0, BLOCK)[None, :]
    x = tl.load(source + d, mask=mask & (d < SIZE), other=0.0)
    tl.store(target + d, x.to(target.dtype.element_ty), mask=mask & (d < SIZE))


@triton.jit
def rope_and_write_kernel(
    q,  # [T, H, D]
    q_out,  # [T, H, D]
    k,  # [T, K, D]
    v,  # [T, K, V]
    keys,  # [slots, K, D]
    values,  # [slots, K, V]
    cos,  # [T, DIM / 2] float32
    sin,
    slots,  # [T]
    stride_q_t,
    stride_q_h,
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    stride_keys_s,
    stride_keys_h,
    stride_values_s,
    stride_values_h,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """Grid: (tokens, blocks of query heads, then blocks of KV heads)."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos += token * (DIM // 2)
    sin += token * (DIM // 2)
    if block < tl.cdiv(H, BLOCK_H):
        head = (block * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
        source = q + token * stride_q_t + head * stride_q_h
        rotate(source, q_out + (token * H + head) * D, cos, sin, head < H, D, DIM, INTERLEAVED, HALF, REST)
    else:
        kv_head = ((block - tl.cdiv(H, BLOCK_H)) * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
        slot = tl.load(slots + token).to(tl.int64)
        key = k + token * stride_k_t + kv_head * stride_k_h
        key_slot = keys + slot * stride_keys_s + kv_head * stride_keys_h
        rotate(key, key_slot, cos, sin, kv_head < K, D, DIM, INTERLEAVED, HALF, REST)
        value = v + token * stride_v_t + kv_head * stride_v_h
        copy(value, values + slot * stride_values_s + kv_head * stride_values_h, kv_head < K, V, BLOCK_V)


@triton.jit
def write_kernel(
    k,  # [T, K, D]
    v,  # [T, K, V]
    keys,  # [slots, K, D]
    values,  # [slots, K, V]
    slots,  # [T]
    stride_k_t,
    stride_k_h,
    stride_v_t,
    stride_v_h,
    stride_keys_s,
    stride_keys_h,
    stride_values_s,
    stride_values_h,
    K: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid: (tokens, blocks of KV heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]
    slot = tl.load(slots + token).to(tl.int64)
    source = k + token * stride_k_t + head * stride_k_h
    copy(source, keys + slot * stride_keys_s + head * stride_keys_h, head < K, D, BLOCK_D)
    source = v + token * stride_v_t + head * stride_v_h
    copy(source, values + slot * stride_values_s + head * stride_values_h, head < K, V, BLOCK_V)


# ---- on the host


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    interleaved: bool,
) -> Tensor:
    check(k, v, keys, values, slots)
    check_rope(q, k, cos, sin)
    (T, H, D), K, V = q.shape, k.shape[1], v.shape[2]
    dim = 2 * cos.shape[1]
    q_out = torch.empty(T, H, D, dtype=q.dtype, device=q.device)
    if T == 0:
        return q_out
    block_h, block_k = (min(BLOCK_HEADS, triton.next_power_of_2(heads)) for heads in (H, K))
    rope_and_write_kernel[(T, triton.cdiv(H, block_h) + triton.cdiv(K, block_k))](
        q,
        q_out,
        k,
        v,
        keys,
        values,
        cos,
        sin,
        slots,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        H=H,
        K=K,
        D=D,
        V=V,
        DIM=dim,
        INTERLEAVED=interleaved,
        BLOCK_H=block_h,
        BLOCK_K=block_k,
        BLOCK_V=triton.next_power_of_2(V),
        HALF=triton.next_power_of_2(dim // 2),
        REST=triton.next_power_of_2(max(1, D - dim)),
        enable_fp_fusion=False,
    )
    return q_out


@torch.library.custom_op("folio::rope_and_write", mutates_args=("keys", "values"))
def rope_and_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    interleaved: bool,
) -> Tensor:
    """Write k [T, K, D], rotated, and v [T, K, V] to keys [slots, K, D], values [slots, K, V] at `slots` [T] -> q [T,
    H, D], rotated.

    cos, sin [T, dim / 2] float32 turn the first `dim` dims: pairs (0, 1), (2, 3) ... if `interleaved`, else (0, dim /
    2) ... . Two tokens of one slot (padding: slot 0) leave either's, or a mixture. Strides are free but for the last
    dim. ValueError for what does not fit together.
    """
    return launch(q, k, v, keys, values, cos, sin, slots, interleaved)


@torch.library.custom_op("folio::rope_and_write_latent", mutates_args=("cache",))
def rope_and_write_latent(
    q_rope: Tensor,
    k_rope: Tensor,
    latent: Tensor,
    cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    interleaved: bool,
) -> Tensor:
    """MLA: write [latent [T, R] | k_rope [T, rope], rotated] to cache [slots, R + rope] -> q_rope [T, H, rope], rotated.

    The rest as in `rope_and_write`.
    """
    return launch(q_rope, *latent_as_heads(k_rope, latent, cache), cos, sin, slots, interleaved)


@rope_and_write.register_fake
@rope_and_write_latent.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("folio::write_kv", mutates_args=("keys", "values"))
def write_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k [T, K, D], v [T, K, V] into keys [slots, K, D], values [slots, K, V] at `slots` [T], in place.

    As `rope_and_write`, but nothing is rotated.
    """
    check(k, v, keys, values, slots)
    (T, K, D), V = k.shape, v.shape[2]
    if T == 0:
        return
    block_k = min(BLOCK_HEADS, triton.next_power_of_2(K))
    write_kernel[(T, triton.cdiv(K, block_k))](
        k,
        v,
        keys,
        values,
        slots,
        *k.stride()[:2],
        *v.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        K=K,
        D=D,
        V=V,
        BLOCK_K=block_k,
        BLOCK_D=triton.next_power_of_2(D),
        BLOCK_V=triton.next_power_of_2(V),
    )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Raise ValueError for what a kernel would write to the wrong place. Looks at no element of a tensor, except of
    `slots` where FOLIO_DEBUG=1."""
    for name, tensor in (("k", k), ("v", v), ("keys", keys), ("values", values)):
        require_heads(name, tensor)
        require(tensor.device == k.device, f"{name} is on {tensor.device}, k on {k.device}")
    T, K, D = k.shape
    require(v.shape[:2] == (T, K), f"v is {list(v.shape)}: must be [{T}, {K}, V], as k is")
    for name, tensor, dim in (("keys", keys, D), ("values", values, v.shape[2])):
        require(tensor.shape[1:] == (K, dim), f"{name} are {list(tensor.shape)}: must be [slots, {K}, {dim}]")
    require(len(keys) == len(values), f"keys have {len(keys)} slots, values {len(values)}: they must agree")
    require(slots.shape == (T,), f"slots are {list(slots.shape)}: must be [{T}], one of each token")
    require(slots.dtype in (torch.int32, torch.int64), f"slots are {slots.dtype}: must be int32 or int64")
    require(T < 2 or slots.stride(0) == 1, f"slots must be contiguous, their stride is {slots.stride(0)}")
    require(slots.device == k.device, f"slots are on {slots.device}, k on {k.device}")
    on_gpu = k.is_cuda or paged.INTERPRETED
    require(on_gpu, f"k is on {k.device}: Triton kernels need a GPU, or TRITON_INTERPRET=1")
    if paged.DEBUG and T > 0:
        low, high = int(slots.min()), int(slots.max())  # waits for the device
        require(low >= 0 and high < len(keys), f"slots from {low} to {high}: the pool has 0 to {len(keys) - 1}")


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    require_heads("q", q)
    T, _, D = k.shape
    require(q.shape[::2] == (T, D), f"q is {list(q.shape)}: must be [{T}, H, {D}], as k is")
    for name, tensor in (("cos", cos), ("sin", sin)):
        require(tensor.dim() == 2 and len(tensor) == T, f"{name} is {list(tensor.shape)}: must be [{T}, dim / 2]")
        require(tensor.dtype == torch.float32, f"{name} is {tensor.dtype}: must be float32")
        require(tensor.is_contiguous(), f"{name} must be contiguous, its strides are {tensor.stride()}")
    require(cos.shape == sin.shape, f"cos is {list(cos.shape)}, sin {list(sin.shape)}: they must agree")
    require(0 < 2 * cos.shape[1] <= D, f"cos turns {2 * cos.shape[1]} dims: a head has {D}")
    for name, tensor in (("q", q), ("cos", cos), ("sin", sin)):
        require(tensor.device == k.device, f"{name} is on {tensor.device}, k on {k.device}")


def require_heads(name: str, tensor: Tensor) -> None:
    require(tensor.dim() == 3, f"{name} must have 3 dimensions, not {tensor.dim()}")
    require(tensor.is_floating_point(), f"{name} is {tensor.dtype}: must be a floating-point type")
    side_by_side = tensor.shape[2] < 2 or tensor.stride(2) == 1
    require(
        side_by_side, f"{name}: the numbers of a head must lie side by side, its strides are {list(tensor.stride())}"
    )
