"""The experts on a CPU, packed, plain and compiled, against experts written out in float64.

pytest tests/test_experts.py
"""

import pytest
import torch
from plain_experts import Layer, make_choices, make_layer, plain_experts
from torch import Tensor

from kernels.experts import experts, tokens_per_expert
from kernels.linear import can_pack, pack

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}
KNOBS = [
    dict(),
    dict(bias=True),
    dict(activation="gelu"),
    dict(activation="gelu_tanh"),
    dict(clamp=(1.702, 1.0)),
    dict(bias=True, clamp=(1.1, 0.5)),
    dict(weigh_input=True),
    dict(weigh_input=True, bias=True),
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def both(layer: Layer) -> list[tuple]:
    """The arguments with plain weights, and with packed ones where there are such."""
    gate_up, down, *rest = layer.arguments
    if not can_pack(gate_up):
        return [layer.arguments]
    return [layer.arguments, ([pack(w) for w in gate_up], [pack(w) for w in down], *rest)]


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() <= DTYPES[out.dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("T", [1, 2, 17])
def test_plain_and_packed(T: int, knobs: dict, dtype: torch.dtype):
    layer = make_layer(6, 40, 24, dtype, **knobs)
    x = torch.randn(T, 40).to(dtype)
    chosen, weights = make_choices(T, 6, 3)
    expected = plain_experts(x, chosen, weights, layer)
    for arguments in both(layer):
        assert_close(experts(x, chosen, weights, *arguments), expected)


@pytest.mark.parametrize("T, E, k", [(1, 1, 1), (9, 4, 4), (30, 2, 1), (0, 3, 2)])
def test_numbers_of_tokens_and_experts(T: int, E: int, k: int):
    layer = make_layer(E, 16, 8, torch.float32)
    x, (chosen, weights) = torch.randn(T, 16), make_choices(T, E, k)
    expected = plain_experts(x, chosen, weights, layer)
    for arguments in both(layer):
        out = experts(x, chosen, weights, *arguments)
        assert out.shape == (T, 16)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_only_the_experts_that_were_chosen_are_read():
    layer = make_layer(8, 16, 8, torch.float32, bias=True)
    x = torch.randn(3, 16)
    chosen, weights = make_choices(3, 8, 2, among=4)
    for tensor in (layer.gate_up, layer.down, layer.gate_up_bias, layer.down_bias):
        tensor[4:] = float("nan")
    for arguments in both(layer):
        assert experts(x, chosen, weights, *arguments).isfinite().all()
    chosen[0, 0] = 5
    assert not experts(x, chosen, weights, *layer.arguments)[0].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_its_company(dtype: torch.dtype):
    """But for how oneDNN adds up a product of one row and of more."""
    layer = make_layer(8, 64, 48, dtype)
    x, (chosen, weights) = torch.randn(40, 64).to(dtype), make_choices(40, 8, 3)
    for arguments in both(layer):
        together = experts(x, chosen, weights, *arguments)
        for rows in (slice(0, 1), slice(7, 20), slice(39, 40)):
            alone = experts(x[rows], chosen[rows], weights[rows], *arguments)
            assert (alone - together[rows]).abs().max() <= torch.finfo(dtype).eps * 8 * together.abs().max()
        turned = experts(x.flip(0), chosen.flip(0), weights.flip(0), *arguments).flip(0)
        assert (turned - together).abs().max() <= torch.finfo(dtype).eps * 8 * together.abs().max()


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("knobs", [KNOBS[0], KNOBS[5], KNOBS[7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_into_one_graph(T: int, knobs: dict, dtype: torch.dtype):
    """A single row as loops over plain weights, all else as the op. Without code generation, which adds nothing here."""
    layer = make_layer(5, 24, 16, dtype, **knobs)
    x, (chosen, weights) = torch.randn(T, 24).to(dtype), make_choices(T, 5, 2)
    expected = plain_experts(x * 2, chosen, weights, layer)
    for arguments in both(layer):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, c, w, a=arguments: experts(x * 2, c, w, *a), fullgraph=True, backend="aot_eager", dynamic=False
        )
        with torch.inference_mode():
            assert_close(compiled(x, chosen, weights), expected)


def test_one_graph_for_any_number_of_tokens():
    layer = make_layer(5, 24, 16, torch.float32)
    arguments, graphs = both(layer)[-1], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, c, w: experts(x, c, w, *arguments), fullgraph=True, backend=backend, dynamic=True
    )
    with torch.inference_mode():
        for T in (4, 3, 40, 7):  # not k at first: equal sizes are taken for one and the same
            x, (chosen, weights) = torch.randn(T, 24), make_choices(T, 5, 2)
            assert_close(compiled(x, chosen, weights), plain_experts(x, chosen, weights, layer))
    assert len(graphs) == 1


def test_tokens_per_expert():
    chosen = torch.tensor([[0, 3], [3, 1], [3, 0]])
    assert tokens_per_expert(chosen, 5).tolist() == [2, 1, 0, 3, 0]
