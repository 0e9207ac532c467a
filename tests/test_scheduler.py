"""The scheduler: who is admitted, what a step computes, how requests share pages, lose them and end. No model, no device.

python -m pytest tests/test_scheduler.py
"""

from collections.abc import Callable, Sequence

import pytest

from cache.pages import PagePool
from cache.radix import tree_key
from errors import UserError
from scheduler.batch import Batch
from scheduler.request import Request, SamplingParams, State
from scheduler.scheduler import RATIO_DECAY, RATIO_LEAST, RATIO_START, SHARED_AT_LEAST, Scheduler

STOP = 0
TOKEN = 9


class Counted(Request):
    """Counts how often it ended."""

    ends = 0

    def finish(self, *args) -> None:
        super().finish(*args)
        self.ends += 1


def request(
    prompt: int | Sequence[int] = 5,
    new: int = 4,
    *,
    leader: Request | None = None,
    namespace: tuple = (),
    priority: int = 0,
    **params,
) -> Counted:
    """prompt: its tokens, or how many; then no other request begins alike."""
    if isinstance(prompt, int):
        request.started += 1
        prompt = [1000 * request.started + i for i in range(prompt)]
    options = {"leader": leader, "namespace": namespace, "priority": priority}
    return Counted(prompt, SamplingParams(**params), frozenset([STOP]), new, 0, **options)


request.started = 0


def samples(n: int, prompt: int | Sequence[int], new: int = 4) -> list[Counted]:
    """n samples of one prompt; the first leads."""
    first = request(prompt, new, n=n)
    return [first] + [request(first.prompt_ids, new, n=n, leader=first) for _ in range(n - 1)]


def make(
    pages: int = 20, page_size: int = 4, rows: int = 3, chunk_size: int = 100, *requests: Request, **options
) -> Scheduler:
    s = Scheduler(PagePool(pages + 1, page_size), rows, chunk_size, **options)
    for r in requests:
        s.add(r)
    return s


def commit(s: Scheduler, batch: Batch, token: int = TOKEN, bad: Sequence[Request] = ()) -> list[int]:
    taken = s.commit(batch, [token] * len(batch.requests), [r not in bad for r in batch.requests])
    s.check()
    return taken


def step(s: Scheduler, token: int = TOKEN, bad: Sequence[Request] = ()) -> Batch | None:
    batch = s.plan()
    s.check()
    if batch is not None:
        commit(s, batch, token, bad)
    return batch


def drain(s: Scheduler) -> list[Batch]:
    batches = []
    while (batch := step(s)) is not None:
        batches.append(batch)
    return batches


def idle(s: Scheduler) -> bool:
    """Nobody holds a page or a row; what is cached can go."""
    s.check()
    rows = sorted(s.free_rows) == list(range(1, s.max_batch_size + 1))
    return not s.has_work and s.available_pages == s.pool.total and rows and not s.tree.locked_pages


def states(*requests: Request) -> list[State]:
    return [r.state for r in requests]


# ---- a request, from its prompt to its end


def test_nothing_to_do():
    s = make()
    assert s.plan() is None and not s.has_work


def test_a_request_from_prompt_to_end():
    r = request(5, new=3)
    s = make(20, 4, 3, 100, r)
    assert s.has_work and r.state is State.WAITING
    batch = s.plan()
    assert (batch.requests, batch.ids, batch.starts, batch.lengths) == ([r], r.prompt_ids, [0], [5])
    assert (batch.samples, batch.decodes) == ([True], 0)
    assert (batch.changes.admitted, batch.changes.tables) == ({r: 5}, [(r.row, 0, r.pages)])
    assert batch.changes.copies == []
    assert r.state is State.RUNNING and r.row > 0 and len(r.pages) == 2 and r.in_flight == 1
    assert s.commit(batch, [41], [True]) == [0]
    assert (r.computed, r.output_ids, r.in_flight) == (5, [41], 0)
    batch = s.plan()
    assert (batch.requests, batch.ids, batch.starts, batch.lengths) == ([r], [41], [5], [1])
    assert (batch.samples, batch.decodes, batch.changes.admitted, batch.changes.tables) == ([True], 1, {}, [])
    s.commit(batch, [42], [True])
    batch = s.plan()
    assert (batch.ids, batch.starts) == ([42], [6])
    s.commit(batch, [43], [True])
    assert (r.output_ids, r.finish_reason, r.state) == ([41, 42, 43], "length", State.FINISHED)
    assert (r.row, r.pages, r.node, r.shared) == (0, [], None, 0)
    assert idle(s) and s.plan() is None


def test_a_page_is_added_when_the_last_one_is_full():
    r = request(4, new=6)
    s = make(20, 4, 3, 100, r)
    tables = [step(s).changes.tables for _ in range(6)]
    row, pages = tables[0][0][0], [page for changes in tables for _, _, new in changes for page in new]
    assert tables == [[(row, 0, pages[:1])], [(row, 1, pages[1:2])], [], [], [], [(row, 2, pages[2:])]]
    assert len(pages) == 3 and r.finish_reason == "length" and idle(s)


def test_a_future_token_is_named_by_its_row():
    a, b = request(5), request(3)
    s = make(20, 4, 3, 100, a, b)
    first, second = s.plan(), s.plan()
    assert (second.ids, second.starts, second.decodes) == ([-a.row, -b.row], [5, 3], 2)
    s.commit(first, [41, 42], [True, True])
    third = s.plan()
    assert (third.ids, third.starts) == ([-a.row, -b.row], [6, 4])
    s.commit(second, [43, 44], [True, True])
    s.commit(third, [45, 46], [True, True])
    assert s.plan().ids == [45, 46], "known by now"
    assert (a.output_ids, b.output_ids) == ([41, 43, 45], [42, 44, 46])


def test_nothing_is_planned_beyond_the_last_token():
    r = request(5, new=2)
    s = make(20, 4, 3, 100, r)
    batches = [s.plan() for _ in range(3)]
    assert batches[2] is None and s.has_work
    for batch in batches[:2]:
        commit(s, batch)
    assert r.output_ids == [TOKEN] * 2 and idle(s)


def test_no_page_is_added_for_the_last_token_which_is_never_computed():
    r = request(5, new=4)
    s = make(20, 4, 3, 100, r)
    batches = [s.plan() for _ in range(4)]
    assert batches[3].starts == [7] and r.computed == r.last == 8
    assert s.plan() is None and len(r.pages) == 2
    for batch in batches:
        commit(s, batch)
    assert r.output_ids == [TOKEN] * 4 and idle(s)


@pytest.mark.parametrize("chunk_size, chunks", [(4, [4, 3]), (5, [5, 2]), (6, [6, 1]), (7, [7]), (8, [7])])
def test_a_prompt_in_chunks(chunk_size: int, chunks: list[int]):
    r = request(7, new=1)
    s = make(20, 4, 3, chunk_size, r)
    batches = drain(s)
    assert [b.lengths for b in batches] == [[n] for n in chunks]
    assert [b.starts for b in batches] == [[sum(chunks[:i])] for i in range(len(chunks))]
    assert [i for b in batches for i in b.ids] == r.prompt_ids
    assert [b.samples for b in batches] == [[False]] * (len(chunks) - 1) + [[True]]
    assert r.output_ids == [TOKEN] and idle(s)


def test_a_chunk_is_at_least_a_page():
    r = request(7, new=1)
    assert [b.lengths for b in drain(make(20, 4, 3, 1, r))] == [[4], [3]]


def test_a_stop_id_ends():
    r = request(new=10)
    s = make(20, 4, 3, 100, r)
    step(s)
    step(s, token=STOP)
    assert (r.finish_reason, r.stop_reason, r.output_ids) == ("stop", STOP, [TOKEN, STOP])
    assert idle(s)


def test_a_stop_id_before_min_new_tokens_does_not_end():
    r = request(new=10, min_new_tokens=2)
    s = make(20, 4, 3, 100, r)
    for _ in range(3):
        step(s, token=STOP)
    assert r.output_ids == [STOP] * 3 and r.finish_reason == "stop"


def test_a_batch_is_greedy_if_all_that_it_samples_is():
    greedy, other = request(temperature=0), request(temperature=1)
    assert Batch([greedy], samples=[True]).greedy
    assert not Batch([greedy, other], samples=[True, True]).greedy
    assert not Batch([greedy, other], samples=[True, False]).greedy  # its other chunks must not need another graph


def test_a_batch_is_masked_if_one_of_it_needs_the_host():
    plain, masked = request(), request()
    masked.constraint = "a grammar"
    assert not Batch([plain], samples=[True]).masked
    assert Batch([plain, masked], samples=[True, True]).masked


# ---- tokens that are forced


def running(s: Scheduler, r: Request) -> None:
    for _ in range(20):
        if r.state is not State.RUNNING:
            step(s)
    assert r.state is State.RUNNING


@pytest.mark.parametrize("count", [1, 2, 9])
def test_forced_tokens_are_computed_in_one_chunk(count: int):
    """The step on its way samples the first of them; of the next, its token is taken as always."""
    r = request(5, new=20)
    s = make(20, 4, 3, 100, r)
    running(s, r)
    batch, before = s.plan(), len(r.tokens)
    for n in range(count):
        s.force(r, 100 + n, sampled=n == 0)
    assert commit(s, batch) == []
    batch = s.plan()
    assert (batch.starts, batch.lengths, batch.samples) == ([before], [count], [True])
    assert batch.ids == [100 + n for n in range(count)] and batch.decodes_only == (count == 1)
    assert batch.changes.forced == [(r.row, 100 + n) for n in range(1, count)]
    assert commit(s, batch) == [0] and r.output_ids[-count - 1 :] == [*batch.ids, TOKEN]
    drain(s)
    assert idle(s) and r.finish_reason == "length" and r.new_tokens == 20


def test_forced_tokens_end_a_request_like_any_other():
    r = request(5, new=4)
    s = make(20, 4, 3, 100, r)
    running(s, r)
    batch = s.plan()
    for token in (100, 101, 102):
        s.force(r, token, sampled=token == 100)
    assert r.finish_reason == "length" and r.row and commit(s, batch) == [] and idle(s)


def test_what_was_forced_is_forgotten_with_its_row():
    """Or it would count as sampled by whoever gets the row next."""
    r, other = request(5, new=20), request(3, new=2)
    s = make(20, 4, 1, 100, r)
    running(s, r)
    batch = s.plan()
    for token in (100, 101, 102):
        s.force(r, token, sampled=token == 100)
    s.end(r, "abort")
    s.add(other)
    commit(s, batch)
    batch = s.plan()
    assert batch.requests == [other] and batch.changes.forced == []


def test_forced_tokens_wait_for_pages():
    """None are free: somebody is preempted, once the step on its way has come home."""
    first, second = request(8, new=16), request(8, new=16, priority=1)
    s = make(6, 4, 2, 100, first, second, policy="priority")
    s.ratio = 0.0
    batch = step(s)
    assert batch.requests == [first, second]
    batch = s.plan()
    for n in range(11):
        s.force(first, 100 + n, sampled=n == 0)
    assert s.plan() is None
    commit(s, batch)
    batch = s.plan()
    assert second.state is State.PREEMPTED and batch.requests[0] is first and batch.lengths[0] == 11
    commit(s, batch)
    drain(s)
    assert idle(s) and first.finish_reason == second.finish_reason == "length"


# ---- what goes into a step


def test_decodes_first_then_chunks_within_one_budget():
    a, b = request(5, new=20), request(6, new=20)
    s = make(40, 4, 4, 11, a, b)
    step(s)
    long, next_one = request(12), request(7)
    s.add(long)
    s.add(next_one)
    batch = step(s)
    assert (batch.requests, batch.lengths, batch.decodes) == ([a, b, long], [1, 1, 9], 2)
    assert batch.ids == [TOKEN, TOKEN, *long.prompt_ids[:9]]
    assert batch.samples == [True, True, False]
    batch = step(s)
    assert (batch.requests, batch.lengths, batch.decodes) == ([a, b, long, next_one], [1, 1, 3, 6], 2)
    assert batch.samples == [True, True, True, False]
    batch = step(s)
    assert (batch.requests, batch.lengths, batch.decodes) == ([a, b, long, next_one], [1, 1, 1, 1], 3)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_long_prompt_never_stops_the_decodes(chunked: bool):
    running = [request(3, new=30) for _ in range(3)]
    s = make(100, 4, 5, 8, *running, chunked_prefill=chunked)
    while any(r.state is not State.RUNNING for r in running):
        step(s)
    s.add(long := request(150))
    before = [r.new_tokens for r in running]
    for i in range(1, 20):
        batch = step(s)
        assert batch.requests[: batch.decodes][:3] == running
        assert [r.new_tokens for r in running] == [n + i for n in before]
    assert chunked == (long.state is State.PREFILLING)


def test_decodes_that_fill_the_budget_alone_leave_a_page_to_a_prompt():
    running = [request(3, new=40) for _ in range(4)]
    s = make(100, 4, 5, 4, *running)
    while any(r.state is not State.RUNNING for r in running):
        step(s)
    s.add(late := request(10, new=1))
    assert [step(s).lengths for _ in range(3)] == [[1, 1, 1, 1, 4], [1, 1, 1, 1, 4], [1, 1, 1, 1, 2]]
    assert late.finish_reason == "length"


def test_without_chunks_a_prompt_is_computed_whole():
    requests = [request(n, new=1) for n in (6, 10, 3, 40, 2)]
    s = make(100, 4, 5, 8, *requests, chunked_prefill=False)
    assert [b.lengths for b in drain(s)] == [[6], [10], [3], [40], [2]]
    assert all(r.finish_reason == "length" for r in requests) and idle(s)


def test_without_chunks_prompts_that_fit_into_the_budget_share_a_step():
    requests = [request(n, new=1) for n in (3, 5, 1)]
    s = make(100, 4, 5, 8, *requests, chunked_prefill=False)
    assert [b.lengths for b in drain(s)] == [[3, 5], [1]]


# ---- admission


@pytest.mark.parametrize("prompt, new, fits", [(16, 4, True), (17, 3, True), (17, 4, False), (400, 1, False)])
def test_a_request_that_can_never_fit_is_refused_with_the_figures(prompt: int, new: int, fits: bool):
    s, r = make(pages=5), request(prompt, new)
    if fits:
        s.add(r)
        drain(s)
        assert r.finish_reason == "length" and idle(s)
        return
    with pytest.raises(UserError, match=f"{prompt + new} tokens .* cache of 20"):
        s.add(r)
    assert not s.has_work
    s.end(r, "error")
    assert idle(s)


def test_rows_limit_what_runs_and_come_back():
    requests = [request(new=2) for _ in range(7)]
    s = make(100, 4, 3, 100, *requests)
    s.plan()
    assert sorted(r.row for r in requests) == [0, 0, 0, 0, 1, 2, 3]
    s = make(100, 4, 3, 100, *(requests := [request(new=2) for _ in range(7)]))
    batches = drain(s)
    assert max(len(b.requests) for b in batches) == 3
    assert [r for b in batches for r in b.changes.admitted] == requests and idle(s)


def test_first_come_first_served():
    """A small request does not overtake a large one that waits for pages."""
    first, large, small = request(8, new=4), request(12, new=4), request(2, new=2)
    s = make(5, 4, 3, 100, first, large, small, policy="fcfs")
    s.plan()
    assert states(first, large, small) == [State.RUNNING, State.WAITING, State.WAITING]
    assert s.pool.free_pages == 3, "enough for the small one"


def test_admission_leaves_what_those_inside_are_expected_to_need():
    first, second = request(4, new=20), request(8, new=1)
    s = make(6, 4, 3, 100, first, second)
    step(s)
    assert states(first, second) == [State.RUNNING, State.WAITING]
    s = make(6, 4, 3, 100, first := request(4, new=20), second := request(8, new=1))
    s.ratio = RATIO_LEAST
    s.plan()
    assert states(first, second) == [State.RUNNING, State.RUNNING]


def test_one_alone_is_admitted_whatever_is_expected_of_it():
    r = request(16, new=4)
    s = make(5, 4, 3, 100, r)
    assert step(s).requests == [r]


# ---- ends from outside


def in_state(state: State) -> tuple[Scheduler, Counted, Counted]:
    """A request in this state, and another one beside it."""
    other, r = request(5), request(9)
    s = make(100, 4, 3, 4, other, r)
    while r.state is not (State.RUNNING if state is State.PREEMPTED else state):
        step(s)
    if state is State.PREEMPTED:
        s.preempt(r)
    return s, r, other


@pytest.mark.parametrize("state", State)
def test_an_end_from_outside_in_every_state(state: State):
    s, r, other = in_state(state)
    s.end(r, "abort", "gone")
    s.check()
    assert (r.state, r.ends, r.row, r.pages) == (State.FINISHED, 1, 0, [])
    assert (r.finish_reason, r.stop_reason) == (("length", None) if state is State.FINISHED else ("abort", "gone"))
    s.end(r, "error")
    assert r.ends == 1, "it was not ended again"
    drain(s)
    assert other.output_ids == [TOKEN] * 4 and idle(s)


@pytest.mark.parametrize("state", [State.PREFILLING, State.RUNNING])
@pytest.mark.parametrize("flying", [1, 2])
def test_an_end_while_steps_are_on_their_way(state: State, flying: int):
    """Row and pages come back when the last of them is home, and no token is taken from any."""
    r = request(30, new=10)
    s = make(100, 4, 3, 4, r)
    while r.state is not state:
        step(s)
    batches = [s.plan() for _ in range(flying)]
    row, pages, taken = r.row, len(r.pages), r.new_tokens
    assert r.in_flight == flying
    s.end(r, "abort")
    for batch in batches:
        s.check()
        assert (r.row, len(r.pages), s.has_work) == (row, pages, True)
        assert commit(s, batch) == []
    assert (r.row, r.pages, r.new_tokens, r.ends) == (0, [], taken, 1) and idle(s)


@pytest.mark.parametrize("token, reason", [(STOP, "stop"), (TOKEN, "length")])
def test_an_end_is_noticed_one_step_late_and_the_surplus_token_dropped(token: int, reason: str):
    r, other = request(5, new=2 if reason == "length" else 9), request(5, new=9)
    s = make(20, 4, 3, 100, r, other)
    step(s)
    first, second = s.plan(), s.plan()
    assert second.requests == ([other] if reason == "length" else [r, other])
    s.commit(first, [token, 51], [True, True])
    s.check()
    assert (r.finish_reason, r.output_ids) == (reason, [TOKEN, token])
    assert (r in s.leaving) == (r.row > 0) == (reason == "stop")
    third = s.plan()
    assert third.requests == [other]
    assert commit(s, second) == ([0] if reason == "length" else [1])
    assert (r.row, r.output_ids, r.ends) == (0, [TOKEN, token], 1)
    commit(s, third)
    assert other.output_ids == [TOKEN, 51, TOKEN, TOKEN]


def test_a_row_is_not_given_away_while_a_step_writes_to_it():
    r, late = request(5, new=9), request(5)
    s = make(20, 4, 1, 100, r)
    step(s)
    batch = s.plan()
    s.end(r, "abort")
    s.add(late)
    assert s.plan() is None, "the only row is in flight"
    commit(s, batch)
    assert s.plan().requests == [late]


def test_ending_a_request_that_was_never_queued():
    s, r = make(), request()
    s.end(r, "abort")
    assert r.finish_reason == "abort" and idle(s)


# ---- prefixes


PROMPT = list(range(100, 110))


def test_an_earlier_request_leaves_its_prefix():
    a, b = request(PROMPT), request([*PROMPT[:9], 7, 8])
    s = make(20, 4, 3, 100, a)
    drain(s)
    assert s.tree.pages == 3, "10 tokens of the prompt, and 3 of the output, of which the last was never computed"
    s.add(b)
    batch = s.plan()
    assert (batch.starts, batch.ids) == ([8], [100 + 8, 7, 8])
    assert (b.shared, b.computed, b.metrics.cached_tokens) == (2, 11, 8)
    commit(s, batch)
    drain(s)
    assert (s.prompt_tokens, s.cached_tokens) == (21, 8) and idle(s)


def test_a_prompt_that_is_wholly_cached_computes_one_page():
    s = make(20, 4, 3, 100, request(PROMPT[:8]))
    drain(s)
    s.add(request(PROMPT[:8]))
    batch = step(s)
    assert (batch.starts, batch.ids, batch.samples) == ([4], PROMPT[4:8], [True])
    s = make(20, 1, 3, 100, request(PROMPT[:8]))
    drain(s)
    s.add(request(PROMPT[:8]))
    assert step(s).ids == PROMPT[7:8], "one token, if a page holds one"


def test_an_output_is_cached_too():
    a = request(PROMPT, new=7)
    s = make(20, 4, 3, 100, a)
    drain(s)
    s.add(b := request([*PROMPT, *a.output_ids, 5]))
    step(s)
    assert b.metrics.cached_tokens == 16


def test_what_was_computed_until_an_abort_stays():
    a, b = request(PROMPT, new=9), request(PROMPT)
    s = make(20, 4, 3, 4, a)
    step(s)
    batch = s.plan()
    s.end(a, "abort")
    commit(s, batch)
    s.add(b)
    assert step(s).starts == [8]


def test_namespaces_do_not_share():
    s = make(20, 4, 3, 100, request(PROMPT, namespace=("a",)))
    drain(s)
    s.add(other := request(PROMPT, namespace=("b",)))
    s.add(same := request(PROMPT, namespace=("a",)))
    step(s)
    assert (other.metrics.cached_tokens, same.metrics.cached_tokens) == (0, 8)


def test_without_radix_nothing_is_shared_between_requests():
    s = make(20, 4, 3, 100, radix=False)
    for _ in range(2):
        s.add(request(PROMPT))
        s.add(request(PROMPT))
        batch = step(s)
        assert (batch.starts, batch.lengths) == ([0, 0], [10, 10])
        drain(s)
        assert s.tree.pages == 0 and s.pool.free_pages == s.pool.total
    assert s.cached_tokens == 0


def test_what_another_computes_is_waited_for():
    """The second request is admitted when the first has computed what they share, and computes only the rest."""
    common = list(range(100, 148))
    a, b = request([*common, 1, 2]), request([*common, 3, 4])
    s = make(50, 4, 3, 16, a, b)
    assert [step(s).requests for _ in range(3)] == [[a], [a], [a]]
    batch = step(s)
    assert (batch.requests, batch.starts, batch.lengths) == ([a, b], [48, 48], [2, 2])
    assert b.metrics.cached_tokens == 48
    drain(s)
    assert a.output_ids == b.output_ids and idle(s)


@pytest.mark.parametrize("more, waits", [(0, True), (-1, False)])
def test_a_short_prefix_is_computed_twice(more: int, waits: bool):
    common = list(range(100, 100 + SHARED_AT_LEAST + more))
    a, b = request([*common, 1, 2]), request([*common, 3, 4])
    s = make(50, 4, 3, 100, a, b)
    assert s.plan().requests == ([a] if waits else [a, b])


def test_one_of_another_namespace_does_not_wait():
    common = list(range(100, 140))
    a, b = request(common, namespace=("a",)), request(common, namespace=("b",))
    assert make(50, 4, 3, 100, a, b).plan().requests == [a, b]


def test_others_do_not_wait_for_one_that_waits():
    common = list(range(100, 140))
    a, b, c = request([*common, 1]), request([*common, 2]), request(5)
    s = make(50, 4, 3, 100, a, b, c, policy="fcfs")
    assert s.plan().requests == [a, c]


def test_whoever_waited_goes_on_alone_if_the_other_is_aborted():
    common = list(range(100, 160))
    a, b = request(common), request(common)
    s = make(50, 4, 3, 16, a, b)
    step(s)
    s.end(a, "abort")
    batch = step(s)
    assert (batch.requests, batch.starts) == ([b], [16]), "and keeps what was computed"


@pytest.mark.parametrize("radix", [True, False])
def test_two_that_computed_the_same_keep_one_copy(radix: bool):
    a, b = request(PROMPT), request(PROMPT)
    s = make(20, 4, 3, 100, a, b, radix=radix)
    batch = s.plan()
    own = list(b.pages)
    commit(s, batch)
    assert (b.pages == own) != radix
    if radix:
        assert (a.pages[:2], a.shared, b.shared) == (b.pages[:2], 2, 2)
        assert s.pool.free_pages == 20 - 2 - 2
        assert s.plan().changes.tables == [(b.row, 0, a.pages[:2])]
    else:
        assert s.pool.free_pages == 20 - 6 and (a.shared, b.shared) == (0, 0)


def test_a_duplicate_that_a_step_on_its_way_reads_is_free_and_unharmed_until_the_next_plan():
    a, b = request(PROMPT), request(PROMPT)
    s = make(6, 4, 3, 100, a, b)
    s.ratio = 0
    first, second = s.plan(), s.plan()
    assert second.changes.tables == []
    commit(s, first)
    third = s.plan()
    assert third.changes.tables == [(b.row, 0, a.pages[:2])], "before anything can be written to the old ones"
    commit(s, second)
    commit(s, third)


# ---- n samples


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("length", [10, 8, 9, 3, 1])
def test_samples_share_the_full_pages_and_copy_the_last(radix: bool, length: int):
    """With pages of 4 and the prompt's last token computed by each: so much of the prompt is shared, and so much copied."""
    first, *rest = samples(3, PROMPT[:length])
    s = make(30, 4, 3, 100, first, *rest, radix=radix)
    assert s.plan().requests == [first], "they wait for the first"
    s = make(30, 4, 3, 100, *(group := samples(3, PROMPT[:length])), radix=radix)
    step(s)
    shared = (length - 1) // 4
    source = group[0].pages[shared]
    batch = s.plan()
    assert (batch.requests, batch.decodes) == (group, 1)
    assert batch.starts[1:] == [length - 1] * 2 and batch.ids[1:] == [PROMPT[length - 1]] * 2
    copied = (length - 1) % 4 > 0
    assert batch.changes.copies == [(source, r.pages[shared]) for r in group[1:] if copied]
    for r in group[1:]:
        assert r.pages[:shared] == group[0].pages[:shared] and r.metrics.cached_tokens == length - 1
    assert len({r.pages[shared] for r in group}) == 3
    commit(s, batch)
    drain(s)
    assert [r.output_ids for r in group] == [[TOKEN] * 4] * 3 and idle(s)
    assert radix or s.tree.pages == 0


@pytest.mark.parametrize("radix", [True, False])
def test_samples_of_an_ended_leader(radix: bool):
    first, second = samples(2, PROMPT)
    s = make(30, 4, 1, 100, first, second, radix=radix)
    while first.finish_reason is None:
        step(s)
    batch = step(s)
    assert (batch.requests, batch.starts) == ([second], [8 if radix else 0]) and not batch.changes.copies
    drain(s)
    assert second.finish_reason == "length" and idle(s)


def test_samples_of_a_leader_that_never_ran():
    first, second, third = samples(3, PROMPT)
    s = make(30, 4, 3, 100, first, second, third)
    s.end(first, "abort")
    batch = step(s)
    assert batch.requests == [second, third] and batch.starts == [0, 0]
    drain(s)
    assert second.output_ids == third.output_ids and idle(s)


@pytest.mark.parametrize("radix", [True, False])
def test_samples_of_a_preempted_leader(radix: bool):
    first, second = samples(2, PROMPT, new=9)
    s = make(30, 4, 2, 4, first, second, radix=radix)
    while first.state is not State.RUNNING:
        step(s)
    s.preempt(first)
    drain(s)
    assert [r.output_ids for r in (first, second)] == [[TOKEN] * 9] * 2 and idle(s)
    assert first.metrics.preemptions == 1 and second.finish_reason == "length"


def test_a_sample_is_copied_nothing_once_it_has_tokens_of_its_own():
    first, second = samples(2, PROMPT, new=9)
    s = make(30, 4, 2, 100, first, second)
    for _ in range(4):
        step(s)
    s.preempt(second)
    batch = s.plan()
    assert batch.changes.copies == [] and second in batch.requests
    commit(s, batch)
    drain(s)
    assert second.output_ids == [TOKEN] * 9


# ---- preemption


def crowded(**options) -> tuple[Scheduler, Counted, Counted]:
    """Two that were let in together, and will want 10 pages where there are 7."""
    long, short = request(8, new=12), request(4, new=16)
    s = make(7, 4, 3, 100, long, short, **options)
    s.ratio = 0
    return s, long, short


def test_who_loses_least_is_preempted_and_keeps_its_tokens():
    s, long, short = crowded()
    while not s.preemptions:
        step(s)
    assert states(long, short) == [State.RUNNING, State.PREEMPTED]
    assert short.new_tokens > 0 and short.metrics.preemptions == 1
    assert (short.row, short.pages, short.computed) == (0, [], 0)
    kept = short.output_ids
    drain(s)
    assert long.output_ids == [TOKEN] * 12 and short.output_ids == [TOKEN] * 16
    assert short.output_ids[: len(kept)] == kept and idle(s)


def test_one_always_progresses():
    """Six that each need nearly the whole pool: in every step somebody computes, and in the end all are done."""
    requests = [request(5 + i, new=20 - i) for i in range(6)]
    s = make(7, 4, 6, 100, *requests)
    for _ in range(1000):
        s.ratio = 0
        if not s.has_work:
            break
        assert step(s) is not None
    assert all(r.output_ids == [TOKEN] * r.max_new_tokens for r in requests)
    assert s.preemptions and idle(s)


def test_a_preempted_request_is_resumed_with_all_its_tokens():
    r = request(6, new=9)
    s = make(20, 4, 3, 100, r)
    for _ in range(4):
        step(s, token=41)
    s.preempt(r)
    s.flush()
    batch = s.plan()
    assert (batch.requests, batch.ids, batch.starts) == ([r], r.prompt_ids + [41] * 4, [0])
    assert (batch.samples, batch.decodes, batch.changes.admitted) == ([True], 0, {r: len(r.tokens)})
    commit(s, batch)
    assert r.new_tokens == 5
    drain(s)
    assert r.output_ids == [41] * 4 + [TOKEN] * 5 and idle(s)
    assert (s.prompt_tokens, s.cached_tokens) == (6, 0), "a prompt counts once"


def test_what_it_had_computed_is_found_again_if_nobody_took_it():
    r = request(6, new=9)
    s = make(20, 4, 3, 100, r)
    for _ in range(4):
        step(s)
    s.preempt(r)
    assert step(s).starts == [8]


def test_a_prefix_that_others_hold_is_no_loss():
    """The longer one shares its prompt with a third, so the shorter one has more to compute again."""
    common = list(range(100, 116))
    third, sharing, alone = request(common, new=30), request([*common, 1], new=30), request(6, new=30)
    s = make(40, 4, 3, 100, third)
    step(s)
    s.add(sharing)
    s.add(alone)
    step(s)
    assert sharing.computed > alone.computed
    assert s._loss(sharing) < s._loss(alone) and s._loss(third) < s._loss(alone)


def test_by_priority_the_least_urgent_is_preempted_whatever_it_loses():
    long, short = request(8, new=12, priority=1), request(4, new=16, priority=0)
    s = make(7, 4, 3, 100, long, short, policy="priority")
    s.ratio = 0
    while not s.preemptions:
        step(s)
    assert states(long, short) == [State.PREEMPTED, State.RUNNING]


def test_of_equals_the_youngest_is_preempted():
    a, b = request(4, new=16), request(4, new=16)
    s = make(5, 4, 3, 100, a, b)
    s.ratio = 0
    while not s.preemptions:
        step(s)
    assert states(a, b) == [State.RUNNING, State.PREEMPTED]


def test_the_expectation_rises_after_a_preemption_and_falls_with_every_step():
    s, *_ = crowded()
    while not s.preemptions:
        step(s)
    assert s.ratio > RATIO_START
    expected = s.ratio
    for _ in range(5):
        expected -= RATIO_DECAY if step(s).decodes else 0
        assert s.ratio == pytest.approx(expected)
    s.ratio = RATIO_LEAST + RATIO_DECAY / 2
    step(s)
    assert s.ratio == RATIO_LEAST


def test_what_is_in_flight_cannot_be_preempted():
    r = request()
    s = make(20, 4, 3, 100, r)
    batch = s.plan()
    with pytest.raises(RuntimeError, match="is running, in 1 steps"):
        s.preempt(r)
    commit(s, batch)
    s.preempt(r)
    s.check()
    assert r.state is State.PREEMPTED


def test_with_a_step_on_its_way_the_plan_waits_for_it_rather_than_preempt():
    s, long, short = crowded()
    last = None
    while (batch := s.plan()) is not None:
        if last is not None:
            commit(s, last)
        last = batch
    assert not s.preemptions and states(long, short) == [State.RUNNING] * 2
    s.check()
    commit(s, last)
    assert s.plan() is not None and s.preemptions == 1


def test_an_end_in_the_step_on_its_way_spares_the_preemption():
    s, long, short = crowded()
    last = None
    while (batch := s.plan()) is not None:
        if last is not None:
            commit(s, last)
        last = batch
    s.commit(last, [STOP] * len(last.requests), [True] * len(last.requests))
    s.check()
    assert not s.preemptions and states(long, short) == [State.FINISHED] * 2 and idle(s)


# ---- NaN


def test_logits_that_are_not_finite_end_that_request_only():
    bad, good = request(10, new=9), request(10, new=4)
    s = make(20, 4, 3, 100, bad, good)
    step(s)
    batch = s.plan()
    assert s.commit(batch, [41, 42], [False, True]) == [1]
    s.check()
    assert (bad.finish_reason, bad.stop_reason, bad.output_ids) == (
        "error",
        "the model's logits are not finite",
        [TOKEN],
    )
    assert (bad.row, bad.pages, bad.ends) == (0, [], 1)
    drain(s)
    assert good.output_ids == [TOKEN, 42, TOKEN, TOKEN] and idle(s)


def test_what_is_not_finite_is_not_cached():
    bad = request(PROMPT)
    s = make(20, 4, 3, 8, bad)
    step(s)
    step(s, bad=[bad])
    assert bad.finish_reason == "error" and s.tree.pages == 2, "the first chunk was good"
    s = make(20, 4, 3, 8, bad := request(PROMPT))
    step(s, bad=[bad])
    assert bad.finish_reason == "error" and s.tree.pages == 0 and idle(s)


def test_not_finite_and_found_one_step_late():
    bad, good = request(7, new=9), request(7, new=9)
    s = make(20, 4, 3, 100, bad, good)
    first, second = s.plan(), s.plan()
    pages = list(bad.pages)
    assert commit(s, first, bad=[bad]) == [1]
    assert bad in s.leaving and bad.pages == pages, "a step still writes to them"
    third = s.plan()
    assert third.requests == [good]
    assert commit(s, second, bad=[bad]) == [1]
    assert (bad.row, bad.ends) == (0, 1)
    commit(s, third)
    drain(s)
    assert good.output_ids == [TOKEN] * 9 and idle(s)


# ---- all of it


def test_a_flush_drops_what_nobody_runs_on():
    a, b = request(PROMPT), request(8, new=1)
    s = make(20, 4, 3, 100, a, b)
    step(s)
    assert b.finish_reason == "length" and s.tree.pages == 4
    assert s.flush() == 2 == s.tree.pages
    s.check()
    drain(s)
    assert s.flush() == 0 and s.pool.free_pages == s.pool.total and idle(s)


def test_pages_that_nobody_uses_go_when_they_are_wanted():
    s = make(5, 4, 3, 100, request(12, new=1))
    drain(s)
    assert (s.tree.pages, s.pool.free_pages, s.available_pages) == (3, 2, 5)
    s.add(r := request(14, new=6))
    drain(s)
    assert r.finish_reason == "length" and idle(s)


def test_counters_of_the_hit_rate():
    s = make(50, 4, 3, 100)
    for prompt in (PROMPT, PROMPT, [*PROMPT[:6], 1, 2, 3], [1, 2, 3]):
        s.add(request(prompt, new=1))
        drain(s)
    assert (s.prompt_tokens, s.cached_tokens) == (10 + 10 + 9 + 3, 0 + 8 + 4 + 0)


TAMPERINGS: dict[str, Callable[[Scheduler, Request, Request], object]] = {
    "a page is lost": lambda s, a, b: a.pages.pop(),
    "a page has two owners": lambda s, a, b: a.pages.__setitem__(-1, b.pages[-1]),
    "a page is owned and free": lambda s, a, b: s.pool._free.append(a.pages[-1]),
    "a page is owned and free, another is lost": lambda s, a, b: s.pool._free.__setitem__(0, a.pages[-1]),
    "a page is owned and the tree's": lambda s, a, b: a.pages.__setitem__(-1, a.pages[0]),
    "a free page is lost": lambda s, a, b: s.pool._free.pop(),
    "a free page is there twice": lambda s, a, b: s.pool._free.__setitem__(0, s.pool._free[1]),
    "a row is lost": lambda s, a, b: s.free_rows.pop(),
    "a row has two owners": lambda s, a, b: setattr(a, "row", b.row),
    "a row is held and free": lambda s, a, b: s.free_rows.__setitem__(0, a.row),
    "a request is lost": lambda s, a, b: s.running.pop(a),
    "a lock is lost": lambda s, a, b: s.tree.unlock(a.node),
    "a lock is left": lambda s, a, b: s.tree.lock_node(a.node),
    "a lock is left on a part of the way": lambda s, a, b: setattr(a.node, "locks", a.node.locks + 1),
    "a shared page is not the tree's": lambda s, a, b: a.pages.__setitem__(slice(2), a.pages[1::-1]),
    "a node is forgotten": lambda s, a, b: setattr(a, "node", None),
    "a shared page is taken for an own one": lambda s, a, b: setattr(a, "shared", a.shared - 1),
    "the tree drops a page": lambda s, a, b: s.tree.evict(1),
    "the tree is given a page twice": lambda s, a, b: s.tree.insert(tree_key([1, 2, 3, 4]), [a.pages[0]]),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_check_sees(tampering: str):
    cached = request(8, new=1)
    a, b = request([*PROMPT[:8], 1, 2], new=9), request([*PROMPT[:8], 3, 4], new=9)
    s = make(30, 4, 5, 100, cached, a)
    step(s)
    s.add(b)
    s.add(request([*PROMPT[:4], 5], new=9))
    step(s)
    assert a.node is b.node and a.node.locks == 2 and a.node.parent.locks == 3
    TAMPERINGS[tampering](s, a, b)
    with pytest.raises(RuntimeError):
        s.check()
