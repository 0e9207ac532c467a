"""A picture of both loops at work: what the host and what the device does, on one clock.

The bundled model decodes a batch with the plain loop and with the overlapped one, each writes a trace (`timeline.py`), and a few
steps from the middle of each are drawn. In the lower half the device's next step begins while the host still commits the last.

    python -m bench.trace_picture docs/overlap.svg        # needs the `bench` extra
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.common import emit, table
from engine import Engine, SamplingParams

MODEL = Path(__file__).parent.parent / "assets" / "folio-tiny"
COLOURS = {"plan": "#4c78a8", "launch": "#f58518", "commit": "#54a24b", "step": "#b9b9b9"}

Events = list[dict[str, Any]]


def record(overlap: bool, rows: int, new_tokens: int) -> Events:
    """The events of one batch of `rows` requests, decoded greedily; of the second of two runs, so that all is warm."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            path = Path(folder) / name
            engine = Engine.from_pretrained(MODEL, max_batch_size=rows, overlap=overlap, trace=path)
            params = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
            engine.generate([f"Once upon a time there were {i} foxes" for i in range(rows)], params)
            engine.timeline.close()
        return [e for e in json.loads(path.read_text()) if e["ph"] == "X"]


def idle_share(events: Events) -> float:
    """The share of the time between the first and the last device step in which the device waits."""
    steps = sorted((e["ts"], e["dur"]) for e in events if e["tid"] == 1)[2:-1]
    total = steps[-1][0] + steps[-1][1] - steps[0][0]
    return 1 - sum(duration for _, duration in steps) / total


def draw(traces: dict[str, Events], path: str, steps: int) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "folio"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(10, 3.6), sharex=True)
    window = 0.0
    for axis, (name, events) in zip(axes, traces.items(), strict=True):
        device = sorted(e["ts"] for e in events if e["tid"] == 1)
        start, end = device[len(device) // 2], device[len(device) // 2 + steps]
        window = max(window, end - start)
        for e in events:
            kind = e["name"].split()[0]
            if start - 500 < e["ts"] < end + 500:
                axis.broken_barh(
                    [(e["ts"] - start, e["dur"])], (0.6 - e["tid"], 0.8), facecolors=COLOURS[kind], edgecolor="white"
                )
        axis.set_yticks([1, 0], ["host", "device"])
        axis.set_title(f"{name}: the device waits {idle_share(events):.0%} of the time", loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xlim(-200, window + 200)
    axes[1].set_xlabel("microseconds")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    figure.legend(handles, ["plan", "launch", "commit", "step on the device"], ncol=4, loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", help="where to draw it (SVG); without it, only the figures")
    parser.add_argument("--rows", type=int, default=16, help="requests in the batch (default: 16)")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args(argv)
    traces = {name: record(name == "overlapped", args.rows, args.new_tokens) for name in ("plain", "overlapped")}
    rows, result = [], {}
    for name, events in traces.items():
        step = statistics.median(e["dur"] for e in events if e["tid"] == 1)
        host = {
            kind: statistics.median(e["dur"] for e in events if e["name"] == kind)
            for kind in ("plan", "launch", "commit")
        }
        result[name] = {"step_us": step, "idle": idle_share(events), **host}
        rows.append([name, f"{step:,.0f}", *(f"{v:,.0f}" for v in host.values()), f"{idle_share(events):.1%}"])
    print(table(["loop", "device step, µs", "plan", "launch", "commit", "device waits"], rows))
    if args.picture:
        draw(traces, args.picture, steps=2)
    emit({"bench": "trace_picture", "rows": args.rows, **result})


if __name__ == "__main__":
    main()
