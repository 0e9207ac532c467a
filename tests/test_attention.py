"""Attention over pages against a float64 loop over single queries; slots that must not be read or written are poisoned.

pytest tests/test_attention.py
"""

import importlib.util
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from errors import UserError
from kernels.dispatch import Layout, attend, choose_backend, lay_out
from kernels.reference import attention_bias, history_slots, pieces
from kernels.reference_write import write_kv
from kernels.variants import CAUSAL, MASK_MODS, SCORE_MODS, MaskMod, Variant, jit, model_variant, tl

POISON = 1e4  # in every slot that no token was written to: one that is read by mistake drowns the rest


@dataclass
class Case:
    """B sequences of random lengths, on shuffled pages; each row's history, kept apart in plain order."""

    page_size: int
    heads: int
    kv_heads: int
    dim: int
    lengths: list[int]
    table: Tensor
    history: list[tuple[Tensor, Tensor]]  # a row: keys, values [L, K, D]
    keys: Tensor
    values: Tensor


def make(seed: int, lengths: list[int], page_size: int, heads: int, kv_heads: int, dim: int = 8) -> Case:
    torch.manual_seed(seed)
    counts = [-(-n // page_size) for n in lengths]
    order = (1 + torch.randperm(sum(counts) + 3)).tolist()  # three pages stay without an owner
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int64)  # columns beyond the end name page 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
    slots = (sum(counts) + 4) * page_size
    history = [(torch.randn(n, kv_heads, dim), torch.randn(n, kv_heads, dim)) for n in lengths]
    keys, values = (torch.full((slots, kv_heads, dim), POISON) for _ in range(2))
    return Case(page_size, heads, kv_heads, dim, lengths, table, history, keys, values)


def layout_of(
    case: Case,
    new: list[int],
    variant: Variant = CAUSAL,
    dtype: torch.dtype = torch.float32,
    backend: str = "sdpa",
) -> Layout:
    """A step with the last `new[b]` tokens of each sequence."""
    starts = [length - n for length, n in zip(case.lengths, new, strict=True)]
    variants = [variant, model_variant(None, 3)]
    spans = torch.tensor([starts, new])
    groups = case.heads // case.kv_heads
    return lay_out(starts, new, spans, case.table, case.page_size, backend, variants, groups, dtype)


def tokens_of(case: Case, new: list[int]) -> list[tuple[int, int]]:
    """(sequence, position) of each token of such a step."""
    return [(b, p) for b, n in enumerate(new) for p in range(case.lengths[b] - n, case.lengths[b])]


def write(case: Case, new: list[int]) -> None:
    k, v = (torch.stack([case.history[b][kind][p] for b, p in tokens_of(case, new)]) for kind in (0, 1))
    write_kv(case.keys, case.values, layout_of(case, new).write_slots, k, v)


def naive(
    case: Case, q: Tensor, b: int, head: int, position: int, scale, window, softcap, slopes, sinks, chunk
) -> Tensor:
    """One query, one head, in float64: q [D] -> [D]."""
    first = 0 if window is None else max(0, position - window + 1)
    if chunk is not None:
        first = position - position % chunk
    k, v = (t[first : position + 1, head // (case.heads // case.kv_heads)].double() for t in case.history[b])
    scores = [float(q.double() @ row) * scale for row in k]
    if softcap is not None:
        scores = [math.tanh(s / softcap) * softcap for s in scores]
    if slopes is not None:
        scores = [s - float(slopes[head]) * (position - j) for j, s in enumerate(scores, first)]
    weights = torch.tensor(scores, dtype=torch.float64).exp()
    total = weights.sum() + (0 if sinks is None else float(sinks[head].exp()))
    return (weights[:, None] * v).sum(0) / total


def assert_matches(
    case: Case,
    new: list[int],
    window=None,
    scale=0.3,
    softcap=None,
    slopes=None,
    sinks=None,
    chunk=None,
    dtype=torch.float32,
    tol=1e-5,
    backends=("sdpa", "reference"),
):
    variant = model_variant(softcap, window, chunk)
    if slopes is not None:
        variant = replace(variant, score_mod="alibi", score_args=(slopes,))
    q = torch.randn(sum(new), case.heads, case.dim)
    keys, values = case.keys.to(dtype), case.values.to(dtype)
    for backend in backends:
        layout = layout_of(case, new, variant, dtype, backend)
        out = attend(layout, q.to(dtype), keys, values, scale, variant, sinks)
        assert out.shape == q.shape and out.dtype == dtype
        assert layout.positions.tolist() == [p for _, p in tokens_of(case, new)]
        for i, (b, p) in enumerate(tokens_of(case, new)):
            for h in range(case.heads):
                expected = naive(case, q[i, h], b, h, p, scale, window, softcap, slopes, sinks, chunk)
                torch.testing.assert_close(out[i, h].double(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("new", [[1, 1, 1], [3, 1, 5], [1, 1, 7], [4, 2, 1], [7, 33, 16]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_paged_attention(page_size: int, new: list[int], heads: int, kv_heads: int):
    case = make(page_size + heads + sum(new), [7, 33, 16], page_size, heads, kv_heads)
    write(case, case.lengths)
    assert_matches(case, new)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
@pytest.mark.parametrize("page_size", [4, 16])
def test_window_and_softcap(page_size: int, window: int | None, softcap: float | None):
    case = make(page_size, [5, 30], page_size, heads=4, kv_heads=2)
    write(case, case.lengths)
    assert_matches(case, [1, 1], window, softcap=softcap)
    assert_matches(case, [3, 6], window, softcap=softcap)


@pytest.mark.parametrize("window", [None, 5])
def test_alibi_and_sinks(window: int | None):
    case = make(7, [5, 30], 4, heads=4, kv_heads=2)
    write(case, case.lengths)
    slopes, sinks = torch.rand(4), torch.randn(4)
    for new in ([1, 1], [3, 6]):
        assert_matches(case, new, window, slopes=slopes)
        assert_matches(case, new, window, sinks=sinks)
        assert_matches(case, new, window, slopes=slopes, sinks=sinks)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks(chunk: int):
    """Chunks of tokens that do not see each other, which begin and end anywhere in a page and in a chunk of a prompt."""
    case = make(11, [5, 30, 8], 4, heads=4, kv_heads=2)
    write(case, case.lengths)
    for new in ([1, 1, 1], [3, 16, 1]):
        assert_matches(case, new, chunk=chunk)
        assert_matches(case, new, softcap=2.0, sinks=torch.randn(4), chunk=chunk)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_beside_pytorchs_own_attention(dtype: torch.dtype, groups: int):
    """Sinks far below and far above every score, one of them of the dtype of the weights; and SDPA is what ran."""
    case = make(12, [6, 21], 4, heads=2 * groups, kv_heads=2)
    case.history = [tuple(t.to(dtype).float() for t in kv) for kv in case.history]
    write(case, case.lengths)
    sinks = torch.linspace(-60, 60, 2 * groups).to(dtype)
    tol = 1e-5 if dtype == torch.float32 else 0.05
    for new in ([1, 1], [6, 9]):
        assert_matches(case, new, sinks=sinks, dtype=dtype, tol=tol)
    q = torch.randn(2, 2 * groups, case.dim, dtype=dtype)
    layout, cache = layout_of(case, [1, 1], dtype=dtype), (case.keys.to(dtype), case.values.to(dtype))
    with torch.profiler.profile() as profile:
        attend(layout, q, *cache, 0.3, CAUSAL, sinks)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.name for event in profile.events()}


@jit
def clip(score, query, key, head, args):
    return tl.minimum(tl.maximum(score, -args[0]), args[0])


@jit
def same_document(query, key, args):
    return query // args[0] == key // args[0]


def test_a_variant_of_the_users_own(monkeypatch: pytest.MonkeyPatch):
    """The example that `kernels/variants.py` opens with: its mask through SDPA, the whole through the reference."""
    monkeypatch.setitem(SCORE_MODS, "clip", clip)
    monkeypatch.setitem(MASK_MODS, "document", MaskMod(same_document))
    case = make(8, [30], 4, heads=2, kv_heads=1)
    write(case, case.lengths)
    q = torch.randn(20, 2, case.dim)
    keys, values = (t[:, 0].double() for t in case.history[0])
    query, key = torch.arange(10, 30)[:, None], torch.arange(30)
    both, only_mask = Variant("clip", (0.5,), "document", (12,)), Variant("", (), "document", (12,))
    for bound, variant in ((0.5, both), (1e9, only_mask)):
        scores = (torch.einsum("qhd,kd->hqk", q.double(), keys) * 0.3).clamp(-bound, bound)
        scores = scores.masked_fill((key > query) | (key // 12 != query // 12), float("-inf"))
        expected = torch.einsum("hqk,kd->qhd", scores.softmax(-1), values)
        for backend in ("sdpa", "reference"):
            out = attend(layout_of(case, [20], variant, backend=backend), q, case.keys, case.values, 0.3, variant)
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_nan_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MASK_MODS, "nothing", MaskMod(lambda query, key, args: key < args[0]))
    case = make(9, [6], 4, heads=2, kv_heads=1)
    write(case, case.lengths)
    q, nothing = torch.randn(2, 2, case.dim), Variant(mask_mod="nothing", mask_args=(0,))
    assert not attend(layout_of(case, [2], nothing, backend="reference"), q, case.keys, case.values, 1.0, nothing).any()
    q[1, 0, 0] = float("nan")
    out = attend(layout_of(case, [2], backend="reference"), q, case.keys, case.values, 1.0, CAUSAL)
    assert out[1, 0].isnan().all() and out[0].isfinite().all() and out[1, 1].isfinite().all()


def test_which_backend():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu, 64) == "sdpa"
    assert choose_backend("reference", cuda, 64) == "reference"
    with pytest.raises(UserError, match="one of auto, reference, sdpa, triton, not 'flash'"):
        choose_backend("flash", cpu, 64)
    with pytest.raises(UserError, match="needs a GPU, not cpu|not installed"):
        choose_backend("triton", cpu, 64)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_which_backend_on_a_gpu():
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, 256) == choose_backend("triton", cuda, 80) == "triton"
    for head_dim in (20, 264):
        with pytest.raises(UserError, match=f"multiples of 8, up to 256, not {head_dim}: use 'sdpa'"):
            choose_backend("auto", cuda, head_dim)
        assert choose_backend("sdpa", cuda, head_dim) == "sdpa"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_which_backend_for_a_latent_on_a_gpu():
    cuda = torch.device("cuda")
    assert choose_backend("auto", cuda, 500, latent=(512, 64)) == "triton"  # a head of that size is never made
    for latent in ((500, 64), (512, 8), (512, 48)):
        with pytest.raises(UserError, match=f"powers of 2, at least 16, not {latent[0]} and {latent[1]}: use 'sdpa'"):
            choose_backend("auto", cuda, 128, latent)
        assert choose_backend("sdpa", cuda, 128, latent) == "sdpa"


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int):
    gen = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=gen))

    kv_heads, page_size = pick(1, 3), pick(1, 9)
    lengths = [pick(1, 25) for _ in range(pick(1, 4))]
    case = make(seed, lengths, page_size, kv_heads * pick(1, 3), kv_heads, dim=2 * pick(1, 6))
    write(case, case.lengths)
    window, softcap = [None, pick(1, 12)][pick(0, 1)], [None, 1.5][pick(0, 1)]
    assert_matches(case, [pick(1, n) for n in lengths], window, 0.1 * pick(1, 9), softcap)


def test_history_written_in_pieces_equals_history_written_at_once():
    at_once, pieces = (make(0, [9, 14], 4, 4, 2) for _ in range(2))
    write(at_once, at_once.lengths)
    for lengths, new in (([4, 3], [4, 3]), ([5, 10], [1, 7]), ([9, 14], [4, 4])):
        pieces.lengths = lengths
        write(pieces, new)
    assert at_once.keys.equal(pieces.keys) and at_once.values.equal(pieces.values)


@pytest.mark.parametrize("queries", [1, 3, 16])
def test_blocks_of_queries(monkeypatch: pytest.MonkeyPatch, queries: int):
    """A chunk that is cut into blocks, the last of them shorter, beside decodes."""
    monkeypatch.setattr("kernels.reference.QUERIES", queries)
    case = make(4, [9, 22, 17, 5], 4, 4, 2)
    write(case, case.lengths)
    for window in (None, 5):
        assert_matches(case, [1, 19, 17, 1], window)


@pytest.mark.parametrize("near", [1, 2, 3])  # histories that are gathered together
@pytest.mark.parametrize("new", [[1, 1, 1, 1, 1], [1, 1, 9, 1, 1]], ids=str)
def test_histories_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, new: list[int], near: int):
    case = make(5, [20, 37, 41, 9, 30], 16, heads=4, kv_heads=2)
    row = 2 * 8 * 4
    longest = 48 * row  # in whole pages
    monkeypatch.setattr("kernels.reference.NEAR", near * longest)
    assert next(pieces(torch.tensor([5, 1, 48]), row)) == (near, 1, 48)
    write(case, case.lengths)
    assert_matches(case, new)


def test_bfloat16():
    case = make(3, [9, 21], 4, 4, 2)
    case.history = [tuple(t.bfloat16().float() for t in kv) for kv in case.history]
    write(case, case.lengths)
    for softcap in (None, 3.0):
        assert_matches(case, [2, 5], softcap=softcap, dtype=torch.bfloat16, tol=0.05)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_every_token_is_written_to_its_own_slot_and_no_other(page_size: int):
    case, new = make(1, [6, 20, 3], page_size, 2, 2), [2, 5, 1]
    write(case, new)
    for cached, kind in ((case.keys, 0), (case.values, 1)):
        expected = torch.full_like(cached, POISON)
        for b, p in tokens_of(case, new):
            expected[int(case.table[b, p // page_size]) * page_size + p % page_size] = case.history[b][kind][p]
        assert cached.equal(expected)


def test_padding_reads_and_writes_only_page_0():
    """A sequence with a table of zeros changes nothing for the others."""
    case = make(2, [11], 4, 4, 2)
    write(case, [11])
    before = case.keys.clone()
    case.table = torch.cat([case.table, torch.zeros_like(case.table)])
    case.lengths, case.history = [11, 1], case.history * 2
    write(case, [1, 1])
    assert case.keys[4:].equal(before[4:]) and not case.keys[:4].equal(before[:4])
    assert_matches(case, [1, 1])


def test_runs_of_single_tokens_are_one_rectangle():
    case = make(0, [5, 9, 2, 30, 8], 4, 2, 2)
    layout = layout_of(case, [1, 1, 1, 7, 1])
    assert layout.history.shapes.view(-1, 3).tolist() == [[3, 1, 12], [1, 7, 32], [1, 1, 8]]


def test_history_slots():
    table = torch.tensor([[5, 2], [1, 0]])
    slots = history_slots(table, torch.tensor([4, 1]), 3)
    assert slots.tolist() == [[15, 16, 17, 6, 7, 7], [3, 4, 4, 4, 4, 4]]  # behind the last token, it is repeated


def test_nan_behind_the_last_token_is_not_read():
    """On the same page, and on pages that a longer sequence of the same step makes the table name."""
    case = make(5, [9, 2], 4, 4, 2)
    write(case, case.lengths)
    assert_matches(case, [1, 1])
    written = torch.zeros(len(case.keys), dtype=torch.bool)
    for b, length in enumerate(case.lengths):
        written[history_slots(case.table[b : b + 1], torch.tensor([length - 1]), 4)] = True
    case.keys[~written], case.values[~written] = float("nan"), float("nan")
    assert_matches(case, [1, 1])
    assert_matches(case, [3, 2])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_bias(groups: int, dtype: torch.dtype):
    positions = torch.tensor([[3, 0, 0]])
    for window, seen in {None: [[0, 1, 2, 3], [0], [0]], 2: [[2, 3], [0], [0]], 1: [[3], [0], [0]]}.items():
        bias = attention_bias(positions, 6, model_variant(None, window).mask, groups, dtype)
        assert bias.shape == (1, 1, groups * 3, 6) and bias.dtype == dtype
        expected = torch.full((3, 6), float("-inf"), dtype=dtype)
        for row, columns in zip(expected, seen, strict=True):
            row[columns] = 0
        assert bias[0, 0].equal(expected.repeat(groups, 1))
