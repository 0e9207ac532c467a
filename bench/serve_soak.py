"""256 clients at once for minutes, of whom some leave and some send nonsense: does the server lose a page, a request, or memory?

    python -m bench.serve_soak --minutes 5
    python -m bench.serve_soak --minutes 0.2 --clients 16      # does the benchmark itself work?

Each client asks, reads its stream, and asks again. One in ten leaves in the middle, one in twenty sends a body that must be
refused. Prompts share prefixes; answers are sampled, some several at a time, some after a grammar.

The run fails if
    an answer is not what was asked for, or a refusal is no 4xx with an error in JSON
    the engine's process was restarted
    a request, a row, a lock or a page is left when all have gone (`Engine.check`, and what /server_info says)
    the resident memory of the server or of the engine grows by more than --slope MB a minute over the second half of the run
    (if that is two minutes at least)

Exit code 0 and PASS, or 1 and FAIL with what went wrong.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from bench.common import emit, machine_facts, significant, table
from bench.http_load import Answer, ask, get, server
from bench.serve import latencies, quantile
from bench.soak import slope
from engine_args import BUNDLED_MODEL

LEAVE, HOSTILE = 0.10, 0.05  # shares of all requests
GRAMMARS = ({"regex": "[a-z ]{1,40}"}, {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}})
BODIES = (
    b"", b"{", b"[" * 5000, b'{"text": "\xff"}', b'{"text": 1}', b'{"text": "a", "nothing": 1}', b'{"input_ids": [99999999]}',
    b'{"text": "a", "sampling_params": {"temperature": NaN}}', b'{"text": "a", "sampling_params": {"n": 100000}}',
    b'{"text": "a", "sampling_params": {"regex": "((((a{1000}){1000}){1000}){1000}"}}', b'{"text": ["a", "b"], "rid": "a"}',
    b'{"text": "a", "sampling_params": {"stop": [' + b'"a",' * 500 + b'"a"]}}', b'{"input_ids": [' + b"5," * 5000 + b"5]}",
    b'{"text": "a", "stream": true, "sampling_params": {"ebnf": "root ::= missing"}}', b'{"text": "' + b"a" * 9_000_000 + b'"}',
)  # fmt: skip


@dataclass
class Watched:
    """What has happened so far."""

    done: Counter = field(default_factory=Counter)  # read, left, refused
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"server": [], "engine": []})


class Soak:
    def __init__(self, url: str, args: argparse.Namespace):
        self.url, self.args, self.watched = url, args, Watched()
        rng = random.Random(args.seed)
        self.prefixes = [[rng.randrange(3, 1000) for _ in range(length)] for length in (16, 48, 128)]
        self.end = time.monotonic() + 60 * args.minutes

    async def client(self, number: int) -> None:
        """Ask, read, and ask again, until the time is up or somebody has failed."""
        rng = random.Random(f"{self.args.seed} {number}")
        await asyncio.sleep(rng.random() * 2)
        while time.monotonic() < self.end and not self.watched.failures:
            chance = rng.random()
            try:
                if chance < HOSTILE:
                    await self.refused(rng)
                elif chance < HOSTILE + LEAVE:
                    await ask(self.url, self.body(rng), leave_after=rng.randint(1, 10))
                    self.watched.done["left"] += 1
                else:
                    await self.read(rng)
            except Exception as error:
                self.watched.failures.append(f"{type(error).__name__}: {error}")

    def body(self, rng: random.Random) -> dict[str, Any]:
        own = [rng.randrange(3, 1000) for _ in range(rng.randint(1, 64))]
        params: dict[str, Any] = {"max_new_tokens": rng.randint(8, 64), "temperature": rng.choice([0, 1.0])}
        params |= rng.choice(GRAMMARS) if rng.random() < 0.05 else {"ignore_eos": True}
        return {"input_ids": rng.choice(self.prefixes) + own, "sampling_params": params, "stream": True}

    async def read(self, rng: random.Random) -> None:
        body = self.body(rng)
        answer = await ask(self.url, body)
        self.check(answer, body["sampling_params"])
        self.watched.done["read"] += 1
        self.watched.tokens += answer.tokens
        self.watched.first += latencies([answer])["TTFT"]
        self.watched.between += latencies([answer])["ITL"]

    def check(self, answer: Answer, params: dict[str, Any]) -> None:
        reason = answer.last.get("meta_info", {}).get("finish_reason") or {}
        whole = answer.tokens == params["max_new_tokens"] if "ignore_eos" in params else answer.tokens > 0
        if answer.status != 200 or reason.get("type") not in ("stop", "length") or not whole:
            raise RuntimeError(f"asked with {params}, got status {answer.status}: {str(answer.last)[:300]}")

    async def refused(self, rng: random.Random) -> None:
        body = rng.choice(BODIES)
        try:
            answer = await ask(self.url, body)
        except (ConnectionError, asyncio.IncompleteReadError):
            if len(body) < 1_000_000:  # else the server has closed before it was all sent
                raise
        else:
            if not 400 <= answer.status < 500 or set(answer.last) != {"error"}:
                raise RuntimeError(f"{body[:80]!r} got status {answer.status}: {str(answer.last)[:300]}")
        self.watched.done["refused"] += 1

    async def watch(self, pids: dict[str, int]) -> None:
        """A line every few seconds."""
        start, tokens = time.monotonic(), 0
        print("minutes   read   left  refused  tok/s  " + "  ".join(f"{name} MB" for name in pids), flush=True)
        while time.monotonic() < self.end and not self.watched.failures:
            await asyncio.sleep(self.args.every)
            minutes, done = (time.monotonic() - start) / 60, self.watched.done
            for name, pid in pids.items():
                self.watched.memory[name].append((minutes, resident(pid) / 1e6))
            memory = "  ".join(f"{self.watched.memory[name][-1][1]:9,.1f}" for name in pids)
            rate, tokens = (self.watched.tokens - tokens) / self.args.every, self.watched.tokens
            print(
                f"{minutes:7.2f} {done['read']:6,} {done['left']:6,} {done['refused']:8,} {rate:6,.0f}  {memory}",
                flush=True,
            )

    async def run(self, pids: dict[str, int]) -> None:
        await asyncio.gather(self.watch(pids), *(self.client(i) for i in range(self.args.clients)))


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left_behind(url: str) -> str | None:
    """What is not as it should be when all have gone; None if nothing is."""
    end = time.monotonic() + 60
    while True:
        info = get(url, "/server_info?check=true")
        state = info["internal_states"][0]
        if not (info["open_requests"] or state["running"] or state["waiting"]):
            break
        if time.monotonic() > end:
            return f"requests are left: {info}"
        time.sleep(0.1)
    with urlopen(Request(f"{url}/flush_cache", method="POST")) as response:
        held = json.load(response)["pages_held"]
    state = get(url, "/server_info?check=true")["internal_states"][0]
    if held or state["pages_free"] != state["pages_total"]:
        return f"a flush leaves pages: {state}"
    return f"the engine was restarted {info['engine_restarts']} times" if info["engine_restarts"] else None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole of it -> the record of the JSON line."""
    flags = ["--model", str(BUNDLED_MODEL), "--dtype", "float32", "--max-running-requests", str(args.rows)]
    # few pages: all are soon in use once, which is when the system gives them memory, and evicted all the time
    flags += ["--max-total-tokens", str(256 * args.rows)] + ["--compile"] * args.compile
    with server(flags, args.port) as (url, pid):
        soak = Soak(url, args)
        engine = get(url, "/server_info")["internal_states"][0]["engine_pid"]
        asyncio.run(soak.run({"server": pid, "engine": engine}))
        watched = soak.watched
        if (left := left_behind(url)) is not None:
            watched.failures.append(left)
    growth = {}
    for name, samples in watched.memory.items():
        half = [sample for sample in samples if sample[0] >= samples[-1][0] / 2]
        growth[name] = slope(half)
        if half and half[-1][0] - half[0][0] >= 2 and growth[name] > args.slope:
            watched.failures.append(f"the {name} grows by {growth[name]:.2f} MB a minute; {args.slope:g} is the limit")
    rows = [
        (name, *(f"{quantile(values, share) * 1e3:,.1f}" for share in (0.5, 0.99)))
        for name, values in (("TTFT", watched.first), ("ITL", watched.between))
    ]
    print("\n" + table(("ms", "p50", "p99"), rows))
    return {
        "passed": not watched.failures,
        "failures": watched.failures[:5],
        **watched.done,
        "tokens": watched.tokens,
        "ttft_p99": significant(quantile(watched.first, 0.99)),
        "itl_p99": significant(quantile(watched.between, 0.99)),
        "memory_slope_mb_per_minute": {name: significant(value) for name, value in growth.items()},
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Abuse the server for a while, and see whether it loses anything.")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64, help="--max-running-requests")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--every", type=float, default=5, help="seconds between two lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slope", type=float, default=2.0, help="MB a minute that memory may grow by")
    parser.add_argument("--port", type=int, default=30112)
    parser.add_argument("--out", help="also write the JSON line to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    record = run(args)
    for failure in record["failures"]:
        print(f"\n{failure}")
    print("PASS" if record["passed"] else "FAIL", flush=True)
    emit({"bench": "serve_soak", **machine_facts(), **vars(args), **record}, args.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
