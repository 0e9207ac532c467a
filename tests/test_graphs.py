"""Static buffers, buckets, replays: with the stand-in here, with CUDA graphs where there is a GPU.

python -m pytest tests/test_graphs.py
"""

import random
from itertools import pairwise

import pytest
import torch
from small_model import LATENT, make_engine, tokens, workload

import runner as runner_module
from engine import Engine, SamplingParams
from graphs import ReplayOnCpu, buckets

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
KINDS = pytest.mark.parametrize("knobs", [{}, LATENT], ids=["heads", "latent"])
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def recorded(device: str = "cpu", knobs: dict | None = None, **options) -> Engine:
    engine = make_engine(device, knobs, **dict(graphs=True) | options)
    for _ in engine.warm_up():
        pass
    return engine


@pytest.mark.parametrize(
    "largest, expected",
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (16, [1, 2, 4, 8, 16]),
        (20, [1, 2, 4, 8, 16, 20]),
        (24, [1, 2, 4, 8, 16, 24]),
    ],
)
def test_buckets(largest: int, expected: list[int]):
    assert buckets(largest) == expected


def test_buckets_of_a_large_batch():
    sizes = buckets(500)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 500 and sizes[-2] == 496
    assert all(b - a <= 16 for a, b in pairwise(sizes))


def test_what_a_replay_returns_is_safe_from_the_next():
    source = torch.zeros(2)
    replay = ReplayOnCpu(lambda: [source * 2])
    source.fill_(1)
    first = replay()
    source.fill_(5)
    second = replay()
    assert first[0].tolist() == [2, 2] and second[0].tolist() == [10, 10]


@KINDS
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_tokens_and_nothing_captured_after_the_warm_up(device: str, knobs: dict):
    """Greedy, sampled, penalised, masked, with logprobs; more requests than rows; every batch size from 1 to 5, so padding too."""
    eager = make_engine(device, knobs, graphs=False)
    seeds = [random.randrange(1 << 30) for _ in range(4)]
    expected = [tokens(eager, seed) for seed in seeds]
    engine = recorded(device, knobs)
    captured = engine.stats().captured_graphs
    assert captured == 3 * len(buckets(5)) == 12  # a step, greedy and sampled; the forward alone
    assert [tokens(engine, seed) for seed in seeds] == expected, f"seeds {seeds}"
    stats = engine.stats()
    assert stats.captured_graphs == captured and 0 < stats.steps_replayed < stats.steps
    assert eager.stats().steps_replayed == eager.stats().captured_graphs == 0
    engine.check()


@pytest.mark.parametrize("device", DEVICES)
def test_logprobs_are_those_of_an_eager_step(device: str):
    prompts, _ = workload(2)
    params = SamplingParams(temperature=0, max_new_tokens=9, logprobs=2)
    for a, b in zip(*(e.generate(prompts, params) for e in (make_engine(device), recorded(device))), strict=True):
        assert [x.top for x in a.outputs[0].logprobs] == [x.top for x in b.outputs[0].logprobs]


@KINDS
def test_padding_touches_row_0_and_page_0_alone(knobs: dict):
    """Three rows in a bucket of four. Page 0 is written to; row 0 stays empty, and the rows that are free stay as they were."""
    engine = recorded(knobs=knobs)
    r = engine.runner
    poison = {}
    for row in (4, 5):
        poison[row] = (r.state.length[row].fill_(3), r.state.last_token[row].fill_(17))
    before = [[t.clone() for t in layer] for layer in r.kv]
    engine.generate([[1, 2], [3], [4, 5, 6]], SamplingParams(temperature=0, max_new_tokens=8))
    used = {page for row in (1, 2, 3) for page in r.page_table[row].tolist()} | {0}
    for old, new in zip(before, r.kv, strict=True):
        for a, b in zip(old, new, strict=True):
            changed = (a != b).flatten(1).any(1).nonzero().flatten() // r.page_size
            assert set(changed.tolist()) <= used
    assert r.state.length[0] == 0
    assert all(length == 3 and token == 17 for length, token in poison.values())


def test_lengths_advance_on_the_device_as_the_host_plans_them(monkeypatch):
    """At every decode the device's own length of a row is the position that the host has planned for it."""
    engine = recorded(chunk_size=8, max_total_tokens=160)  # preemption and chunks as well
    bring, checked = engine.runner.bring_rows, []

    def checking(batch, n):
        rows = bring(batch, n)
        lengths = engine.runner.state.length[rows].tolist()
        assert lengths == batch.starts + [0] * (n - len(batch.starts))
        checked.append(n)
        return rows

    monkeypatch.setattr(engine.runner, "bring_rows", checking)
    for seed in range(3):
        tokens(engine, seed)
    assert len(checked) > 50 and engine.failure is None


@pytest.mark.parametrize("graphs", [True, False])
def test_a_steady_decode_brings_nothing(monkeypatch, graphs: bool):
    """Copies to the device: one for a prompt, one where a row gets its next page, none in between."""
    engine = make_engine(graphs=graphs, page_size=16, max_batch_size=2)
    for _ in engine.warm_up():
        pass
    sent = []
    from_host = runner_module.from_host
    monkeypatch.setattr(engine.runner, "set_row", lambda request, tokens: None)  # its own copies, once for each request
    monkeypatch.setattr(
        runner_module, "from_host", lambda values, on: sent.append(list(values)) or from_host(values, on)
    )
    engine.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=30, ignore_eos=True))
    assert engine.stats().steps >= 30
    assert len(sent) == 3, sent  # the prompt; the row of the first decode; the page for token 16


def test_buffers_stay_where_they_are():
    engine = recorded()
    r = engine.runner
    tensors = [r.page_table, r._rows, r.bitmask, *(t for pair in r.kv for t in pair), *vars(r.state).values()]
    addresses = [t.data_ptr() for t in tensors]
    tokens(engine, 0)
    assert [t.data_ptr() for t in tensors] == addresses
