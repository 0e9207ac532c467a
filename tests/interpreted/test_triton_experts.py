"""`kernels/grouped.py` against experts written out in float64.

What the kernels allocate is NaN before they write, so a row that they forget or read too early shows. Weights of experts that
nobody chose are NaN, too. Seeds are fresh; FOLIO_SEED repeats one.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_experts.py
"""

import os
from collections.abc import Iterator

import pytest
import torch
from plain_experts import Layer, make_choices, make_layer, plain_experts
from torch import Tensor

from kernels import grouped, paged

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {F32: 1e-5, F16: 2e-3, BF16: 1.5e-2}  # of the largest output; the products' inputs are rounded once more


@pytest.fixture(autouse=True)
def fresh_seed_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    seed = int(os.environ.get("FOLIO_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"FOLIO_SEED={seed}")
    torch.manual_seed(seed)
    monkeypatch.setattr(paged, "DEBUG", True)  # an expert that does not exist would be a mistake of the test
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN, or the largest integer
    yield
    torch.use_deterministic_algorithms(False)


def poison(layer: Layer, chosen: Tensor) -> None:
    """Nothing of an expert that nobody chose may be read."""
    for e in set(range(len(layer.down))) - set(chosen.flatten().tolist()):
        for tensor in (layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias):
            if tensor is not None:
                tensor[e] = float("nan")


def check(
    T: int, E: int, k: int, hidden: int, size: int, dtype: torch.dtype, among: int | None = None, **knobs
) -> None:
    layer = make_layer(E, hidden, size, dtype, device=DEVICE, **knobs)
    x = torch.randn(T, hidden, device=DEVICE).to(dtype)
    chosen, weights = make_choices(T, E, k, DEVICE, among)
    poison(layer, chosen)
    out = grouped.grouped_experts(x, chosen, weights, *layer.arguments)
    expected = plain_experts(x, chosen, weights, layer)
    assert out.dtype == dtype and out.shape == x.shape
    assert (out.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("T, E, k", [(1, 8, 2), (5, 4, 1), (3, 6, 6), (20, 3, 2)])
def test_few_rows_of_an_expert(T: int, E: int, k: int, dtype):
    check(T, E, k, hidden=64, size=48, dtype=dtype)


@pytest.mark.parametrize("hidden, size", [(72, 40), (33, 17), (160, 16)])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_sizes_that_are_no_multiple_of_a_tile(hidden: int, size: int, dtype):
    check(4, 5, 2, hidden, size, dtype)


@pytest.mark.parametrize("rows", [40, 90])
def test_large_tiles(rows: int):
    """Enough rows for each expert that the tiles of prompts are taken, and more than one block of them."""
    tile = grouped.tile(paged.device_of(None if INTERPRETED else 0)[0], rows, F16)
    assert tile.block_m == (64 if rows <= 64 else 128)
    check(rows * 3, 3, 1, hidden=48, size=24, dtype=F16)


@pytest.mark.parametrize("among", [1, 2])
def test_all_tokens_on_the_same_experts(among: int):
    """One expert gets everything, the others nothing: many blocks of one, and the fewest in all."""
    check(37, 7, among, hidden=32, size=16, dtype=F32, among=among)


@pytest.mark.parametrize(
    "knobs",
    [
        dict(bias=True),
        dict(activation="gelu"),
        dict(activation="gelu_tanh"),
        dict(clamp=(1.702, 1.0)),
        dict(bias=True, clamp=(1.1, 0.5)),
        dict(weigh_input=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_what_families_differ_in(knobs: dict, dtype):
    check(6, 5, 2, hidden=32, size=24, dtype=dtype, **knobs)


def test_a_token_does_not_depend_on_its_company():
    """To the last bit, as long as the tile is the same."""
    layer = make_layer(4, 40, 24, F32, device=DEVICE)
    x = torch.randn(23, 40, device=DEVICE)
    chosen, weights = make_choices(23, 4, 2, DEVICE)
    together = grouped.grouped_experts(x, chosen, weights, *layer.arguments)
    for rows in (slice(0, 1), slice(5, 9), slice(22, 23)):
        alone = grouped.grouped_experts(x[rows], chosen[rows], weights[rows], *layer.arguments)
        assert alone.equal(together[rows])


@pytest.mark.parametrize("N, E", [(1, 1), (7, 3), (300, 5), (2500, 2)])
def test_the_sort(N: int, E: int):
    """Against a stable argsort; chosen in int32 as well. More than a chunk of choices, and of the large chunk."""
    chosen = torch.randint(E, (N,), device=DEVICE, dtype=torch.int32 if N % 2 else torch.int64)
    most = min(N, N // 16 + E)
    sizes = (N, E, most, most, 1)
    order, end, block_expert, block_row, blocks = (
        torch.empty(n, dtype=torch.int32, device=DEVICE).fill_(-1) for n in sizes
    )
    chunk = grouped.FEW if N <= grouped.FEW else grouped.MANY
    out = (order, end, block_expert, block_row, blocks)
    grouped.sort_kernel[(E,)](chosen, *out, N, E=E, BINS=8, CHUNK=chunk, BLOCK_M=16)
    counts = chosen.bincount(minlength=E)
    assert order.tolist() == chosen.argsort(stable=True).tolist()
    assert end.tolist() == counts.cumsum(0).tolist()
    starts = (counts.cumsum(0) - counts).tolist()
    expected = [(e, start + i) for e, start in enumerate(starts) for i in range(0, counts[e], 16)]
    found = list(zip(block_expert.tolist(), block_row.tolist(), strict=True))
    assert found == expected + [(-1, -1)] * (most - len(expected)) and blocks.tolist() == [len(expected)]


def test_no_tokens_at_all():
    layer = make_layer(3, 16, 8, F32, device=DEVICE)
    chosen, weights = make_choices(0, 3, 2, DEVICE)
    assert grouped.grouped_experts(torch.empty(0, 16, device=DEVICE), chosen, weights, *layer.arguments).shape == (
        0,
        16,
    )


def test_traced_into_one_graph():
    layer = make_layer(4, 32, 16, F32, device=DEVICE)
    compiled = torch.compile(
        lambda x, c, w: grouped.grouped_experts(x * 2, c, w, *layer.arguments) + x, fullgraph=True, backend="aot_eager"
    )
    for T in (3, 5):
        x = torch.randn(T, 32, device=DEVICE)
        chosen, weights = make_choices(T, 4, 2, DEVICE)
        expected = grouped.grouped_experts(x * 2, chosen, weights, *layer.arguments) + x
        assert compiled(x, chosen, weights).equal(expected)


WRONG = {
    "gate_up must be": lambda a: {"gate_up": a["gate_up"][0]},
    "down is": lambda a: {"down": a["down"].transpose(1, 2).contiguous()},
    "down must be contiguous": lambda a: {"down": torch.zeros(4, 8, 16, device=DEVICE).transpose(1, 2)},
    "weights is": lambda a: {"weights": a["weights"][:, :1]},
    "gate_up has another dtype": lambda a: {"gate_up": a["gate_up"].half()},
    "weights are": lambda a: {"weights": a["weights"].half()},
    "chosen is": lambda a: {"chosen": a["chosen"].float()},
    "experts that are not among the 4": lambda a: {"chosen": a["chosen"] + 3},
    "no kernel for experts": lambda a: {n: a[n].double() for n in ("x", "gate_up", "down")},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_together(message: str):
    layer = make_layer(4, 16, 8, F32, device=DEVICE)
    chosen, weights = make_choices(3, 4, 2, DEVICE)
    arguments = dict(x=torch.zeros(3, 16, device=DEVICE), chosen=chosen, weights=weights) | vars(layer)
    arguments |= WRONG[message](arguments)
    with pytest.raises(ValueError, match=message):
        grouped.grouped_experts(**arguments)
