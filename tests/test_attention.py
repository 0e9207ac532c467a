"""Attention over pages against a float64 loop over single queries; slots that must not be read or written are poisoned.

pytest tests/test_attention.py
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.reference import attention_bias, history_slots, paged_attention, write_kv, write_slots

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


def positions_of(case: Case, new: list[int]) -> Tensor:
    """The last `new[b]` tokens of each row, filled up with padding on the left."""
    Q = max(new)
    return torch.tensor([[-1] * (Q - n) + list(range(L - n, L)) for L, n in zip(case.lengths, new, strict=True)])


def write(case: Case, positions: Tensor) -> None:
    """Write the tokens at `positions` through write_slots and write_kv; padding tokens carry POISON of the other sign."""
    B, Q = positions.shape
    k, v = (torch.full((B, Q, case.kv_heads, case.dim), -POISON) for _ in range(2))
    for b, row in enumerate(positions.tolist()):
        for q, p in enumerate(row):
            if p >= 0:
                k[b, q], v[b, q] = case.history[b][0][p], case.history[b][1][p]
    write_kv(case.keys, case.values, write_slots(case.table, positions, case.page_size), k, v)


def write_all(case: Case) -> None:
    """The whole history, the shorter rows padded."""
    write(case, positions_of(case, case.lengths))


def attend(case: Case, q: Tensor, positions: Tensor, window: int | None, scale: float, softcap: float | None) -> Tensor:
    slots = history_slots(case.table, case.page_size)
    bias = attention_bias(positions, slots.shape[1], window, case.heads // case.kv_heads, q.dtype)
    return paged_attention(q, case.keys.to(q.dtype), case.values.to(q.dtype), slots, bias, scale, softcap)


def naive(case: Case, q: Tensor, b: int, head: int, position: int, window, scale, softcap) -> Tensor:
    """One query, one head, in float64: q [D] -> [D]."""
    first = 0 if window is None else max(0, position - window + 1)
    k, v = (t[first : position + 1, head // (case.heads // case.kv_heads)].double() for t in case.history[b])
    scores = [float(q.double() @ row) * scale for row in k]
    if softcap is not None:
        scores = [math.tanh(s / softcap) * softcap for s in scores]
    weights = torch.tensor(scores, dtype=torch.float64).exp()
    return (weights[:, None] * v).sum(0) / weights.sum()


def assert_matches(case: Case, positions: Tensor, window=None, scale=0.3, softcap=None, dtype=torch.float32, tol=1e-5):
    B, Q = positions.shape
    q = torch.randn(B, Q, case.heads, case.dim)
    out = attend(case, q.to(dtype), positions, window, scale, softcap)
    assert out.shape == q.shape and out.dtype == dtype
    assert out.isfinite().all()  # padding queries too
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            for h in range(case.heads if p >= 0 else 0):
                expected = naive(case, q[b, i, h], b, h, p, window, scale, softcap)
                torch.testing.assert_close(out[b, i, h].double(), expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("new", [[1, 1, 1], [3, 1, 5], [1, 7, 0]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_paged_attention(page_size: int, new: list[int], heads: int, kv_heads: int):
    case = make(page_size + heads + sum(new), [7, 33, 16], page_size, heads, kv_heads)
    write_all(case)
    assert_matches(case, positions_of(case, new))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 100])
@pytest.mark.parametrize("page_size", [4, 16])
def test_window_and_softcap(page_size: int, window: int | None, softcap: float | None):
    case = make(page_size, [5, 30], page_size, heads=4, kv_heads=2)
    write_all(case)
    assert_matches(case, positions_of(case, [1, 1]), window, softcap=softcap)
    assert_matches(case, positions_of(case, [3, 6]), window, softcap=softcap)


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed: int):
    gen = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=gen))

    kv_heads, page_size = pick(1, 3), pick(1, 9)
    lengths = [pick(1, 25) for _ in range(pick(1, 4))]
    case = make(seed, lengths, page_size, kv_heads * pick(1, 3), kv_heads, dim=2 * pick(1, 6))
    write_all(case)
    window, softcap = [None, pick(1, 12)][pick(0, 1)], [None, 1.5][pick(0, 1)]
    assert_matches(case, positions_of(case, [pick(1, n) for n in lengths]), window, 0.1 * pick(1, 9), softcap)


def test_history_written_in_pieces_equals_history_written_at_once():
    at_once, pieces = (make(0, [9, 14], 4, 4, 2) for _ in range(2))
    write_all(at_once)
    for start in range(0, 14, 3):
        write(pieces, torch.tensor([[p if p < n else -1 for p in range(start, start + 3)] for n in (9, 14)]))
    assert at_once.keys[4:].equal(pieces.keys[4:]) and at_once.values[4:].equal(pieces.values[4:])


def test_bfloat16():
    case = make(3, [9, 21], 4, 4, 2)
    case.history = [tuple(t.bfloat16().float() for t in kv) for kv in case.history]
    write_all(case)
    for softcap in (None, 3.0):
        assert_matches(case, positions_of(case, [2, 5]), softcap=softcap, dtype=torch.bfloat16, tol=0.05)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_every_token_is_written_to_its_own_slot_and_padding_to_slot_0(page_size: int):
    case = make(1, [6, 20, 3], page_size, 2, 2)
    positions = positions_of(case, [2, 5, 0])
    write(case, positions)
    expected = [torch.full_like(case.keys, POISON) for _ in range(2)]
    for cached, kind in zip(expected, (0, 1), strict=True):
        cached[0] = -POISON
        for b, row in enumerate(positions.tolist()):
            for p in [p for p in row if p >= 0]:
                cached[int(case.table[b, p // page_size]) * page_size + p % page_size] = case.history[b][kind][p]
    assert case.keys.equal(expected[0]) and case.values.equal(expected[1])


def test_a_row_of_padding_reads_and_writes_only_slot_0():
    """A padded row of a batch: position -1, a table of zeros. It changes nothing for the others."""
    case = make(2, [11], 4, 4, 2)
    write_all(case)
    before = case.keys.clone(), case.values.clone()
    case.table = torch.cat([case.table, torch.zeros_like(case.table)])
    positions = torch.tensor([[10], [-1]])
    write(case, positions)
    assert case.keys[1:].equal(before[0][1:]) and case.values[1:].equal(before[1][1:])
    assert (case.keys[0] == -POISON).all()
    assert_matches(case, positions)


def test_history_slots():
    table = torch.tensor([[5, 2], [1, 0]])
    assert history_slots(table, 3).tolist() == [[15, 16, 17, 6, 7, 8], [3, 4, 5, 0, 1, 2]]
    assert write_slots(table, torch.tensor([[2, 4], [-1, 0]]), 3).tolist() == [17, 7, 0, 3]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_bias(groups: int, dtype: torch.dtype):
    positions = torch.tensor([[3, -1, 0]])
    for window, seen in {None: [[0, 1, 2, 3], [0], [0]], 2: [[2, 3], [0], [0]], 1: [[3], [0], [0]]}.items():
        bias = attention_bias(positions, 6, window, groups, dtype)
        assert bias.shape == (1, 1, groups * 3, 6) and bias.dtype == dtype
        expected = torch.full((3, 6), float("-inf"), dtype=dtype)
        for row, columns in zip(expected, seen, strict=True):
            row[columns] = 0
        assert bias[0, 0].equal(expected.repeat(groups, 1))
