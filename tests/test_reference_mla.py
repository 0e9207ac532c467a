"""The two forms of MLA in plain PyTorch against each other, in float64, and against a loop over single queries.

pytest tests/test_reference_mla.py
"""

import pytest
import torch
from torch import Tensor

from kernels.reference_mla import absorb_query, mla_absorbed, mla_expanded, project_output

R, ROPE, NOPE, V = 24, 8, 12, 10


def make(seed: int, lengths: list[int], new: list[int], page_size: int, heads: int) -> dict[str, Tensor]:
    """Random weights and queries; latents on shuffled pages; NaN in every slot that nobody owns."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    counts = [-(-n // page_size) for n in lengths]
    order = (1 + torch.randperm(sum(counts) + 2, generator=g)).tolist()
    table = torch.zeros(len(lengths), max(counts) + 1, dtype=torch.int64)
    cache = torch.full(((sum(counts) + 3) * page_size, R + ROPE), float("nan"), dtype=torch.float64)
    for row, count, length in zip(table, counts, lengths, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
        entry = torch.arange(length)
        cache[row[entry // page_size] * page_size + entry % page_size] = randn(length, R + ROPE)
    tokens = sum(new)
    return dict(
        q_nope=randn(tokens, heads, NOPE),
        q_rope=randn(tokens, heads, ROPE),
        w_k=randn(heads, NOPE, R),
        w_v=randn(heads, V, R),
        cache=cache,
        page_table=table,
        offsets=torch.tensor([0, *new]).cumsum(0),
        lengths=torch.tensor(lengths),
    )


def absorbed(case: dict[str, Tensor], page_size: int, scale: float) -> Tensor:
    case = dict(case)
    q_nope, w_k, w_v = case.pop("q_nope"), case.pop("w_k"), case.pop("w_v")
    out = mla_absorbed(absorb_query(q_nope, w_k), **case, page_size=page_size, scale=scale)
    return project_output(out, w_v)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("new", [[1, 1, 1], [7, 2, 40], [3, 0, 17]], ids=str)
@pytest.mark.parametrize("heads", [1, 5])
def test_absorbed_and_expanded_agree(page_size: int, new: list[int], heads: int):
    case = make(page_size + heads, [7, 2, 40], new, page_size, heads)
    out = mla_expanded(**case, page_size=page_size, scale=0.2)
    assert out.shape == (sum(new), heads, V) and out.isfinite().all()
    torch.testing.assert_close(absorbed(case, page_size, 0.2), out, rtol=1e-12, atol=1e-12)


def test_single_queries():
    """Written out for one query and one head at a time, from the definition."""
    lengths, new, page_size, scale = [6, 9], [2, 4], 4, 0.3
    case = make(0, lengths, new, page_size, heads=3)
    out = mla_expanded(**case, page_size=page_size, scale=scale)
    token = 0
    for b, (length, count) in enumerate(zip(lengths, new, strict=True)):
        rows = [
            case["cache"][int(case["page_table"][b, j // page_size]) * page_size + j % page_size] for j in range(length)
        ]
        for position in range(length - count, length):
            for h in range(3):
                w_k, w_v = case["w_k"][h], case["w_v"][h]
                q_nope, q_rope = case["q_nope"][token, h], case["q_rope"][token, h]
                seen = rows[: position + 1]
                scores = torch.stack([scale * (q_nope @ (w_k @ row[:R]) + q_rope @ row[R:]) for row in seen])
                expected = sum(w * (w_v @ row[:R]) for w, row in zip(scores.softmax(0), seen, strict=True))
                torch.testing.assert_close(out[token, h], expected)
            token += 1


def test_empty_sequences_and_padding_give_zeros():
    case = make(1, [0, 5], [1, 2], 4, heads=2)
    for name in ("q_nope", "q_rope"):  # two tokens of padding
        case[name] = torch.cat([case[name], case[name].new_full((2, *case[name].shape[1:]), float("nan"))])
    for out in (mla_expanded(**case, page_size=4, scale=0.2), absorbed(case, 4, 0.2)):
        assert out[0].eq(0).all() and out[1:3].ne(0).all()
        assert out[3:].nan_to_num(0).eq(0).all()
    inner = {k: v for k, v in case.items() if k not in ("q_nope", "w_k", "w_v")}
    out = mla_absorbed(torch.randn(5, 2, R, dtype=torch.float64), **inner, page_size=4, scale=0.2)
    assert out[3:].eq(0).all()
