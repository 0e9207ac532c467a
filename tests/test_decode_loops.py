"""Decode attention in loops against `paged_reference` in float64, eager and compiled; slots of other sequences hold NaN.

pytest tests/test_decode_loops.py
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from kernels.decode_loops import decode_in_loops
from kernels.reference import history_slots, paged_reference
from kernels.variants import CAUSAL, MASK_MODS, MaskMod, Variant, model_variant

PAGES = 128
Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, keys, values, slots, positions


def step(lengths: list[int], page_size: int = 4, H: int = 4, K: int = 2, D: int = 8, V: int = 8) -> Step:
    """One new token of each sequence, on shuffled pages. What no sequence owns is NaN."""
    torch.manual_seed(len(lengths) + H + D)
    B, N = len(lengths), -(-max(lengths) // page_size)
    table = torch.randperm(PAGES)[: B * N].view(B, N)
    last = torch.tensor(lengths) - 1
    slots = history_slots(table, last, page_size)
    keys = torch.full((PAGES * page_size, K, D), float("nan"))
    values = torch.full((len(keys), K, V), float("nan"))
    owned = slots.unique()
    keys[owned], values[owned] = torch.randn(len(owned), K, D), torch.randn(len(owned), K, V)
    return torch.randn(B, H, D), keys, values, slots, last


def reference(args: Step, scale: float, variant: Variant, sinks: Tensor | None) -> Tensor:
    """The same step in float64, of the numbers as they were rounded."""
    q, keys, values, slots, positions = args
    q, keys, values = q.double(), keys.double(), values.double()
    shapes = torch.tensor([len(q), 1, slots.shape[1]])
    return paged_reference(q, keys, values, slots.flatten(), shapes, scale, positions, *variant.flat, sinks)


def assert_matches(
    args: Step,
    variant: Variant = CAUSAL,
    sinks: Tensor | None = None,
    decode=decode_in_loops,
    tol: float = 2e-6,
) -> None:
    out = decode(*args, 0.3, variant, sinks)
    assert out.dtype == args[0].dtype
    torch.testing.assert_close(out.double(), reference(args, 0.3, variant, sinks), rtol=tol, atol=tol)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("lengths", [[1], [37], [7, 33, 16], [1, 20]], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_ragged_histories(page_size: int, lengths: list[int], heads: int, kv_heads: int):
    assert_matches(step(lengths, page_size, heads, kv_heads))


@pytest.mark.parametrize("dims", [(16, 5), (24, 6), (64, 128)], ids=str)
def test_head_dims(dims: tuple[int, int]):
    assert_matches(step([9, 21], D=dims[0], V=dims[1]))


SINKS = torch.tensor([-1.0, 0.0, 1.0, 3.0])
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
VARIANTS = {
    "plain": (CAUSAL, None),
    "window": (model_variant(None, 5), None),
    "chunks": (model_variant(None, None, 5), None),
    "softcap": (model_variant(2.0, None), None),
    "alibi": (Variant("alibi", (SLOPES,)), None),
    "sinks": (CAUSAL, SINKS),
    "all": (model_variant(2.0, 5), SINKS),
    "all, chunks": (model_variant(2.0, None, 5), SINKS),
}


@pytest.mark.parametrize("variant, sinks", VARIANTS.values(), ids=VARIANTS)
def test_variants(variant: Variant, sinks: Tensor | None):
    assert_matches(step([7, 33, 16]), variant, sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype):
    q, keys, values, slots, positions = step([7, 33, 16])
    assert_matches((q.to(dtype), keys.to(dtype), values.to(dtype), slots, positions), tol=torch.finfo(dtype).eps)


def test_a_query_that_sees_nothing_gets_zeros_and_nan_stays_in_its_head(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MASK_MODS, "nothing", MaskMod(lambda query, key, args: key < args[0]))
    q, *rest = step([6, 9])
    assert not decode_in_loops(q, *rest, 1.0, Variant(mask_mod="nothing", mask_args=(0,))).any()
    q[1, 0, 0] = float("nan")
    out = decode_in_loops(q, *rest, 1.0, CAUSAL)
    assert out[1, 0].isnan().all() and out[0].isfinite().all() and out[1, 1:].isfinite().all()


def dynamic(args: Step) -> Step:
    """Rows and lengths may change from step to step."""
    q, _, _, slots, positions = args
    torch._dynamo.mark_dynamic(slots, 1)
    for tensor in (q, slots, positions) if len(q) > 1 else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    return args


@pytest.mark.parametrize("name", ["plain", "all", "all, chunks"])
def test_compiled(name: str):
    """One graph for every batch and length."""
    variant, sinks = VARIANTS[name]
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(decode_in_loops, fullgraph=True)
    for lengths in ([7, 33, 16], [5, 2], [61, 3, 18, 1]):
        assert_matches(dynamic(step(lengths)), variant, sinks, compiled)
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_for_one_row():
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(decode_in_loops, fullgraph=True)
    for length in (7, 61):
        assert_matches(dynamic(step([length], V=64)), decode=compiled)
    assert counters["stats"]["unique_graphs"] == 1
