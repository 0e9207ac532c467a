"""`kernels/kv_write.py` against plain PyTorch, and that (`kernels/reference_write.py`) against the formula of RoPE.

Caches are NaN before, and again where nothing was to be written. Seeds are fresh; FOLIO_SEED repeats one.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_write.py
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import kv_write, paged, reference_write

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAN = float("nan")
SLOTS = 48
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=lambda d: str(d).removeprefix("torch."))
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
# query heads, KV heads, head dim, dims that are turned
SHAPES = pytest.mark.parametrize(
    "heads, kv_heads, dim, turned", [(4, 2, 64, 64), (14, 2, 96, 48), (1, 1, 80, 80), (9, 9, 24, 8), (3, 1, 40, 10)]
)


@pytest.fixture(autouse=True)
def fresh_seed_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    seed = int(os.environ.get("FOLIO_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"FOLIO_SEED={seed}")
    torch.manual_seed(seed)
    monkeypatch.setattr(paged, "DEBUG", True)  # a wrong slot would be a mistake of the test
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angle = torch.randn(tokens, dim // 2, device=DEVICE) * 3
    return angle.cos(), angle.sin()


def caches(kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of NaN; strided, as a layer's part of a larger pool may be."""
    pool = torch.full((SLOTS, kv_heads, dim + value_dim), NAN, dtype=dtype, device=DEVICE)
    return pool[..., :dim], pool[..., dim:]


def inputs(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one tensor, as the fused projection leaves them."""
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device=DEVICE).to(dtype)
    return qkv.split([heads, kv_heads, kv_heads], 1)


def pick_slots(tokens: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randperm(SLOTS)[:tokens].to(DEVICE, dtype)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """To the last bit: products and sums are not fused."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def assert_only_these_slots_are_written(cache: Tensor, slots: Tensor) -> None:
    named = torch.zeros(SLOTS, dtype=torch.bool, device=DEVICE)
    named[slots.long()] = True
    assert cache[named].isfinite().all() and cache[~named].isnan().all()


# ---- the plain version


@INTERLEAVED
@DTYPES
@SHAPES
def test_reference_is_the_formula(heads: int, kv_heads: int, dim: int, turned: int, interleaved: bool, dtype):
    """A pair (a, b) is a complex number, multiplied by cos + i sin; in float64, to within one rounding."""
    x, _, _ = inputs(heads, kv_heads, dim, dtype)
    cos, sin = angles(len(x), turned)
    out = reference_write.rotate(x, cos, sin, interleaved)
    half = turned // 2
    first = torch.arange(half) * 2 if interleaved else torch.arange(half)
    second = first + (1 if interleaved else half)
    expected = x.double()
    pairs = torch.complex(expected[..., first], expected[..., second])
    pairs = pairs * torch.complex(cos.double(), sin.double())[:, None]
    expected[..., first], expected[..., second] = pairs.real, pairs.imag
    assert out.dtype == dtype and out[..., turned:].equal(x[..., turned:])
    rounding = torch.finfo(dtype).eps * (2 if dtype == F32 else 0.51)
    torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=1e-6)


@INTERLEAVED
@DTYPES
def test_reference_keeps_the_models_rounding(interleaved: bool, dtype):
    """Bit for bit what checkpoints were verified with: float32 inside, one rounding at the end."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # cos, sin [T, 1, dim / 2]
        dim = 2 * cos.shape[-1]
        y, rest = x[..., :dim].float(), x[..., dim:]
        a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else y.chunk(2, -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        y = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
        return torch.cat((y.to(x.dtype), rest), -1) if rest.shape[-1] else y.to(x.dtype)

    for turned in (32, 48):
        x = torch.randn(7, 3, 48, device=DEVICE).to(dtype)
        cos, sin = angles(7, turned)
        assert_same(reference_write.rotate(x, cos, sin, interleaved), rotate(x, cos[:, None], sin[:, None]))


def test_reference_is_traced():
    """Into one graph, and what it writes in place arrives."""
    q, k, v = inputs(4, 2, 16, F32)
    slots, (cos, sin) = pick_slots(5), angles(5, 16)
    cache = torch.full((SLOTS, 48), NAN, device=DEVICE)

    def layer(keys: Tensor, values: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        out = reference_write.rope_and_write(q * 2, k, v, keys, values, cos, sin, slots, False)
        return out, reference_write.rope_and_write_latent(q, k[:, 0], v.flatten(1), cache, cos, sin, slots, True)

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        written = [*(t.clone() for t in caches(2, 16, 16, F32)), cache.clone()]
        results.append((*run(*written), *written))
    for eager, compiled in zip(*results, strict=True):
        assert_same(eager, compiled)


# ---- the kernels


@INTERLEAVED
@SHAPES
@pytest.mark.parametrize(
    "dtype, cache_dtype", [(F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (BF16, F32), (F32, F16)], ids=str
)
def test_rope_and_write(heads: int, kv_heads: int, dim: int, turned: int, interleaved: bool, dtype, cache_dtype):
    q, k, v = inputs(heads, kv_heads, dim, dtype)
    slots, (cos, sin) = pick_slots(5), angles(5, turned)
    ours, theirs = (caches(kv_heads, dim, dim, cache_dtype) for _ in range(2))
    out = kv_write.rope_and_write(q, k, v, *ours, cos, sin, slots, interleaved)
    assert_same(out, reference_write.rope_and_write(q, k, v, *theirs, cos, sin, slots, interleaved))
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(mine, other)
        assert_only_these_slots_are_written(mine, slots)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kv_heads, dim, value_dim", [(2, 64, 64), (9, 192, 128), (1, 24, 40)])
@DTYPES
def test_write_kv(kv_heads: int, dim: int, value_dim: int, dtype, integers):
    k = torch.randn(6, kv_heads, dim, device=DEVICE).to(dtype)
    v = torch.randn(kv_heads, 6, value_dim, device=DEVICE).to(dtype).transpose(0, 1)
    slots = pick_slots(6, integers)
    ours, theirs = (caches(kv_heads, dim, value_dim, dtype) for _ in range(2))
    assert kv_write.write_kv(*ours, slots, k, v) is None
    reference_write.write_kv(*theirs, slots, k, v)
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(mine, other)
        assert_only_these_slots_are_written(mine, slots)


@INTERLEAVED
@pytest.mark.parametrize("rank, rope, heads", [(512, 64, 16), (32, 16, 3)])
@pytest.mark.parametrize("dtype, cache_dtype", [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16)], ids=str)
def test_rope_and_write_latent(rank: int, rope: int, heads: int, interleaved: bool, dtype, cache_dtype):
    T, slots = 3, pick_slots(3, torch.int32)
    q_rope, k_rope, latent = (torch.randn(T, *s, device=DEVICE).to(dtype) for s in ((heads, rope), (rope,), (rank,)))
    ours, theirs = (torch.full((SLOTS, rank + rope), NAN, dtype=cache_dtype, device=DEVICE) for _ in range(2))
    cos, sin = angles(T, rope)
    out = kv_write.rope_and_write_latent(q_rope, k_rope, latent, ours, cos, sin, slots, interleaved)
    expected = reference_write.rope_and_write_latent(q_rope, k_rope, latent, theirs, cos, sin, slots, interleaved)
    assert_same(out, expected)
    assert_same(ours, theirs)
    assert_only_these_slots_are_written(ours, slots)


def test_tokens_that_share_a_slot():
    """Padding all goes to slot 0, where either's may remain, number by number; the others are not touched by that."""
    q, k, v = inputs(4, 2, 16, F32, tokens=7)
    slots, (cos, sin) = torch.tensor([0, 17, 0, 3, 0, 0, 40], device=DEVICE), angles(7, 16)
    turned = reference_write.rotate(k, cos, sin, False)
    for write, rows in ((True, turned), (False, k)):
        keys, values = caches(2, 16, 16, F32)
        if write:
            kv_write.rope_and_write(q, k, v, keys, values, cos, sin, slots, False)
        else:
            kv_write.write_kv(keys, values, slots, k, v)
        for cache, source in ((keys, rows), (values, v)):
            assert_only_these_slots_are_written(cache, slots)
            assert (cache[0] == source[slots == 0]).any(0).all()
            assert_same(cache[slots[slots > 0]], source[slots > 0])


def test_no_tokens_at_all():
    q, k, v = inputs(4, 2, 16, F32, tokens=0)
    slots, (cos, sin), (keys, values) = pick_slots(0), angles(0, 16), caches(2, 16, 16, F32)
    assert kv_write.rope_and_write(q, k, v, keys, values, cos, sin, slots, False).shape == (0, 4, 16)
    kv_write.write_kv(keys, values, slots, k, v)
    assert keys.isnan().all() and values.isnan().all()


def test_slots_beyond_32_bits():
    """A pool of more than 2**31 elements: virtual memory, of which one page is touched."""
    torch.use_deterministic_algorithms(False)  # or all of it would be filled with NaN
    try:
        pool = torch.empty(2**31 // 512 + 8, 2, 256, dtype=F16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no memory for it")
    k, v = (torch.randn(1, 2, 256, device=DEVICE).half() for _ in range(2))
    last = torch.tensor([len(pool) - 1], device=DEVICE)
    kv_write.write_kv(pool[..., :128], pool[..., 128:], last, k[..., :128], v[..., 128:])
    assert_same(pool[-1:], torch.cat([k[..., :128], v[..., 128:]], -1))


# ---- as operators of torch


def operators() -> dict[str, tuple]:
    """name -> (arguments, the plain version)."""
    q, k, v = inputs(4, 2, 16, F32)
    slots, (cos, sin) = pick_slots(5), angles(5, 16)
    keys, values = (torch.randn(SLOTS, 2, 16, device=DEVICE) for _ in range(2))
    cache = torch.randn(SLOTS, 48, device=DEVICE)
    return {
        "rope_and_write": (q, k, v, keys, values, cos, sin, slots, True),
        "rope_and_write_latent": (q, k[:, 0], v.flatten(1), cache, cos, sin, slots, False),
        "write_kv": (keys, values, slots, k, v),
    }


NAMES = ["rope_and_write", "rope_and_write_latent", "write_kv"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str):
    """What it says that it writes to is what it writes to."""
    torch.library.opcheck(getattr(torch.ops.folio, name), operators()[name])


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_goes_through(name: str):
    arguments = operators()[name]
    kernel, plain = getattr(kv_write, name), getattr(reference_write, name)

    def layer(*args):
        out = kernel(*args)
        return None if out is None else out + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    ours, theirs = ([a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2))
    out, expected = compiled(*ours), plain(*theirs)
    if expected is not None:
        assert_same(out, expected + 1)
    written = 0
    for mine, other, before in zip(ours, theirs, arguments, strict=True):
        if isinstance(mine, Tensor):
            assert_same(mine, other)
            written += not mine.equal(before)
    assert written == (1 if name == "rope_and_write_latent" else 2)


# ---- bad input


GOOD = dict(
    q=torch.zeros(3, 4, 16),
    k=torch.zeros(3, 2, 16),
    v=torch.zeros(3, 2, 16),
    keys=torch.zeros(9, 2, 16),
    values=torch.zeros(9, 2, 16),
    cos=torch.zeros(3, 8),
    sin=torch.zeros(3, 8),
    slots=torch.tensor([8, 0, 4]),
)
BAD = {
    "q is .3, 4, 8.: must be .3, H, 16.": dict(q=torch.zeros(3, 4, 8)),
    "q is .2, 4, 16.: must be .3, H, 16.": dict(q=torch.zeros(2, 4, 16)),
    "q: the numbers of a head must lie side by side": dict(q=torch.zeros(3, 4, 32)[..., ::2]),
    "q is torch.int32: must be a floating-point type": dict(q=torch.zeros(3, 4, 16, dtype=torch.int32)),
    "q must have 3 dimensions, not 2": dict(q=torch.zeros(3, 64)),
    "v is .2, 2, 16.: must be .3, 2, V.": dict(v=torch.zeros(2, 2, 16)),
    "keys are .9, 1, 16.: must be .slots, 2, 16.": dict(keys=torch.zeros(9, 1, 16)),
    "values are .9, 2, 8.: must be .slots, 2, 16.": dict(values=torch.zeros(9, 2, 8)),
    "keys have 9 slots, values 8": dict(values=torch.zeros(8, 2, 16)),
    "cos turns 32 dims: a head has 16": dict(cos=torch.zeros(3, 16), sin=torch.zeros(3, 16)),
    "cos is .3, 8., sin .3, 4.": dict(sin=torch.zeros(3, 4)),
    "cos is torch.float16: must be float32": dict(cos=torch.zeros(3, 8).half()),
    "sin must be contiguous": dict(sin=torch.zeros(3, 16)[:, ::2]),
    "cos is .2, 8.: must be .3, dim / 2.": dict(cos=torch.zeros(2, 8)),
    "slots are torch.float32": dict(slots=torch.zeros(3)),
    "slots are .2.: must be .3.": dict(slots=torch.zeros(2, dtype=torch.int64)),
    "slots must be contiguous": dict(slots=torch.zeros(6, dtype=torch.int64)[::2]),
    "slots from 4 to 9: the pool has 0 to 8": dict(slots=torch.tensor([4, 9, 5])),
    "slots from -1 to 8": dict(slots=torch.tensor([4, -1, 8])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str):
    arguments = {name: t.to(DEVICE) for name, t in (GOOD | BAD[message]).items()}
    with pytest.raises(ValueError, match=message):
        kv_write.rope_and_write(**arguments, interleaved=False)
    ours = ("k", "v", "keys", "values", "slots")
    if BAD[message].keys() <= set(ours):
        with pytest.raises(ValueError, match=message):
            kv_write.write_kv(**{name: arguments[name] for name in ours})


def test_a_row_of_the_cache_is_latent_and_key():
    q, k, latent, cache = (torch.zeros(*s, device=DEVICE) for s in ((3, 4, 16), (3, 16), (3, 32), (9, 40)))
    (cos, sin), slots = angles(3, 16), pick_slots(3)
    with pytest.raises(ValueError, match=r"cache is \[9, 40\]: must be \[slots, 32 \+ 16\]"):
        kv_write.rope_and_write_latent(q, k, latent, cache, cos, sin, slots, False)


def test_everything_is_on_one_device():
    good = {name: t.to(DEVICE) for name, t in GOOD.items()}
    k, v, keys, values, slots = (good[name] for name in ("k", "v", "keys", "values", "slots"))
    with pytest.raises(ValueError, match="values is on meta, k on"):
        kv_write.check(k, v, keys, values.to("meta"), slots)
    with pytest.raises(ValueError, match="slots are on meta, k on"):
        kv_write.check(k, v, keys, values, slots.to("meta"))
    with pytest.raises(ValueError, match="cos is on meta, k on"):
        kv_write.check_rope(good["q"], k, good["cos"].to("meta"), good["sin"])


def test_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paged, "INTERPRETED", False)
    with pytest.raises(ValueError, match="k is on cpu: Triton kernels need a GPU, or TRITON_INTERPRET=1"):
        kv_write.rope_and_write(**GOOD, interleaved=False)
