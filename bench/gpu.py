"""Folio on a GPU, in nine minutes: ceilings, one user, many users, what each technique is worth, and are the answers right.

    python -m bench.gpu --out gpu.jsonl                   # all of it; random weights, made on the device
    python -m bench.gpu --parts ceilings one_user         # some parts
    python -m bench.gpu --tiny                            # no GPU: tiny shapes on the CPU; the times mean nothing

    ceilings      copy bandwidth and bfloat16 product rate: the denominators
    one_user      Llama 3.1 8B's shape, batch 1, 128 + 256 tokens: share of the copy bandwidth (goal 85 %), graph breaks,
                  graphs made after the warm-up, replays a step, share of the time in which the device has no step
    end_to_end    Llama 3.2 1B's shape, 256 prompts of 4,096 tokens, 16 new each: wall time / device time (goal 1.05)
    batches       the same shape, 128 + 64 tokens, batch 1 to 512: tokens/s, and how a step divides; `neither_of_device` is
                  what is neither attention nor matmul, of the time in which the device works
    ablation      bench.ablate's workload on it: radix tree, overlap, graphs, compile, ... each off in turn
    latent        DeepSeek-V2-Lite's shape (27 layers, latents, 64 experts), batch 1 to 128: tokens/s of three forms of attention,
                  the share of the copy bandwidth, experts that are hit, and how much more than the mean the busiest has
    outputs       a small model: logprobs beside the CPU's, greedy ids with graphs and compiler beside those without

Every part runs in a process of its own and has its share of the budget; what it has not finished by then is said to be skipped,
and the parts after it have theirs. Time that a part leaves over goes to the next. With one part, all is for that one. Each
result is a JSON line at once; tables come last.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.common import Stat, machine_facts, progress, significant, table
from bench.gpu_parts import PARTS, Record, clean_up, full, tiny

# Shares of the budget. One that is cut short finds its compiled code on the disk the next time.
SHARES = {
    "ceilings": 30,
    "one_user": 170,
    "end_to_end": 100,
    "batches": 80,
    "ablation": 80,
    "latent": 120,
    "outputs": 60,
}
SPARE = 0.15  # of a part's seconds, for what a row that has begun needs


# ---- one part


def measure(part: str, args: argparse.Namespace, copy: float | None, seconds: float) -> Iterator[Record]:
    """In this process. Numbers as they go into JSON."""
    setup = (tiny if args.tiny else full)(copy, (1 - SPARE) * seconds, args.mode)
    for record in PARTS[part](setup):
        yield {"part": part} | {key: as_json(value) for key, value in record.items()}


def as_json(value: Any) -> Any:
    if isinstance(value, Stat):
        return value.json()
    return significant(value) if isinstance(value, float) else value


def measure_apart(command: list[str], part: str, seconds: float) -> Iterator[Record]:
    """In a process of its own, which prints its records as lines and is ended after so many seconds."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    late = threading.Event()

    def end() -> None:
        late.set()
        with suppress(ProcessLookupError):
            kill_group(process.pid)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("{"):  # a library may have something to say
                yield json.loads(line)
        if process.wait() != 0:
            reason = (
                f"not done after {seconds:.0f} s" if late.is_set() else f"failed with exit code {process.returncode}"
            )
            yield {"part": part, "skipped": reason}
    finally:
        timer.cancel()
        if process.poll() is None:
            kill_group(process.pid)
            process.wait()


def kill_group(process: int) -> None:
    """End a process and all that it has started: compilers, too."""
    os.killpg(process, signal.SIGKILL)


# ---- all of them


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Part after part. Each may take its share of the budget and what those before it have left over."""
    copy, until = args.copy, time.monotonic()
    for part in args.parts:
        until += args.budget * SHARES[part] / sum(SHARES[name] for name in args.parts)
        seconds = until - time.monotonic()
        progress(f"{part}: at most {seconds:.0f} s")
        if args.tiny:
            records = measure(part, args, copy, seconds)
        else:
            worker = [sys.executable, "-m", "bench.gpu", "--worker", "--parts", part, "--mode", args.mode]
            worker += ["--seconds", str(seconds)] + (["--copy", str(copy)] if copy else [])
            records = measure_apart(worker, part, seconds)
        for record in records:
            if "copy_bytes_per_s" in record:
                copy = record["copy_bytes_per_s"]["median"]
            yield record
        clean_up()


def show(records: list[Record]) -> str:
    """One part: a table with a line a record, or a line a figure if there is one record. Goals and lists below."""
    lists = {"goals", "longest", "only_on_a_gpu"}
    keys = list(dict.fromkeys(key for record in records for key in record if key not in lists | {"part"}))
    cells = [[shown(key, record.get(key)) for key in keys] for record in records]
    text = table(["", records[0]["part"]], zip(keys, cells[0], strict=True)) if len(cells) == 1 else table(keys, cells)
    below = [
        f"{key}: {item}" for record in records for key in ("goals", "only_on_a_gpu") for item in record.get(key, ())
    ]
    below += [f"{ms:8.3f} ms  {part:9}  {name}" for record in records for part, name, ms in record.get("longest", ())]
    return "\n".join([text, *below])


def shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # a Stat
        return f"{value['median']:,.5g} ({value['low']:,.5g}..{value['high']:,.5g})"
    return f"{value:,.5g}" if isinstance(value, int | float) else str(value)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Folio's figures on a GPU, in nine minutes.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--mode", choices=("default", "max-autotune"), default="default", help="compiler, for one_user")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: does the benchmark itself work?")
    parser.add_argument("--out", help="also write the JSON lines to this file")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds for all parts (default: 520)")
    parser.add_argument(
        "--copy", type=float, help="the copy bandwidth in bytes a second, if ceilings are not among the parts"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def write_lines(records: Iterable[Record], out: str | None) -> list[Record]:
    """Each to stdout and to the file as soon as it is known."""
    seen = []
    if out is not None:
        Path(out).write_text("", encoding="utf-8")
    for record in records:
        line = json.dumps(record)
        print(line, flush=True)
        if out is not None:
            with Path(out).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        seen.append(record)
    return seen


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device, and torch finds none here (--tiny does without)", file=sys.stderr)
        return 2
    if args.worker:
        write_lines(measure(args.parts[0], args, args.copy, args.seconds), None)
        return 0
    gpu = "none: tiny shapes on a CPU, the times mean nothing" if args.tiny else torch.cuda.get_device_name()
    start, facts = time.monotonic(), {"bench": "gpu", "gpu": gpu, "cuda": torch.version.cuda, **machine_facts()}
    records = write_lines(run_with(facts, args), args.out)[1:]
    for part in dict.fromkeys(record["part"] for record in records):
        print("\n" + show([record for record in records if record["part"] == part]))
    print(f"\n{gpu}; {time.monotonic() - start:.0f} s")
    return 0


def run_with(facts: Record, args: argparse.Namespace) -> Iterator[Record]:
    """What the figures mean nothing without, then the figures."""
    yield facts
    yield from run(args)


if __name__ == "__main__":
    sys.exit(main())
