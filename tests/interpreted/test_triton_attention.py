"""The Triton attention kernels against softmax written out in float64, on a CPU: Triton's interpreter runs them.

Every slot that no token owns is NaN, every new tensor starts as NaN, page tables are shuffled. Seeds are fresh;
FOLIO_SEED repeats one.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_attention.py
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import interpreter_bf16
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import decode, paged, prefill, variants
from kernels.decode import paged_decode
from kernels.prefill import paged_prefill
from kernels.variants import CAUSAL, MASK_MODS, SCORE_MODS, MaskMod, Variant, apply_in_torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of ||out - expected|| / ||expected||
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_seed_and_poison() -> Iterator[None]:
    seed = int(os.environ.get("FOLIO_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"FOLIO_SEED={seed}")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


# ---- a batch, and what should come out


@dataclass
class Case:
    """B sequences with `new[b]` queries at the end of `lengths[b]` tokens."""

    q: Tensor  # [T, H, D]
    keys: Tensor  # [slots, K, D]
    values: Tensor
    table: Tensor  # [B, N]
    query_start: Tensor  # [B + 1]
    lengths: Tensor  # [B]
    page_size: int
    scale: float
    history: list[tuple[Tensor, Tensor]]  # each sequence's keys and values [L, K, D] in plain order


def make(
    lengths: list[int],
    new: list[int] | None = None,
    page_size: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    dtype: torch.dtype = F32,
    integers: torch.dtype = torch.int32,
    padding: int = 0,
    value_dim: int | None = None,
) -> Case:
    """`new` None: one query each, as decode takes them. `padding`: queries behind the last sequence."""
    new = [1] * len(lengths) if new is None else new
    dims = (dim, value_dim or dim)
    history = [tuple(torch.randn(n, kv_heads, d).to(dtype) for d in dims) for n in lengths]
    q = torch.randn(sum(new) + padding, heads, dim).to(dtype)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=integers)
    return lay_in_pages(Case(q, q, q, q, starts, torch.tensor(lengths, dtype=integers), page_size, dim**-0.5, history))


def lay_in_pages(case: Case) -> Case:
    """Write the history into shuffled pages. Page 0 and 3 more belong to nobody; unused columns name one of them."""
    S, dtype = case.page_size, case.q.dtype
    counts = [-(-len(k) // S) for k, _ in case.history]
    pages = (1 + torch.randperm(sum(counts) + 3)).tolist()
    nobody = pages.pop()
    table = torch.full((len(counts), max(counts, default=0) + 2), nobody, dtype=case.lengths.dtype)
    keys, values = (
        torch.full(((sum(counts) + 4) * S, *t.shape[1:]), float("nan"), dtype=dtype) for t in case.history[0]
    )
    for row, count, (k, v) in zip(table, counts, case.history, strict=True):
        row[:count] = torch.tensor([pages.pop() for _ in range(count)])
        at = torch.arange(len(k))
        slots = row[at // S].long() * S + at % S
        keys[slots], values[slots] = k, v
    moved = {n: t.to(DEVICE) for n, t in dict(keys=keys, values=values, table=table).items()}
    moved |= {n: getattr(case, n).to(DEVICE) for n in ("q", "query_start", "lengths")}
    return replace(case, **moved)


def expected(case: Case, window=None, softcap=None, slopes=None, sinks=None, chunk=None) -> Tensor:
    """Attention as it is written on paper, in float64."""
    out = torch.zeros(*case.q.shape[:2], case.values.shape[2], dtype=torch.float64)
    starts = case.query_start.tolist()
    for b, (k, v) in enumerate(case.history):
        q = case.q[starts[b] : starts[b + 1]].cpu().double()
        if len(k) == 0 or len(q) == 0:
            continue
        k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * case.scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        if slopes is not None:
            scores = scores - slopes.cpu().double()[:, None, None] * distance
        hidden = distance < 0
        if window is not None:
            hidden = hidden | (distance >= window)
        if chunk is not None:
            position = torch.arange(len(k))
            hidden = hidden | (position[-len(q) :, None] // chunk != position // chunk)
        weights = scores.masked_fill(hidden, float("-inf")).exp()
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.cpu().double().exp()[:, None, None]
        out[starts[b] : starts[b + 1]] = torch.einsum("hqk,khd->qhd", weights / total, v)
    return out


def run_decode(case: Case, variant: Variant = CAUSAL, **options) -> Tensor:
    return paged_decode(
        case.q, case.keys, case.values, case.table, case.lengths, case.page_size, case.scale, variant, **options
    )


def run_prefill(case: Case, variant: Variant = CAUSAL, sinks: Tensor | None = None) -> Tensor:
    batch = (case.q, case.keys, case.values, case.table, case.query_start, case.lengths)
    return paged_prefill(*batch, case.page_size, case.scale, variant, sinks)


def error(out: Tensor, reference: Tensor) -> float:
    return float((out.cpu().double() - reference).norm() / reference.norm().clamp(min=1e-30))


def assert_right(out: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and out.shape == reference.shape
    assert error(out, reference) < TOLERANCE[dtype]  # false for NaN
    assert not out.cpu()[(reference == 0).all(-1)].any()


def around(page_size: int) -> list[int]:
    """Lengths at which something begins or ends: nothing, one token, a page, a tile."""
    return sorted({0, 1, page_size - 1, page_size, page_size + 1, 63, 64, 65, 140})


# ---- decode

SHAPES = [  # query heads, KV heads, head dim, page size, dtype
    (4, 2, 64, 16, F32),
    (3, 1, 80, 1, F16),
    (8, 1, 96, 128, BF16),
    (2, 2, 128, 7, BF16),
    (16, 1, 256, 32, F16),
    (20, 1, 64, 64, BF16),
    (71, 1, 64, 16, F16),  # Falcon-7B: more heads on one KV head than a program has rows
    (6, 2, 32, 3, F32),
    (2, 1, 256, 16, F32),
    (4, 1, 8, 5, F32),
]


@pytest.mark.parametrize("heads, kv_heads, dim, page_size, dtype", SHAPES, ids=str)
def test_decode(heads, kv_heads, dim, page_size, dtype):
    case = make(around(page_size), None, page_size, heads, kv_heads, dim, dtype)
    assert_right(run_decode(case), expected(case), dtype)


@pytest.mark.parametrize("fixed_split", [None, 64, 128])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_decode_in_splits(fixed_split, dtype):
    case = make([0, 300, 1, 65], page_size=16, kv_heads=1, dtype=dtype, integers=torch.int64)
    assert_right(run_decode(case, fixed_split=fixed_split), expected(case), dtype)
    case = make([513], page_size=16, kv_heads=1, dtype=dtype)  # alone, it is split by itself
    assert decode.plan(1, 4, 513, None, 64) == (5, 128)
    assert_right(run_decode(case, fixed_split=fixed_split), expected(case), dtype)


def test_more_partial_results_than_the_merge_reads_at_a_time():
    case = make([decode.MERGE_BLOCK * 32 + 50, 40, 32 * decode.MERGE_BLOCK], kv_heads=1, heads=2, dim=16)
    assert_right(run_decode(case, fixed_split=32), expected(case), F32)


def test_split_count_does_not_matter():
    case = make([0, 200, 97, 1], heads=4, kv_heads=1)
    outs = [run_decode(case, fixed_split=n) for n in (None, 32, 96, 1024)]
    reference = expected(case)
    assert all(error(out, reference) < 5e-7 for out in outs)


def test_page_size_and_page_order_do_not_matter():
    case = make([0, 1, 70, 33], [0, 1, 3, 33], heads=4, kv_heads=1)
    first = run_prefill(case)
    for page_size in (1, 5, 16, 128):
        assert run_prefill(lay_in_pages(replace(case, page_size=page_size))).equal(first)
    case = make([0, 1, 70, 33], heads=4, kv_heads=1)
    first = run_decode(case, fixed_split=32)
    for page_size in (1, 5, 16, 128):
        assert run_decode(lay_in_pages(replace(case, page_size=page_size)), fixed_split=32).equal(first)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("extras", [{}, {"window": 50, "sinks": True}], ids=["plain", "window, sinks"])
def test_with_fixed_splits_a_row_is_the_same_bit_for_bit_in_any_batch(dtype, extras):
    case = make([150, 1, 700, 64, 0], heads=4, kv_heads=1, dim=32, dtype=dtype)
    sinks = torch.randn(4, device=DEVICE) if "sinks" in extras else None
    variant = variants.model_variant(None, extras.get("window"))
    whole = run_decode(case, variant, fixed_split=64, sinks=sinks)
    for rows in ([0], [3, 0], [0, 1, 4], [1], [4, 3]):
        part = replace(case, q=case.q[rows], table=case.table[rows], lengths=case.lengths[rows])
        narrow = replace(part, table=part.table[:, : max(1, -(-int(part.lengths.max()) // 16))].contiguous())
        for some in (part, narrow):
            assert run_decode(some, variant, fixed_split=64, sinks=sinks).equal(whole[rows])


def test_a_plan_made_for_longer_sequences_is_right_for_shorter_ones():
    """As in a CUDA graph, which is captured once: the grid stays, the lengths change."""
    case = make([40, 3], heads=2, kv_heads=1)
    case.table = torch.cat([case.table, case.table.repeat(1, 30)], dim=1)
    assert decode.plan(2, 4, case.table.shape[1] * 16, None, 64)[0] == 8
    assert_right(run_decode(case), expected(case), F32)


def test_plan():
    assert decode.plan(8, 132, 32768, None, 64) == (66, 128)  # one sequence, 8 KV heads: fill the GPU
    assert decode.plan(8, 132, 1024, None, 64) == (8, 128)  # no split below the least size
    assert decode.plan(2048, 132, 32768, None, 64) == (1, 128)  # full already
    assert decode.plan(8, 132, 0, None, 64) == (1, 128)
    assert decode.plan(1, 132, 1000, 256, 64) == (4, 256)
    assert decode.plan(999, 132, 1000, 256, 64) == (4, 256)
    with pytest.raises(ValueError, match="multiple of the tile"):
        decode.plan(1, 132, 1000, 100, 64)


# ---- prefill

STEPS = [  # tokens of each sequence, of them new
    ([5, 40, 64], [5, 40, 64]),  # prompts
    ([150, 66, 65], [20, 2, 64]),  # chunks behind a prefix
    ([100, 1, 0, 17, 64], [1, 1, 0, 17, 1]),  # decodes, a prompt, and an empty row
]


@pytest.mark.parametrize("lengths, new", STEPS, ids=["prompts", "chunks", "mixed"])
@pytest.mark.parametrize("heads, kv_heads, dim, page_size, dtype", SHAPES[:6], ids=str)
def test_prefill(heads, kv_heads, dim, page_size, dtype, lengths, new):
    case = make(lengths, new, page_size, heads, kv_heads, dim, dtype)
    assert_right(run_prefill(case), expected(case), dtype)


@pytest.mark.parametrize("heads, kv_heads, dim, page_size, dtype", SHAPES[6:], ids=str)
def test_prefill_of_odd_shapes(heads, kv_heads, dim, page_size, dtype):
    case = make([3, 40, 1], [3, 5, 1], page_size, heads, kv_heads, dim, dtype, torch.int64)
    assert_right(run_prefill(case), expected(case), dtype)


def test_prefill_at_the_borders_of_pages_and_tiles():
    lengths = [n for n in around(16) if n]
    case = make(lengths, [min(n, 3) for n in lengths], heads=2, kv_heads=1, dim=16)
    assert_right(run_prefill(case), expected(case), F32)


def test_many_short_sequences_and_blocks_that_end_inside_them():
    """Every block must find its sequence, however their lengths fall on block borders."""
    new = torch.randint(0, 40, (9,)).tolist()
    lengths = [n + int(torch.randint(0, 30, ())) * (n > 0) for n in new]
    case = make(lengths, new, heads=3, kv_heads=1, dim=16)
    assert_right(run_prefill(case), expected(case), F32)


def test_padding_behind_the_last_sequence_is_zero():
    case = make([20, 0, 3], [20, 0, 3], heads=2, kv_heads=1, dim=16, padding=37)
    out = run_prefill(case)
    assert_right(out, expected(case), F32)
    assert out.shape[0] == 60 and not out[23:].any()


def test_queries_of_an_empty_sequence_get_zeros():
    """A padding row of a graph has a token but no history."""
    case = make([20, 0, 3], [4, 2, 1], heads=2, kv_heads=1, dim=16)
    assert_right(run_prefill(case), expected(case), F32)


@pytest.mark.parametrize("dim, value_dim, dtype", [(192, 128, BF16), (24, 40, F32), (96, 16, F16)])
def test_values_of_another_head_dim(dim, value_dim, dtype):
    """As the expanded form of MLA has them: keys of 192, values of 128."""
    case = make([70, 0, 5], [9, 0, 5], heads=4, kv_heads=2, dim=dim, dtype=dtype, value_dim=value_dim)
    assert_right(run_prefill(case), expected(case), dtype)
    case = make([70, 0, 5], heads=4, kv_heads=2, dim=dim, dtype=dtype, value_dim=value_dim)
    for split in (None, 64):
        assert_right(run_decode(case, fixed_split=split), expected(case), dtype)


def test_prefill_of_single_tokens_is_decode():
    case = make([1, 17, 90], heads=4, kv_heads=1)
    assert error(run_prefill(case), run_decode(case).cpu().double()) < 1e-6


def test_nothing_to_do():
    empty = make([5], [0])
    assert run_prefill(empty).shape == (0, 4, 64)
    none = replace(empty, q=empty.q[:0], table=empty.table[:0], lengths=empty.lengths[:0])
    assert run_decode(none).shape == (0, 4, 64)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed):
    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))

    kv_heads, dtype = pick(1, 2), [F32, F16, BF16][pick(0, 2)]
    lengths = [pick(0, 150) for _ in range(pick(1, 4))]
    shape = (pick(1, 130), kv_heads * pick(1, 7), kv_heads, 8 * pick(1, 16), dtype)
    case = make(lengths, [pick(min(n, 1), min(n, 60)) for n in lengths], *shape)
    window, chunk = [(None, None), (pick(1, 120), None), (None, pick(1, 120))][pick(0, 2)]
    softcap, sinks = [None, 2.0][pick(0, 1)], [None, torch.randn(shape[1]).to(DEVICE)][pick(0, 1)]
    variant = variants.model_variant(softcap, window, chunk)
    assert_right(run_prefill(case, variant, sinks), expected(case, window, softcap, None, sinks, chunk), dtype)
    case, split = make(lengths, None, *shape), [None, 64, 128][pick(0, 2)]
    out = run_decode(case, variant, fixed_split=split, sinks=sinks)
    assert_right(out, expected(case, window, softcap, None, sinks, chunk), dtype)


# ---- variants

OPTIONS = [
    {"softcap": 2.0},
    {"softcap": 50.0},
    {"slopes": True},
    {"sinks": True},
    {"window": 1},
    {"window": 64},
    {"window": 65},
    {"window": 1000},
    {"chunk": 1},
    {"chunk": 64},
    {"chunk": 67},
    {"chunk": 1000},
    {"softcap": 3.0, "window": 37, "sinks": True},
    {"softcap": 3.0, "chunk": 37, "sinks": True},
    {"slopes": True, "window": 100},
]


def variant_of(options: dict, heads: int) -> tuple[Variant, dict]:
    options = {n: torch.randn(heads).abs().to(DEVICE) if x is True else x for n, x in options.items()}
    variant = variants.model_variant(options.get("softcap"), options.get("window"), options.get("chunk"))
    if "slopes" in options:
        variant = replace(variant, score_mod="alibi", score_args=(options["slopes"],))
    return variant, options


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_variants(options):
    variant, options = variant_of(options, 4)
    case = make([0, 1, 64, 170], heads=4, kv_heads=1, dim=32)
    for split in (None, 64):
        out = run_decode(case, variant, fixed_split=split, sinks=options.get("sinks"))
        assert_right(out, expected(case, **options), F32)
    case = make([3, 170, 0, 40], [3, 9, 0, 40], heads=4, kv_heads=1, dim=32)
    assert_right(run_prefill(case, variant, options.get("sinks")), expected(case, **options), F32)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "sinks" not in o], ids=str)
def test_variants_on_pytorch_tensors(options):
    variant, options = variant_of(options, 4)
    scores = torch.randn(4, 5, 9, dtype=torch.float64, device=DEVICE)
    query, key = torch.arange(4, 9, device=DEVICE)[:, None], torch.arange(9, device=DEVICE)[None, :]
    out = apply_in_torch(variant, scores, query, key, torch.arange(4, device=DEVICE)[:, None, None])
    right = scores
    if "softcap" in options:
        right = torch.tanh(scores / options["softcap"]) * options["softcap"]
    if "slopes" in options:
        right = right - options["slopes"].double()[:, None, None] * (query - key)
    hidden = (key > query) | (query - key >= options.get("window", 1000))
    size = options.get("chunk", 1000)
    hidden = hidden | (query // size != key // size)
    torch.testing.assert_close(out, right.masked_fill(hidden, float("-inf")))


@triton.jit
def clip(score, query, key, head, args):
    return tl.minimum(tl.maximum(score, -args[0]), args[0])


@triton.jit
def same_document(query, key, args):
    return query // args[0] == key // args[0]


def test_a_variant_of_the_users_own(monkeypatch):
    """The example that `kernels/variants.py` opens with, in both kernels and on PyTorch tensors."""
    monkeypatch.setitem(SCORE_MODS, "clip", clip)
    monkeypatch.setitem(MASK_MODS, "document", MaskMod(same_document))
    variant = Variant("clip", (0.5,), "document", (50,))
    case = make([120, 7], [60, 2], heads=2, kv_heads=1, dim=16)
    right = torch.zeros(case.q.shape, dtype=torch.float64)
    for b, rows in enumerate((slice(0, 60), slice(60, 62))):
        q, (k, v) = case.q[rows].cpu().double(), (t[:, 0].double() for t in case.history[b])
        query, key = torch.arange(len(k) - len(q), len(k))[:, None], torch.arange(len(k))[None, :]
        scores = torch.einsum("qhd,kd->hqk", q, k) * case.scale
        scores = apply_in_torch(variant, scores, query, key, torch.arange(2)[:, None, None])
        direct = scores.new_zeros(scores.shape).masked_fill((key > query) | (key // 50 != query // 50), float("-inf"))
        assert scores.isinf().equal(direct.isinf()) and scores[~scores.isinf()].abs().max() == 0.5
        right[rows] = torch.einsum("hqk,kd->qhd", scores.softmax(-1), v)
    assert_right(run_prefill(case, variant), right, F32)
    last = replace(case, q=case.q[[59, 61]])
    for split in (None, 32):
        assert_right(run_decode(last, variant, fixed_split=split), right[[59, 61]], F32)


def test_an_unknown_variant_or_misplaced_arguments():
    with pytest.raises(ValueError, match="no attention variant 'tanh': known are softcap"):
        Variant("tanh")
    with pytest.raises(ValueError, match="numbers first"):
        Variant("alibi", (torch.ones(2), 1.0))


# ---- memory


def test_a_pool_of_more_than_2_to_the_31_elements():
    torch.use_deterministic_algorithms(False)  # or all of it would be filled
    pages = (2**31 // (128 * 16)) + 64
    pool = torch.empty(pages * 16, 1, 128, dtype=F16, device=DEVICE)  # keys and values in one; hardly touched
    case = make([40, 20], [9, 1], kv_heads=1, heads=2, dim=128, dtype=F16)
    case.table[0, :3] = torch.tensor([pages - 1, 3, pages - 40])
    case.table[1, :2] = torch.tensor([pages - 2, pages - 3])
    case.history = [(k, k) for k, _ in case.history]
    for row, (k, _) in zip(case.table, case.history, strict=True):
        at = torch.arange(len(k), device=DEVICE)
        pool[row[at // 16].long() * 16 + at % 16] = k.to(DEVICE)
    case.keys = case.values = pool
    assert_right(run_prefill(case), expected(case), F16)
    last = replace(case, q=case.q[[8, 9]], query_start=torch.arange(3))
    assert_right(run_decode(last), expected(last), F16)


def test_queries_cut_out_of_a_larger_tensor():
    """As the model has them: q, k and v of one product."""
    case = make([30, 5], [7, 1], heads=4, kv_heads=2)
    fused = torch.randn(8, 8, 64).to(DEVICE)
    case.q = fused[:, :4]
    assert not case.q.is_contiguous()
    assert_right(run_prefill(case), expected(case), F32)
    last = replace(case, q=case.q[6:], query_start=torch.arange(3))
    assert_right(run_decode(last), expected(last), F32)


def test_nan_in_one_sequence_stays_there():
    case = make([40, 20, 3], heads=2, kv_heads=1, dim=16)
    before = run_decode(case)
    slot = int(case.table[1, 0]) * 16
    case.keys[slot] = float("nan")
    after = run_decode(case)
    assert after[1].isnan().all() and after[[0, 2]].equal(before[[0, 2]])


# ---- as an op, and bad input


def test_passes_through_torch_compile_as_one_graph():
    case = make([20, 3], heads=2, kv_heads=1, dim=16)
    variant, sinks = variants.model_variant(5.0, 7), torch.randn(2, device=DEVICE)

    table, starts, lengths = case.table, case.query_start, case.lengths

    def both(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        decoded = paged_decode(q, keys, values, table, lengths, 16, 0.3, variant, fixed_split=64, sinks=sinks)
        return decoded + paged_prefill(q, keys, values, table, starts, lengths, 16, 0.3, variant, sinks)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert compiled(case.q, case.keys, case.values).equal(both(case.q, case.keys, case.values))


BAD = {
    "no attention kernel for torch.int8": lambda c: replace(
        c, q=c.q.char(), keys=c.keys.char(), values=c.values.char()
    ),
    "keys is torch.float16, q is torch.float32": lambda c: replace(c, keys=c.keys.half()),
    "must agree": lambda c: replace(c, values=c.values[:16]),
    "head dim of q is 16, of keys 64": lambda c: replace(c, q=c.q[..., :16]),
    "side by side": lambda c: replace(c, q=c.q.transpose(1, 2).contiguous().transpose(1, 2)),
    "3 query heads cannot share 2 KV heads": lambda c: replace(c, q=c.q[:, :3]),
    "not whole pages of 48": lambda c: replace(c, page_size=48),
    "scale is -1": lambda c: replace(c, scale=-1.0),
    "lengths is torch.float32": lambda c: replace(c, lengths=c.lengths.float()),
    "page_table must have 2 dim": lambda c: replace(c, table=c.table[0]),
    "page_table must be contiguous": lambda c: replace(c, table=c.table[:, ::2]),
    "page_table has 1 rows": lambda c: replace(c, table=c.table[:1]),
    r"q must be \[T, H, D\]": lambda c: replace(c, q=c.q[0]),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("run", [run_decode, run_prefill])
def test_bad_input(message, run):
    case = make([20, 3])
    with pytest.raises(ValueError, match=message):
        run(BAD[message](case))


def test_bad_input_of_one_kernel():
    case = make([20, 3], [2, 1])
    with pytest.raises(ValueError, match="one query for each sequence"):
        run_decode(case)
    with pytest.raises(ValueError, match="query_start has 2 entries: must be 3"):
        run_prefill(replace(case, query_start=case.query_start[:2]))
    with pytest.raises(ValueError, match="another argument on another device"):
        paged.check(
            case.q, case.keys, case.values, case.table.to("meta"), case.lengths, 16, 1.0, None, [], case.query_start
        )
    with pytest.raises(ValueError, match=r"sinks must be \[4\]"):
        run_prefill(case, sinks=torch.zeros(3, device=DEVICE))


def test_page_ids_are_checked_when_debugging(monkeypatch):
    monkeypatch.setattr(paged, "DEBUG", True)
    case = make([20, 3])
    run_decode(case)
    pages = len(case.keys) // 16
    case.table[1, 0] = pages
    with pytest.raises(ValueError, match=rf"page_table\[1, 0\] is {pages}: the pool has pages 0 to {pages - 1}"):
        run_decode(case)
    case.table[1, 0], case.lengths[1] = 1, 1000
    with pytest.raises(ValueError, match="a length of 1000 does not fit"):
        run_decode(case)


@pytest.mark.parametrize("table", [decode.TILES, prefill.TILES])
def test_every_head_dim_has_a_configuration_on_every_gpu(table):
    for arch in ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942", "gfx950"):
        for dim in (8, 64, 80, 96, 128, 192, 256):
            assert paged.table_for(table, arch)[paged.padded(dim)]


# ---- the interpreter


@pytest.mark.skipif(not INTERPRETED, reason="is about the interpreter")
def test_bfloat16_in_the_interpreter():
    x = torch.cat([torch.randn(4096) * 100, torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])])
    bits = interpreter_bf16.to_bits(x.numpy())
    there = torch.from_numpy(bits.view("int16")).view(BF16)
    torch.testing.assert_close(there, x.to(BF16), rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(interpreter_bf16.to_float32(bits).copy())
    torch.testing.assert_close(back, x.to(BF16).float(), rtol=0, atol=0, equal_nan=True)

    @triton.jit
    def add(a, out):
        tl.store(out, tl.load(a) + tl.load(a))

    with pytest.raises(Exception, match="compute in float32"):
        add[(1,)](x.to(BF16), x.to(BF16))
