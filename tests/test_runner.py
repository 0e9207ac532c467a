"""The compiled step: the same tokens as eager, and nothing compiles after the warm-up. One layer, to keep it short."""

import random

import pytest
import torch

from engine import Engine, SamplingParams
from errors import UserError
from kernels.variants import Variant
from mla import LatentSpec
from model import ModelConfig, Transformer
from moe import MoESpec
from rope import RopeSpec
from runner import compiled_graphs

VOCAB = 96


SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position=256,
    ropes=[RopeSpec(theta=1000.0, dim=16, max_position=256)],
)


# Multi-head Latent Attention instead of heads; the sizes are such as the Triton kernel takes.
LATENT = dict(
    latent=LatentSpec(query_rank=24, rank=32, nope=8, rope=16, value=24),
    head_dim=24,
    rope_interleaved=True,
)


def make_engine(device: str = "cpu", knobs: dict | None = None, **options) -> Engine:
    """`knobs`: what else the ModelConfig says."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SMALL | (knobs or {})))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model = model.to(device)
    model.pack()
    return Engine(model, **dict(max_batch_size=5, chunk_size=24) | options)


def workload(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of 1 to 60 tokens: greedy, sampled, penalised, filtered and masked ones side by side."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(12)]
    kinds = [
        dict(temperature=0),
        dict(temperature=0.9, seed=7),
        dict(temperature=1.2, seed=8, top_k=9, top_p=0.8, min_p=0.01),
        dict(temperature=0, repetition_penalty=1.3, logprobs=3),
        dict(seed=9, frequency_penalty=0.5, presence_penalty=0.2, logit_bias={5: 3.0}),
        dict(temperature=0, allowed_tokens_fn=lambda ids: range(len(ids) % 5, VOCAB, 3)),
        dict(temperature=1.0, seed=10, allowed_tokens_fn=lambda ids: range(len(ids) % 7, VOCAB, 2)),
    ]
    return prompts, [SamplingParams(max_new_tokens=rng.randint(1, 30), **rng.choice(kinds)) for _ in prompts]


def tokens(engine: Engine, seed: int) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in engine.generate(*workload(seed))]


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
    for _ in engine.compile(greedy=True):
        pass
    assert [out.outputs[0].token_ids for out in engine.generate(prompts, greedy)] == expected


MOE = MoESpec(
    num_experts=6, top_k=2, intermediate_size=24, layers=(True, True), routing="sigmoid", renormalize=True,
    correction_bias=True, groups=3, topk_groups=2, group_score="top2", shared_size=16, shared_gate=True, bias=True,
)  # fmt: skip


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
