"""`kernels/mla.py` and `kernels/mla_extend.py` against plain PyTorch in float64.

What the kernel must not read is NaN: slots that nobody owns, page 0, everything behind a sequence's last token. What it
must write is NaN before. Seeds are fresh; FOLIO_SEED repeats one.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_mla.py
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import test_reference_mla
import torch
from torch import Tensor

from kernels import mla, mla_extend, mla_splits, paged
from kernels.mla_splits import Splits, balanced_splits, fixed_splits
from kernels.reference_mla import mla_absorbed, mla_expanded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
R, ROPE, SCALE = 512, 64, 0.0417
NAN = float("nan")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of ||out - expected|| / ||expected||
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def fresh_seed_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    seed = int(os.environ.get("FOLIO_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"FOLIO_SEED={seed}")
    torch.manual_seed(seed)
    monkeypatch.setattr(paged, "DEBUG", True)  # a wrong page id would be a mistake of the test
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    page_size: int
    q_latent: Tensor
    q_rope: Tensor
    cache: Tensor
    page_table: Tensor
    lengths: Tensor
    offsets: Tensor

    def decode(self, **options) -> Tensor:
        return mla.mla_decode(
            self.q_latent,
            self.q_rope,
            self.cache,
            self.page_table,
            self.lengths,
            self.page_size,
            SCALE,
            **options,
        )

    def extend(self, **options) -> Tensor:
        return mla.mla_extend(
            self.q_latent,
            self.q_rope,
            self.cache,
            self.page_table,
            self.offsets,
            self.lengths,
            self.page_size,
            SCALE,
            **options,
        )

    def row(self, b: int) -> "Case":
        """Sequence b alone, its page table as short as may be."""
        tokens = slice(int(self.offsets[b]), int(self.offsets[b + 1]))
        pages = max(1, -(-int(self.lengths[b]) // self.page_size))
        return replace(
            self,
            q_latent=self.q_latent[tokens],
            q_rope=self.q_rope[tokens],
            page_table=self.page_table[b : b + 1, :pages].contiguous(),
            lengths=self.lengths[b : b + 1],
            offsets=self.offsets[b : b + 2] - self.offsets[b],
        )


def make(
    lengths: list[int],
    new: list[int] | None = None,
    heads: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    rank: int = R,
    rope: int = ROPE,
) -> Case:
    """Sequences on shuffled pages; the last `new[b]` entries of each are new. One seed, one history, for all page sizes."""
    new = new or [1] * len(lengths)
    histories = [torch.randn(n, rank + rope) for n in lengths]
    queries = torch.randn(sum(new), heads, rank + rope) * 2
    counts = [-(-n // page_size) for n in lengths]
    order = (1 + torch.randperm(sum(counts) + 2)).tolist()
    table = torch.zeros(
        len(lengths), max(counts, default=0) + 2, dtype=torch.int32
    )  # columns beyond the end name page 0
    cache = torch.full(((sum(counts) + 3) * page_size, rank + rope), NAN)
    for row, count, rows in zip(table, counts, histories, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
        entry = torch.arange(len(rows))
        cache[row[entry // page_size].long() * page_size + entry % page_size] = rows
    queries, cache = queries.to(DEVICE, dtype), cache.to(DEVICE, dtype)
    tensors = (
        queries[..., :rank],
        queries[..., rank:],
        cache,
        table.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int64).to(DEVICE),
        torch.tensor([0, *new]).cumsum(0).to(DEVICE),
    )
    return Case(page_size, *tensors)


def reference(case: Case) -> Tensor:
    q_latent, q_rope, cache = case.q_latent.double(), case.q_rope.double(), case.cache.double()
    return mla_absorbed(q_latent, q_rope, cache, case.page_table, case.offsets, case.lengths, case.page_size, SCALE)


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[out.dtype], float(error)  # NaN is not smaller
    assert out[expected.flatten(1).eq(0).all(1)].eq(0).all()  # empty rows are zeros


# Decode


@DTYPES
@pytest.mark.parametrize(
    "heads, page_size, lengths",
    [
        (16, 16, [1, 37, 0, 300]),
        (16, 64, [63, 64, 65]),
        (20, 1, [32, 1, 33]),
        (64, 128, [127, 129]),
        (128, 7, [6, 7, 8]),
    ],
)
def test_decode(heads: int, page_size: int, lengths: list[int], dtype: torch.dtype):
    case = make(lengths, heads=heads, page_size=page_size, dtype=dtype)
    assert_close(case.decode(splits=fixed_splits(1024, 1024, DEVICE)), reference(case))


@DTYPES
def test_decode_splits_its_history(dtype: torch.dtype):
    case = make([0, 1, 31, 33, 290], heads=4, dtype=dtype)
    expected = reference(case)
    assert_close(case.decode(), expected)
    for splits in (fixed_splits(32, 320, DEVICE), Splits(torch.tensor([1], device=DEVICE), 3)):
        assert splits.most > 1
        assert_close(case.decode(splits=splits), expected)


def test_more_splits_than_one_block_of_the_merge():
    case = make([600, 40], heads=4)
    splits = fixed_splits(32, 640, DEVICE)
    assert splits.most > mla.MERGE_BLOCK
    assert_close(case.decode(splits=splits), reference(case))


def test_page_size_and_page_order_change_nothing():
    seed, outs = torch.initial_seed(), []
    for page_size in (1, 3, 16, 128):
        torch.manual_seed(seed)
        outs.append(make([70, 5], heads=8, page_size=page_size).decode())
    assert all(out.equal(outs[0]) for out in outs[1:])


@pytest.mark.parametrize("tokens", [64, 1024])
def test_fixed_splits_give_a_row_the_same_bits_in_any_company(tokens: int):
    case = make([150, 1, 0, 333], heads=8)
    out = case.decode(splits=fixed_splits(tokens, 2048, DEVICE))
    for b in range(4):
        alone = case.row(b)
        longest = alone.page_table.shape[1] * alone.page_size
        assert alone.decode(splits=fixed_splits(tokens, longest, DEVICE))[0].equal(out[b])


@pytest.mark.parametrize("tokens", [32, 1024])
def test_nan_shows_in_its_own_sequence_and_in_no_other(tokens: int):
    """A sick request must end, not go on with an answer that only looks well."""
    case = make([90, 40], heads=4)
    expected = reference(case)
    case.cache[int(case.page_table[0, 4]) * 16 + 3, 7] = NAN
    out = case.decode(splits=fixed_splits(tokens, 1024, DEVICE))
    assert out[0].isnan().all()
    assert_close(out[1:], expected[1:])


def test_balanced_splits():
    """Equal work for each processor, whole histories where there are enough of them, never less than MIN_SPLIT."""
    few = balanced_splits(torch.tensor([8192], device=DEVICE), 16, 8192, torch.bfloat16)
    many = balanced_splits(torch.full((4096,), 8192, device=DEVICE), 16, 8192, torch.bfloat16)
    short = balanced_splits(torch.tensor([10], device=DEVICE), 16, 8192, torch.bfloat16)
    assert few.most > 1 and int(few.tokens) < 8192
    assert many.most == 1
    assert int(short.tokens) == mla_splits.MIN_SPLIT
    case = make([900, 10, 300], heads=4)
    assert_close(case.decode(splits=balanced_splits(case.lengths, 4, 1024, torch.float32)), reference(case))


def test_small_ranks_and_free_strides():
    """As a tiny model has them; queries as the batched product that absorbs W_K leaves them, heads first."""
    case = make([9, 50], heads=4, rank=32, rope=16)
    expected = reference(case)
    assert_close(case.decode(), expected)
    case.q_latent = case.q_latent.transpose(0, 1).contiguous().transpose(0, 1)
    wide = torch.full((len(case.cache), 64), NAN, device=DEVICE)
    wide[:, :48] = case.cache
    case.cache, case.page_table = wide[:, :48], case.page_table.long()
    assert_close(case.decode(), expected)


def test_offsets_beyond_32_bits():
    """A pool of more than 2**31 elements: virtual memory, of which two pages are touched."""
    case = make([40], dtype=torch.float16, heads=2)
    torch.use_deterministic_algorithms(False)  # or all of it would be filled with NaN
    try:
        slots = (2**31 // (R + ROPE) // 16 + 8) * 16
        pool = torch.empty_strided((slots, R + ROPE), (R + ROPE, 1), dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no memory for it")
    moved = case.page_table.clone()
    for i, page in enumerate(case.page_table[0, :3].tolist()):
        moved[0, i] = len(pool) // 16 - 1 - i
        pool[moved[0, i] * 16 :][:16] = case.cache[page * 16 :][:16]
    out = case.decode()
    case.cache, case.page_table = pool, moved
    assert case.decode().equal(out)


# Extend


@DTYPES
@pytest.mark.parametrize(
    "heads, page_size, lengths, new",
    [
        (16, 16, [5, 37, 0, 100, 18], [5, 1, 0, 20, 3]),  # a prompt, a decode, nothing, prefix and new, a verify
        (16, 64, [63, 64, 65, 129], [1, 64, 1, 2]),
        (20, 1, [33, 7], [3, 7]),
        (128, 7, [15, 8], [2, 1]),
    ],
)
def test_extend(heads: int, page_size: int, lengths: list[int], new: list[int], dtype: torch.dtype):
    case = make(lengths, new, heads, page_size, dtype)
    assert_close(case.extend(), reference(case))


@DTYPES
def test_extend_splits_its_history(dtype: torch.dtype):
    case = make([5, 150, 70], [5, 4, 1], heads=4, dtype=dtype)
    expected = reference(case)
    for tokens in (64, 50):  # the second is no whole number of tiles
        assert_close(case.extend(splits=fixed_splits(tokens, 192, DEVICE)), expected)


def test_extend_by_one_is_decode():
    case = make([33, 0, 64], heads=16)
    torch.testing.assert_close(case.extend(), case.decode(), rtol=1e-5, atol=1e-6)


def test_padding_behind_the_last_sequence_gives_zeros():
    case = make([20, 9], [3, 9], heads=4)
    expected = reference(case)
    rows = torch.full((30, 4, R + ROPE), NAN, device=DEVICE)
    case.q_latent = torch.cat([case.q_latent, rows[..., :R]])
    case.q_rope = torch.cat([case.q_rope, rows[..., R:]])
    for splits in (None, fixed_splits(32, 64, DEVICE)):
        out = case.extend(splits=splits)
        assert_close(out[:12], expected)
        assert out[12:].eq(0).all()


def test_extend_gives_a_row_the_same_bits_in_any_company_and_any_chunk():
    case = make([40, 90, 3], [9, 5, 3], heads=4)
    out = case.extend()
    for b in range(3):
        alone = case.row(b)
        whole = out[int(case.offsets[b]) : int(case.offsets[b + 1])]
        assert alone.extend().equal(whole)
        last = replace(
            alone, q_latent=alone.q_latent[-2:], q_rope=alone.q_rope[-2:], offsets=torch.tensor([0, 2]).to(DEVICE)
        )
        assert last.extend().equal(whole[-2:])


def test_nothing_but_padding():
    """No sequence at all, as a captured graph may see; and a batch of nothing."""
    case = make([], heads=4)
    assert case.extend().shape == case.decode().shape == (0, 4, R)
    case.q_latent, case.q_rope = (torch.full((9, 4, n), NAN, device=DEVICE) for n in (R, ROPE))
    assert case.extend().eq(0).all()


# As operators of torch


def operands(case: Case, splits: Splits | None, extend: bool) -> tuple:
    offsets = [case.offsets] if extend else []
    tensors = [case.q_latent, case.q_rope, case.cache, case.page_table, *offsets, case.lengths]
    tokens, most = (None, 1) if splits is None else (splits.tokens, splits.most)
    return (*tensors, case.page_size, SCALE, tokens, most)


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_opcheck(extend: bool, split: bool):
    case = make([5, 40], heads=4, rank=32, rope=16)
    splits = fixed_splits(32, 48, DEVICE) if split else None
    op = torch.ops.folio.mla_extend if extend else torch.ops.folio.mla_decode
    torch.library.opcheck(op, operands(case, splits, extend))


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_torch_compile_goes_through(extend: bool, split: bool):
    case = make([5, 40], heads=4, rank=32, rope=16)
    splits = fixed_splits(32, 48, DEVICE) if split else None

    def layer(q_latent: Tensor) -> Tensor:
        case.q_latent = q_latent * 2
        return (case.extend if extend else case.decode)(splits=splits) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    query = case.q_latent.clone()
    expected = layer(query)
    assert expected.isfinite().all() and compiled(query).equal(expected)


# Bad input


BAD = {
    "cache has rows of 100": lambda c: dict(cache=c.cache[:, :100]),
    "cache is torch.float16, q_latent torch.float32": lambda c: dict(cache=c.cache.half()),
    "no MLA kernel for torch.float64": lambda c: {n: getattr(c, n).double() for n in ("q_latent", "q_rope", "cache")},
    r"q_rope is \[2, 3, 64\]: must be \[2, 4, rope\]": lambda c: dict(q_rope=c.q_rope[:, :3]),
    "q_latent must have 3 dimensions": lambda c: dict(q_latent=c.q_latent[0]),
    "latent rank 24: must be a power of two": lambda c: dict(
        q_latent=c.q_latent[..., :24], cache=c.cache[:, : 24 + ROPE]
    ),
    "q_latent: its last dimension must be contiguous": lambda c: dict(q_latent=c.q_latent.mT.contiguous().mT),
    "page_table is torch.float32": lambda c: dict(page_table=c.page_table.float()),
    "lengths is torch.float32": lambda c: dict(lengths=c.lengths.float()),
    "lengths has 2 entries, page_table 1 rows": lambda c: dict(page_table=c.page_table[:1]),
    "32 slots are not whole pages of 5": lambda c: dict(page_size=5, cache=c.cache[:32]),
    "not whole pages of 0": lambda c: dict(page_size=0),
    "pool has pages 0 to": lambda c: dict(page_table=c.page_table + 1000),
    "is -9..: the pool has pages": lambda c: dict(page_table=c.page_table - 1000),
    "a length of 1020 does not fit": lambda c: dict(lengths=c.lengths + 1000),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("extend", [False, True])
def test_bad_input(message: str, extend: bool):
    case = make([9, 20], heads=4)
    case = replace(case, **BAD[message](case))
    with pytest.raises(ValueError, match=message):
        case.extend() if extend else case.decode()


def test_bad_input_of_one_kind():
    case = make([9, 20], heads=4)
    one = replace(case, page_table=case.page_table[:1], lengths=case.lengths[:1])
    with pytest.raises(ValueError, match="one query for each sequence: q_latent has 2, page_table 1"):
        one.decode()
    with pytest.raises(ValueError, match="offsets has 3 entries: must be 2"):
        one.extend()
    with pytest.raises(ValueError, match="offsets is torch.float32"):
        replace(case, offsets=case.offsets.float()).extend()
    with pytest.raises(ValueError, match="a split of 0 entries"):
        fixed_splits(0, 100, DEVICE)
    with pytest.raises(ValueError, match="scale is 0"):
        mla.mla_decode(case.q_latent, case.q_rope, case.cache, case.page_table, case.lengths, 16, 0.0)


def test_everything_is_on_one_gpu(monkeypatch: pytest.MonkeyPatch):
    case = make([9, 20], heads=4, rank=32, rope=16)
    tensors = [case.q_latent, case.q_rope, case.cache, case.page_table, case.lengths]
    with pytest.raises(ValueError, match="page_table is on meta, q_latent on"):
        mla.check(*tensors[:3], case.page_table.to("meta"), case.lengths, 16, SCALE)
    monkeypatch.setattr(paged, "INTERPRETED", False)
    with pytest.raises(ValueError, match="q_latent is on cpu: Triton kernels need a GPU"):
        mla.mla_decode(*(t.cpu() for t in tensors), 16, SCALE)


def test_every_gpu_has_a_tile():
    for arch in ("sm80", "sm86", "sm90", "sm100", "sm120", "gfx942", "gfx950"):
        for rows in (1, 16, 17, 64, 128):
            assert mla_splits.config(arch, rows, torch.bfloat16).block_m >= 16


# ---- a step with chunks of prompts: `kernels/mla_extend.py`


@pytest.mark.parametrize(
    "lengths, new, expands",
    [
        ([9, 40, 70, 33], [1, 2, 40, 33], [False, False, True, True]),
        ([50, 20, 3, 21], [50, 1, 1, 20], [True, False, False, True]),
        ([70], [3], [False]),
    ],
    ids=str,
)
@pytest.mark.parametrize("heads_at_once", [1, 3])
def test_step_in_the_cheaper_form(lengths, new, expands, heads_at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Against the expanded form written out; decodes, short chunks and long ones in any order."""
    for name, size in dict(R=32, ROPE=16, NOPE=8, V=24).items():
        monkeypatch.setattr(test_reference_mla, name, size)
    case = test_reference_mla.make(sum(new), lengths, new, 4, heads=3)
    expected = mla_expanded(**case, page_size=4, scale=0.2)
    taken, numbers = [], (8 + 16 + 24) * 4 * sum(-(-length // 4) for length in lengths)
    monkeypatch.setattr(mla_extend, "MOST_NUMBERS", heads_at_once * numbers)
    for name in ("attend_expanded", "mla_extend"):
        do = getattr(mla_extend, name)
        monkeypatch.setattr(
            mla_extend, name, lambda *args, do=do, name=name: taken.append((name, len(args[-3]))) or do(*args)
        )
    case = {k: (t.float() if t.is_floating_point() else t).to(DEVICE) for k, t in case.items()}
    w_k, w_v, starts = case.pop("w_k"), case.pop("w_v"), [a - b for a, b in zip(lengths, new, strict=True)]
    where = case["cache"], case["page_table"], case["offsets"], case["lengths"], torch.tensor([*starts, *new])
    out = mla_extend.mla_step(case["q_nope"], case["q_rope"], torch.cat((w_k, w_v), 1), *where, 4, 0.2)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-5, atol=2e-5)
    names = {True: "attend_expanded", False: "mla_extend"}
    assert [name for name, count in taken for _ in range(count)] == [names[e] for e in expands]
