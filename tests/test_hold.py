"""Prefixes that somebody holds: they stay while others are evicted, give way to who cannot run, and cost no page.

python -m pytest tests/test_hold.py
"""

import random
from pathlib import Path

import pytest

from engine import Engine, SamplingParams
from errors import UserError

TINY = Path(__file__).parent.parent / "assets" / "folio-tiny"
GREEDY = SamplingParams(temperature=0, max_new_tokens=4)


def engine_of(**options) -> Engine:
    return Engine.from_pretrained(
        TINY, dtype="float32", **dict(page_size=4, max_batch_size=2, max_model_len=64) | options
    )


def prompts(count: int, length: int = 24) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(10, 1000) for _ in range(length)] for _ in range(count)]


def cached(engine: Engine, ids: list[int]) -> int:
    return engine.generate([[*ids, 7]], GREEDY)[0].outputs[0].metrics.cached_tokens


def test_what_is_held_outlives_all_others():
    engine = engine_of(max_total_tokens=128)
    held, *others = prompts(12)
    with engine.hold(held) as tokens:
        assert tokens == 24
        engine.generate(others, GREEDY)
        engine.check()
        assert engine.stats().pages_locked == 6
        assert cached(engine, held) == 24 and cached(engine, others[0]) == 0
        assert engine.flush_cache() == 6
    engine.check()
    assert engine.stats().pages_locked == 0
    engine.generate(others, GREEDY)
    assert cached(engine, held) == 0
    engine.check()


def test_two_may_hold_the_same_and_parts_of_it():
    engine = engine_of(max_total_tokens=256)
    ids = prompts(1)[0]
    with engine.hold(ids) as all_of_it:
        with engine.hold(ids[:9]) as part, engine.hold(ids):
            assert (all_of_it, part) == (24, 8)
            engine.check()
        engine.check()
        assert engine.stats().pages_locked == 6
    engine.check()
    assert engine.stats().pages_locked == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_hold_gives_way_to_a_request_that_needs_its_pages(overlap):
    engine = engine_of(max_total_tokens=64, overlap=overlap)
    held, other = prompts(2, 40)
    with engine.hold(held) as tokens:
        assert tokens == 40
        output = engine.generate([other], SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True))[0].outputs[
            0
        ]
        assert output.finish_reason == "length" and len(output.token_ids) == 20
        engine.check()
        assert engine.stats().pages_locked == 0
    engine.check()


def test_an_error_inside_lets_go_too():
    engine = engine_of(max_total_tokens=128)
    with pytest.raises(ZeroDivisionError), engine.hold(prompts(1)[0]):
        raise ZeroDivisionError
    engine.check()
    assert engine.stats().pages_locked == 0


def test_without_the_tree_nothing_is_held():
    engine = engine_of(max_total_tokens=128, radix=False)
    with engine.hold(prompts(1)[0]) as tokens:
        assert tokens == 0
        engine.check()


def test_a_salt_is_part_of_it():
    engine = engine_of(max_total_tokens=128)
    ids = prompts(1)[0]
    with engine.hold(ids, cache_salt="mine"):
        assert cached(engine, ids) == 0
    with pytest.raises(UserError, match="cache_salt"), engine.hold(ids, cache_salt=""):
        pass
