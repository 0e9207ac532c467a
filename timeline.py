"""A timeline of the steps for chrome://tracing or ui.perfetto.dev: one row for the host, one for the device.

python generate.py --trace trace.json --prompt "Once upon a time"
python -m bench.trace_picture trace.json docs/overlap.svg
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

ROWS = ("host", "device")


class Spans:
    """Whoever wants to know when host and device work."""

    def add(self, row: str, name: str, start: float, end: float, **details: Any) -> None:
        """`row` did `name` from `start` to `end`, in seconds of `time.perf_counter`."""
        raise NotImplementedError

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, and a span on the host's row whenever it is called."""

        @wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add("host", name, start, time.perf_counter())

        return traced


@dataclass(frozen=True)
class Span:
    row: str  # of ROWS
    name: str
    start: float  # seconds of `time.perf_counter`
    end: float
    requests: int = 0  # of a step
    tokens: int = 0


class RecentSpans(Spans):
    """The last ones, in memory."""

    def __init__(self, most: int):
        self.spans: deque[Span] = deque(maxlen=most)

    def add(self, row: str, name: str, start: float, end: float, **details: Any) -> None:
        self.spans.append(Span(row, name, start, end, **details))


class Timeline(Spans):
    """A file. Events are written as they come; `close`, from any thread, ends the list (the viewers do without)."""

    def __init__(self, path: str | Path):
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        self._lock = threading.Lock()
        self._origin = time.perf_counter()
        self._separator = "[\n"
        for number, row in enumerate(ROWS):
            self._write({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}})

    def add(self, row: str, name: str, start: float, end: float, **details: Any) -> None:
        """One event; `details` show when it is clicked."""
        at, duration = (start - self._origin) * 1e6, (end - start) * 1e6
        self._write(
            {"ph": "X", "name": name, "pid": 0, "tid": ROWS.index(row), "ts": at, "dur": duration, "args": details}
        )

    def _write(self, event: dict[str, Any]) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.write(self._separator + json.dumps(event))
                self._separator = ",\n"

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.write("\n]\n")
                self._file.close()
