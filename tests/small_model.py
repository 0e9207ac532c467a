"""A model of one small layer with random weights, an engine of it, and work for it. VOCAB tokens, no tokenizer."""

import random

import torch

from engine import Engine, SamplingParams
from mla import LatentSpec
from model import ModelConfig, Transformer
from moe import MoESpec
from rope import RopeSpec

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

MOE = MoESpec(
    num_experts=6, top_k=2, intermediate_size=24, layers=(True, True), routing="sigmoid", renormalize=True,
    correction_bias=True, groups=3, topk_groups=2, group_score="top2", shared_size=16, shared_gate=True, bias=True,
)  # fmt: skip


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
