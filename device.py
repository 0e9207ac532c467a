"""The device as a stream: work is handed over and runs in order, and the host goes on.

On a GPU that is CUDA's way. There are two streams: one computes, the other brings results to pinned memory, and the host waits
for one event a step and for nothing else. On a CPU a worker thread plays the stream: torch lets go of the interpreter lock in every
operator, so the host's share of a step costs no time of its own there either.

    python -m pytest tests/test_device.py
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], list[Tensor]]


class Pending(Protocol):
    """Work on its way."""

    def result(self) -> list[Tensor]:
        """Wait for it: its tensors, on the host. Raises what the work has raised."""

    def span(self) -> tuple[float, float]:
        """When it ran, in seconds of `time.perf_counter`. After `result` only."""


class CpuPending:
    def __init__(self, future: "Future[tuple[list[Tensor], float, float]]"):
        self._future = future

    def result(self) -> list[Tensor]:
        return self._future.result()[0]

    def span(self) -> tuple[float, float]:
        return self._future.result()[1:]


class CpuStream:
    """One worker thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="folio-device")

    def submit(self, work: Work) -> CpuPending:
        return CpuPending(self._thread.submit(self._run, work))

    @staticmethod
    @torch.inference_mode()
    def _run(work: Work) -> tuple[list[Tensor], float, float]:
        start = time.perf_counter()
        return work(), start, time.perf_counter()


class CudaPending:
    def __init__(self, tensors: list[Tensor], start: torch.cuda.Event, end: torch.cuda.Event, stream: "CudaStream"):
        self._tensors, self._start, self._end, self._stream = tensors, start, end, stream

    def result(self) -> list[Tensor]:
        self._end.synchronize()
        return self._tensors

    def span(self) -> tuple[float, float]:
        first, origin = self._stream.first, self._stream.origin
        return tuple(origin + first.elapsed_time(event) / 1000 for event in (self._start, self._end))


class CudaStream:
    """A stream to compute and a stream to fetch results."""

    def __init__(self, device: torch.device):
        self.device = device
        self.compute, self.fetch = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.first = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)  # once, so that the events' clock can be told in the host's
        self.first.record(self.compute)
        self.origin = time.perf_counter()

    def submit(self, work: Work) -> CudaPending:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.compute.wait_stream(torch.cuda.default_stream(self.device))  # where weights and pages were made
        with torch.inference_mode(), torch.cuda.stream(self.compute):
            start.record()
            results = work()
        self.fetch.wait_stream(self.compute)
        with torch.inference_mode(), torch.cuda.stream(self.fetch):
            host = [to_pinned(t) for t in results]
            for t in results:
                t.record_stream(self.fetch)  # its memory is in use until the copy is done
            end.record()
        return CudaPending(host, start, end, self)


def to_pinned(t: Tensor) -> Tensor:
    """A copy of a device tensor in pinned memory, on its way when this returns."""
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)


def from_host(values: Iterable, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of host values on the device; the copy does not wait."""
    t = torch.as_tensor(values, dtype=dtype)
    return t if device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)


def open_stream(device: torch.device) -> CpuStream | CudaStream:
    return CpuStream() if device.type == "cpu" else CudaStream(device)
