"""The stream alone, with nobody behind it: order, end, and who is told when its reader goes.

python -m pytest tests/test_streams.py
"""

import asyncio
import gc
import threading

import pytest
from waiting import HANG

from output import Delta
from streams import Stream


class Aborts(list):
    """Stands in for `engine.abort` and keeps what it is asked."""

    __call__ = list.append


def make(samples: int = 1) -> tuple[Stream, Aborts]:
    aborts = Aborts()
    return Stream("name", samples, aborts), aborts


def delta(number: int, end: str | None = None, index: int = 0) -> Delta:
    return Delta("name", index, f"{number} ", [number], end)


def started(target) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    thread.join(HANG)
    assert not thread.is_alive()


async def until(condition) -> None:
    """Give way to the other tasks until something has come about."""
    for _ in range(HANG * 1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came about")


# ---- a thread that reads


def test_deltas_come_in_order_and_the_last_one_ends_the_stream():
    stream, aborts = make()
    for i in range(5):
        stream.put(delta(i, "stop" if i == 4 else None))
    assert [d.token_ids for d in stream] == [[i] for i in range(5)]
    assert list(stream) == [] and aborts == []


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=str)
def test_a_stream_ends_when_all_samples_have(order: list[int]):
    stream, aborts = make(3)
    for index in order:
        stream.put(delta(1, None, index))
    for index in order:
        stream.put(delta(2, "length", index))
    assert [(d.index, d.finish_reason) for d in stream] == [(i, r) for r in (None, "length") for i in order]
    stream.close()
    assert aborts == []


def test_a_reader_waits_for_another_thread():
    """What is put is read at once: the next delta is put only when the reader has the one before."""
    stream, _ = make()
    got, read = [], threading.Semaphore(0)

    def reader() -> None:
        for d in stream:
            got.append(d.token_ids[0])
            read.release()

    thread = started(reader)
    for i in range(20):
        stream.put(delta(i, "stop" if i == 19 else None))
        assert read.acquire(timeout=HANG)
    join(thread)
    assert got == list(range(20))


def test_read_whole_it_wakes_its_reader_at_ends_only(monkeypatch):
    stream, aborts = make(2)
    woken, got = [], []
    wake = stream._wake_reader
    monkeypatch.setattr(stream, "_wake_reader", lambda: (woken.append(1), wake()))
    stream.put(delta(0))
    thread = started(lambda: got.extend(stream.whole()))
    while not stream._patient:
        pass
    for i in range(1, 9):
        stream.put(delta(i, "stop" if i in (4, 8) else None, index=i // 5))
    join(thread)
    assert [d.token_ids[0] for d in got] == list(range(9)) and len(woken) == 3 and aborts == []


def test_closing_gives_what_has_come_to_who_reads_it_whole():
    stream, aborts = make()
    got = []
    stream.put(delta(0))
    thread = started(lambda: got.extend(stream.whole()))
    while not stream._patient:
        pass
    stream.close()
    join(thread)
    assert len(got) <= 1 and aborts == ["name"] and stream.whole() == []


@pytest.mark.parametrize("read", [0, 1, 2])
def test_closing_aborts_once_and_ends_the_iteration(read: int):
    stream, aborts = make(2)
    for i in range(2):
        stream.put(delta(i, "stop" if i == 0 else None))
    for _ in range(read):
        next(stream)
    stream.close()
    stream.close()
    assert aborts == ["name"] and list(stream) == []


def test_closing_what_has_ended_and_was_read_aborts_nothing():
    stream, aborts = make()
    stream.put(delta(0, "length"))
    next(stream)
    stream.close()
    assert aborts == []


def test_closing_from_another_thread_ends_a_reader_that_waits():
    """Even if the one who is told to abort says nothing more."""
    stream, aborts = make()
    got = []
    thread = started(lambda: got.extend(stream))
    stream.put(delta(0))
    while not got:
        pass
    stream.close()
    join(thread)
    assert [d.token_ids for d in got] == [[0]] and aborts == ["name"]


def test_what_comes_after_closing_is_nobodys():
    stream, aborts = make()
    stream.close()
    stream.put(delta(0, "abort"))
    assert list(stream) == [] and aborts == ["name"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_leaving_a_with_block_closes(error: type[BaseException]):
    stream, aborts = make()
    stream.put(delta(0))
    with pytest.raises(error), stream:
        for _ in stream:
            raise error
    assert aborts == ["name"] and list(stream) == []


def test_a_dropped_stream_aborts():
    stream, aborts = make()
    stream.put(delta(0))
    del stream
    gc.collect()
    assert aborts == ["name"]


def test_a_dropped_stream_that_has_ended_does_not():
    stream, aborts = make()
    stream.put(delta(0, "stop"))
    assert len(list(stream)) == 1
    del stream
    gc.collect()
    assert aborts == []


# ---- asyncio


def test_async_for_takes_what_is_there_and_ends():
    async def main() -> list[int]:
        return [d.token_ids[0] async for d in stream]

    stream, aborts = make()
    for i in range(4):
        stream.put(delta(i, "stop" if i == 3 else None))
    assert asyncio.run(main()) == [0, 1, 2, 3] and aborts == []


def test_another_thread_wakes_a_task_that_waits():
    """Each delta is put only once the task waits for it, so that every one needs its own wake-up."""

    async def main() -> None:
        async def read() -> None:
            async for d in stream:
                got.append(d.token_ids[0])

        task = asyncio.create_task(read())
        for i in range(10):
            await until(lambda: stream._waiter is not None)
            await asyncio.to_thread(stream.put, delta(i, "stop" if i == 9 else None))
        await asyncio.wait_for(task, HANG)

    stream, aborts = make()
    got = []
    asyncio.run(main())
    assert got == list(range(10)) and aborts == []


def test_many_deltas_from_a_busy_thread_are_neither_lost_nor_turned_round():
    async def main() -> list[int]:
        thread = started(lambda: [stream.put(delta(i, "stop" if i == 1999 else None)) for i in range(2000)])
        got = [d.token_ids[0] async for d in stream]
        join(thread)
        return got

    stream, _ = make()
    assert asyncio.run(asyncio.wait_for(main(), HANG)) == list(range(2000))


def test_cancelling_a_task_that_waits_aborts():
    async def main() -> None:
        async def read() -> None:
            async for d in stream:
                got.append(d)

        task = asyncio.create_task(read())
        await until(lambda: got and stream._waiter is not None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert aborts == ["name"]
        stream.put(delta(1, "abort"))  # the engine's answer: nobody waits for it
        assert [d async for d in stream] == []

    stream, aborts = make()
    got = []
    stream.put(delta(0))
    asyncio.run(main())
    assert len(got) == 1 and aborts == ["name"]


def test_breaking_out_and_aclose_abort_once():
    async def main() -> None:
        async for _ in stream:
            break
        await stream.aclose()
        await stream.aclose()
        assert [d async for d in stream] == []

    stream, aborts = make()
    stream.put(delta(0))
    stream.put(delta(1))
    asyncio.run(main())
    assert aborts == ["name"]


def test_closing_from_another_thread_ends_a_task_that_waits():
    async def main() -> list[Delta]:
        async def read() -> list[Delta]:
            return [d async for d in stream]

        task = asyncio.create_task(read())
        await until(lambda: stream._waiter is not None)
        await asyncio.to_thread(stream.close)
        return await asyncio.wait_for(task, HANG)

    stream, aborts = make()
    assert asyncio.run(main()) == [] and aborts == ["name"]


@pytest.mark.parametrize("cancel", [True, False])
def test_a_loop_that_is_gone_does_not_disturb_who_puts(cancel: bool):
    """The engine's thread puts: whatever became of a reader, it must not fail."""
    stream, _ = make()
    loop = asyncio.new_event_loop()

    async def read() -> None:
        async for _ in stream:
            pass

    task = loop.create_task(read())
    loop.run_until_complete(until(lambda: stream._waiter is not None))
    if cancel:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()
    stream.put(delta(0))
    stream.put(delta(1, "abort"))
    assert len(stream._deltas) == 2
    if not cancel:
        with pytest.raises(StopIteration):  # let the task end, so that nothing complains of it later
            stream.close()
            task.get_coro().throw(StopAsyncIteration)
