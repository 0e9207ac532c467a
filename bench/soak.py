"""Hours of abuse in minutes: does the engine lose a request, a page, a lock, or memory?

    python -m bench.soak --minutes 20
    python -m bench.soak --minutes 20 --policy lpm --seed 7
    python -m bench.soak --minutes 0.2             # does the benchmark itself work?

The bundled model, few rows, few pages, and a scheduler that soon expects answers to be short, so that requests are preempted
all the time. Threads and an asyncio loop ask for texts, streamed or whole, with shared prefixes, salts, priorities and sampling
parameters of every kind. Some are read to the end; others are closed, dropped or cancelled at a random moment, or aborted by
a third party. Some ask for what cannot be served. Now and then the cache is flushed. Every few seconds all hold still
until the engine is idle.

The run fails if
    a request ends twice, never, or without a reason, or a reader sees anything else than one end for each sample
    `Engine.check` finds a page, a row or a lock lost: every second, and whenever the engine is idle
    pages are neither free nor evictable when idle, or not free after a flush
    no token comes for 30 seconds while there is work
    resident memory grows by more than --slope MB a minute, over the second half of the run (if that is a minute at least)

Exit code 0 and PASS, or 1 and FAIL with what went wrong.
"""

import argparse
import asyncio
import faulthandler
import gc
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.common import emit, machine_facts, significant, table
from engine import Engine, SamplingParams
from errors import UserError
from machine import peak_memory
from output import Delta
from scheduler.policy import REORDER
from scheduler.request import Request
from scheduler.scheduler import RATIO_DECAY
from streams import Stream

MODEL = Path(__file__).parent.parent / "assets" / "folio-tiny"
REASONS = {"stop", "length", "abort", "error"}
MOST_NEW = 120  # tokens
SILENCE = 30.0  # seconds without a token, while there is work, that are one too many
TEXTS = (
    "Once upon a time",
    " there was a little girl named Lily",
    ". She",
    " wanted to",
    " play",
    " in the park",
    "\n",
)


# ---- what is counted


@dataclass
class Counts:
    """Of sequences: an accepted request for n samples is n of them."""

    accepted: int = 0
    refused: int = 0  # with a UserError, as they should be
    tokens: int = 0
    last_token: float = field(default_factory=time.perf_counter)
    ended: Counter = field(default_factory=Counter)  # reason -> how many
    checks: int = 0
    idle_checks: int = 0
    flushes: int = 0
    slowest_call: float = 0.0  # seconds that the slowest check or flush took, waiting for its turn included
    lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, samples: int) -> None:
        with self.lock:
            self.accepted += samples


@contextmanager
def counted(counts: Counts) -> Iterator[None]:
    """Count every token and every end where they happen, whoever reads them or does not."""
    append, finish = Request.append, Request.finish

    def counted_append(request: Request, token: int) -> None:
        counts.tokens += 1
        counts.last_token = time.perf_counter()
        append(request, token)

    def counted_finish(request: Request, reason: str, detail: int | str | None = None) -> None:
        finish(request, reason, detail)  # raises if it has ended before
        with counts.lock:
            counts.ended[reason] += 1

    with patch.object(Request, "append", counted_append), patch.object(Request, "finish", counted_finish):
        yield


# ---- what is asked for


@dataclass
class Ask:
    prompt: str | list[int]
    params: SamplingParams
    options: dict[str, Any]  # of `generate` and `stream`
    fails: bool = False  # must end with an error


def make_ask(rng: random.Random, engine: Engine, prefixes: list[list[int]]) -> Ask:
    """A random request that can be served."""
    if rng.random() < 0.2:
        prompt: str | list[int] = "".join(rng.choice(TEXTS) for _ in range(rng.randint(1, 6)))
    else:
        vocab, longest = engine.model.config.vocab_size, engine.max_model_len
        start = rng.choice([*prefixes, []])
        own = rng.choice([1, 2, 15, 16, 17, rng.randint(1, longest // 3)])
        prompt = (start + [rng.randrange(3, vocab) for _ in range(own)])[: longest - MOST_NEW]
    salt = rng.choice([None, None, None, "red", "blue", f"salt-{rng.random()}"])
    options = {"priority": rng.randint(-2, 2), "cache_salt": salt}
    fails = rng.random() < 0.02
    return Ask(prompt, make_params(rng, engine.model.config.vocab_size, fails), options, fails)


def make_params(rng: random.Random, vocab: int, fails: bool) -> SamplingParams:
    """Most of it is off most of the time, so that plain greedy batches occur too."""

    def now_and_then(value: Any, default: Any, often: float = 0.15) -> Any:
        return value if rng.random() < often else default

    allowed: Callable | None = now_and_then(lambda tokens: range(3, vocab, 1 + len(tokens) % 3), None, 0.05)
    if fails:
        after = rng.randint(1, 100)
        allowed = lambda tokens: [5] if len(tokens) % 100 != after else []  # noqa: E731
    new = rng.choice([1, 2, rng.randint(1, MOST_NEW), rng.randint(MOST_NEW // 2, MOST_NEW)])
    return SamplingParams(
        max_new_tokens=MOST_NEW if fails else new,
        min_new_tokens=0 if fails else now_and_then(rng.randint(0, new), 0),
        n=rng.choice([1, 1, 1, 2, 3]),
        temperature=rng.choice([0, 0, 0.7, 1.0, 5.0]),
        top_k=now_and_then(rng.randint(1, 50), 0),
        top_p=now_and_then(rng.uniform(0.1, 1), 1.0),
        min_p=now_and_then(rng.uniform(0, 0.5), 0.0),
        repetition_penalty=now_and_then(rng.uniform(0.8, 1.5), 1.0),
        presence_penalty=now_and_then(rng.uniform(-2, 2), 0.0),
        frequency_penalty=now_and_then(rng.uniform(-2, 2), 0.0),
        logit_bias=now_and_then({rng.randrange(vocab): rng.uniform(-100, 100)}, {}),
        seed=now_and_then(rng.randrange(2**63), None),
        stop=now_and_then([rng.choice([".", " the", "\n", "Lily"])], [], 0.0 if fails else 0.2),
        stop_token_ids=now_and_then([rng.randrange(vocab)], [], 0.0 if fails else 0.1),
        ignore_eos=fails or rng.random() < 0.5,
        logprobs=now_and_then(rng.randint(0, 5), None),
        allowed_tokens_fn=allowed,
    )


class Reader:
    """What the reader of a stream has seen of its samples. RuntimeError on whatever must not be."""

    def __init__(self, ask: Ask):
        self._ask, self._ends = ask, Counter[int]()

    def take(self, delta: Delta) -> None:
        if self._ends[delta.index]:
            raise RuntimeError(f"sample {delta.index} goes on after its end: {delta}")
        if delta.finish_reason is not None:
            check_reason(self._ask, delta.finish_reason, delta.stop_reason)
            self._ends[delta.index] += 1

    def done(self) -> None:
        if self._ends != dict.fromkeys(range(self._ask.params.n), 1):
            raise RuntimeError(f"the stream is over, but of {self._ask.params.n} samples these ended: {self._ends}")


def check_reason(ask: Ask, reason: str | None, detail: Any) -> None:
    if reason not in REASONS:
        raise RuntimeError(f"a request has ended with {reason!r}")
    if reason == "error" and not ask.fails:
        raise RuntimeError(f"a request that should be served has ended with an error: {detail}")


# ---- who asks


class Soak:
    """The engine, and everybody who is after it."""

    def __init__(self, engine: Engine, seed: int, pause: float):
        self.engine, self.seed, self.pause = engine, seed, pause
        self.counts = Counts()
        self.failures: list[str] = []
        self.over = threading.Event()
        self.open = threading.Event()  # closed: nobody may ask for anything new
        self.open.set()
        self.live: dict[str, None] = {}  # ids that a third party may abort
        self.busy = 0  # askers between the gate and the end of what they asked for
        self._ids = 0
        rng, vocab = random.Random(seed), engine.model.config.vocab_size
        lengths = (16, 40, engine.max_model_len // 3, engine.max_model_len // 2)
        self.prefixes = [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]

    def fail(self, what: str) -> None:
        self.failures.append(what)
        self.over.set()

    def guard(self, work: Callable[[random.Random], None], name: str) -> None:
        """The body of a thread: `work` until it is over. Whatever it raises fails the run."""
        rng = random.Random(f"{self.seed} {name}")
        while not self.over.is_set():
            try:
                work(rng)
            except Exception:
                self.fail(f"{name}: {traceback.format_exc()}")

    def enter(self) -> bool:
        """Through the gate, unless it is closed or all is over."""
        with self.counts.lock:
            if self.over.is_set() or not self.open.is_set():
                return False
            self.busy += 1
            return True

    def leave(self) -> None:
        with self.counts.lock:
            self.busy -= 1

    def start_stream(self, ask: Ask) -> Stream:
        with self.counts.lock:
            self._ids += 1
            id = f"soak-{self._ids}"
        stream = self.engine.stream(ask.prompt, ask.params, request_id=id, **ask.options)
        self.counts.accept(ask.params.n)
        self.live[id] = None
        return stream

    def forget(self, stream: Stream) -> None:
        self.live.pop(stream.request_id, None)

    # ---- threads

    def ask(self, rng: random.Random) -> None:
        """One turn of a thread: wait a little, ask, read."""
        time.sleep(rng.expovariate(1 / self.pause))
        if not self.enter():
            time.sleep(0.01)
            return
        try:
            rng.choices((self.read_stream, self.generate, self.ask_too_much), (6, 3, 1))[0](rng)
        finally:
            self.leave()

    def read_stream(self, rng: random.Random) -> None:
        """To its end, or close it or drop it on the way."""
        ask = make_ask(rng, self.engine, self.prefixes)
        reader, stream = Reader(ask), self.start_stream(ask)
        most = rng.choice([None, None, None, 0, 1, rng.randint(1, 30)])
        try:
            if most is None:
                for delta in stream:
                    reader.take(delta)
                reader.done()
            else:
                for _, delta in zip(range(most), stream, strict=False):
                    reader.take(delta)
                if rng.random() < 0.5:
                    stream.close()  # else it is dropped
        finally:
            self.forget(stream)

    def generate(self, rng: random.Random) -> None:
        asks = [make_ask(rng, self.engine, self.prefixes) for _ in range(rng.randint(1, 3))]
        outputs = self.engine.generate([a.prompt for a in asks], [a.params for a in asks], **asks[0].options)
        for ask, output in zip(asks, outputs, strict=True):
            self.counts.accept(ask.params.n)
            if [c.index for c in output.outputs] != list(range(ask.params.n)):
                raise RuntimeError(f"asked for {ask.params.n} samples, got {output.outputs}")
            for completion in output.outputs:
                check_reason(ask, completion.finish_reason, completion.stop_reason)

    def ask_too_much(self, rng: random.Random) -> None:
        vocab, longest = self.engine.model.config.vocab_size, self.engine.max_model_len
        prompt, params = rng.choice(
            [
                ([5] * longest, SamplingParams()),
                ([5] * 10, SamplingParams(max_new_tokens=longest)),
                ([vocab], SamplingParams()),
                ("", SamplingParams()),
            ]
        )
        try:
            self.engine.stream(prompt, params)
        except UserError:
            self.counts.refused += 1
        else:
            raise RuntimeError(f"a prompt of {len(prompt)} tokens was taken that cannot be served")

    # ---- asyncio

    def run_loop(self, tasks: int) -> None:
        """The body of the thread of the asyncio loop."""
        try:
            asyncio.run(self._all_async(tasks))
        except Exception:
            self.fail(f"asyncio: {traceback.format_exc()}")

    async def _all_async(self, tasks: int) -> None:
        await asyncio.gather(*(self._ask_async(random.Random(f"{self.seed} task {i}")) for i in range(tasks)))

    async def _ask_async(self, rng: random.Random) -> None:
        while not self.over.is_set():
            await asyncio.sleep(rng.expovariate(1 / self.pause))
            if not self.enter():
                continue
            try:
                await self._read_async(rng)
            finally:
                self.leave()

    async def _read_async(self, rng: random.Random) -> None:
        """To its end, or be cancelled on the way."""
        ask = make_ask(rng, self.engine, self.prefixes)
        stream, reader = self.start_stream(ask), Reader(ask)

        async def read() -> None:
            async for delta in stream:
                reader.take(delta)
            reader.done()

        try:
            patience = rng.expovariate(1 / 0.3) if rng.random() < 0.4 else None
            await asyncio.wait_for(read(), patience)
        except TimeoutError:
            if rng.random() < 0.5:
                await stream.aclose()  # once more; the cancelled task has closed it
        finally:
            self.forget(stream)

    # ---- third parties

    def disturb(self, rng: random.Random) -> None:
        """One turn of who aborts other people's requests, and flushes the cache."""
        time.sleep(rng.expovariate(1 / (5 * self.pause)))
        ids = list(self.live)
        self.engine.abort(rng.choice(ids) if ids else "nobody")
        if rng.random() < 0.05:
            self.timed(self.engine.flush_cache)
            self.counts.flushes += 1

    def inspect(self, rng: random.Random) -> None:
        """One turn of who checks: while all run, then with the gate closed, when the engine has become idle."""
        for _ in range(rng.randint(2, 8)):
            if self.over.wait(1.0):
                return
            self.timed(self.engine.check)
            self.counts.checks += 1
        self.hold_still(rng.random() < 0.5)

    def hold_still(self, flush: bool) -> None:
        """Close the gate, wait until all have left it, and prove that nothing is left of them."""
        self.open.clear()
        while self.busy or self.engine.has_work:
            if self.failures:
                return
            time.sleep(0.002)
        self.engine.check()
        stats, counts = self.engine.stats(), self.counts
        if stats.running or stats.waiting or stats.pages_locked:
            raise RuntimeError(f"idle, but {stats}")
        if counts.accepted != counts.ended.total():
            raise RuntimeError(f"idle, but of {counts.accepted} sequences {counts.ended.total()} have ended")
        if stats.pages_free + stats.pages_held != stats.pages_total:
            raise RuntimeError(f"pages are lost: {stats}")
        if flush and (self.engine.flush_cache() or self.engine.stats().pages_free != stats.pages_total):
            raise RuntimeError(f"idle, but a flush leaves pages: {self.engine.stats()}")
        counts.idle_checks += 1
        if not self.over.is_set():
            self.open.set()

    def timed(self, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        self.counts.slowest_call = max(self.counts.slowest_call, time.perf_counter() - start)

    def start(self, askers: int, tasks: int) -> list[threading.Thread]:
        works = {f"asker {i}": self.ask for i in range(askers)} | {"disturber": self.disturb, "inspector": self.inspect}
        started = [threading.Thread(target=self.guard, args=(work, name), name=name) for name, work in works.items()]
        started.append(threading.Thread(target=self.run_loop, args=(tasks,), name="asyncio"))
        for thread in started:
            thread.daemon = True
            thread.start()
        return started


# ---- who watches


def resident_memory() -> int:
    """Bytes of this process in memory; where the system does not say, the most it has ever had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import torch

        return peak_memory(torch.device("cpu"))


def slope(samples: list[tuple[float, float]]) -> float:
    """Least squares through (x, y); 0 for fewer than two."""
    if len(samples) < 2:
        return 0.0
    mean_x, mean_y = (sum(column) / len(samples) for column in zip(*samples, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / spread if spread else 0.0


class Watch:
    """Prints how it goes, keeps the memory samples, and notices silence."""

    HEADERS = (
        "minutes",
        "RSS MB",
        "objects",
        "threads",
        "free",
        "held",
        "inside",
        "done",
        "aborted",
        "preempted",
        "tok/s",
    )

    def __init__(self, soak: Soak):
        self.soak, self.start = soak, time.perf_counter()
        self.memory: list[tuple[float, float]] = []  # minutes, MB
        self.objects: list[tuple[float, float]] = []  # minutes, how many
        self._tokens = (self.start, 0)

    def is_silent(self) -> bool:
        """Nothing to do is no silence: the clock then starts anew."""
        counts = self.soak.counts
        if not self.soak.engine.has_work and not self.soak.busy:
            counts.last_token = time.perf_counter()
        return time.perf_counter() - counts.last_token > SILENCE

    def sample(self) -> list[str]:
        """A line of the table."""
        now, counts, stats = time.perf_counter(), self.soak.counts, self.soak.engine.stats()
        minutes = (now - self.start) / 60
        self.memory.append((minutes, resident_memory() / 1e6))
        self.objects.append((minutes, len(gc.get_objects())))
        since, tokens = self._tokens
        self._tokens = (now, counts.tokens)
        aborted = counts.ended["abort"]
        return [
            f"{minutes:.2f}", f"{self.memory[-1][1]:,.1f}", f"{self.objects[-1][1]:,}", str(threading.active_count()),
            str(stats.pages_free), str(stats.pages_held), str(stats.running + stats.waiting),
            f"{counts.ended.total() - aborted:,}", f"{aborted:,}", f"{stats.preemptions:,}",
            f"{(counts.tokens - tokens) / max(now - since, 1e-9):,.0f}",
        ]  # fmt: skip

    def show(self, cells: Sequence[str]) -> None:
        print(
            "  ".join(cell.rjust(max(8, len(name))) for cell, name in zip(cells, self.HEADERS, strict=True)), flush=True
        )

    def until(self, end: float, every: float) -> None:
        """Sample until `end`, or until the run has failed."""
        self.show(self.HEADERS)
        due = 0.0
        while time.perf_counter() < end and not self.soak.over.is_set():
            if time.perf_counter() >= due:
                due = time.perf_counter() + every
                self.show(self.sample())
            if self.is_silent():
                self.report_silence()
            self.soak.over.wait(0.05)

    def report_silence(self) -> None:
        faulthandler.dump_traceback()
        self.soak.fail(f"no token for {SILENCE:.0f} s while there is work: {self.soak.engine.stats()}")

    def second_half(self, samples: list[tuple[float, float]]) -> tuple[float, float]:
        """-> growth a minute over the second half, and how many minutes that is."""
        half = [s for s in samples if s[0] >= samples[-1][0] / 2]
        return slope(half), half[-1][0] - half[0][0]


def drain(soak: Soak, watch: Watch, threads: list[threading.Thread]) -> None:
    """Let all finish what they read, then prove that nothing is left."""
    soak.over.set()
    while any(thread.is_alive() for thread in threads) or (soak.engine.has_work and not soak.failures):
        if watch.is_silent():
            watch.report_silence()
            return
        if soak.failures and time.perf_counter() - soak.counts.last_token > 5:
            return
        time.sleep(0.02)
    try:
        soak.hold_still(flush=False)
        soak.hold_still(flush=True)
    except Exception:
        soak.fail(f"after the drain: {traceback.format_exc()}")


def judge(soak: Soak, watch: Watch, limit: float) -> dict[str, Any]:
    """-> the record; what is wrong with the memory or the reasons joins the failures."""
    counts, engine = soak.counts, soak.engine
    growth, minutes = watch.second_half(watch.memory)
    if minutes >= 1 and growth > limit:
        soak.fail(f"memory grows by {growth:.2f} MB a minute; {limit:g} is the limit")
    if set(counts.ended) - REASONS:
        soak.fail(f"reasons that are none: {counts.ended}")
    return {
        "passed": not soak.failures, "failures": soak.failures, "steps": engine.steps, "tokens": counts.tokens,
        "sequences": counts.accepted, "ended": dict(counts.ended), "refused": counts.refused,
        "preemptions": engine.stats().preemptions, "hit_rate": significant(engine.stats().hit_rate),
        "checks": counts.checks, "idle_checks": counts.idle_checks, "flushes": counts.flushes,
        "slowest_call_s": significant(counts.slowest_call), "memory_mb": significant(watch.memory[-1][1]),
        "memory_slope_mb_per_minute": significant(growth), "slope_minutes": significant(minutes),
        "objects_slope_per_minute": significant(watch.second_half(watch.objects)[0]),
    }  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole of it -> the record of the JSON line."""
    engine = Engine.from_pretrained(
        MODEL,
        dtype="float32",
        max_batch_size=args.rows,
        max_model_len=args.context,
        max_total_tokens=args.pages * 16,
        chunk_size=args.chunk,
        schedule_policy=args.policy,
        overlap=args.overlap,
        radix=args.radix,
        chunked_prefill=args.chunked_prefill,
    )
    soak = Soak(engine, args.seed, args.pause)
    with counted(soak.counts), patch("scheduler.scheduler.RATIO_DECAY", 10 * RATIO_DECAY):
        watch = Watch(soak)
        threads = soak.start(args.askers, args.tasks)
        watch.until(watch.start + 60 * args.minutes, args.every)
        drain(soak, watch, threads)
    watch.show(watch.sample())
    return judge(soak, watch, args.slope)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Abuse the engine for a while, and see whether it loses anything.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=5, help="seconds between two lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--askers", type=int, default=6, help="threads that ask")
    parser.add_argument("--tasks", type=int, default=6, help="of the asyncio loop")
    parser.add_argument("--pause", type=float, default=0.05, help="mean seconds between two requests of one asker")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--pages", type=int, default=32, help="of 16 tokens each")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--policy", choices=list(REORDER), default="priority")
    for name in ("overlap", "radix", "chunked-prefill"):
        parser.add_argument(f"--no-{name}", dest=name.replace("-", "_"), action="store_false")
    parser.add_argument("--slope", type=float, default=1.0, help="MB a minute that memory may grow by")
    parser.add_argument("--out", help="also write the JSON line to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    record = run(args)
    shown = ([key, str(value)] for key, value in record.items() if key not in ("passed", "failures"))
    print("\n" + table(("", "value"), shown))
    for failure in record["failures"]:
        print(f"\n{failure}")
    print("PASS" if record["passed"] else "FAIL", flush=True)
    emit({"bench": "soak", **machine_facts(), **vars(args), **record}, args.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if code:
        os._exit(code)  # a thread that hangs would keep the process
