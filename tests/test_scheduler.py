"""Admission, chunks and the end of requests, with random tokens in place of a model.

pytest tests/test_scheduler.py
"""

import random
from collections import Counter

import pytest

from cache.pages import PagePool
from errors import UserError
from scheduler.request import Request, SamplingParams, State
from scheduler.scheduler import Batch, Scheduler

STOP = 0


class Counted(Request):
    """Counts how often it ended."""

    ends = 0

    def finish(self, *args) -> None:
        super().finish(*args)
        self.ends += 1


def request(prompt: int = 5, new: int = 4, seed: int = 0, **params) -> Counted:
    ids = list(range(100, 100 + prompt))
    return Counted(ids, SamplingParams(**params), frozenset([STOP]), new, seed)


def make(pages: int = 20, page_size: int = 4, rows: int = 3, chunk_size: int = 100) -> Scheduler:
    return Scheduler(PagePool(pages + 1, page_size), rows, chunk_size)


def step(s: Scheduler, token: int = 9) -> Batch | None:
    batch = s.plan()
    if batch is not None:
        s.commit(batch, [token] * len(batch.requests))
    s.check()
    return batch


def drain(s: Scheduler) -> list[Batch]:
    batches = []
    while (batch := step(s)) is not None:
        batches.append(batch)
    return batches


def idle(s: Scheduler) -> bool:
    return not s.has_work and s.pool.free_pages == s.pool.total and sorted(s.free_rows) == [1, 2, 3]


def test_nothing_to_do():
    s = make()
    assert s.plan() is None and not s.has_work


def test_a_request_from_prompt_to_end():
    s, r = make(), request(prompt=5, new=3)
    s.add(r)
    assert s.has_work and r.state is State.WAITING
    batch = s.plan()
    assert (batch.requests, batch.ids, batch.start, batch.samples) == ([r], [r.prompt_ids], [0], True)
    assert r.state is State.PREFILLING and r.row > 0 and len(r.pages) == 2  # 8 tokens of 4 a page
    s.commit(batch, [41])
    assert r.state is State.RUNNING and r.computed == 5
    batch = s.plan()
    assert (batch.ids, batch.start, batch.samples) == ([[41]], [5], True)
    s.commit(batch, [42])
    batch = s.plan()
    assert (batch.ids, batch.start) == ([[42]], [6])
    s.commit(batch, [43])
    assert (r.output_ids, r.finish_reason, r.state) == ([41, 42, 43], "length", State.FINISHED)
    assert (r.row, r.pages) == (0, []) and idle(s) and s.plan() is None


@pytest.mark.parametrize("chunk_size, chunks", [(1, [1] * 7), (3, [3, 3, 1]), (6, [6, 1]), (7, [7]), (8, [7])])
def test_a_prompt_in_chunks(chunk_size: int, chunks: list[int]):
    s, r = make(chunk_size=chunk_size), request(prompt=7, new=1)
    s.add(r)
    batches = drain(s)
    assert [len(b.ids[0]) for b in batches] == chunks
    assert [b.start[0] for b in batches] == [sum(chunks[:i]) for i in range(len(chunks))]
    assert [i for b in batches for i in b.ids[0]] == r.prompt_ids
    assert [b.samples for b in batches] == [False] * (len(chunks) - 1) + [True]
    assert r.output_ids == [9]


def test_first_come_first_served():
    """A small request does not overtake a large one that waits for pages."""
    s = make(pages=5)
    first, large, small = request(prompt=8, new=4), request(prompt=12, new=4), request(prompt=2, new=2)
    for r in (first, large, small):
        s.add(r)
    s.plan()
    assert [r.state for r in (first, large, small)] == [State.PREFILLING, State.WAITING, State.WAITING]
    assert len(first.pages) == 3 and s.pool.free_pages == 2  # enough for the small one
    while first.finish_reason is None:
        step(s)
    s.plan()
    assert [r.state for r in (large, small)] == [State.PREFILLING, State.PREFILLING]
    drain(s)
    assert idle(s)


def test_rows_limit_what_runs_and_come_back():
    s = make()
    requests = [request(new=2) for _ in range(7)]
    for r in requests:
        s.add(r)
    s.plan()
    assert sorted(r.row for r in requests) == [0, 0, 0, 0, 1, 2, 3]
    batches = drain(s)
    assert max(len(b.requests) for b in batches) == 3  # decoded together
    assert [r for b in batches if b.start[0] == 0 for r in b.requests] == requests
    assert idle(s)


def test_a_prompt_goes_before_the_decodes():
    s = make(chunk_size=4)
    running, late = request(new=10), request(prompt=9)
    s.add(running)
    step(s)
    step(s)
    assert running.state is State.RUNNING
    s.add(late)
    batches = [step(s) for _ in range(3)]
    assert [b.requests for b in batches] == [[late]] * 3
    assert step(s).requests == [running, late]


@pytest.mark.parametrize("prompt, new, fits", [(16, 4, True), (17, 3, True), (17, 4, False), (400, 1, False)])
def test_a_request_that_can_never_fit_is_refused_with_the_figures(prompt: int, new: int, fits: bool):
    s, r = make(pages=5), request(prompt, new)
    if fits:
        s.add(r)
        drain(s)
        assert r.finish_reason == "length"
        return
    with pytest.raises(UserError, match=f"{prompt + new} tokens .* cache of 20"):
        s.add(r)
    assert not s.has_work


def test_a_stop_id_ends():
    s, r = make(), request(new=10)
    s.add(r)
    step(s)
    step(s, token=STOP)
    assert (r.finish_reason, r.stop_reason, r.output_ids) == ("stop", STOP, [9, STOP])
    assert idle(s)


@pytest.mark.parametrize("state", State)
def test_an_end_from_outside_in_every_state(state: State):
    s, r, other = make(rows=3, chunk_size=3), request(), request()
    s.add(r)
    s.add(other)
    while r.state is not state:
        step(s)
    s.end(r, "abort", "gone")
    s.check()
    assert r.state is State.FINISHED and r.ends == 1
    assert (r.finish_reason, r.stop_reason) == (("length", None) if state is State.FINISHED else ("abort", "gone"))
    s.end(r, "error")  # once more: nothing happens
    assert r.ends == 1
    drain(s)
    assert other.finish_reason == "length" and len(other.output_ids) == 4 and idle(s)


def test_a_request_that_ends_while_its_step_runs_takes_no_token():
    s, r, other = make(), request(), request()
    for each in (r, other):
        s.add(each)
        step(s)
    batch = s.plan()
    s.end(r, "abort")
    s.commit(batch, [50, 51])
    s.check()
    assert r.output_ids == [9] and other.output_ids == [9, 51]


def test_ending_a_request_that_was_never_queued():
    s, r = make(), request()
    s.end(r, "abort")
    s.check()
    assert r.finish_reason == "abort" and idle(s)


def test_a_batch_is_greedy_if_all_that_it_samples_is():
    greedy, other = request(temperature=0), request(temperature=1)
    assert Batch([greedy], [[1]], [0], True).greedy
    assert not Batch([greedy, other], [[1], [1]], [0, 0], True).greedy
    assert Batch([other], [[1]], [0], samples=False).greedy


@pytest.mark.parametrize("loss", ["page", "page twice", "row", "row twice"])
def test_check_sees_what_is_lost_or_owned_twice(loss: str):
    s, a, b = make(), request(), request()
    s.add(a)
    s.add(b)
    s.plan()
    s.check()
    if loss == "page":
        a.pages.pop()
    elif loss == "page twice":
        a.pages[0] = b.pages[0]
    elif loss == "row":
        s.free_rows.pop()
    else:
        a.row = b.row
    with pytest.raises(RuntimeError):
        s.check()


@pytest.mark.parametrize("seed", range(25))
def test_random_traffic(seed: int):
    """Random sizes, tokens, ends from outside between and within steps: everything is given back, each ends once."""
    rng = random.Random(seed)
    s = make(pages=rng.randint(8, 25), page_size=rng.choice([1, 4]), rows=3, chunk_size=rng.choice([1, 3, 100]))
    size = s.pool.total * s.pool.page_size
    alive, everyone, order = [], [], []
    for _ in range(300):
        if rng.random() < 0.25:
            r = request(rng.randint(1, 12), rng.randint(1, 9), min_new_tokens=rng.choice([0, 0, 1]))
            if len(r.prompt_ids) + r.max_new_tokens <= size:
                s.add(r)
                alive.append(r)
                everyone.append(r)
        batch = s.plan()
        if alive and rng.random() < 0.08:  # in whatever state, also while its step runs
            s.end(rng.choice(alive), rng.choice(["abort", "stop", "error"]))
        if batch is not None:
            order += [r for r in batch.requests if r not in order]
            for r, ids, start in zip(batch.requests, batch.ids, batch.start, strict=True):
                sequence = r.prompt_ids + r.output_ids
                assert sequence[start : start + len(ids)] == ids, "a token at a wrong position"
            s.commit(batch, [rng.randint(0, 12) for _ in batch.requests])
        s.check()
        held = sum(-(-(len(r.prompt_ids) + r.max_new_tokens) // s.pool.page_size) for r in s.running)
        assert held == s.pool.total - s.pool.free_pages
        assert sorted([r.row for r in s.running] + s.free_rows) == [1, 2, 3]
        alive = [r for r in alive if r.finish_reason is None]
    drain(s)
    assert idle(s)
    assert [r.ends for r in everyone] == [1] * len(everyone)
    assert order == [r for r in everyone if r in order], "not first come, first served"
    for r in everyone:
        assert len(r.output_ids) <= r.max_new_tokens
        assert r.finish_reason != "length" or len(r.output_ids) == r.max_new_tokens
    assert len(Counter(r.finish_reason for r in everyone)) >= 3
