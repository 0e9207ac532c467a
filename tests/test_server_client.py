"""The engine's process and its client: what happens when either, or a reader, is slow, wrong or gone.

python -m pytest tests/test_server_client.py
"""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from server_process import MODEL
from waiting import HANG

from errors import UserError
from serving import child as child_module
from serving import client as client_module
from serving.answers import Answer, joined
from serving.api_errors import EngineDown, ServerBusy, TimedOut
from serving.client import EngineClient
from serving.messages import Delta
from stats import Stats

OPTIONS = {"model": str(MODEL), "dtype": "float32", "max_batch_size": 2, "max_model_len": 512}
LONG = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 0}


Body = Callable[[EngineClient], Coroutine]


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Body], None]]:
    """Runs what it is given with a client that several tests share: an engine takes seconds to start."""
    with shared(max_queue=3) as run_body:
        yield run_body


@contextmanager
def shared(**settings: Any) -> Iterator[Callable[[Body], None]]:
    with asyncio.Runner() as runner, patch.dict(os.environ, OMP_NUM_THREADS="1"):
        client = EngineClient(OPTIONS, **settings)
        runner.run(client.start())
        try:
            yield lambda body: runner.run(asyncio.wait_for(body(client), HANG))
        finally:
            runner.run(client.close())
            assert not client.healthy


async def text_of(answer: Answer) -> str:
    return "".join([delta.text async for delta in answer])


async def until_idle(client: EngineClient) -> None:
    """The engine has let go of everything, and proves it."""
    while (stats := await client.stats(check=True)).running or stats.waiting:
        await asyncio.sleep(0.01)
    assert stats.pages_free + stats.pages_held == stats.pages_total and stats.pages_locked == 0
    assert client.open_requests == 0


# ---- one answer


def delta(text: str, index: int = 0, end: str | None = None) -> Delta:
    return Delta("1", index, text, [len(text)], finish_reason=end, prompt_tokens=3)


def test_a_slow_reader_gets_it_in_one_piece():
    async def read() -> None:
        answer = Answer("r", 2, 60, lambda: None)
        for i, (text, end) in enumerate([("a", None), ("b", None), ("c", "stop")]):
            answer.put(delta(text, 0, end))
            answer.put(delta(text * (i + 2), 1, end))
        got = [d async for d in answer]
        assert [(d.index, d.text, d.finish_reason) for d in got] == [(0, "abc", "stop"), (1, "aabbbcccc", "stop")]
        assert got[1].token_ids == [2, 3, 4]

    asyncio.run(read())


def test_joined_keeps_all_of_both():
    a, b = delta("a"), delta("b", end="length")
    assert joined([a]) is a
    assert joined([a, b]) == Delta("1", 0, "ab", [1, 1], finish_reason="length", prompt_tokens=3)


@pytest.mark.parametrize("how", ["close", "drop", "cancel", "late"])
def test_a_reader_that_goes_aborts(how):
    aborted = []

    async def read() -> None:
        answer = Answer("r", 1, 0.01 if how == "late" else 60, lambda: aborted.append(1))
        answer.put(delta("a"))
        await anext(answer)
        if how == "close":
            answer.close()
            answer.close()
        elif how == "drop":
            del answer
            gc.collect()
        elif how == "cancel":
            task = asyncio.create_task(text_of(answer))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with pytest.raises(TimedOut):
                await anext(answer)
        assert aborted == [1]

    asyncio.run(read())


def test_one_that_has_ended_is_not_aborted():
    async def read() -> None:
        answer = Answer("r", 1, 60, lambda: pytest.fail("aborted"))
        answer.put(delta("a", end="stop"))
        assert await text_of(answer) == "a"
        answer.close()

    asyncio.run(read())


# ---- the process


def test_requests_and_those_that_leave(run):
    async def body(client: EngineClient) -> None:
        same = [await text_of(client.generate(str(i), [5, 6, 7], LONG)) for i in range(2)]
        assert same[0] == same[1] and len(same[0]) > 100
        reader = client.generate("slow", [5, 6, 7], LONG)
        left = client.generate("left", [5, 6], LONG | {"n": 2})
        await anext(left)
        left.close()
        while (await client.stats()).running + (await client.stats()).waiting:  # nobody reads: it ends all the same
            await asyncio.sleep(0.01)
        assert [d.text async for d in reader] == [same[0]]
        again = client.generate("left", [5, 6], {"max_new_tokens": 1})  # an id may come again
        assert (await anext(again)).finish_reason == "length"
        await until_idle(client)
        assert await client.flush() == 0
        assert (await client.stats()).pages_free == client.model.max_total_tokens // client.model.page_size

    run(body)


def test_what_is_wrong_is_refused_before_the_first_delta(run):
    async def body(client: EngineClient) -> None:
        for name, prompt, params, options in [
            ("tokens", [5] * 600, {}, {}),
            ("vocabulary", [5000], {}, {}),
            ("empty", [], {}, {}),
            ("regex", [5], {"regex": "(("}, {}),
            ("one of them", [5], {"regex": "a", "json_object": True}, {}),
            ("stop token ids", [5], {"stop_token_ids": list(range(40))}, {}),
            ("cache_salt", [5], {}, {"cache_salt": ""}),
        ]:
            with pytest.raises(UserError, match=name):
                await text_of(client.generate("r", prompt, params, **options))
        with pytest.raises(UserError, match="nothing"):
            client.generate("r", [5], {"nothing": 1})
        with pytest.raises(UserError, match="encoded"):
            client.generate("r", [5], {}, cache_salt="\ud800")
        with pytest.raises(UserError, match="rid"):
            client.generate("r" * 200, [5])
        first = client.generate("r", [5], LONG)
        with pytest.raises(UserError, match="in use"):
            client.generate("r", [5])
        first.close()
        await until_idle(client)

    run(body)


def test_the_queue_has_an_end(run):
    async def body(client: EngineClient) -> None:
        wide = client.generate("wide", [5], LONG | {"n": 10})  # alone, so that it may
        with pytest.raises(ServerBusy) as raised:
            client.generate("more", [5], LONG)
        assert raised.value.status == 503 and raised.value.headers["Retry-After"]
        wide.close()
        answers = [client.generate(str(i), [5, i], LONG) for i in range(5)]  # 2 run, 3 wait
        with pytest.raises(ServerBusy):
            client.generate("more", [5], LONG)
        client.abort_all()
        assert [(await _last(answer)).finish_reason for answer in answers] == ["abort"] * 5
        client.generate("room", [5], LONG).close()
        await until_idle(client)

    run(body)


async def _last(answer: Answer) -> Delta:
    async for d in answer:
        last = d
    return last


def test_killed_under_load_all_end_and_another_one_starts(run):
    async def body(client: EngineClient) -> None:
        answers = [client.generate(str(i), [5, i], LONG) for i in range(5)]
        await anext(answers[0])
        question = asyncio.create_task(client.stats())
        await asyncio.sleep(0)
        os.kill(client.pid, signal.SIGKILL)
        ends = await asyncio.gather(*map(text_of, answers), return_exceptions=True)
        assert all(isinstance(end, EngineDown) for end in ends)
        assert isinstance((await asyncio.gather(question, return_exceptions=True))[0], EngineDown | Stats)
        assert not client.healthy and "died" in client.why_unhealthy and client.open_requests == 0
        with pytest.raises(EngineDown):
            client.generate("now", [5])
        while not client.healthy:
            await asyncio.sleep(0.05)
        assert client.restarts == 1
        assert len(await text_of(client.generate("again", [5, 6, 7], LONG))) > 100
        await until_idle(client)

    run(body)


def test_closing_ends_what_runs(run):
    """The last one that has this client."""

    async def body(client: EngineClient) -> None:
        answer = client.generate("r", [5], LONG)
        await anext(answer)
        await client.close()
        with pytest.raises(EngineDown):
            await text_of(answer)
        with pytest.raises(EngineDown):
            client.generate("r", [5])
        assert not client.healthy and client.restarts == 1  # of the test before

    run(body)


STAND_IN = """
import socket, sys, time
from frames import write_frame
from serving import messages as m
pipe = socket.socket(fileno=int(sys.argv[1])).makefile("wb")
write_frame(pipe, m.encode(m.Ready(m.ModelFacts("", "", "", "", "", 9, 9, 9, 9, 9, []))))
if {after!r}:
    write_frame(pipe, {after!r})
time.sleep(1000)
"""


@pytest.mark.parametrize("after", [b"", b"{}", b'[{"type": "delta", "rid": 1}]'], ids=["silent", "object", "no delta"])
def test_one_that_says_nothing_or_nonsense_is_killed(monkeypatch, after):
    monkeypatch.setattr(child_module, "COMMAND", [sys.executable, "-c", STAND_IN.format(after=after)])

    async def body(client: EngineClient) -> None:
        while client.healthy:
            with pytest.raises(EngineDown):
                await text_of(client.generate("r", [5]))
        assert "died" in client.why_unhealthy and client.restarts == 0 and client.open_requests == 0
        with pytest.raises(EngineDown):
            await client.stats()

    with shared(watchdog=0.5, restart=False) as run:
        run(body)


def test_what_the_engine_refuses_is_said():
    async def start() -> None:
        with pytest.raises(UserError, match="/nowhere"):
            await EngineClient(OPTIONS | {"model": "/nowhere"}).start()

    asyncio.run(start())


def test_it_waits_longer_each_time():
    assert list(client_module.BACK_OFF) == sorted(client_module.BACK_OFF) and client_module.BACK_OFF[0] == 0
