"""What a snapshot says is what the engine holds, and however much that is, it stays small.

python -m pytest tests/test_snapshot.py
"""

from collections import Counter
from pathlib import Path

import pytest
from test_engine import ids_of, make, prompt_ids
from test_radix import find, hold, tree
from test_timeline import events_of

import snapshot
from engine import Engine, SamplingParams
from snapshot import CACHED, FREE, LOCKED, OWN, pool_cells

PARAMS = SamplingParams(temperature=0, max_new_tokens=6)


def started(engine: Engine, prompts: list[list[int]], params: SamplingParams = PARAMS) -> None:
    """These run, and have their first token."""
    for prompt in prompts:
        engine.add(prompt, params)
    while len([r for r in engine.scheduler.running if r.new_tokens]) < len(prompts):
        engine.step()


# ---- the tree


def test_the_nodes_used_last_come_first_and_parents_before_their_children():
    t = tree([1, 2, 3], [1, 2, 4], [5], [6])
    hold(t, [1, 2, 4])
    hold(t, [5])
    shown = list(t.recent(99))
    assert sorted(n.id for n in shown) == sorted(n.id for n in t.nodes()) and len({n.id for n in shown}) == len(shown)
    assert [n.pages for n in shown[:1]] == [find(t, [5])]
    assert [n.pages for n in t.recent(3)] == [find(t, [5]), find(t, [1, 2]), find(t, [1, 2, 4])[2:]]
    for node in shown:
        assert node.parent.id == 0 or node.parent in shown[: shown.index(node)]


def test_a_node_keeps_its_id_when_another_is_split_off_above_it():
    t = tree([1, 2, 3])
    (before,) = t.nodes()
    hold(t, [1, 2])
    upper, lower = sorted(t.nodes(), key=lambda n: n.pages)
    assert lower is before and upper.id not in (0, lower.id)


# ---- all of it


@pytest.mark.parametrize("overlap", [False, True])
def test_it_says_who_has_what(overlap):
    engine = make(overlap=overlap, max_total_tokens=400)
    start = prompt_ids(9)[0]
    engine.generate(start, PARAMS)
    started(engine, [[*start, 1], [*start, 2], prompt_ids(21)[0]])
    engine.add(prompt_ids(30)[0], PARAMS)
    now = engine.snapshot()
    count = Counter(now.cells)
    assert (len(now.cells), now.pages_per_cell) == (engine.pool.total, 1)
    assert count[FREE] == now.stats.pages_free and count[LOCKED] == now.stats.pages_locked
    assert count[CACHED] == now.stats.pages_held - now.stats.pages_locked
    inside = [*engine.scheduler.running, *engine.scheduler.prefilling, *engine.scheduler.leaving]
    assert count[OWN] == sum(len(r.pages) - r.shared for r in inside) > 0

    assert {n.id for n in now.nodes} == {n.id for n in engine.scheduler.tree.nodes()}
    assert sum(n.pages for n in now.nodes) == now.stats.pages_held
    shared = next(n for n in now.nodes if n.first[:4] == start[:4])
    assert (shared.tokens, shared.pages, shared.parent, shared.salted) == (8, 2, 0, False)
    assert shared.first == start[:8] and shared.locks == shared.hits == 2

    assert [r.state for r in now.requests] == ["running"] * 3
    first, _, third = now.requests
    assert (first.prompt_tokens, first.cached_tokens, first.max_new_tokens) == (10, 8, 6)
    assert 0 < first.new_tokens <= 6 and first.computed_tokens >= 10 and first.node == shared.id
    assert third.cached_tokens == 0 and third.pages >= 6
    engine.step()
    assert len(engine.snapshot().requests) == 4


def test_who_waits_is_in_it_and_what_is_salted_says_so():
    engine = make(max_batch_size=1)
    engine.generate(prompt_ids(9)[0], PARAMS, cache_salt="s")
    for prompt in prompt_ids(5, 6):
        engine.add(prompt, PARAMS)
    engine.step()
    now = engine.snapshot()
    assert {n.salted for n in now.nodes} == {True}
    assert [r.state for r in now.requests] == ["running", "waiting"]
    assert (now.requests[1].pages, now.requests[1].node, now.requests[1].computed_tokens) == (0, 0, 0)


def test_it_changes_no_token_and_leaves_no_page_behind():
    prompts = prompt_ids(5, 21, 9)
    alone = ids_of(make().generate(prompts, PARAMS))
    engine = make()
    engine.watch(True)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, PARAMS, request_id=str(i))
    got: dict[str, list[int]] = {str(i): [] for i in range(3)}
    while engine.has_work:
        for delta in engine.step():
            got[delta.request_id] += delta.token_ids
        engine.snapshot()
    engine.check()
    assert list(got.values()) == alone


# ---- bounded


def test_a_long_queue_and_a_wide_tree_do_not_make_it_longer(monkeypatch):
    for name, most in (("MOST_NODES", 3), ("MOST_REQUESTS", 2), ("MOST_CELLS", 16), ("PREVIEW", 2)):
        monkeypatch.setattr(snapshot, name, most)
    engine = make(max_total_tokens=400)
    engine.generate(prompt_ids(9, 10, 11, 12, 13), PARAMS)
    started(engine, prompt_ids(14, 15, 16))
    now = engine.snapshot()
    assert len(now.nodes) == 3 and len(now.requests) == 2 and len(now.cells) <= 16
    assert len(now.cells) * now.pages_per_cell >= engine.pool.total and now.pages_per_cell > 1
    assert all(len(n.first) == 2 for n in now.nodes)


def test_a_cell_of_many_pages_has_the_letter_of_most_in_use(monkeypatch):
    monkeypatch.setattr(snapshot, "MOST_CELLS", 4)
    assert pool_cells("rlc.") == ("rlc.", 1)
    assert pool_cells("....." "...l." "rrrl." "cc") == (".lrc", 5)  # fmt: skip


# ---- the steps


def test_steps_are_noted_only_while_somebody_watches():
    engine = make()
    engine.generate(prompt_ids(5), PARAMS)
    assert engine.snapshot().spans == []
    engine.watch(True)
    engine.watch(True)
    started(engine, prompt_ids(6))
    spans = engine.snapshot().spans
    assert {s.name for s in spans if s.row == "host"} == {"plan", "launch", "commit"}
    assert all(s.start <= s.end <= engine.snapshot().at for s in spans)
    (first, *_) = [s for s in spans if s.row == "device"]
    assert (first.requests, first.tokens) == (1, 6)
    engine.watch(False)
    engine.watch(False)
    assert engine.snapshot().spans == []
    assert not {"plan", "launch", "commit", "masks"} & {*vars(engine), *vars(engine.scheduler), *vars(engine.runner)}


def test_the_spans_are_as_many_as_are_kept_and_no_more(monkeypatch):
    monkeypatch.setattr("engine.MOST_SPANS", 7)
    engine = make()
    engine.watch(True)
    engine.generate(prompt_ids(5), PARAMS)
    assert len(engine.snapshot().spans) == 7


def test_a_trace_goes_on_when_nobody_watches_any_more(tmp_path: Path):
    engine = make(trace=tmp_path / "t.json")
    for on in (True, False):
        engine.watch(on)
        engine.generate(prompt_ids(5), PARAMS)
    engine.timeline.close()
    plans, steps = events_of(tmp_path / "t.json", "host", "commit"), events_of(tmp_path / "t.json", "device")
    assert len(plans) == len(steps) == engine.steps
