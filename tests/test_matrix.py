"""The same tokens on any road: radix, overlap, chunk size, page size, preemption and batch size change nothing.

40 prompts with shared prefixes, greedy, float32, against `transformers`: both bundled models (one has a latent and experts), and
random ones, with grouped KV heads and with a latent (MLA).

pytest tests/test_matrix.py
"""

import functools
import itertools
import random

import pytest
import torch
import zoo
from test_families import folder, our_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.checkpoints import BUNDLED
from engine import Engine, SamplingParams
from scheduler.scheduler import Scheduler

NEW = 12
PROMPTS = 40


@functools.cache
def theirs(name: str) -> PreTrainedModel:
    if name not in BUNDLED:
        return zoo.build(name)
    return AutoModelForCausalLM.from_pretrained(BUNDLED[name], dtype=torch.float32)


@functools.cache
def ours(name: str):
    return our_model(BUNDLED[name] if name in BUNDLED else folder(name))


@functools.cache
def prompts(name: str) -> list[list[int]]:
    """A tree: 4 stems, each with branches at any depth, some equal to a stem and some to each other."""
    rng, vocab = random.Random("bundled" if name in BUNDLED else name), theirs(name).config.vocab_size

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(5, vocab) for _ in range(rng.randint(low, high))]

    stems = [tokens(1, 3), tokens(33, 33), tokens(60, 70)]
    stems.append(stems[2][:40] + tokens(20, 40))
    made = [list(stem) for stem in stems]
    while len(made) < PROMPTS:
        base = rng.choice(made)
        made.append(base[: rng.randint(1, len(base))][:100] + tokens(0, 20))
    return made


@functools.cache
@torch.no_grad()
def expected(name: str) -> list[list[int]]:
    model = theirs(name)
    model.generation_config.eos_token_id = None
    out = []
    for prompt in prompts(name):
        ids = torch.tensor([prompt])
        out.append(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[0])
    return [ids[len(prompt) :].tolist() for ids, prompt in zip(out, prompts(name), strict=True)]


def preempt_at_random(scheduler: Scheduler, rng: random.Random) -> None:
    """Now and then let the step on its way come home, then send a random request back to waiting."""
    plan, due = scheduler.plan, False

    def plan_with_preemption():
        nonlocal due
        inside = [*scheduler.running, *scheduler.prefilling]
        if due and not any(r.in_flight for r in inside):
            if inside:
                scheduler.preempt(rng.choice(inside))
            due = False
        elif inside and rng.random() < 0.1:
            due = True
        return None if due else plan()

    scheduler.plan = plan_with_preemption


ROADS = list(itertools.product([True, False], [True, False], [16, 64, None], [1, 16], [True, False]))


@pytest.mark.parametrize("name", ["folio-tiny", "llama3", "deepseek_v2_dense"])
@pytest.mark.parametrize("number", range(len(ROADS)), ids=[
    f"radix={r:d}-overlap={o:d}-chunk={c or 'whole'}-page={p}-preempt={f:d}" for r, o, c, p, f in ROADS
])  # fmt: skip
def test_the_same_tokens_on_any_road(number: int, name: str):
    radix, overlap, chunk, page, preempt = ROADS[number]
    rows = 1 + (number * 17 + (20 if name == "llama3" else 0)) % PROMPTS  # over all roads: every size from 1 to 40
    engine = Engine(
        ours(name), max_batch_size=rows, page_size=page, radix=radix, overlap=overlap, max_total_tokens=rows * 200 + 400,
        chunk_size=chunk or 64, chunked_prefill=chunk is not None, max_model_len=200,
    )  # fmt: skip
    if preempt:
        preempt_at_random(engine.scheduler, random.Random(number))
    outputs = engine.generate(prompts(name), SamplingParams(temperature=0, max_new_tokens=NEW))
    assert [o.outputs[0].token_ids for o in outputs] == expected(name)
    engine.check()
    stats = engine.stats()
    assert (stats.preemptions > 0) == preempt
    assert (stats.cached_tokens > 300) == radix


@pytest.mark.parametrize("name", ["qwen3_moe", "folio-tiny-mla"])
@pytest.mark.parametrize("number", range(1, len(ROADS), 7))  # each switch is on in some, and off in others
def test_the_same_tokens_with_experts(number: int, name: str):
    test_the_same_tokens_on_any_road(number, name)


def test_every_batch_size_is_there():
    assert {1 + (n * 17 + at) % PROMPTS for n in range(len(ROADS)) for at in (0, 20)} == set(range(1, PROMPTS + 1))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("preempt", [True, False])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(overlap: bool, preempt: bool):
    params = [
        SamplingParams(
            seed=i, temperature=0.5 + i % 3, top_p=1 - i % 4 / 10, top_k=i % 5 * 10, max_new_tokens=NEW,
            repetition_penalty=1 + i % 2, frequency_penalty=i % 3 / 2,
        )
        for i in range(PROMPTS)
    ]  # fmt: skip
    crowd = Engine(
        ours("llama3"), max_batch_size=11, chunk_size=16, max_total_tokens=2000, overlap=overlap, max_model_len=200
    )
    if preempt:
        preempt_at_random(crowd.scheduler, random.Random(1))
    together = crowd.generate(prompts("llama3"), params)
    alone = Engine(ours("llama3"), max_batch_size=1, radix=False, overlap=False, max_model_len=200)
    for prompt, param, output in list(zip(prompts("llama3"), params, together, strict=True))[::3]:
        assert alone.generate(prompt, param)[0].outputs[0].token_ids == output.outputs[0].token_ids
    assert (crowd.stats().preemptions > 0) == preempt
