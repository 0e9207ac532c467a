"""The engine as a server uses it: by hand, from threads, from asyncio; requests that go away; a device that fails.

python -m pytest tests/test_serving.py
"""

import asyncio
import functools
import gc
import itertools
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest
import zoo
from test_engine import GREEDY, MIXED, ids_of, make, one, poisoned, prompt_ids, settle
from waiting import HANG, until

from engine import Engine, SamplingParams
from errors import EngineFailed, UserError
from output import Delta
from scheduler.request import Request, State
from stats import Throughput

LONG = SamplingParams(temperature=0, max_new_tokens=100)
BOTH_LOOPS = pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "normal"])


# ---- helpers


@functools.cache
def alone(prompt: tuple[int, ...], number: int) -> list[int]:
    """What MIXED[number] says to a prompt when nobody else is there and nothing is cached."""
    return ids_of(make(radix=False, overlap=False).generate(list(prompt), MIXED[number]))[0]


def drain(engine: Engine) -> dict[str, list[Delta]]:
    """Step by hand until nothing is left to do: the deltas of each request."""
    deltas = defaultdict(list)
    for _ in range(2000):
        if not engine.has_work:
            return deltas
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    raise AssertionError("it does not come to an end")


def tokens_of(deltas: list[Delta]) -> list[int]:
    return [i for d in deltas for i in d.token_ids]


def ends(deltas: list[Delta]) -> list[str]:
    return [d.finish_reason for d in deltas if d.finish_reason is not None]


def request_of(engine: Engine, id: str) -> Request:
    return engine._groups[id].requests[0]


def in_threads(*targets: Callable[[], object]) -> list[object]:
    """Run all at once and give back what they return; what one raises is raised here."""
    results: list[object] = [None] * len(targets)

    def run(i: int) -> None:
        try:
            results[i] = targets[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(targets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
        assert not thread.is_alive(), "a thread hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Gate:
    """Lets so many steps pass on the device and holds the next until `open`: what the host does meanwhile comes in time."""

    def __init__(self, engine: Engine, steps: int):
        self.open, self.steps, self.inner = threading.Event(), steps, engine.runner.run
        engine.runner.run = self

    def __call__(self, *args):
        self.steps -= 1
        if self.steps < 0:
            assert self.open.wait(HANG)
        return self.inner(*args)


# ---- by hand: add, step, abort


@BOTH_LOOPS
def test_the_deltas_of_step_add_up_to_what_generate_gives(overlap: bool):
    engine = make(overlap=overlap, chunk_size=16)
    prompts = ["Once", " upon a time", "x", "0123456789 " * 3, "Once upon"]
    params = [SamplingParams(temperature=1.2, seed=i, max_new_tokens=25, n=1 + i % 3, stop=["an"]) for i in range(5)]
    expected = make(overlap=False).generate(prompts, params)
    ids = [engine.add(x, p) for x, p in zip(prompts, params, strict=True)]
    assert len(set(ids)) == 5
    deltas = drain(engine)
    assert set(deltas) == set(ids)
    for id, output in zip(ids, expected, strict=True):
        for c in output.outputs:
            mine = [d for d in deltas[id] if d.index == c.index]
            assert tokens_of(mine) == c.token_ids and "".join(d.text for d in mine) == c.text
            assert [d.finish_reason for d in mine] == [None] * (len(mine) - 1) + [c.finish_reason]
            assert mine[-1].stop_reason == c.stop_reason
    settle(engine)


def test_a_step_with_nothing_to_do_does_nothing():
    engine = make()
    assert engine.step() == [] and not engine.has_work and engine.steps == 0


@BOTH_LOOPS
def test_requests_may_be_added_at_any_step(overlap: bool):
    engine = make(overlap=overlap, chunk_size=8)
    prompts = prompt_ids(3, 20, 33, 8, 17, 1)
    deltas = defaultdict(list)
    for i, prompt in enumerate(prompts):
        engine.add(prompt, MIXED[i], request_id=str(i))
        for _ in range(i):
            for d in engine.step():
                deltas[d.request_id].append(d)
    for id, rest in drain(engine).items():
        deltas[id] += rest
    assert [tokens_of(deltas[str(i)]) for i in range(6)] == [alone(tuple(p), i) for i, p in enumerate(prompts)]
    settle(engine)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_id_in_use_is_refused_and_harms_nobody(after: int):
    """Neither the one who has it, whichever way the second comes, nor the one whose turn it is later."""
    engine, prompt = make(), prompt_ids(9)[0]
    engine.add(prompt, GREEDY, request_id="mine")
    deltas = [d for _ in range(after) for d in engine.step()]
    for call in (engine.add, engine.stream):
        with pytest.raises(UserError, match="request id 'mine' is in use"):
            call([1, 2], GREEDY, request_id="mine")
        gc.collect()
    deltas += drain(engine)["mine"]
    assert tokens_of(deltas) == alone(tuple(prompt), 0) and ends(deltas) == ["length"]
    assert engine.add(prompt, GREEDY, request_id="mine") == "mine"
    assert tokens_of(drain(engine)["mine"]) == alone(tuple(prompt), 0)
    settle(engine)


def test_an_old_stream_that_is_closed_does_not_abort_who_has_its_id_now():
    engine, prompt = make(), prompt_ids(9)[0]
    old = engine.stream([1, 2, 3], GREEDY, request_id="mine")
    settle(engine)  # it has ended, and nobody has read it
    engine.add(prompt, GREEDY, request_id="mine")
    old.close()
    deltas = drain(engine)["mine"]
    assert ends(deltas) == ["length"] and tokens_of(deltas) == alone(tuple(prompt), 0)


def test_ids_that_callers_choose_do_not_get_in_the_way_of_those_the_engine_makes():
    """Here are all that it is about to make, if it only counts."""
    engine = make()
    chosen = [engine.add([1], GREEDY, request_id=f"request-{i}") for i in range(1, 10)]
    made = [engine.add([2], GREEDY) for _ in range(3)]
    assert len({*chosen, *made}) == 12 and set(map(tuple, map(ends, drain(engine).values()))) == {("length",)}


def test_aborting_who_is_not_there_is_harmless():
    engine, prompt = make(), prompt_ids(9)[0]
    engine.abort("nobody")
    assert not engine.has_work
    engine.add(prompt, GREEDY, request_id="mine")
    engine.abort("nobody")
    assert tokens_of(drain(engine)["mine"]) == alone(tuple(prompt), 0)
    engine.abort("mine")
    assert not engine.has_work and engine.step() == []
    settle(engine)


@BOTH_LOOPS
def test_aborting_twice_ends_once(overlap: bool):
    engine = make(overlap=overlap)
    id = engine.add([1, 2, 3], LONG)
    engine.step()
    for _ in range(3):
        engine.abort(id)
    deltas = drain(engine)[id]
    assert ends(deltas) == ["abort"] and deltas[-1].finish_reason == "abort"
    settle(engine)


STATES = ["queued", "waiting", "prefilling", "running", "in flight", "preempted", "last token in flight"]


def bring_to(engine: Engine, id: str, state: str) -> list[Delta]:
    """Step until the request is in that state; the deltas up to there."""
    deltas: list[Delta] = []
    request = request_of(engine, id)
    if state == "queued":
        return deltas
    wanted = {"waiting": State.WAITING, "prefilling": State.PREFILLING}.get(state, State.RUNNING)
    for _ in range(100):
        deltas += engine.step()
        if request.state is not wanted:
            continue
        if state == "in flight" and not (request.in_flight and request.new_tokens):
            continue
        if state == "last token in flight" and request.computed != request.last:
            continue
        break
    assert request.state is wanted and (request.in_flight or "in flight" not in state)
    if state == "preempted":
        plan, engine.scheduler.plan = engine.scheduler.plan, lambda: None
        deltas += engine.step()  # what is on its way comes home
        engine.scheduler.plan = plan
        engine.scheduler.preempt(request)
        assert request.state is State.PREEMPTED
    return deltas


@pytest.mark.parametrize(
    "state, overlap",
    [(state, overlap) for state in STATES for overlap in (True, False) if overlap or "in flight" not in state],
)
@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
def test_abort_in_every_state_ends_once_and_harms_nobody(state: str, overlap: bool, radix: bool):
    """The others share the victim's prefix, one of them comes after it."""
    engine = make(max_batch_size=3, chunk_size=8, overlap=overlap, radix=radix)
    stem = prompt_ids(22)[0]
    prompts = {"before": stem[:15], "victim": [*stem, 7, 7], "after": [*stem, 9]}
    if state == "waiting":  # all rows are taken
        prompts = {"one": [1], "two": [2], "three": [3], **prompts}
    deltas: dict[str, list[Delta]] = defaultdict(list)
    for id in list(prompts)[:-1]:
        engine.add(prompts[id], GREEDY, request_id=id)
    for d in bring_to(engine, "victim", state):
        deltas[d.request_id].append(d)
    victim = request_of(engine, "victim")
    engine.abort("victim")
    engine.add(prompts["after"], GREEDY, request_id="after")
    for id, rest in drain(engine).items():
        deltas[id] += rest
    assert ends(deltas["victim"]) == ["abort"] and deltas["victim"][-1].stop_reason is None
    assert tokens_of(deltas["victim"]) == alone(tuple(prompts["victim"]), 0)[: victim.new_tokens]
    assert victim.metrics.finished_at is not None
    for id in prompts.keys() - {"victim"}:
        assert tokens_of(deltas[id]) == alone(tuple(prompts[id]), 0) and ends(deltas[id]) == ["length"]
    settle(engine)


def test_aborts_that_race_with_the_end_leave_nothing_behind():
    """The id is in use when abort looks, and free when the engine does."""
    engine, stop = make(), threading.Event()

    def abort_all() -> None:
        while not stop.is_set():
            for i in range(60):
                engine.abort(f"r{i}")
                time.sleep(0)  # else it has the interpreter for itself most of the time

    thread = threading.Thread(target=abort_all, daemon=True)
    thread.start()
    for i in range(60):
        deltas = list(engine.stream([i + 1], SamplingParams(max_new_tokens=2), request_id=f"r{i}"))
        assert deltas[-1].finish_reason in ("length", "abort")
    stop.set()
    thread.join(HANG)
    until(lambda: not engine.has_work)
    settle(engine)


# ---- n samples of one prompt


def watch_plan(engine: Engine) -> list:
    """Every batch that the scheduler plans from now on."""
    batches, plan = [], engine.scheduler.plan

    def watched():
        batch = plan()
        if batch is not None:
            batches.append(batch)
        return batch

    engine.scheduler.plan = watched
    return batches


@BOTH_LOOPS
@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_samples_share_the_prompts_pages_and_copy_only_the_last(page_size: int, radix: bool, overlap: bool):
    """The prompt is computed once; each further sample computes its last token alone, on a page of its own."""
    n = 4
    for length in sorted({1, 2, page_size, page_size + 1, page_size + 2, 2 * page_size, 2 * page_size + 1, 35}):
        engine = make(page_size=page_size, radix=radix, overlap=overlap, max_batch_size=n)
        batches = watch_plan(engine)
        prompt = prompt_ids(length)[0]
        params = dict(temperature=1.3, max_new_tokens=7)
        outputs = engine.generate(prompt, SamplingParams(n=n, seed=40, **params))
        singles = make(page_size=page_size, radix=False).generate(
            [prompt] * n, [SamplingParams(seed=40 + i, **params) for i in range(n)]
        )
        assert ids_of(outputs) == ids_of(singles) and len(set(map(tuple, ids_of(outputs)))) == n
        copies = [c for b in batches for c in b.changes.copies]
        assert len(copies) == (n - 1 if (length - 1) % page_size else 0)
        if copies:
            assert len({c[0] for c in copies}) == 1 and len({c[1] for c in copies} - {copies[0][0]}) == n - 1
        first = {
            row: pages for b in batches for row, at, pages in b.changes.tables if at == 0 and len(b.changes.admitted)
        }
        shared = [pages[: (length - 1) // page_size] for pages in first.values()]
        assert len(first) == n and all(pages == shared[0] for pages in shared)
        prefilled = sum(sum(b.lengths[b.decodes :]) for b in batches)
        assert prefilled == length + n - 1
        settle(engine)


@BOTH_LOOPS
@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_aborting_a_group_in_the_middle_ends_each_sample_once(after: int, overlap: bool):
    engine, prompt = make(max_batch_size=5, chunk_size=8, overlap=overlap), prompt_ids(18)[0]
    group = engine.add(prompt, SamplingParams(n=6, seed=3, max_new_tokens=60))  # more than there are rows
    other = engine.add(prompt, GREEDY)
    deltas = [d for _ in range(after) for d in engine.step()]
    engine.abort(group)
    deltas += [d for ds in drain(engine).values() for d in ds]
    for i in range(6):
        assert ends([d for d in deltas if d.request_id == group and d.index == i]) == ["abort"]
    assert tokens_of([d for d in deltas if d.request_id == other]) == alone(tuple(prompt), 0)
    settle(engine)


@BOTH_LOOPS
@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
@pytest.mark.parametrize("length", [1, 9, 16, 17])
def test_a_first_sample_that_ends_at_once_leaves_the_others_whole(length: int, radix: bool, overlap: bool):
    prompt, params = prompt_ids(length)[0], dict(temperature=2.0, max_new_tokens=9)
    stop = one(make(), prompt, seed=70, **params).token_ids[0]
    params["stop_token_ids"] = [stop]
    engine = make(radix=radix, overlap=overlap)
    outputs = engine.generate(prompt, SamplingParams(n=5, seed=70, **params))
    singles = make(radix=False).generate([prompt] * 5, [SamplingParams(seed=70 + i, **params) for i in range(5)])
    assert ids_of(outputs) == ids_of(singles)
    assert ids_of(outputs)[0] == [stop] and max(map(len, ids_of(outputs))) > 1
    settle(engine)


# ---- threads


def test_eight_threads_get_what_each_would_get_alone():
    engine = make(chunk_size=16, max_total_tokens=400)
    rng = random.Random(0)
    stem = prompt_ids(20)[0]
    work = [
        [((*stem[: rng.randint(0, 20)], rng.randrange(1, 128)), rng.randrange(6)) for _ in range(4)] for _ in range(8)
    ]

    def client(number: int) -> list[list[int]]:
        got = []
        for prompt, kind in work[number]:
            if number % 2:
                got += ids_of(engine.generate(list(prompt), MIXED[kind]))
            else:
                got.append([i for d in engine.stream(list(prompt), MIXED[kind]) for i in d.token_ids])
        return got

    results = in_threads(*(functools.partial(client, i) for i in range(8)))
    assert results == [[alone(*w) for w in mine] for mine in work]
    settle(engine)


def test_streams_closed_in_the_middle_by_four_threads_disturb_four_others():
    engine, prompts = make(), [prompt_ids(10 + i)[0] for i in range(8)]

    def leave(number: int) -> int:
        for i in range(3):
            stream = engine.stream(prompts[number], LONG)
            for _ in range(number + i):
                next(stream)
            stream.close()
        return number

    def stay(number: int) -> list[list[int]]:
        return [[i for d in engine.stream(prompts[number], GREEDY) for i in d.token_ids] for _ in range(2)]

    results = in_threads(*(functools.partial(leave if i % 2 else stay, i) for i in range(8)))
    assert results[::2] == [[alone(tuple(prompts[i]), 0)] * 2 for i in range(0, 8, 2)]
    settle(engine)


def test_the_thread_that_steps_goes_when_there_is_nothing_to_do_and_comes_again():
    engine = make()
    for _ in range(3):
        engine.generate([1, 2], GREEDY)
        until(lambda: engine._driver is None)
    settle(engine)


@pytest.mark.parametrize("how", ["close", "drop", "with", "break"])
def test_a_stream_that_nobody_reads_any_more_aborts_its_request(how: str):
    engine = make()
    gate = Gate(engine, 3)
    stream = engine.stream([1, 2, 3], LONG, request_id="mine")
    request = request_of(engine, "mine")
    if how == "with":
        with pytest.raises(KeyError), stream:
            next(stream)
            raise KeyError
    elif how == "break":
        for _ in stream:
            break
    else:
        next(stream)
    if how == "close":
        stream.close()
    if how in ("drop", "break"):
        del stream
        gc.collect()
    gate.open.set()
    settle(engine)
    assert request.finish_reason == "abort" and request.new_tokens < 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_a_consumer_raises_the_engine_is_usable(error: type[BaseException]):
    engine = make()

    def consume() -> None:
        for _ in engine.stream([1, 2, 3], LONG):
            raise error

    with pytest.raises(error):
        consume()
    gc.collect()
    settle(engine)
    assert one(engine, prompt_ids(9)[0]).token_ids == alone(tuple(prompt_ids(9)[0]), 0)


def test_control_c_in_generate_aborts_what_it_asked_for():
    """A real signal, while the main thread waits."""
    engine = make()
    inner, calls = engine.runner.run, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return inner(*args)

    engine.runner.run = interrupting
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[1, 2, 3], [4]], SamplingParams(temperature=0, max_new_tokens=250))
    finally:
        signal.signal(signal.SIGINT, before)
    settle(engine)
    assert len(calls) < 200 and engine.failure is None
    assert one(engine, [1, 2]).finish_reason == "length"


# ---- asyncio


def run_async(main) -> object:
    return asyncio.run(asyncio.wait_for(main, HANG))


def test_async_for_gives_what_generate_gives():
    engine, prompt = make(), prompt_ids(9)[0]

    async def main() -> list[Delta]:
        return [d async for d in engine.stream(prompt, GREEDY)]

    deltas = run_async(main())
    assert tokens_of(deltas) == alone(tuple(prompt), 0) and ends(deltas) == ["length"]
    settle(engine)


def test_many_tasks_at_once_and_none_blocks_the_loop():
    engine, prompts = make(), [prompt_ids(1 + i)[0] for i in range(24)]
    ticks = []

    async def client(i: int) -> list[int]:
        return [t async for d in engine.stream(prompts[i], MIXED[i % 6]) for t in d.token_ids]

    async def tick() -> None:
        while True:
            ticks.append(1)
            await asyncio.sleep(0)

    async def main() -> list[list[int]]:
        ticker = asyncio.create_task(tick())
        got = await asyncio.gather(*map(client, range(24)))
        ticker.cancel()
        return got

    assert run_async(main()) == [alone(tuple(p), i % 6) for i, p in enumerate(prompts)]
    assert len(ticks) > 24
    settle(engine)


@pytest.mark.parametrize("how", ["cancel", "break and aclose", "break", "the loop ends"])
def test_a_task_that_goes_away_aborts_its_request_and_no_other(how: str):
    engine, prompt = make(), prompt_ids(9)[0]
    gate = Gate(engine, 4)
    requests = []

    async def client() -> None:
        stream = engine.stream([1, 2, 3], LONG, request_id="gone")
        requests.append(request_of(engine, "gone"))
        async for _ in stream:
            if how.startswith("break"):
                break
        if how == "break and aclose":
            await stream.aclose()

    async def main() -> list[int]:
        other = engine.stream(prompt, GREEDY)
        task = asyncio.create_task(client())
        ids = (await anext(other)).token_ids
        while not requests or not requests[0].new_tokens:  # until the other task has its own first
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        if how == "cancel":
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif how != "the loop ends":
            await task
        if how == "the loop ends":
            return ids
        gate.open.set()
        return ids + [t async for d in other for t in d.token_ids]

    ids = run_async(main())
    gc.collect()
    gate.open.set()
    if how != "the loop ends":
        assert ids == alone(tuple(prompt), 0)
    settle(engine)
    assert requests[0].finish_reason == "abort" and requests[0].new_tokens < 10
    assert engine.failure is None and one(engine, [1, 2]).finish_reason == "length"


# ---- what is cached, and for whom


def cached(engine: Engine, prompt: list[int], salt: str | None) -> int:
    (output,) = engine.generate(prompt, GREEDY, cache_salt=salt)
    assert ids_of([output])[0] == alone(tuple(prompt), 0)
    return output.outputs[0].metrics.cached_tokens


def test_only_the_same_salt_shares():
    engine, prompt = make(), prompt_ids(33)[0]
    for salt in (None, "a", "b", "A", "a "):
        assert cached(engine, prompt, salt) == 0
    for salt in (None, "a", "b", "A", "a "):
        assert cached(engine, prompt, salt) == 32
    settle(engine)


def test_salts_that_run_together_do_not_share_either():
    engine, prompt = make(), prompt_ids(33)[0]
    for salt in ("a", "b", None):
        engine.add(prompt, GREEDY, request_id=str(salt), cache_salt=salt)
    requests = [request_of(engine, id) for id in ("a", "b", "None")]
    deltas = drain(engine)
    assert [r.metrics.cached_tokens for r in requests] == [0, 0, 0]
    assert {tuple(tokens_of(d)) for d in deltas.values()} == {tuple(alone(tuple(prompt), 0))}
    settle(engine)


@pytest.mark.parametrize("salt", ["", 5, b"x", ("a",)], ids=repr)
def test_salts_that_are_no_text_are_refused(salt):
    engine = make()
    for call in (engine.generate, engine.stream, engine.add):
        with pytest.raises(UserError, match="cache_salt is .* text"):
            call([1, 2], GREEDY, cache_salt=salt)
    assert not engine.has_work


def test_flush_cache_drops_all_but_what_is_in_use():
    engine, prompt = make(overlap=False), prompt_ids(33)[0]
    engine.generate(prompt_ids(21)[0], GREEDY)
    assert engine.stats().pages_held > 0
    engine.add(prompt, GREEDY)
    engine.step()
    assert engine.flush_cache() == engine.stats().pages_held == engine.stats().pages_locked == 8
    engine.scheduler.check()
    drain(engine)
    assert engine.flush_cache() == engine.stats().pages_held == 0
    assert engine.stats().pages_free == engine.stats().pages_total
    assert cached(engine, prompt, None) == 0 and cached(engine, prompt, None) == 32
    settle(engine)


def test_flushing_while_others_run_changes_no_token():
    engine, prompts = make(), [prompt_ids(20)[0] + [i] for i in range(12)]
    stop = threading.Event()

    def flush() -> int:
        flushed = 0
        while not stop.is_set():
            engine.flush_cache()
            flushed += 1
        return flushed

    def run() -> list[list[int]]:
        got = ids_of(engine.generate(prompts, GREEDY))
        stop.set()
        return got

    got, flushed = in_threads(run, flush)
    assert got == [alone(tuple(p), 0) for p in prompts] and flushed > 0
    settle(engine)


# ---- who comes first


def test_the_lowest_priority_value_runs_first():
    engine = make(schedule_policy="priority", max_batch_size=1, overlap=False)
    for id, priority in (("a", 5), ("b", -3), ("c", 0), ("d", -3), ("e", 5)):
        engine.add([1, 2], GREEDY, request_id=id, priority=priority)
    assert list(drain(engine)) == ["b", "d", "c", "a", "e"]
    engine.check()


def test_without_the_policy_a_priority_changes_nothing():
    engine = make(schedule_policy="fcfs", max_batch_size=1, overlap=False)
    for id, priority in (("a", 5), ("b", -3), ("c", 0)):
        engine.add([1, 2], GREEDY, request_id=id, priority=priority)
    assert list(drain(engine)) == ["a", "b", "c"]


@pytest.mark.parametrize("priority", [1.5, "1", None], ids=repr)
def test_a_priority_that_is_no_whole_number_is_refused(priority):
    with pytest.raises(UserError, match="priority is .* whole number"):
        make().add([1], GREEDY, priority=priority)


# ---- gauges and metrics


def test_the_gauges_at_known_moments():
    """Pages of 4, two rows, no overlap: everything can be counted."""
    engine = make(max_batch_size=2, overlap=False, max_total_tokens=160)
    s = engine.stats()
    assert (s.healthy, s.running, s.waiting, s.pages_total, s.pages_free, s.pages_held) == (True, 0, 0, 40, 40, 0)
    assert (s.hit_rate, s.steps, s.preemptions, s.prompt_tokens, s.tokens_per_second) == (0, 0, 0, 0, 0)
    first, second, third = ([i] * n for i, n in ((1, 8), (2, 9), (3, 5)))
    for prompt in (first, second, third):
        engine.add(prompt, GREEDY)
    engine.step()
    s = engine.stats()
    assert (s.running, s.waiting, s.steps) == (2, 1, 1)
    assert (s.pages_free, s.pages_held, s.pages_locked) == (40 - 2 - 3, 4, 4)  # 8 and 9 tokens fill two pages each
    assert (s.prompt_tokens, s.cached_tokens, s.hit_rate) == (17, 0, 0)
    engine.step()
    s = engine.stats()
    assert (s.pages_free, s.pages_held) == (40 - 3 - 3, 4)  # the first needs a third
    assert s.tokens_per_second > 0
    drain(engine)
    s = engine.stats()
    assert (s.running, s.waiting, s.pages_locked, s.steps) == (0, 0, 0, 24)
    # of 8 + 12, 9 + 12 and 5 + 12 tokens the last was never computed: 19, 20 and 16
    assert (s.pages_held, s.pages_free) == (4 + 5 + 4, 40 - 13)
    engine.generate(first, GREEDY)
    s = engine.stats()
    assert (s.prompt_tokens, s.cached_tokens) == (30, 4)  # one token of a prompt is always computed, so one page
    assert s.hit_rate == 4 / 30 and s.preemptions == 0
    settle(engine)


def test_the_rate_is_that_of_the_last_seconds(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    throughput = Throughput(window=5.0)
    assert throughput.rate() == 0
    for at, tokens in ((100.0, 7), (101.0, 1), (103.0, 8)):
        throughput.add(at, tokens)
    now = 104.0
    assert throughput.rate() == 16 / 4
    now = 105.5  # the first is forgotten
    assert throughput.rate() == 9 / 4.5
    now = 109.0
    assert throughput.rate() == 0


@BOTH_LOOPS
def test_preemptions_are_counted_and_cost_no_token(overlap: bool):
    engine = make(max_total_tokens=100, max_model_len=60, overlap=overlap)
    engine.scheduler.ratio = 0.1  # expects little of each, so lets in more than will fit
    prompts, params = prompt_ids(4, 5, 6, 7), SamplingParams(temperature=0, max_new_tokens=40)
    outputs = engine.generate(prompts, params)
    assert ids_of(outputs) == ids_of(make().generate(prompts, params))
    each = [o.outputs[0].metrics.preemptions for o in outputs]
    assert engine.stats().preemptions == sum(each) > 0
    settle(engine)


@BOTH_LOOPS
def test_the_metrics_of_a_request_are_in_order(overlap: bool):
    engine = make(max_batch_size=2, overlap=overlap)
    start = time.perf_counter()
    prompts = prompt_ids(20, 9, 5, 33)
    outputs = engine.generate(prompts, MIXED[:4])
    again = engine.generate(prompts, MIXED[:4])
    end = time.perf_counter()
    for output in outputs + again:
        m = output.outputs[0].metrics
        times = [start, m.queued_at, m.admitted_at, *m.token_times, m.finished_at, end]
        assert times == sorted(times) and len(m.token_times) == len(output.outputs[0].token_ids)
        assert m.time_to_first_token == m.token_times[0] - m.queued_at and m.preemptions == 0
    assert [o.outputs[0].metrics.cached_tokens for o in outputs] == [0] * 4
    assert [o.outputs[0].metrics.cached_tokens for o in again] == [16, 8, 4, 32]


# ---- the tokens that may come


def step_by(*by: int) -> Callable[[list[int]], list[int]]:
    """Only so much more than the last one."""
    return lambda ids: [(ids[-1] + k) % zoo.VOCAB for k in by]


ANY_PARAMS = [
    dict(temperature=0),
    dict(temperature=1.5, seed=3),
    dict(temperature=0, logprobs=2),
    dict(seed=1, top_k=3),
]


@pytest.mark.parametrize("params", ANY_PARAMS, ids=str)
def test_only_allowed_tokens_come_and_the_function_sees_all_so_far(params: dict):
    prompt, outputs = prompt_ids(11)[0], []
    for overlap in (True, False):
        seen: list[list[int]] = []

        def allowed(ids: list[int], seen: list = seen) -> list[int]:
            seen.append(ids)
            return step_by(1, 5, 9)(ids)

        engine = make(overlap=overlap, chunk_size=4)
        c = one(engine, prompt, allowed_tokens_fn=allowed, **params)
        every = prompt + c.token_ids
        assert len(c.token_ids) == 12 and seen == [every[:n] for n in range(11, 23)]
        assert all((b - a) % zoo.VOCAB in (1, 5, 9) for a, b in itertools.pairwise(every[10:]))
        outputs.append(c.token_ids)
        settle(engine)
    assert outputs[0] == outputs[1] != one(make(), prompt, **params).token_ids


@pytest.mark.parametrize("params", ANY_PARAMS, ids=str)
def test_allowing_everything_changes_nothing(params: dict):
    prompt = prompt_ids(11)[0]
    free = one(make(), prompt, allowed_tokens_fn=lambda ids: range(zoo.VOCAB), **params)
    assert free.token_ids == one(make(), prompt, **params).token_ids


def test_allowing_one_token_forces_it_whatever_else_is_asked():
    prompt = prompt_ids(11)[0]
    for params in (*ANY_PARAMS, dict(temperature=0, repetition_penalty=5.0, logit_bias={2: -100})):
        c = one(make(), prompt, allowed_tokens_fn=lambda ids: [len(ids) % 7], **params)
        assert c.token_ids == [n % 7 for n in range(11, 23)]


@BOTH_LOOPS
def test_masked_and_unmasked_requests_in_one_batch(overlap: bool):
    """Each as if it were alone; what a mask changes is seen in its own row only."""
    prompts = prompt_ids(3, 20, 33, 8, 17, 1)
    masked = SamplingParams(temperature=1.0, seed=9, max_new_tokens=10, allowed_tokens_fn=step_by(2, 3))
    lone = ids_of(make(overlap=False).generate(prompts[:2], masked))
    engine = make(overlap=overlap, max_batch_size=8, chunk_size=16)
    outputs = engine.generate([*prompts, *prompts[:2]], [*MIXED, masked, masked])
    assert ids_of(outputs) == [*(alone(tuple(p), i) for i, p in enumerate(prompts)), *lone]
    settle(engine)


def after(tokens: int, then: Callable[[list[int]], Sequence[int]]) -> Callable[[list[int]], Sequence[int]]:
    return lambda ids: range(zoo.VOCAB) if len(ids) < tokens else then(ids)


BAD_ANSWERS = {
    "raises": (lambda ids: [][0], "IndexError: list index out of range"),
    "empty": (lambda ids: [], "allows no token"),
    "too large": (lambda ids: [1, 128], "allowed_tokens_fn has token id 128"),
    "negative": (lambda ids: [-1], "allowed_tokens_fn has token id -1"),
    "fraction": (lambda ids: [1, 2.5], "allowed_tokens_fn has token id 2.5"),
    "text": (lambda ids: ["a"], "allowed_tokens_fn has token id 'a'"),
    "nothing": (lambda ids: None, "TypeError"),
}


@BOTH_LOOPS
@pytest.mark.parametrize("at", [0, 4])
@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_answer_ends_that_request_only(case: str, at: int, overlap: bool):
    answer, reason = BAD_ANSWERS[case]
    bad, *others = prompt_ids(11, 4, 20)
    engine = make(overlap=overlap)
    params = SamplingParams(temperature=0, max_new_tokens=12, allowed_tokens_fn=after(11 + at, answer))
    failed, *fine = engine.generate([bad, *others], [params, MIXED[1], MIXED[2]])
    c = failed.outputs[0]
    assert (c.finish_reason, c.token_ids) == ("error", alone(tuple(bad), 0)[:at]) and reason in c.stop_reason
    assert ids_of(fine) == [alone(tuple(others[0]), 1), alone(tuple(others[1]), 2)]
    settle(engine)
    assert engine.failure is None and one(engine, bad).token_ids == alone(tuple(bad), 0)


def test_true_is_a_whole_number():
    assert one(make(), [3], allowed_tokens_fn=lambda ids: [True], max_new_tokens=3).token_ids == [1, 1, 1]


# ---- logits that are not finite, in the middle of a text


@functools.cache
def sudden(temperature: float) -> tuple[dict, list[int]]:
    """Parameters, and the tokens they lead to: the fifth to tenth of them is the poisoned one."""
    for seed in range(400):
        params = dict(temperature=temperature, seed=seed, logit_bias={5: 4.0}, max_new_tokens=30)
        c = one(poisoned(overlap=False), [9] * 9, **params)
        if c.finish_reason == "error" and 5 <= len(c.token_ids) <= 10:
            return params, c.token_ids
    raise AssertionError("no seed leads there")


@BOTH_LOOPS
@pytest.mark.parametrize("radix", [True, False], ids=["radix", "no radix"])
def test_nan_in_the_middle_of_a_text_ends_it_and_harms_nobody_though_it_is_found_late(overlap: bool, radix: bool):
    """Again and again on the same pages, so that who comes next has those that held NaN."""
    params, tokens = sudden(1.2)
    assert tokens[-1] == 5 and 5 not in tokens[:-1]
    healthy = SamplingParams(temperature=0, max_new_tokens=25, logit_bias={5: -100})
    prompts = [[9] * 9 + [1], [9] * 30]
    expected = ids_of(make_poisoned_alone(prompts, healthy))
    engine = poisoned(overlap=overlap, radix=radix, max_total_tokens=8 * 16)
    for _ in range(4):
        bad, *others = engine.generate([[9] * 9, *prompts], [SamplingParams(**params), healthy, healthy])
        c = bad.outputs[0]
        assert (c.finish_reason, c.token_ids, len(c.metrics.token_times)) == ("error", tokens, len(tokens))
        assert "not finite" in c.stop_reason
        assert [o.outputs[0].finish_reason for o in others] == ["length"] * 2 and ids_of(others) == expected
        settle(engine)


def make_poisoned_alone(prompts: list[list[int]], params: SamplingParams) -> list:
    return [o for p in prompts for o in poisoned(overlap=False, radix=False).generate(p, params)]


@BOTH_LOOPS
def test_nan_on_a_page_that_was_once_of_another_row_does_not_reach_that_row(overlap: bool):
    """The row's table may still name the page, behind the end of its own sequence; a masked NaN is a NaN all the same."""
    healthy = SamplingParams(temperature=0, max_new_tokens=12, logit_bias={5: -100})
    turns_bad = SamplingParams(temperature=0, max_new_tokens=12, logit_bias={5: 100})
    expected = ids_of(make_poisoned_alone([[9] * 5], healthy))[0]
    engine = poisoned(max_total_tokens=20 * 16, overlap=overlap, radix=False)
    engine.generate([7] * 100, healthy)  # has many pages, and gives them and the row back
    short, bad = engine.generate([[9] * 5, [7] * 90], [healthy, turns_bad])
    assert (bad.outputs[0].finish_reason, bad.outputs[0].token_ids) == ("error", [5])
    assert (short.outputs[0].finish_reason, ids_of([short])[0]) == ("length", expected)
    settle(engine)


@BOTH_LOOPS
def test_nan_of_the_first_sample_is_not_copied_to_the_others(overlap: bool):
    """It samples the poisoned token first; its page is copied for the others before that is known."""
    base, bad = dict(temperature=1.5, max_new_tokens=6, logit_bias={5: 8.0}), 0
    engine = poisoned(overlap=overlap)
    for seed in (2, 11, 15, 21, 23, 29):
        first, second = engine.generate([9] * 9, SamplingParams(n=2, seed=seed, **base))[0].outputs
        expected = one(poisoned(overlap=False, radix=False), [9] * 9, **base, seed=seed + 1)
        bad += (first.finish_reason, first.token_ids) == ("error", [5])
        assert (second.finish_reason, second.token_ids) == (expected.finish_reason, expected.token_ids)
        settle(engine)
    assert bad >= 3


# ---- a device that fails


class Broken(RuntimeError):
    pass


def break_at(engine: Engine, call: int, what: str = "run", before: Callable[[], None] = lambda: None) -> None:
    """Make the runner's method raise at its n-th call and at all later ones; `before` runs before the first that fails."""
    inner, calls = getattr(engine.runner, what), []

    def failing(*args):
        calls.append(1)
        if len(calls) == call:
            before()
        if len(calls) >= call:
            raise Broken("the device is gone")
        return inner(*args)

    setattr(engine.runner, what, failing)


def assert_failed(engine: Engine) -> None:
    """It says so, and takes nothing more."""
    assert isinstance(engine.failure, Broken) and engine.stats().healthy is False
    assert not engine.has_work and engine.step() == []
    for call in (engine.add, engine.generate, engine.stream):
        with pytest.raises(EngineFailed, match="the engine has failed.*the device is gone"):
            call([1, 2], GREEDY)
    with pytest.raises(EngineFailed, match="the device is gone"):
        engine.check()
    engine.abort("nobody")


# prompts of 30 in chunks of 8: calls 1 to 8 are prefills, the later ones decodes too
@BOTH_LOOPS
@pytest.mark.parametrize("what, masked", [("run", False), ("apply", False), ("apply", True), ("run_choose", True)])
@pytest.mark.parametrize("call", [1, 2, 6, 12])
def test_when_the_device_fails_every_request_ends_with_an_error(call: int, what: str, masked: bool, overlap: bool):
    """Running, prefilling, waiting, and one that comes while it fails."""
    engine = make(max_batch_size=2, chunk_size=8, overlap=overlap)
    allowed = (lambda ids: range(zoo.VOCAB)) if masked else None
    params = SamplingParams(temperature=0, max_new_tokens=12, allowed_tokens_fn=allowed)
    prompts = {f"r{i}": p for i, p in enumerate(prompt_ids(30, 29, 5, 6, 7))}
    for id, prompt in prompts.items():
        engine.add(prompt, params, request_id=id)
    prompts["late"] = [1, 2, 3]
    break_at(engine, call, what, lambda: engine.add(prompts["late"], params, request_id="late") and None)
    deltas = drain(engine)
    for id, prompt in prompts.items():
        assert ends(deltas[id]) == ["error"]
        assert deltas[id][-1].stop_reason == "the engine failed: Broken: the device is gone"
        mine = tokens_of(deltas[id])
        assert mine == alone(tuple(prompt), 0)[: len(mine)] and len(mine) < 12
    assert_failed(engine)


@BOTH_LOOPS
@pytest.mark.parametrize("call", [1, 4, 10])
def test_when_the_device_fails_nobody_waits_for_ever(call: int, overlap: bool):
    """generate and stream, in a thread and in asyncio, and one that is queued behind them."""
    engine, go = make(max_batch_size=3, overlap=overlap), threading.Event()
    break_at(engine, call, before=lambda: go.wait(HANG))

    async def read() -> list[Delta]:
        return [d async for d in engine.stream([4, 5], LONG)]

    def release() -> None:
        until(lambda: len(engine._groups) == 5)
        go.set()

    results = in_threads(
        lambda: engine.generate([[1, 2], [1, 2, 3]], LONG),
        lambda: list(engine.stream([3], LONG)),
        lambda: run_async(read()),
        lambda: engine.generate([6], SamplingParams(n=2, max_new_tokens=50)),
        release,
    )
    outputs = [c for i in (0, 3) for o in results[i] for c in o.outputs]
    assert len(outputs) == 4
    for c in [*outputs, results[1][-1], results[2][-1]]:
        assert (c.finish_reason, c.stop_reason) == ("error", "the engine failed: Broken: the device is gone")
    assert ends(results[1]) == ends(results[2]) == ["error"]
    assert all(c.metrics.finished_at is not None for c in outputs)
    assert_failed(engine)


def test_an_interrupt_while_stepping_by_hand_ends_the_requests_and_is_raised():
    engine = make(overlap=False)
    id, commit = engine.add([1, 2], GREEDY), engine.commit
    request = request_of(engine, id)

    def interrupted(*args):
        commit(*args)
        raise KeyboardInterrupt

    engine.commit = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert isinstance(engine.failure, KeyboardInterrupt) and not engine.has_work and not engine._groups
    assert (request.finish_reason, request.stop_reason) == ("error", "the engine failed: KeyboardInterrupt: ")
    with pytest.raises(EngineFailed):
        engine.stream([1], GREEDY)


# ---- what is refused


@pytest.mark.parametrize("tokens, page_size, rows, pages", [(15, 4, 4, 3), (40, 16, 3, 2), (4, 1, 5, 4)])
def test_a_cache_with_less_than_a_page_for_each_row_is_refused(tokens: int, page_size: int, rows: int, pages: int):
    message = f"a cache of {tokens} tokens has {pages} pages of {page_size}; {rows} rows need at least one each"
    with pytest.raises(UserError, match=message):
        make(max_total_tokens=tokens, page_size=page_size, max_batch_size=rows)
    assert make(max_total_tokens=tokens, page_size=page_size, max_batch_size=pages).pool.total == pages


def test_what_can_never_fit_is_refused_with_the_figures():
    engine = make(max_total_tokens=40, max_model_len=60)
    with pytest.raises(UserError, match=r"41 tokens \(prompt and new\) can never fit into a cache of 40"):
        engine.add([1] * 30, SamplingParams(max_new_tokens=11))
    with pytest.raises(UserError, match=r"41 tokens \(prompt and new\) can never fit into a cache of 40"):
        engine.add([1] * 40)
    with pytest.raises(UserError, match="the prompt has 60 tokens; the context has 60, and one must be new"):
        engine.add([1] * 60)
    assert not engine.has_work and len(one(engine, [1] * 30, max_new_tokens=10).token_ids) == 10
    assert len(one(engine, [1] * 30, max_new_tokens=None).token_ids) == 10  # as far as the cache goes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be a whole number, at least 1"),
        ({"chunk_size": 7.5}, "chunk_size is 7.5; it must be a whole number, at least 1"),
        ({"chunk_size": -1}, "chunk_size is -1; it must be a whole number, at least 1"),
        ({"page_size": 129}, "page_size is 129; it must be between 1 and 128"),
        ({"max_model_len": 257}, "max_model_len is 257; it must be between 2 and the model's 256"),
        ({"schedule_policy": "lottery"}, "schedule_policy is 'lottery'; it must be one of fcfs, lpm"),
        ({"max_total_tokens": 3}, "too small"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_named(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize("bad", [2.5, "a", None], ids=repr)
def test_token_ids_that_are_no_whole_numbers_are_refused(bad):
    engine = make()
    with pytest.raises(UserError, match=f"prompt has token id {bad!r}"):
        engine.add([1, bad], GREEDY)
    with pytest.raises(UserError, match=f"stop_token_ids has token id {bad!r}"):
        engine.add([1], SamplingParams(stop_token_ids=[bad]))
    with pytest.raises(UserError, match=f"logit_bias has token id {bad!r}"):
        engine.add([1], SamplingParams(logit_bias={bad: 1.0}))
    assert not engine.has_work


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "dfs-weight", "priority"])
def test_a_policy_changes_who_runs_when_and_no_token(policy: str):
    engine = make(schedule_policy=policy, max_batch_size=2, max_total_tokens=200)
    stem = prompt_ids(20)[0]
    prompts = [[*stem[: 3 * i], i] for i in range(7)]
    assert ids_of(engine.generate(prompts, GREEDY)) == [alone(tuple(p), 0) for p in prompts]
    settle(engine)
