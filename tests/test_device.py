"""The device as a stream: work in order, somewhere else, and its errors where its results are asked for.

python -m pytest tests/test_device.py
"""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from waiting import HANG

import device
from device import CpuStream, CudaPending, CudaStream, from_host, open_stream


def test_work_runs_in_order_in_one_other_thread_and_in_inference_mode():
    stream, seen = CpuStream(), []

    def work(number: int):
        def run() -> list[torch.Tensor]:
            seen.append((number, threading.current_thread(), torch.is_inference_mode_enabled()))
            return [torch.tensor(number)]

        return run

    pending = [stream.submit(work(i)) for i in range(50)]
    assert [p.result()[0].item() for p in reversed(pending)] == list(range(50))[::-1]
    assert [number for number, _, _ in seen] == list(range(50))
    (thread,) = {thread for _, thread, _ in seen}
    assert thread is not threading.current_thread() and thread.name.startswith("folio-device")
    assert all(inference for _, _, inference in seen) and not torch.is_inference_mode_enabled()


def test_submit_does_not_wait_for_the_work():
    stream, go, later = CpuStream(), threading.Event(), []
    first = stream.submit(lambda: [torch.tensor(go.wait(HANG))])
    second = stream.submit(lambda: later.append(1) or [])
    assert later == []
    go.set()
    assert second.result() == [] and later == [1]
    assert first.result()[0].item() is True


def test_a_result_can_be_asked_for_more_than_once():
    pending = CpuStream().submit(lambda: [torch.ones(2), torch.zeros(1)])
    assert [t.tolist() for t in pending.result()] == [t.tolist() for t in pending.result()] == [[1, 1], [0]]


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_the_result_raises_what_the_work_has_raised_and_the_stream_goes_on(error: BaseException):
    def fail() -> list[torch.Tensor]:
        raise error

    stream = CpuStream()
    failed, after = stream.submit(fail), stream.submit(lambda: [torch.ones(1)])
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            failed.result()
        assert caught.value is error
    assert after.result()[0].item() == 1


def test_spans_lie_between_submit_and_result_and_do_not_overlap():
    stream = CpuStream()
    before = time.perf_counter()
    pending = [stream.submit(lambda: [torch.ones(64, 64) @ torch.ones(64, 64)]) for _ in range(5)]
    for p in pending:
        p.result()
    after = time.perf_counter()
    times = [before, *(t for p in pending for t in p.span()), after]
    assert times == sorted(times)
    assert all(start < end for start, end in (p.span() for p in pending))


def test_two_streams_do_not_wait_for_each_other():
    one, other, go = CpuStream(), CpuStream(), threading.Event()
    blocked = one.submit(lambda: [torch.tensor(go.wait(HANG))])
    assert other.submit(lambda: [torch.ones(1)]).result()[0].item() == 1
    go.set()
    assert blocked.result()[0].item() is True


def test_the_stream_of_a_cpu():
    assert isinstance(open_stream(torch.device("cpu")), CpuStream)


@pytest.mark.parametrize("values, dtype", [([1, 2], torch.int64), ([1.5], torch.float32), ([], torch.int32)], ids=str)
def test_from_host_on_a_cpu(values: list, dtype: torch.dtype):
    t = from_host(values, torch.device("cpu"), dtype)
    assert (t.tolist(), t.dtype, t.device.type) == (values, dtype, "cpu")


# ---- CUDA, played by stand-ins: what is asked of it, and in which order


class FakeCuda:
    """Enough of torch.cuda for a CudaStream; `log` has what was asked. An event's time is the length of the log then."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current: str | None = None
        self.streams = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "FakeCuda":
        fake = self

        class Stream:
            def __init__(self, device: torch.device):
                self.name = ("compute", "fetch")[fake.streams]
                fake.streams += 1

            def wait_stream(self, other: "Stream") -> None:
                fake.log.append(f"{self.name} waits for {other.name}")

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self, stream: Stream | None = None) -> None:
                self.at = len(fake.log)
                fake.log.append(f"event on {stream.name if stream else fake.current}")

            def synchronize(self) -> None:
                fake.log.append("host waits for an event")

            def elapsed_time(self, other: "Event") -> float:
                return (other.at - self.at) * 1000.0

        class On:
            def __init__(self, stream: Stream):
                self.stream = stream

            def __enter__(self) -> None:
                self.before, fake.current = fake.current, self.stream.name

            def __exit__(self, *_) -> None:
                fake.current = self.before

        def to_pinned(t: torch.Tensor) -> torch.Tensor:
            fake.log.append(f"copy on {fake.current}")
            return t.clone()

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", On)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(name="default"))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: fake.log.append("host waits for all"))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: fake.log.append(f"in use by {s.name}"))
        monkeypatch.setattr(device, "to_pinned", to_pinned)
        return self


def test_a_cuda_step_computes_on_one_stream_fetches_on_the_other_and_waits_for_one_event(monkeypatch):
    fake = FakeCuda().install(monkeypatch)
    stream = CudaStream(torch.device("cuda"))
    assert fake.log == ["host waits for all", "event on compute"]
    del fake.log[:]

    def work() -> list[torch.Tensor]:
        fake.log.append(f"work on {fake.current}, inference {torch.is_inference_mode_enabled()}")
        return [torch.arange(3), torch.ones(1)]

    pending = stream.submit(work)
    assert fake.log == [
        "compute waits for default",
        "event on compute",
        "work on compute, inference True",
        "fetch waits for compute",
        "copy on fetch",
        "copy on fetch",
        "in use by fetch",
        "in use by fetch",
        "event on fetch",
    ]
    del fake.log[:]
    assert [t.tolist() for t in pending.result()] == [[0, 1, 2], [1]] and fake.log == ["host waits for an event"]


def test_cuda_spans_are_told_in_the_clock_of_the_host(monkeypatch):
    fake = FakeCuda().install(monkeypatch)
    stream = CudaStream(torch.device("cuda"))
    pending = stream.submit(lambda: [])
    start, end = pending.span()
    recorded = [at for at, what in enumerate(fake.log) if what.startswith("event")]
    first = recorded[0]
    assert (start, end) == tuple(stream.origin + at - first for at in recorded[1:])
    assert stream.origin < start < end


def test_work_that_fails_at_launch_raises_at_submit_on_cuda(monkeypatch):
    """There the host launches by itself, so an error of Python shows at once; the current stream is as it was."""
    fake = FakeCuda().install(monkeypatch)
    stream = CudaStream(torch.device("cuda"))
    with pytest.raises(ZeroDivisionError):
        stream.submit(lambda: [torch.ones(1 // 0)])
    assert fake.current is None and not torch.is_inference_mode_enabled()


# ---- CUDA itself


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.gpu
def test_cuda_gives_the_results_of_the_cpu_and_does_not_wait_at_submit():
    """Synchronising raises while work is submitted, and the results of a long chain are not there yet after it."""
    on = torch.device("cuda")
    stream, cpu = open_stream(on), CpuStream()
    assert isinstance(stream, CudaStream)
    here = torch.randint(0, 7, (512, 512), dtype=torch.float64)
    there = here.to(on)
    torch.cuda.synchronize()

    def chain(x: torch.Tensor, times: int) -> list[torch.Tensor]:
        y = x
        for _ in range(times):
            y = (y @ x).remainder(7)
        return [y, y.sum(-1).long()]

    stream.submit(lambda: chain(there, 2)).result()  # loads what the first use loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [stream.submit(lambda n=n: chain(there, n)) for n in (300, 3, 5)]
        ids = from_host([3, 1, 2], on)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(pending[0], CudaPending) and not pending[-1]._end.query()
    for p, n in reversed(list(zip(pending, (300, 3, 5), strict=True))):
        mine, expected = p.result(), cpu.submit(lambda n=n: chain(here, n)).result()
        assert all(t.device.type == "cpu" and t.is_pinned() for t in mine)
        assert [t.tolist() for t in mine] == [t.tolist() for t in expected]
    spans = [t for p in pending for t in p.span()]
    assert all(start <= end for start, end in (p.span() for p in pending))
    assert spans[::2] == sorted(spans[::2]) and ids.tolist() == [3, 1, 2]
