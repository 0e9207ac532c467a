"""The compiled step: the same tokens as eager, and nothing compiles after the warm-up. One layer, to keep it short."""

import pytest
import torch
from small_model import LATENT, MOE, make_engine, tokens, workload

from engine import SamplingParams
from errors import UserError
from kernels.variants import Variant
from runner import compiled_graphs


@pytest.mark.parametrize("knobs", [{}, LATENT], ids=["heads", "latent"])
def test_compiled_gives_the_same_tokens_and_compiles_nothing_after_the_warm_up(knobs: dict):
    eager = make_engine(knobs=knobs)
    expected = [tokens(eager, seed) for seed in range(4)]
    engine = make_engine(knobs=knobs)
    before = compiled_graphs()
    assert len(list(engine.compile())) == 12
    graphs = engine.stats().compiled_graphs
    # decode of one row, of many, prompts; one row and many, greedy and sampled, masked and not
    assert graphs - before == 3 + 8
    assert [tokens(engine, seed) for seed in range(4)] == expected
    assert engine.stats().compiled_graphs == graphs
    engine.check()


def test_compiled_for_one_row_at_a_time():
    """Weights are plain then, and a step of one row is another loop: the same tokens."""
    prompts, _ = workload(1)
    greedy = SamplingParams(temperature=0, max_new_tokens=20)
    expected = [out.outputs[0].token_ids for out in make_engine().generate(prompts, greedy)]
    engine = make_engine(max_batch_size=1)
    before = compiled_graphs()
    assert len(list(engine.compile(greedy=True, masked=False))) == 2
    graphs = compiled_graphs()
    assert graphs - before == 3  # a decode, a prompt, and one choice for both
    assert not engine.model.head.packed
    assert [out.outputs[0].token_ids for out in engine.generate(prompts, greedy)] == expected
    assert compiled_graphs() == graphs


KINDS = {
    "window, softcap": dict(windows=[7, None, 7, None], attn_softcap=3.0),
    "window, sinks": dict(windows=[7, None, 7, None], sinks=True, qkv_bias=True, out_bias=True),
    "chunks, no rope, temperature": dict(
        chunks=[12, None, 12, None],
        layer_rope=[0, None, 0, None],
        qk_norm="bare",
        query_temperature=(0.3, 8),
        query_temperature_without_rope=True,
    ),
}


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_compiled_with_layers_of_two_kinds(kinds: dict):
    """Alike ones share their code, and only that: each has its weights, its pages, its window."""
    prompts, _ = workload(2)
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    knobs = dict(num_layers=4) | kinds
    expected = [out.outputs[0].token_ids for out in make_engine(knobs=knobs).generate(prompts, greedy)]
    engine = make_engine(knobs=knobs)
    for _ in engine.compile(greedy=True, masked=False):
        pass
    assert [out.outputs[0].token_ids for out in engine.generate(prompts, greedy)] == expected


@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_with_experts(rows: int):
    """One row at a time is loops over the chosen experts' weights, more are the op; neither compiles anew for other numbers."""
    prompts, _ = workload(3)
    greedy = SamplingParams(temperature=0, max_new_tokens=12)
    knobs = dict(num_layers=2, moe=MOE)
    expected = [
        out.outputs[0].token_ids for out in make_engine(knobs=knobs, max_batch_size=rows).generate(prompts, greedy)
    ]
    engine = make_engine(knobs=knobs, max_batch_size=rows)
    for _ in engine.compile(greedy=True, masked=False):
        pass
    graphs = compiled_graphs()
    assert [out.outputs[0].token_ids for out in engine.generate(prompts, greedy)] == expected
    assert compiled_graphs() == graphs


def test_what_a_cpu_cannot_compile_is_said_before():
    engine = make_engine()
    engine.model.variants[0] = Variant("alibi", (torch.ones(4),))
    with pytest.raises(UserError, match="tensor among its arguments"):
        engine.compile()
    assert not engine.runner.compiled
    with pytest.raises(UserError, match="mode is 'fast'; it must be one of default, max-autotune"):
        make_engine().compile(mode="fast")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("knobs", [{}, LATENT], ids=["heads", "latent"])
def test_gpu_equals_cpu(knobs: dict):
    on_cpu, on_gpu = make_engine(knobs=knobs), make_engine("cuda", knobs)
    prompts, _ = workload(0)
    greedy = SamplingParams(temperature=0, max_new_tokens=8)
    for a, b in zip(on_cpu.generate(prompts, greedy), on_gpu.generate(prompts, greedy), strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
