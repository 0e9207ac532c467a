"""Packed linear layers against F.linear.

pytest tests/test_linear.py
"""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import can_pack, pack, packed_linear, plain_linear, unpack
from layers import Linear

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES = [(1, 1), (48, 32), (33, 129), (7, 200)]  # [out, in]


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def weight_of(dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
    weight = random(dtype, *shape)
    if not can_pack(weight):
        pytest.skip(f"no packed {dtype} here")
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 16, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_equals_plain(dtype: torch.dtype, shape: tuple[int, int], rows: int, has_bias: bool):
    weight, x = weight_of(dtype, shape), random(dtype, rows, shape[1])
    bias = random(dtype, shape[0]) if has_bias else None
    y = packed_linear(x, pack(weight), bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == dtype and y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= DTYPES[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_are_kept_and_x_may_be_strided(dtype: torch.dtype):
    weight = weight_of(dtype, (24, 16))
    x = random(dtype, 3, 16, 5).transpose(1, 2)
    y = packed_linear(x, pack(weight))
    assert y.shape == (3, 5, 24)
    torch.testing.assert_close(y, F.linear(x, weight), rtol=DTYPES[dtype], atol=10 * DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_gives_the_same_numbers_back(dtype: torch.dtype, shape: tuple[int, int]):
    weight = weight_of(dtype, shape)
    packed = pack(weight)
    assert packed.is_mkldnn and packed.shape == weight.shape and packed.dtype == dtype
    assert unpack(packed).equal(weight)
    assert unpack(weight) is weight


def test_what_cannot_be_packed():
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float64))
    assert not can_pack(torch.zeros(4, 4, device="meta"))


def layer_of(weight: torch.Tensor, bias: torch.Tensor) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias=True)
    layer.weight.data, layer.bias.data = weight.clone(), bias
    return layer


def test_a_layer_packs_itself_once():
    weight, bias = weight_of(torch.float32, (24, 16)), random(torch.float32, 24)
    layer, x = layer_of(weight, bias), random(torch.float32, 3, 16)
    torch.testing.assert_close(layer(x), F.linear(x, weight, bias))
    for _ in range(2):
        layer.pack()
        assert layer.weight.is_mkldnn
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias))


def test_a_layer_unpacks_itself():
    weight, bias = weight_of(torch.float32, (24, 16)), random(torch.float32, 24)
    layer, x = layer_of(weight, bias), random(torch.float32, 3, 16)
    layer.pack()
    for _ in range(2):
        layer.unpack()
        assert layer.weight.equal(weight) and not layer.weight.is_mkldnn
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("with_bias", [True, False])
def test_plain_linear_eager_and_compiled(dtype: torch.dtype, rows: int, with_bias: bool):
    weight, x = random(dtype, 24, 16), random(dtype, rows, 16)
    bias = random(dtype, 24) if with_bias else None
    torch._dynamo.reset()  # each case is a graph of one function, and there is a limit to those
    compiled = torch.compile(plain_linear, fullgraph=True, backend="aot_eager", dynamic=False)
    with torch.inference_mode():
        expected = F.linear(x, weight, bias)
        for linear in (plain_linear, compiled):
            torch.testing.assert_close(linear(x, weight, bias), expected)


def test_compiles_in_one_graph():
    """Without code generation: what could break the graph is the op, or its fake implementation."""
    weight, bias = weight_of(torch.float32, (24, 16)), random(torch.float32, 24)
    layer, x = layer_of(weight, bias), random(torch.float32, 3, 16)
    layer.pack()
    compiled = torch.compile(lambda x: 2 * layer(x), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), 2 * F.linear(x, weight, bias))
