"""The Triton kernels on a GPU: each as a share of what the machine can do, and beside its peers.

    python -m bench.kernels                                    all of it, to bench/results/kernels-<gpu>.json
    python -m bench.kernels --only decode mla --out mla.json   some groups: decode prefill mla sampling write
    python -m bench.kernels --sweep mla --cases "16 heads"     other tiles, warps and stages, of decode, prefill or mla
    python -m bench.kernels --table                            the newest results as a table in Markdown
    TRITON_INTERPRET=1 python -m bench.kernels --tiny          no GPU: tiny shapes, the times mean nothing

First the two ceilings: bandwidth of a large copy (bytes read plus bytes written; the faster of the driver's copy and of
a kernel) and rate of a large bfloat16 product. A case's floor is the time of its bytes or its operations at that rate,
whichever is more (`bench/kernel_cases.py` counts them), and its share is floor / time. Peers take turns with the kernel
in one run; the figure is the median of the repeats. Before anything is timed, outputs are compared; what is wrong gets
no figure.
"""

import argparse
import datetime
import gc
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench.common import Stat, alternate, emit, progress, significant, summarize, table
from bench.gpu_clock import Call, Measure
from bench.kernel_cases import GROUPS, Built, Case, Goal, Rig, Skipped, Wrong, gpu_rig, tiny_rig, worst
from kernels import decode, mla, prefill
from kernels.paged import INTERPRETED

RESULTS = Path(__file__).resolve().parent / "results"
REPEATS = 9
LIMIT = 2e-2  # of the relative error: bfloat16, and other orders of summation
NO_MEANING = "interpreter: the times mean nothing"

Row = dict[str, Any]


# ---- ceilings


def measure_ceilings(rig: Rig, repeats: int) -> dict[str, Stat]:
    """-> {"copy": bytes per second, "matmul": operations per second}, of operands far larger than the L2 cache."""
    numbers, size = (1 << 31, 8192) if rig.device.type == "cuda" else (1 << 16, 64)
    progress("ceilings")
    source, target = rig.normal(numbers), rig.normal(numbers)
    a, b = rig.normal(size, size), rig.normal(size, size)
    calls: dict[str, list[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "copy by a kernel": [lambda: torch.neg(source, out=target)],
        "matmul": [lambda: a @ b],
    }
    samples = alternate({name: rig.clock(call) for name, call in calls.items()}, repeats + 1)
    work = {"copy": 2 * source.numel() * source.element_size(), "matmul": 2 * size**3}
    rates = {
        name: summarize(work[name.split()[0]] / t for t in times[1:])  # the first one warms up
        for name, times in samples.items()
    }
    copy = max(rates["copy"], rates["copy by a kernel"], key=lambda stat: stat.median)
    return {"copy": copy, "matmul": rates["matmul"]}


# ---- one case


def floor_of(case: Case, ceilings: dict[str, Stat]) -> tuple[float, str]:
    """-> the least seconds that a call can take, and the ceiling that says so."""
    times = {"copy": case.size / ceilings["copy"].median, "matmul": case.flops / ceilings["matmul"].median}
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


def check(built: Built, out: Callable[[int], Any], wanted: Callable[[int], Any]) -> float:
    """The largest difference in the first and the last copy. Wrong where it is above the limit."""
    error = worst(built.differ(out(copy), wanted(copy)) for copy in (0, -1))
    if not error <= LIMIT:
        raise Wrong(f"differs by {error:.1e}, at most {LIMIT:g} is allowed")
    return error


def prepare_peers(built: Built, rig: Rig) -> tuple[dict[str, Measure], dict[str, str], float]:
    """Compare the kernel with its reference and its peers with the kernel, and set up what agrees.

    -> measures by name, "ours" first; why a peer has none; the error of the kernel. Wrong where the kernel is.
    """
    calls, left_out = {}, {}
    for name, make in built.peers.items():
        try:
            calls[name] = make()
        except Exception as error:
            left_out[name] = why(error)

    def ours(copy: int) -> Any:
        return built.project(built.calls[copy]())

    if built.reference is not None:
        error = check(built, lambda copy: built.calls[copy](), built.reference)
    elif calls:
        first = next(iter(calls.values()))
        error = check(built, ours, lambda copy: first[copy]())
    else:
        raise Wrong(f"nothing to compare with: {left_out}")
    measures = {"ours": rig.clock(built.calls)}
    for name, peer in calls.items():
        try:
            check(built, lambda copy, peer=peer: peer[copy](), ours)
            measures[name] = rig.clock(peer)
        except Exception as problem:
            left_out[name] = why(problem)
    for name, reason in left_out.items():
        progress(f"    {name}: {reason}")
    return measures, left_out, error


def why(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if isinstance(error, Skipped | Wrong) else f"{type(error).__name__}: {text}"


def measure_case(case: Case, rig: Rig, ceilings: dict[str, Stat], repeats: int) -> Row:
    """-> a row. A case that does not work is a row too, with `failed` or `skipped` and no figures."""
    row: Row = {"group": case.group, "case": case.name}
    try:
        built = case.build(rig)
    except Exception as error:
        return row | {"skipped" if isinstance(error, Skipped) else "failed": why(error)}
    try:
        measures, left_out, error = prepare_peers(built, rig)
        stats = {name: summarize(times) for name, times in alternate(measures, repeats).items()}
    except Exception as error:
        return row | {"failed": why(error)}
    ours, (floor, bound) = stats.pop("ours"), floor_of(case, ceilings)
    row |= {
        "seconds": ours.json(),
        "bytes": case.size,
        "flops": case.flops,
        "floor": significant(floor),
        "bound": bound,
        "share": significant(floor / ours.median, 4),
        "error": significant(error, 2),
        "copies": len(built.calls),
        "cold": len(built.calls) * case.rotated >= rig.cold_bytes,
        "peers": {name: stat.json() for name, stat in stats.items()},
        "left_out": left_out,
    }
    return row | {"goals": [reached(goal, row) for goal in case.goals]}


def reached(goal: Goal, row: Row) -> dict[str, Any]:
    """-> {what, least, got, met}; got and met are None where no such peer was measured."""
    times = [stat["median"] for name, stat in row["peers"].items() if name.startswith(goal.what)]
    got = row["share"] if goal.what == "share" else min(times) / row["seconds"]["median"] if times else None
    met = None if got is None else got >= goal.least
    return {"what": goal.what, "least": goal.least, "got": got and significant(got, 4), "met": met}


def clean_up(rig: Rig) -> None:
    gc.collect()
    if rig.device.type == "cuda":
        torch.cuda.empty_cache()


# ---- all cases


def measure_all(args: argparse.Namespace, rig: Rig, facts: dict[str, Any]) -> dict[str, Any]:
    """Group after group, its table on stdout. The file has all rows so far: a broken GPU may end the run at any time."""
    start = time.monotonic()
    repeats = 2 if args.tiny else REPEATS
    ceilings = measure_ceilings(rig, repeats)
    clean_up(rig)
    record = {"bench": "kernels", **facts, "repeats": repeats}
    record |= {"ceilings": {name: stat.json() for name, stat in ceilings.items()}, "rows": []}
    print(headline(record), flush=True)
    for group in args.only:
        for case in selected(GROUPS[group](args.tiny), args.cases):
            progress(f"{time.monotonic() - start:4.0f} s  {group}: {case.name}")
            record["rows"].append(measure_case(case, rig, ceilings, repeats))
            if args.out:
                Path(args.out).write_text(json.dumps(record) + "\n", encoding="utf-8")
            clean_up(rig)
        rows = [row for row in record["rows"] if row["group"] == group]
        print("\n" + table(HEADERS, map(cells, rows)), flush=True)
    return record


def selected(cases: Iterable[Case], names: list[str] | None) -> Iterator[Case]:
    return (case for case in cases if names is None or case.name.startswith(tuple(names)))


# ---- tables

HEADERS = ("kernel", "µs", "of the ceiling", "peers", "goals")

NOTE = (
    "Times are those of calls in a CUDA graph, launches excluded, on data that L2 does not hold unless the row says so. "
    "A share is the least time that copy bandwidth or matmul rate allow, over the time taken; for sampling the least "
    "is one read of the logits. Beside a peer stands how many times as long it takes."
)


def headline(record: dict[str, Any]) -> str:
    copy, matmul = record["ceilings"]["copy"]["median"], record["ceilings"]["matmul"]["median"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    label = f" ({NO_MEANING})" if record["tiny"] else ""
    return (
        f"{record['gpu']}{label}, {record['date']}, {versions}: copy {copy / 1e9:,.0f} GB/s, "
        f"bfloat16 products {matmul / 1e12:,.0f} TFLOP/s; medians of {record['repeats']} (least..most)"
    )


def cells(row: Row) -> list[str]:
    """A row as text. A peer's figure says how many times as long as the kernel it takes."""
    name = f"{row['group']} {row['case']}"
    for reason in ("skipped", "failed"):
        if reason in row:
            return [name, f"{reason}: {row[reason]}", "", "", ""]
    ours = row["seconds"]["median"]
    peers = [f"{peer} {stat['median'] / ours:.2f}x" for peer, stat in row["peers"].items()]
    share = f"{row['share']:.1%} of {row['bound']}" + ("" if row["cold"] else ", from L2")
    return [name, Stat(**row["seconds"]).show(1, 1e6), share, ", ".join(peers), ", ".join(map(goal_text, row["goals"]))]


def goal_text(goal: dict[str, Any]) -> str:
    answer = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
    least = f"{goal['least']:.0%}" if goal["what"] == "share" else f"{goal['what']} {goal['least']:g}x"
    return f"{least} {answer}"


def markdown(record: dict[str, Any]) -> str:
    """The table of a README."""
    lines = [HEADERS, ["---", *["---:"] * 2, *["---"] * 2], *map(cells, record["rows"])]
    return "\n".join([headline(record), "", *(f"| {' | '.join(line)} |" for line in lines), "", NOTE])


def newest(folder: Path) -> Path | None:
    return max(folder.glob("kernels-*.json"), key=lambda path: path.stat().st_mtime, default=None)


def print_table(path: Path | None) -> int:
    if path is None or not path.is_file():
        print(f"no results: {path or RESULTS / 'kernels-*.json'} is not there", file=sys.stderr)
        return 2
    print(markdown(json.loads(path.read_text(encoding="utf-8"))))
    return 0


# ---- sweep

SWEPT = {"decode": decode, "prefill": prefill, "mla": mla}  # each asks `config` for its tile
TILES = {"block_n": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3, 5)}  # 3 and 4 compile to the same code
TINY_TILES = {"block_n": (16, 32), "warps": (4,), "stages": (1, 2)}


def with_tile(config: Any, tile: dict[str, int]) -> Any:
    """A kernel's configuration with other values; its fields are named so, or `num_` before it."""
    names = {f.name.removeprefix("num_"): f.name for f in fields(config)}
    return replace(config, **{names[key]: value for key, value in tile.items()})


def sweep_case(case: Case, rig: Rig, tiles: list[dict[str, int]], repeats: int) -> dict[str, Stat | str]:
    """-> for each tile the seconds of a call, or why there is none."""
    built = case.build(rig)
    reference = built.reference or by_first_peer(built)
    wanted = {copy: reference(copy) for copy in (0, -1)}
    project = (lambda out: out) if built.reference else built.project
    found: dict[str, Stat | str] = {}
    measures: dict[str, Measure] = {}
    for tile in tiles:
        label = ", ".join(f"{key} {value}" for key, value in tile.items()) or "as it is"
        calls = [tiled(call, case.group, tile) for call in built.calls]
        try:
            check(built, lambda copy, calls=calls: project(calls[copy]()), wanted.__getitem__)
            measures[label] = rig.clock(calls)
        except Exception as error:
            found[label] = why(error)
    return found | {label: summarize(times) for label, times in alternate(measures, repeats).items()}


def tiled(call: Call, kernel: str, tile: dict[str, int]) -> Call:
    """The call with another tile than its kernel would choose."""
    choose = SWEPT[kernel].config

    def run() -> Any:
        with patch.object(SWEPT[kernel], "config", lambda *a, **k: with_tile(choose(*a, **k), tile)):
            return call()

    return run


def by_first_peer(built: Built) -> Callable[[int], Any]:
    calls = next(iter(built.peers.values()))()
    return lambda copy: calls[copy]()


def sweep(args: argparse.Namespace, rig: Rig) -> dict[str, Any]:
    """Each case's tiles, the fastest first; then those that are best over all cases, by geometric mean."""
    choices = TINY_TILES if args.tiny else TILES
    tiles = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    tiles.insert(0, {})
    results: dict[str, dict[str, Stat]] = {}
    for case in selected(GROUPS[args.sweep](args.tiny), args.cases):
        progress(f"sweep: {args.sweep} {case.name}")
        try:
            found = sweep_case(case, rig, tiles, 2 if args.tiny else 5)
        except Exception as error:
            print(f"\n{case.name}: {why(error)}", flush=True)
            continue
        finally:
            clean_up(rig)
        timed = {label: stat for label, stat in found.items() if isinstance(stat, Stat)}
        order = sorted(timed, key=lambda label: timed[label].median)
        rows = [[label, timed[label].show(1, 1e6)] for label in order]
        rows += [[label, reason] for label, reason in found.items() if isinstance(reason, str)]
        print("\n" + table([f"{args.sweep} {case.name}", "µs"], rows), flush=True)
        results[case.name] = {label: timed[label] for label in order}
    means = over_all(results)
    print("\n" + table(["over all cases", "times the best"], [[k, f"{v:.3f}"] for k, v in means.items()]), flush=True)
    cases = {name: {label: s.json() for label, s in stats.items()} for name, stats in results.items()}
    return {"sweep": args.sweep, "cases": cases, "over_all": means}


def over_all(results: dict[str, dict[str, Stat]]) -> dict[str, float]:
    """For each tile that works in every case: its time as a multiple of the case's best, geometric mean, best first."""
    stats = [s for s in results.values() if s]
    common = set.intersection(*map(set, stats)) if stats else set()
    means = {}
    for label in common:
        logs = [math.log(s[label].median / min(x.median for x in s.values())) for s in stats]
        means[label] = significant(math.exp(sum(logs) / len(logs)), 4)
    return dict(sorted(means.items(), key=lambda item: item[1]))


# ---- all of it


def machine(tiny: bool) -> dict[str, Any]:
    """What the figures mean nothing without."""
    return {
        "gpu": "no GPU" if tiny else torch.cuda.get_device_name(),
        "tiny": tiny,
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "driver": driver_version()},
    }


def driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else "unknown"


def slug(gpu: str) -> str:
    """ "NVIDIA H200" -> "nvidia-h200" """
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the Triton kernels on a GPU.")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="some of the groups; default: all")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help='only those that begin so: "16 x 8k"')
    parser.add_argument("--sweep", choices=SWEPT, help="try other tiles of one kernel instead")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes in the interpreter: does it all run?")
    parser.add_argument("--table", nargs="?", const="", metavar="JSON", help="print results; default: the newest")
    parser.add_argument("--out", help="JSON file; default for all groups: bench/results/kernels-<gpu>.json, else none")
    return parser.parse_args(argv)


def complaint(args: argparse.Namespace) -> str | None:
    """Why this cannot run here."""
    if args.tiny:
        if not INTERPRETED:
            return "--tiny runs in Triton's interpreter: set TRITON_INTERPRET=1"
        if args.out and Path(args.out).resolve().is_relative_to(RESULTS):
            return f"{NO_MEANING}, so they do not go into {RESULTS}"
    elif INTERPRETED:
        return "TRITON_INTERPRET is set: nothing would run on the GPU. Unset it, or use --tiny"
    elif not torch.cuda.is_available():
        return "this needs a CUDA device, and torch finds none here; TRITON_INTERPRET=1 and --tiny try it without one"
    return None


@torch.inference_mode()
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.table is not None:
        return print_table(Path(args.table) if args.table else newest(RESULTS))
    if (problem := complaint(args)) is not None:
        print(problem, file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rig, facts = tiny_rig() if args.tiny else gpu_rig(), machine(args.tiny)
    if args.tiny:
        print(NO_MEANING)
    if args.sweep:
        emit({"bench": "kernels", **facts, **sweep(args, rig)}, args.out)
        return 0
    if args.out is None and not (args.tiny or args.only or args.cases):
        RESULTS.mkdir(exist_ok=True)
        args.out = str(RESULTS / f"kernels-{slug(facts['gpu'])}.json")
    args.only = args.only or list(GROUPS)
    record = measure_all(args, rig, facts)
    emit(record, args.out)
    return 1 if any("failed" in row for row in record["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
