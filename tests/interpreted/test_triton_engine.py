"""The whole engine on the Triton kernels: the same tokens as on the plain reference.

TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_triton_engine.py
"""

import pytest
import torch
from small_model import LATENT, MOE, make_engine, workload

from engine import Engine, SamplingParams
from rope import RopeSpec
from runner import compiled_graphs

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"

MODELS = {
    "llama": {},
    "window, softcap, norm": dict(num_layers=2, windows=[7, None], attn_softcap=3.0, qk_norm="head"),
    "no rope, norm after": dict(num_layers=2, layer_rope=[None, 0], qk_norm="head", qk_norm_after_rope=True),
    "window, sinks": dict(num_layers=2, windows=[7, None], sinks=True),
    "chunks": dict(num_layers=2, chunks=[12, None], layer_rope=[0, None], qk_norm="bare", qk_norm_after_rope=True),
    "latent": LATENT,
    "interleaved, partial": dict(rope_interleaved=True, ropes=[RopeSpec(theta=1000.0, dim=8, max_position=256)]),
    "experts": dict(num_layers=2, moe=MOE),  # theirs are Triton's where there is a GPU
}


def engine_on(attention: str, knobs: dict, **options) -> Engine:
    """Of few rows: the interpreter is slow, and computes the padding too."""
    return make_engine(DEVICE, knobs, attention=attention, max_batch_size=3, **options)


def run(engine: Engine, temperatures: tuple[int, ...] = (0, 1, 0, 1), masked: bool = False) -> list[list[int]]:
    """Prompts that share a prefix, longer ones in chunks, greedy and seeded, more than there are rows."""
    allowed = (lambda ids: range(len(ids) % 3, 96, 2)) if masked else None
    prompts, _ = workload(3)
    prompts = [prompts[0][:9] + p[:30] for p in prompts[: len(temperatures)]]
    params = [SamplingParams(temperature=t, seed=5, max_new_tokens=6, allowed_tokens_fn=allowed) for t in temperatures]
    outs = engine.generate(prompts, params)
    engine.check()
    return [out.outputs[0].token_ids for out in outs]


@pytest.mark.parametrize("knobs", MODELS.values(), ids=MODELS)
def test_same_tokens_as_the_reference(knobs):
    expected = run(engine_on("reference", knobs))
    engine = engine_on("triton", knobs, page_size=4)
    assert engine.runner.attention == "triton"
    assert run(engine) == expected
    assert run(engine) == expected  # from the cache


@pytest.mark.parametrize("knobs", [{}, LATENT], ids=["heads", "latent"])
def test_compiled_as_one_graph_and_only_once(knobs):
    sampled = (1,) * 4
    reference = engine_on("reference", knobs)
    expected = [run(reference, sampled, masked) for masked in (False, True)]
    engine = engine_on("triton", knobs)
    before = compiled_graphs()
    for _ in engine.compile(greedy=False):
        pass
    graphs = compiled_graphs()
    # decode of one row, of many, prompts; sampling for one row and many, masked and not
    assert graphs - before == 3 + 4
    assert [run(engine, sampled, masked) for masked in (False, True)] == expected
    assert compiled_graphs() == graphs
