"""What the benchmarks share: time, alternate, summarise, print.

A shared machine is fast one minute and slow the next. So things that are compared take turns inside one run, the order is
turned round every second time, and what is reported is the median with its spread.

    from bench.common import alternate, summarize
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Stat:
    """Median and range of a few measurements."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 1, scale: float = 1.0) -> str:
        return f"{self.median * scale:,.{digits}f} ({self.low * scale:,.{digits}f}..{self.high * scale:,.{digits}f})"

    def json(self) -> dict[str, float]:
        return {name: significant(value) for name, value in asdict(self).items()}


def summarize(values: Iterable[float]) -> Stat:
    values = list(values)
    return Stat(statistics.median(values), min(values), max(values))


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes. For work on the CPU: it waits for no device."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(measures: dict[str, Callable[[], Sample]], repeats: int) -> dict[str, list[Sample]]:
    """Call every measure once a repeat, in turn; every second repeat goes backwards, so that a drift favours nobody."""
    samples: dict[str, list[Sample]] = {name: [] for name in measures}
    for i in range(repeats):
        for name in list(measures)[:: -1 if i % 2 else 1]:
            samples[name].append(measures[name]())
    return samples


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they need; the first one to the left, the others to the right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    padded = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in padded)


def emit(record: dict[str, Any], out: str | None = None) -> None:
    """Print the record as one JSON line; also write it to the file `out`."""
    line = json.dumps(record)
    print(line)
    if out is not None:
        Path(out).write_text(line + "\n", encoding="utf-8")


def progress(text: str) -> None:
    """To stderr, so that stdout holds nothing but results."""
    print(text, file=sys.stderr, flush=True)


def significant(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")


def use_threads(threads: int | None) -> int:
    """Set the number of threads of all that torch does on the CPU (None: leave torch's choice); return what it is."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def machine_facts() -> dict[str, Any]:
    """What a figure means nothing without."""
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "last_level_cache": last_level_cache(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def last_level_cache() -> str | None:
    """Size of the first core's last cache as Linux prints it ("32768K"); None where it is not to be had."""
    try:
        folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
        return (folders[-1] / "size").read_text(encoding="utf-8").strip() if folders else None
    except OSError:
        return None
