"""RoPE and the way into the pages in plain PyTorch: what `kernels/kv_write.py` is compared with, and what runs where it
does not. Nothing here needs Triton, and `torch.compile` traces through all of it.

RoPE (Su et al., RoFormer, 2021) turns pairs of dims of each query and key by an angle that grows with the position, so
that their product depends on the distance alone. The turning is done in float32 whatever the model's dtype: cos and sin
arrive in it.

    python -m pytest tests/test_interpreted.py -k write

Shapes: T new tokens, H query heads, K KV heads, D head dim of queries and keys, V of values.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first `dim` dims of x [T, heads, D] pair by pair, in float32; the rest pass through.

    cos, sin [T, dim / 2] float32. Pairs (0, 1), (2, 3) ... if `interleaved`, else (0, dim / 2), (1, dim / 2 + 1) ... .
    """
    cos, sin, dim = cos[:, None], sin[:, None], 2 * cos.shape[-1]
    y, rest = x[..., :dim].float(), x[..., dim:]
    a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    y = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((y.to(x.dtype), rest), -1) if rest.shape[-1] else y.to(x.dtype)


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Put k [T, K, D], v [T, K, V] into keys [slots, K, D], values [slots, K, V] at `slots` [T], in place."""
    keys.index_put_((slots,), k.to(keys.dtype))
    values.index_put_((slots,), v.to(values.dtype))


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
    """`write_kv` of the rotated k and of v -> q [T, H, D], rotated. cos, sin, `interleaved` as in `rotate`.

    Two tokens of one slot (padding: slot 0) leave either's.
    """
    write_kv(keys, values, slots, rotate(k, cos, sin, interleaved), v)
    return rotate(q, cos, sin, interleaved)


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

    ValueError if a row of the cache is not that long.
    """
    k, v, *_ = latent_as_heads(k_rope, latent, cache)
    row = torch.cat((v, rotate(k, cos, sin, interleaved)), -1)[:, 0]  # one write of whole rows, and none to a view
    cache.index_put_((slots,), row.to(cache.dtype))
    return rotate(q_rope, cos, sin, interleaved)


def latent_as_heads(k_rope: Tensor, latent: Tensor, cache: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> k, v, keys, values of `rope_and_write`, as if MLA had one KV head. The last two are views of `cache`."""
    R, rope = latent.shape[-1], k_rope.shape[-1]
    if cache.dim() != 2 or cache.shape[1] != R + rope:
        raise ValueError(f"cache is {list(cache.shape)}: must be [slots, {R} + {rope}], as latent and k_rope are")
    return k_rope[:, None], latent[:, None], cache[:, None, R:], cache[:, None, :R]
