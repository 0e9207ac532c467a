"""The waiting queue: who goes first under each policy, and that nobody waits for ever.

python -m pytest tests/test_policy.py
"""

import random
from collections.abc import Callable, Sequence

import pytest

from cache.pages import PagePool
from cache.radix import RadixTree, tree_key
from scheduler.policy import MAX_PASSED_OVER, MAX_REORDERED, REORDER, WaitingQueue
from scheduler.request import Request, SamplingParams, State
from scheduler.scheduler import Scheduler


def request(prompt: Sequence[int], arrival: int = 0, priority: int = 0, new: int = 1) -> Request:
    r = Request(prompt, SamplingParams(), frozenset(), new, 0, priority=priority)
    r.arrival = arrival
    return r


def queue(policy: str, *prompts: Sequence[int], priorities: Sequence[int] = ()) -> WaitingQueue:
    """Requests that arrived in this order, from 1."""
    q = WaitingQueue(policy)
    for i, prompt in enumerate(prompts):
        q.add(request(prompt, i + 1, priorities[i] if priorities else 0))
    return q


def tree(*prompts: Sequence[int]) -> RadixTree:
    t = RadixTree(1)
    for prompt in prompts:
        t.insert(tree_key(prompt), [t.pages + 100 + i for i in range(len(prompt))])
    return t


def order(q: WaitingQueue, t: RadixTree | None = None, most: int = 1000) -> list[int]:
    return [r.arrival for r in q.candidates(t or RadixTree(1), most)]


def admit(q: WaitingQueue, r: Request) -> None:
    q.admitted(r)
    r.state = State.PREFILLING


def test_an_unknown_policy_is_refused():
    with pytest.raises(KeyError):
        WaitingQueue("sjf")


@pytest.mark.parametrize("policy", REORDER)
def test_an_empty_queue(policy: str):
    q = WaitingQueue(policy)
    assert (len(q), list(q), order(q)) == (0, [], [])


def test_first_come_first_served_whatever_is_cached():
    q = queue("fcfs", [5, 5, 5], [1, 2, 3], [1, 2])
    assert order(q, tree([1, 2, 3])) == [1, 2, 3]


def test_the_longest_cached_prefix_goes_first_and_arrival_decides_between_equals():
    q = queue("lpm", [5, 5, 5], [1, 2, 9], [1, 2, 3, 4], [6], [1, 2, 8])
    assert order(q, tree([1, 2, 3, 4])) == [3, 2, 5, 1, 4]


def test_depth_first_the_branch_with_most_requests_first():
    """Three wait below [1], of which two go on to [1, 2]; two below [7]; one has nothing cached."""
    q = queue("dfs-weight", [9, 9], [7, 8, 0], [1, 3, 0], [1, 2, 0], [7, 0], [1, 2, 5])
    t = tree([1, 2], [1, 3], [7, 8])
    assert order(q, t) == [4, 6, 3, 2, 5, 1]


def test_depth_first_keeps_a_branch_together():
    prompts = [[first, second, 0] for second in (1, 2, 3) for first in (1, 2, 3)]
    t = tree(*[[first, second] for first in (1, 2, 3) for second in (1, 2, 3)])
    firsts = [prompts[i - 1][0] for i in order(queue("dfs-weight", *prompts), t)]
    assert firsts == sorted(firsts)


def test_namespaces_are_told_apart():
    q = queue("lpm", [5], [1, 2, 3])
    q.add(other := request([1, 2, 3], 3))
    other.namespace = ("other",)
    assert order(q, tree([1, 2, 3])) == [2, 1, 3]


def test_the_lowest_priority_value_goes_first_then_arrival():
    q = queue("priority", [1], [2], [3], [4], [5], priorities=[1, 0, 2, 0, -1])
    assert order(q) == [5, 2, 4, 1, 3]


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "dfs-weight"])
def test_priority_means_nothing_to_the_other_policies(policy: str):
    assert order(queue(policy, [1], [2], [3], priorities=[2, 1, 0])) == [1, 2, 3]


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
@pytest.mark.parametrize("more", [0, 1, 1000])
def test_of_a_long_queue_only_a_front_is_reordered(policy: str, more: int):
    """Who is cached and came last of all is not found in a long queue, until a neighbour of its prompt is admitted."""
    q = queue(policy, *[[5]] * (MAX_REORDERED - 2 + more), [9, 2, 4], [9, 2, 3])
    last, t = MAX_REORDERED + more, tree([9, 2])
    assert order(q, t)[0] == (1 if more else last - 1)
    first = next(r for r in q if r.arrival == last - 1)
    admit(q, first)
    assert order(q, t)[0] == last


def test_the_order_is_kept_until_queue_or_tree_change():
    q, t = queue("lpm", [5, 5], [1, 2, 3]), tree([1, 2])
    assert order(q, t) == [2, 1]
    t.insert(tree_key([5]), [99])
    assert order(q, t) == [2, 1]
    q.add(request([1, 2, 4, 5], 3))
    assert order(q, t) == [2, 3, 1]
    t.insert(tree_key([1, 2, 4]), [t.match(tree_key([1, 9])).pages[0], 101, 102])
    assert order(q, t) == [3, 2, 1]


def test_no_more_candidates_than_are_worth_a_look():
    q = queue("fcfs", *[[1]] * 50)
    assert order(q, most=7) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("policy", REORDER)
def test_remove_takes_out_the_one_that_is_meant(policy: str):
    rng = random.Random(0)
    q = queue(policy, *[[i] for i in range(40)], priorities=[rng.randint(0, 2) for _ in range(40)])
    left = list(q)
    while left:
        r = left.pop(rng.randrange(len(left)))
        q.remove(r)
        assert list(q) == left and len(q) == len(left)


def test_the_oldest_that_has_ended_or_runs_is_forgotten():
    q = queue("fcfs", [1], [2], [3])
    first, second, third = q
    q.remove(first)
    first.finish("abort")
    assert q.oldest is second
    admit(q, second)
    assert q.oldest is third


@pytest.mark.parametrize("policy", REORDER)
def test_a_preempted_request_goes_back_to_its_place(policy: str):
    q = queue(policy, *[[i] for i in range(5)])
    second = list(q)[1]
    admit(q, second)
    assert order(q) == [1, 3, 4, 5]
    second.state = State.PREEMPTED
    q.add(second)
    assert order(q) == [1, 2, 3, 4, 5]
    q.remove(second)
    assert order(q) == [1, 3, 4, 5]


@pytest.mark.parametrize("policy", REORDER)
def test_a_preempted_request_is_the_oldest_again(policy: str):
    q = queue(policy, [1], [2], [3])
    first = q.oldest
    admit(q, first)
    assert q.oldest is not first
    first.state = State.PREEMPTED
    q.add(first)
    assert q.oldest is first


def test_a_preempted_request_goes_back_to_its_place_among_its_priority():
    q = queue("priority", *[[i] for i in range(4)], priorities=[0, 1, 0, 1])
    second = list(q)[2]
    assert second.arrival == 2
    admit(q, second)
    second.state = State.PREEMPTED
    q.add(second)
    assert order(q) == [1, 3, 2, 4]


@pytest.mark.parametrize("policy, best", [("lpm", [1, 2, 3]), ("dfs-weight", [1, 2, 3]), ("priority", [6])])
def test_the_oldest_is_passed_over_a_bounded_number_of_times(policy: str, best: list[int]):
    q, t = queue(policy, [5, 5], priorities=[9]), tree([1, 2, 3])
    oldest = q.oldest
    for i in range(MAX_PASSED_OVER):
        q.add(request(best, i + 2))
        assert oldest.passed_over == i
        assert order(q, t) == [i + 2, 1]
        admit(q, q.candidates(t, 10)[0])
    q.add(request(best, 1000))
    assert order(q, t) == [1, 1000], "now it goes first"
    admit(q, oldest)
    assert oldest.passed_over == 0
    assert order(q, t) == [1000]


def test_it_goes_first_in_a_queue_that_is_too_long_for_a_look_at_it():
    """By priority, with more urgent ones before it than are looked at."""
    q = queue("priority", [5], *[[1]] * 50, priorities=[9] + [0] * 50)
    assert order(q, most=3) == [2, 3, 4]
    q.oldest.passed_over = MAX_PASSED_OVER
    assert order(q, most=3) == [1, 2, 3, 4]


# ---- through the scheduler


def endless(s: Scheduler, late: Request, another: Callable[[int], Request]) -> int:
    """Steps until `late` is admitted, while more of the others arrive than there are rows for; each step admits `rows`."""
    for i in range(2000):
        while len(s.waiting) < 2 * s.max_batch_size + 2:
            s.add(another(i))
        s.commit(batch := s.plan(), [9] * len(batch.requests), [True] * len(batch.requests))
        s.check()
        if late.state is not State.WAITING:
            return i
    raise AssertionError("it waits for ever")


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight"])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_endless_stream_of_cached_prompts_starves_nobody(policy: str, rows: int):
    s = Scheduler(PagePool(200, 1), rows, 64, policy=policy)
    s.add(request([1, 2, 3, 4]))
    s.commit(s.plan(), [9], [True])
    s.add(late := request([7, 7, 7]))
    assert endless(s, late, lambda i: request([1, 2, 3, 4 + i % 3])) == -(-MAX_PASSED_OVER // rows)
    assert late.passed_over == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_an_endless_stream_of_urgent_requests_starves_nobody(rows: int):
    s = Scheduler(PagePool(200, 1), rows, 64, policy="priority")
    s.add(late := request([7, 7, 7], priority=5))
    assert endless(s, late, lambda i: request([1, 2, i])) == -(-MAX_PASSED_OVER // rows)


def test_one_that_fits_badly_is_not_starved_by_many_that_fit_well():
    """It goes first in the end, and then nobody is admitted until there are pages for it."""
    s = Scheduler(PagePool(17, 1), 4, 64, policy="priority")
    s.add(late := request(range(100, 114), priority=5, new=2))
    assert endless(s, late, lambda i: request([1 + i % 7, 2, 3], new=2)) <= MAX_PASSED_OVER + 4
