"""The simulations in bench/, on next to nothing: what they report lies where it must.

pytest tests/test_bench_sim.py
"""

import json

import pytest

from bench import cache_sim, scheduler

TINY = 0.1
SIZES = [1024, 2048]  # pages


@pytest.mark.parametrize("name", cache_sim.GENERATED)
def test_hit_rates_lie_between_nothing_and_the_optimum(name: str):
    records = cache_sim.measure(cache_sim.generate(name, 0, TINY), SIZES, [("fcfs", "lru"), ("lpm", "lfu")])
    assert len(records) == 4
    for r in records:
        assert 0 < r["hit"] <= r["optimum"] <= r["endless"] < 1
        assert 0 <= r["plain"] <= r["order"] <= r["endless"]
        assert 0 < r["held"] <= 1


def test_a_seed_decides_everything():
    def records(seed: int) -> list[dict]:
        return cache_sim.measure(cache_sim.generate("tree_of_thought", seed, TINY), SIZES[:1], [("lpm", "lru")])

    assert records(0) == records(0) != records(1)


def test_a_cache_that_is_large_enough_is_an_endless_one():
    work = cache_sim.generate("few_shot", 0, TINY)
    (record,) = cache_sim.measure(work, [10_000], [("fcfs", "lru")])
    assert record["hit"] == record["plain"] == record["order"] == record["endless"]


def trace(tmp_path, *prompts: list[int]):
    path = tmp_path / "trace.jsonl"
    lines = ({"timestamp": 1000 * i, "input_length": 512 * len(ids) - 12, "output_length": 12, "hash_ids": ids}
             for i, ids in enumerate(prompts))  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return cache_sim.mooncake(path, step_seconds=0.5)


def test_a_trace_counts_whole_blocks(tmp_path):
    work = trace(tmp_path, [1, 2, 3], [4, 5, 6], [1, 2, 7])
    assert work.prompt_tokens == 3 * (3 * 512 - 12)
    (large,) = cache_sim.measure(work, [100], [("fcfs", "lru")])
    assert large["hit"] == large["order"] == large["endless"] == 2 * 512 / work.prompt_tokens


def test_belady_keeps_what_is_used_next_and_lru_does_not(tmp_path):
    work = trace(tmp_path, [1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 2, 10])
    (small,) = cache_sim.measure(work, [5], [("fcfs", "lru")])  # a request holds three
    assert 0 == small["plain"] < small["order"] == small["optimum"] == small["endless"]


def test_a_trace_that_contradicts_itself_is_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}))
    with pytest.raises(ValueError, match="1 hashes for 600 tokens"):
        cache_sim.mooncake(path, step_seconds=1)


@pytest.mark.parametrize("kind", scheduler.KINDS)
def test_steps_are_what_they_are_said_to_be(kind: str):
    record = scheduler.measure_steps(kind, running=4, waiting=3, policy="lpm", count=40)
    assert 0 < record["plan"]["low"] <= record["plan"]["median"] <= record["plan"]["high"]
    assert 0 < record["commit"]["median"] < record["both"]["high"]


def test_a_one_page_leaf_costs_more_than_a_dialogue():
    dialogues, leaves = (scheduler.bytes_per_token(fill, 200) for fill in (scheduler.dialogues, scheduler.leaves))
    assert 4 < dialogues < leaves < 100
