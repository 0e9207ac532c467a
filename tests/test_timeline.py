"""The trace of the steps: JSON that a viewer reads, and an order of events that tells the two loops apart.

python -m pytest tests/test_timeline.py
"""

import gc
import itertools
import json
import threading
from pathlib import Path

import pytest
from test_engine import ids_of, make, prompt_ids
from torch import Tensor
from waiting import HANG

from engine import SamplingParams
from errors import UserError
from scheduler.batch import Batch
from timeline import Timeline

PARAMS = SamplingParams(temperature=0, max_new_tokens=6)


def events_of(path: Path, row: str | None = None, name: str | None = None) -> list[dict]:
    """Those on the row of that name (all with times, without one), as (start, end) in order."""
    events = json.loads(path.read_text(encoding="utf-8"))
    rows = {e["args"]["name"]: e["tid"] for e in events if e["ph"] == "M"}
    assert list(rows) == ["host", "device"] and len(set(rows.values())) == 2
    events = [e for e in events if e["ph"] == "X"]
    events = [e for e in events if row is None or e["tid"] == rows[row]]
    return [e for e in events if name is None or e["name"] == name]


def span(event: dict) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def traced(path: Path, overlap: bool) -> tuple:
    engine = make(trace=path, overlap=overlap, chunk_size=16)
    outputs = engine.generate(prompt_ids(5, 21, 9), PARAMS)
    engine.timeline.close()
    return engine, outputs


# ---- the file alone


def test_an_event_has_its_row_its_name_its_times_in_microseconds_and_its_details(tmp_path: Path):
    timeline = Timeline(tmp_path / "t.json")
    origin = timeline._origin
    timeline.add("device", "step 1", origin + 0.5, origin + 0.75, tokens=3)
    timeline.add("host", "plan", origin + 1, origin + 2)
    timeline.close()
    (step,), (plan,) = events_of(tmp_path / "t.json", "device"), events_of(tmp_path / "t.json", "host")
    assert (step["name"], step["args"], step["pid"]) == ("step 1", {"tokens": 3}, plan["pid"])
    assert span(step) == pytest.approx((500_000, 750_000)) and span(plan) == pytest.approx((1e6, 2e6))


def test_a_timed_function_is_the_same_function_and_leaves_an_event_even_if_it_raises(tmp_path: Path):
    def divide(a: int, b: int = 1) -> float:
        """Docs."""
        return a / b

    timeline = Timeline(tmp_path / "t.json")
    timed = timeline.timed("divide", divide)
    assert timed(6, b=3) == 2 and timed.__doc__ == "Docs."
    with pytest.raises(ZeroDivisionError):
        timed(1, 0)
    timeline.close()
    events = events_of(tmp_path / "t.json", "host", "divide")
    assert len(events) == 2 and span(events[0])[1] <= span(events[1])[0] and all(e["dur"] >= 0 for e in events)


def test_closing_twice_and_events_after_it_change_nothing(tmp_path: Path):
    timeline = Timeline(tmp_path / "t.json")
    timeline.close()
    before = (tmp_path / "t.json").read_text()
    timeline.close()
    timeline.add("host", "late", 0, 1)
    assert (tmp_path / "t.json").read_text() == before and events_of(tmp_path / "t.json") == []


def test_closing_while_others_write_raises_nothing_and_leaves_a_whole_file(tmp_path: Path):
    for attempt in range(20):
        path, errors = tmp_path / f"{attempt}.json", []
        timeline, started = Timeline(path), threading.Event()

        def write(timeline: Timeline = timeline, started: threading.Event = started, errors: list = errors) -> None:
            try:
                for i in range(2000):
                    timeline.add("host", "plan", i, i + 1)
                    started.set()
            except ValueError as error:
                errors.append(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        assert started.wait(HANG)
        timeline.close()
        thread.join(HANG)
        assert errors == [] and not thread.is_alive() and len(events_of(path)) >= 1


# ---- of an engine


@pytest.mark.parametrize("overlap", [True, False])
def test_every_step_has_one_event_on_the_device_and_plan_launch_commit_on_the_host(tmp_path: Path, overlap: bool):
    path = tmp_path / "trace.json"
    engine, outputs = traced(path, overlap)
    assert ids_of(outputs) == ids_of(make().generate(prompt_ids(5, 21, 9), PARAMS))
    steps = events_of(path, "device")
    assert [e["name"] for e in steps] == [f"step {n + 1}" for n in range(engine.steps)] and engine.steps > 6
    assert sum(e["args"]["tokens"] for e in steps) >= 5 + 21 + 9 + 3 * 5
    assert max(e["args"]["requests"] for e in steps) == 3
    for name in ("launch", "commit"):
        assert len(events_of(path, "host", name)) == engine.steps
    assert len(events_of(path, "host", "plan")) >= engine.steps
    assert {e["name"] for e in events_of(path, "host")} == {"plan", "launch", "commit"}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_row_shows_one_thing_at_a_time_and_a_step_runs_between_its_launch_and_its_commit(
    tmp_path: Path, overlap: bool
):
    path = tmp_path / "trace.json"
    traced(path, overlap)
    for row in ("host", "device"):
        times = [t for e in sorted(events_of(path, row), key=lambda e: e["ts"]) for t in span(e)]
        assert all(a <= b + 1e-3 for a, b in itertools.pairwise(times))  # microseconds, rounded
    launches, steps, commits = (
        events_of(path, *what) for what in (("host", "launch"), ("device",), ("host", "commit"))
    )
    for launch, step, commit in zip(launches, steps, commits, strict=True):
        assert launch["ts"] <= step["ts"] and span(step)[1] <= commit["ts"]


@pytest.mark.parametrize("overlap", [True, False])
def test_only_the_overlapped_loop_launches_a_step_before_it_commits_the_one_before(tmp_path: Path, overlap: bool):
    path = tmp_path / "trace.json"
    traced(path, overlap)
    launches, commits = events_of(path, "host", "launch"), events_of(path, "host", "commit")
    pairs = list(zip(commits, launches[1:], strict=False))
    assert len(pairs) > 5
    assert [next_launch["ts"] < commit["ts"] for commit, next_launch in pairs] == [overlap] * len(pairs)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_with_masks_shows_the_whole_of_it(tmp_path: Path, overlap: bool):
    """From the start of its forward, though the masks are filled after that, and the sampling launched last."""
    path = tmp_path / "trace.json"
    engine, forwards, asked = make(trace=path, overlap=overlap), threading.Semaphore(0), []
    run_forward = engine.runner.run_forward

    def forward(batch: Batch) -> list[Tensor]:
        result = run_forward(batch)
        forwards.release()
        return result

    def allowed(ids: list[int]) -> range:
        asked.append(forwards.acquire(timeout=HANG))  # when the mask is filled, the forward is over
        return range(10)

    engine.runner.run_forward = forward
    engine.generate([1, 2, 3], SamplingParams(temperature=0, max_new_tokens=6, allowed_tokens_fn=allowed))
    engine.timeline.close()
    steps, masks = events_of(path, "device"), events_of(path, "host", "mask")
    assert asked == [True] * 6
    for step, mask in list(zip(steps, masks, strict=False))[:6]:  # with overlap a surplus step follows
        assert step["ts"] < span(mask)[1] < span(step)[1]


def test_a_trace_is_readable_though_nobody_has_closed_it(tmp_path: Path):
    """The engine is collected, and its file is whole."""
    path = tmp_path / "trace.json"
    engine = make(trace=path)
    engine.generate([1, 2, 3], PARAMS)
    steps = engine.steps
    del engine
    for _ in range(3):
        gc.collect()
    assert len(events_of(path, "device")) == steps


@pytest.mark.parametrize("where", ["no/such/folder/t.json", "."])
def test_a_trace_that_cannot_be_written_is_refused(tmp_path: Path, where: str):
    with pytest.raises(UserError, match="cannot write the trace"):
        make(trace=tmp_path / where)
