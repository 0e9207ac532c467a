"""Where a step's time goes: attention, matmul, sampling, other work of the device, and waiting for the host.

    python generate.py --profile trace.json --prompt "Once upon a time"

    with engine.profile("trace.json.gz"):
        engine.generate(prompts)
    engine.stats().breakdown   # {"attention": ..., "matmul": ..., "sampling": ..., "other": ..., "host": ...}, seconds a step

torch.profiler records. On a GPU its kernels and copies are the device's work, on a CPU the operators of the stream's worker
thread. At any moment the event that has begun last owns the time; a moment without one counts as `host`, between the
kernels of a step as well as between two steps. So the five add up to the wall time of the steps.

An event belongs to a part by its name (`part_of`), on a CPU else to that of the operator that has called it (what attention
calls is all attention). What no rule knows is `other`. A kernel that the compiler has fused from several parts counts as its
product, if it has one. On a CPU, compiled code is one event, unless torch was told before its import to give each loop its
name: `prepare` does, and `--compile` then compiles anew.

Recording takes time itself, a microsecond or two an operator: an eager step is slower while it is watched.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError

if TYPE_CHECKING:  # `prepare` comes before torch
    import torch

    from device import CpuStream, CudaStream

PARTS = ("attention", "matmul", "sampling", "other", "host")
MARK = "folio: the device's thread"

FUSED = re.compile(r"(triton_(?:poi|red|per)|cpp)_fused_(\w+)")  # Inductor: what loops, and the operators in it
RULES = (  # the first that fits
    (
        "attention",
        r"paged_|scaled_dot_product|flash|fmha|attention|triton_(decode|prefill)|mla_|latent_(decode|extend)|\b(decode|prefill|merge)_kernel",
    ),
    ("sampling", r"argmax|topk|sort|log_?softmax|isfinite|cutoff|triton_sample|\b(edit|survey|settle)_kernel"),
    (
        "matmul",
        r"gemm|gemv|cutlass|cublas|xmma|nvjet|splitk|_linear|triton_(tem|mm|bmm)|::(mm|addmm|bmm|linear|matmul)$",
    ),
)


def part_of(name: str) -> str | None:
    """The part that an operator or a kernel of this name belongs to; None if no rule knows it."""
    if (fused := FUSED.search(name)) is not None:
        return part_of_fused(fused[1], set(fused[2].split("_")))
    return next((part for part, rule in RULES if re.search(rule, name, re.IGNORECASE)), None)


def part_of_fused(kind: str, words: set[str]) -> str | None:
    """kind: the sort of loop; words: what is in it. A pointwise loop has no product. One row's product is a `mul` and a `sum`."""
    if {"amax", "exp", "gather"} <= words and "rsqrt" not in words:  # loops over the pages, and no whole layer
        return "attention"
    noise, product = "rshift" in words, words & {"mm", "addmm", "bmm"}
    weights = kind == "cpp" and {"mul", "sum"} <= words and not ("softmax" in words and "log" not in words)
    if kind != "triton_poi" and (product or weights) and not noise:
        return "matmul"
    return "sampling" if noise or words & {"argmax", "isfinite", "topk", "sort", "cutoff"} or "log" in words else None


@dataclass(frozen=True)
class Event:
    """Something that the device did, from start to end in seconds."""

    name: str
    start: float
    end: float


def divide(events: Iterable[Event], periods: Sequence[tuple[float, float]], nested: bool) -> Counter[tuple[str, str]]:
    """Seconds of each (part, name) within the periods; ("host", "") is what is left of them.

    nested: an event inside of another was called by it, and has its part where it has none of its own. What attention calls is
    attention: its products are two of the matrix products of a step, but not what a person looks for under that name.
    """
    ordered = sorted(events, key=lambda e: (e.start, -e.end))
    spent: Counter[tuple[str, str]] = Counter()
    for start, end in periods:
        now, open_events = start, []  # (end, part, name), the one that owns the time last
        inside = (e for e in ordered if e.end > start and e.start < end)
        for event in chain(inside, [Event("", end, end)]):
            while open_events and now < event.start:
                until, part, name = open_events[-1]
                if until <= now:
                    open_events.pop()
                    continue
                spent[part, name] += min(until, event.start) - now
                now = min(until, event.start)
            spent["host", ""] += max(0.0, event.start - now)
            now = max(now, event.start)
            while open_events and open_events[-1][0] <= now:
                open_events.pop()
            caller = open_events[-1][1] if nested and open_events else "other"
            part = caller if caller == "attention" else part_of(event.name) or caller
            open_events.append((event.end, part, event.name))
    return spent


class Recorder:
    """Records the steps between `start` and `stop`; `add` tells it of each. Start and stop between two steps."""

    def __init__(self, stream: "CpuStream | CudaStream", device: "torch.device", path: str | Path | None):
        """path: for the trace, for ui.perfetto.dev; compressed if it ends in .gz."""
        if path is not None:
            require_writable(path)
        self.path, self.stream, self.device = path, stream, device
        self.steps = 0
        self.breakdown: dict[str, float] | None = None  # seconds a step; None: no step, or the device said nothing
        self.kernels: list[tuple[str, str, float]] = []  # (part, name, seconds a step), the longest first
        self._periods: list[tuple[float, float]] = []  # in which there was work, by time.perf_counter
        self._idle = True

    def start(self) -> None:
        from torch._C._profiler import _ExperimentalConfig
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":  # the host's events are for the eye only, and take the host's time
            activities = [ProfilerActivity.CUDA] + activities * (self.path is not None)
        all_threads = _ExperimentalConfig(profile_all_threads=True)
        self._profiler = profile(activities=activities, experimental_config=all_threads, acc_events=True)
        self._profiler.start()
        self._epoch = time.time_ns() - time.perf_counter_ns()  # the profiler's clock is that of the day
        mark = self.stream.submit(_mark)
        mark.result()
        # Spans on a GPU are told by its own clock, which drifts: some milliseconds in minutes.
        self._drift = time.perf_counter() - mark.span()[1] if self.device.type == "cuda" else 0.0

    def add(self, span: tuple[float, float], idle: bool) -> None:
        """A step has run in `span`, and left the engine idle or not: then what follows is nobody's waiting."""
        start, end = (t + self._drift for t in span)
        self._periods.append((start if self._idle else self._periods.pop()[0], end))
        self._idle = idle
        self.steps += 1

    def stop(self) -> None:
        self.stream.submit(list).result()  # what is on its way still
        self._profiler.stop()
        if self.path is not None:
            self._profiler.export_chrome_trace(str(self.path))
        events = self._device_events()
        if events and self.steps:
            spent = divide(events, self._periods, nested=self.device.type == "cpu")
            self.breakdown = dict.fromkeys(PARTS, 0.0)
            for (part, name), seconds in spent.most_common():
                self.breakdown[part] += seconds / self.steps
                self.kernels += [(part, name, seconds / self.steps)] if name else []
        del self._profiler  # with all of its events

    def _device_events(self) -> list[Event]:
        events: list[Any] = self._profiler.profiler.kineto_results.events()
        if self.device.type == "cuda":
            events = [e for e in events if e.device_type().name == "CUDA" and not e.is_user_annotation()]
        else:
            threads = {e.start_thread_id() for e in events if e.name() == MARK}
            events = [e for e in events if e.start_thread_id() in threads and e.name() != MARK]
        return [Event(e.name(), (e.start_ns() - self._epoch) / 1e9, (e.end_ns() - self._epoch) / 1e9) for e in events]


def _mark() -> "list[torch.Tensor]":
    """On the stream: an event by which its thread can be told."""
    from torch.profiler import record_function

    with record_function(MARK):
        return []


def prepare(path: str | Path) -> None:
    """Before torch is imported: loops of compiled CPU code under their own names, no chatter of the profiler's.

    UserError if the trace could not be written there.
    """
    require_writable(path)
    os.environ.setdefault("TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def require_writable(path: str | Path) -> None:
    try:
        Path(path).open("a").close()
    except OSError as error:
        raise UserError(f"cannot write the profile {path}: {error}") from error
