"""How much of the prompts comes from the prefix cache, beside what could come from it at best. No model runs.

    python -m bench.cache_sim                                       # generated workloads, about a minute
    python -m bench.cache_sim --mooncake conversation_trace.jsonl   # and a trace of real traffic, as long again
    python -m bench.cache_sim --workloads few_shot --policies lpm --cache-tokens 16384

Requests go through the real tree, scheduler and overlapped loop; a stand-in for the runner returns tokens that are
fixed beforehand. `hit` is cached prompt tokens / prompt tokens, at first admission. Beside it:

endless   An endless cache, in the best order: nothing is missed but what nobody has computed yet.
optimum   Generated workloads: as `endless`. All requests (of dialogues, all dialogues) are there from the start; then
          depth first through the tree of prompts is such an order, for any cache that holds the longest request
          (RadixAttention, Zheng et al., 2024, theorem 3.1). For the trace, whose order is its users': as `order`.
order     Belady's rule, in the order in which this very run admitted requests: the page whose next use is farthest
          goes. That is never before the next use of the pages above it, so it is always a leaf's, as in the tree.
plain     No bound: LRU, in the same order. What a simple cache would do.

What `order` lacks to `endless` is the order's fault; what `plain` lacks to `order` is that it cannot see the future;
what `hit` lacks to `plain` is concurrency's, or a bug's. For all but `hit` one request runs at a time and holds only
its own pages, output included. The scheduler runs many at once and locks the pages of all, so that bounds over a small
cache are out of reach; sharing among those that run may also lift it above `plain`. Turns of a dialogue that are still
to come are known to the bounds alone. Samples of one prompt count as cached in the bounds, but for one token.

The trace (Mooncake, FAST'25) has a hash for each block of 512 tokens. Hashes stand in place of tokens, blocks in place
of pages: a page is one "token", and a step decodes a block. Outputs occupy blocks too, whose hashes nobody knows, so
that nobody hits them. A last block that is not full takes a page too, and is never hit by its own prompt, as any last
token. Requests arrive by the trace's clock.
"""

import argparse
import json
import random
import statistics
import time
from array import array
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count, islice
from pathlib import Path
from typing import Any

from bench.common import emit, progress, significant, table
from cache.pages import PagePool
from scheduler.batch import Batch
from scheduler.loop import Masks, normal_loop, overlap_loop
from scheduler.request import Request, SamplingParams, State
from scheduler.scheduler import Scheduler

BLOCK = 512  # tokens that a hash of the trace stands for
COMBINATIONS = (
    ("fcfs", "lru"), ("fcfs", "lfu"), ("lpm", "lru"), ("lpm", "lfu"), ("lpm", "fifo"), ("dfs-weight", "lru"),
)  # fmt: skip


@dataclass(slots=True)
class Call:
    """One request to come, with the answer that it will get."""

    prompt: array
    output: array
    arrival: float = 0.0  # seconds
    after: int | None = None  # index of the call that must have ended before
    leader: int | None = None  # index of the first sample of the same prompt
    tokens: int = 0  # of the prompt, where an item of it is not one token


@dataclass(slots=True)
class Workload:
    name: str
    calls: list[Call]
    page_size: int
    rows: int
    chunk_size: int
    online: bool = False  # in order of arrival: a clairvoyant could not choose another
    step_seconds: float = 0.0  # how far the clock moves in a step
    item_tokens: int = 1  # tokens that an item of a prompt stands for
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = sum(call.tokens or len(call.prompt) for call in self.calls)


# ---- generated workloads


def tokens(rng: random.Random, low: int, high: int = 0) -> array:
    """`low` to `high` random token ids, 0 ... 65535."""
    return array("i", array("H", rng.randbytes(2 * rng.randint(low, high or low))))


def few_shot(rng: random.Random, scale: float) -> list[Call]:
    """Many questions on few long prefixes of worked examples, in no order."""
    prefixes = [tokens(rng, 1500, 2500) for _ in range(round(32 * scale))]
    calls = [Call(prefix + tokens(rng, 50, 150), tokens(rng, 30, 100)) for prefix in prefixes for _ in range(20)]
    rng.shuffle(calls)
    return calls


def document_qa(rng: random.Random, scale: float) -> list[Call]:
    """Ten questions on each of some long documents, in no order."""
    documents = [tokens(rng, 4000, 12000) for _ in range(round(32 * scale))]
    calls = [Call(document + tokens(rng, 30, 80), tokens(rng, 30, 100)) for document in documents for _ in range(10)]
    rng.shuffle(calls)
    return calls


def multi_turn(rng: random.Random, scale: float) -> list[Call]:
    """Dialogues of five turns that begin together; the next turn comes as soon as the last one is answered."""
    system, calls = tokens(rng, 256), []
    history, last = {}, {}
    for turn in range(5):
        for i in range(round(128 * scale)):
            prompt = history.get(i, system) + tokens(rng, 50, 300)
            calls.append(Call(prompt, tokens(rng, 50, 200), after=last.get(i) if turn else None))
            history[i], last[i] = prompt + calls[-1].output, len(calls) - 1
    return calls


def tree_of_thought(rng: random.Random, scale: float) -> list[Call]:
    """A tree of three thoughts under each thought, three deep, for each problem; all problems share their examples."""
    examples, calls = tokens(rng, 1000), []
    level = [(examples + tokens(rng, 100, 200), None) for _ in range(round(24 * scale))]
    for _ in range(4):
        below = []
        for prompt, after in level:
            calls.append(Call(prompt, tokens(rng, 40, 120), after=after))
            so_far = prompt + calls[-1].output
            below += [(so_far + tokens(rng, 8), len(calls) - 1) for _ in range(3)]
        level = below
    return calls


def self_consistency(rng: random.Random, scale: float) -> list[Call]:
    """Eight samples of each question; the questions are of four tasks, each with its worked examples."""
    tasks, calls = [tokens(rng, 1000, 2000) for _ in range(4)], []
    for _ in range(round(96 * scale)):
        prompt, leader = rng.choice(tasks) + tokens(rng, 60, 200), len(calls)
        calls += [Call(prompt, tokens(rng, 100, 250), leader=leader if i else None) for i in range(8)]
    return calls


GENERATED: dict[str, Callable[[random.Random, float], list[Call]]] = {
    "few_shot": few_shot,
    "document_qa": document_qa,
    "multi_turn": multi_turn,
    "tree_of_thought": tree_of_thought,
    "self_consistency": self_consistency,
}


def generate(name: str, seed: int, scale: float = 1.0) -> Workload:
    """A generated workload. scale: of the number of its requests."""
    return Workload(
        name, GENERATED[name](random.Random(f"{name} {seed}"), scale), page_size=16, rows=64, chunk_size=2048
    )


def mooncake(path: Path, step_seconds: float, limit: int | None = None) -> Workload:
    """A Mooncake trace: blocks for tokens. ValueError for a trace whose blocks and lengths do not agree."""
    calls, fresh = [], count(1 << 24)  # ids of output blocks, beyond all hashes
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            r = json.loads(line)
            prompt = array("i", r["hash_ids"])
            if len(prompt) != -(-r["input_length"] // BLOCK):
                raise ValueError(f"{path}: {len(prompt)} hashes for {r['input_length']} tokens")
            blocks = -(-(r["input_length"] + r["output_length"]) // BLOCK)
            output = array(
                "i", [next(fresh) for _ in range(blocks - len(prompt) + 1)]
            )  # the last one is never computed
            calls.append(Call(prompt, output, arrival=r["timestamp"] / 1000, tokens=r["input_length"]))
            if len(calls) == limit:
                break
    return Workload("mooncake", calls, 1, 256, 1024, online=True, step_seconds=step_seconds, item_tokens=BLOCK)


# ---- replay


class Replay:
    """A workload on its way through a scheduler: the device and the host of `scheduler.loop` in one."""

    def __init__(self, work: Workload, pages: int, policy: str, eviction: str, overlap: bool = True):
        self.work, self.clock = work, 0.0
        self.scheduler = Scheduler(
            PagePool(pages + 1, work.page_size), work.rows, work.chunk_size, policy=policy, eviction=eviction
        )
        self.order: list[int] = []  # calls as they were admitted
        self.steps = self.held = 0  # held: pages that running requests held, summed over steps
        self._requests: list[Request | None] = [None] * len(work.calls)
        self._followers: dict[int, list[int]] = {}
        for i, call in enumerate(work.calls):
            if call.after is not None:
                self._followers.setdefault(call.after, []).append(i)
        self._coming = [i for i, call in enumerate(work.calls) if call.after is None][
            ::-1
        ]  # by arrival, the next one last
        self._overlap = overlap

    def run(self) -> "Replay":
        loop = (overlap_loop if self._overlap else normal_loop)(self.scheduler, self, self)
        scheduler, calls, coming = self.scheduler, self.work.calls, self._coming
        while coming or scheduler.has_work:
            if not scheduler.has_work:
                self.clock = max(self.clock, calls[coming[-1]].arrival)
            while coming and calls[coming[-1]].arrival <= self.clock:
                self._add(coming.pop())
            next(loop)
            self.steps += 1
            self.held += scheduler.pool.total - scheduler.available_pages
            self.clock += self.work.step_seconds
        scheduler.check()
        return self

    def _add(self, i: int) -> None:
        call = self.work.calls[i]
        leader = None if call.leader is None else self._requests[call.leader]
        samples = SamplingParams(n=2 if leader else 1)
        self._requests[i] = Request(call.prompt, samples, frozenset(), len(call.output), 0, index=i, leader=leader)
        self.scheduler.add(self._requests[i])

    def launch(self, batch: Batch) -> "Answers":
        self.order += [r.index for r in batch.changes.admitted if not r.metrics.preemptions]
        calls = self.work.calls
        ends = (start + length - r.num_prompt for r, start, length in _rows(batch))
        return Answers(
            [calls[r.index].output[at] if at >= 0 else 0 for r, at in zip(batch.requests, ends, strict=True)]
        )

    def commit(self, batch: Batch, answers: list[int]) -> None:
        self.scheduler.commit(batch, answers, [True] * len(answers))
        for r in batch.requests:
            if r.state is State.FINISHED:
                for i in self._followers.pop(r.index, ()):
                    self._add(i)

    def masks(self, batch: Batch) -> Masks:
        raise NotImplementedError("nothing is masked here")

    @property
    def hit(self) -> float:
        """Cached prompt tokens / prompt tokens."""
        cached = sum(r.metrics.cached_tokens for r in self._requests)
        return cached * self.work.item_tokens / self.work.prompt_tokens


def _rows(batch: Batch) -> Iterator[tuple[Request, int, int]]:
    return zip(batch.requests, batch.starts, batch.lengths, strict=True)


class Answers(list):
    """A step that is done as soon as it is launched."""

    def sample(self, masks: Masks) -> None:
        raise NotImplementedError("nothing is masked here")

    def wait(self) -> "Answers":
        return self


# ---- bounds


class Bounds:
    """What a cache could do for a workload at best; see above for what that assumes."""

    def __init__(self, work: Workload):
        self.work = work
        size, known = work.page_size, {}
        # of each call the pages of all its tokens, as numbers: equal prefix, equal number
        self.paths: list[list[int]] = []
        self.usable: list[int] = []  # of each call how many of them could be cached when it comes
        for call in work.calls:
            items = (call.prompt + call.output[:-1]).tobytes()
            path, node, width = [], -1, size * 4
            for at in range(0, len(items) - width + 1, width):
                node = known.setdefault((node, items[at : at + width]), len(known))
                path.append(node)
            self.paths.append(path)
            self.usable.append((len(call.prompt) - 1) // size)
        self.needed = [-(-(len(call.prompt) + len(call.output) - 1) // size) for call in work.calls]  # pages
        self.longest = max(self.needed)
        self._orders: dict[tuple[int, int], tuple[float, float]] = {}

    def _rate(self, hits: Sequence[int]) -> float:
        """hits: of each call how many pages. Samples find all of their leader's prompt, but for one token."""
        size = self.work.page_size
        items = sum(
            hits[i] * size if call.leader is None else len(call.prompt) - 1 for i, call in enumerate(self.work.calls)
        )
        return items * self.work.item_tokens / self.work.prompt_tokens

    def endless(self) -> float:
        """Every use is a hit, but the first of each page. None is missed that some call leaves without using it."""
        hits = list(self.usable)
        left = {p for path, usable in zip(self.paths, self.usable, strict=True) for p in path[usable:]}
        seen: set[int] = set()
        for i, (path, usable) in enumerate(zip(self.paths, self.usable, strict=True)):
            if self.work.calls[i].leader is None:
                new = {p for p in path[:usable] if p not in left and p not in seen}
                hits[i] -= len(new)
                seen |= new
        return self._rate(hits)

    def served(self, order: Sequence[int], pages: int) -> tuple[float, float]:
        """Hit rates of calls served one by one in this order: with the best eviction, and with LRU."""
        name = (hash(tuple(order)), pages)
        if name not in self._orders:
            self._orders[name] = self._rate(self._belady(order, pages)), self._rate(self._lru(order, pages))
        return self._orders[name]

    def _lru(self, order: Sequence[int], pages: int) -> list[int]:
        hits, cached = [0] * len(self.paths), dict[int, None]()  # least recently used first, of a path the deepest one
        for i in order:
            path = self.paths[i]
            hits[i] = next((at for at, page in enumerate(path[: self.usable[i]]) if page not in cached), self.usable[i])
            for page in path:
                cached.pop(page, None)
            for page in list(islice(cached, max(0, len(cached) + self.needed[i] - pages))):
                del cached[page]
            cached.update(dict.fromkeys(reversed(path)))
        return hits

    def _belady(self, order: Sequence[int], pages: int) -> list[int]:
        hits = [0] * len(self.paths)
        uses: dict[int, list[int]] = {}  # of each page when it could be hit
        for now, i in enumerate(order):
            for page in self.paths[i][: self.usable[i]]:
                uses.setdefault(page, []).append(now)
        cached: dict[int, int] = {}  # page: when it will be used next
        farthest: list[tuple[int, int]] = []
        for now, i in enumerate(order):
            path = self.paths[i]
            for page in path[: self.usable[i]]:
                if page not in cached:
                    break
                hits[i] += 1
            for page in path:
                cached.pop(page, None)  # held by the request, not by the cache
            room = pages - self.needed[i]
            while len(cached) > room and farthest:
                when, page = (-x for x in heappop(farthest))
                if cached.get(page) == when:
                    del cached[page]
            for page in path:
                times = uses.get(page, ())
                at = bisect(times, now)
                if at < len(times):
                    cached[page] = times[at]
                    heappush(farthest, (-times[at], -page))  # of a path the deepest one first
        return hits


# ---- measure


def measure(work: Workload, sizes: Sequence[int], combinations: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A record for each cache size [pages], policy and eviction."""
    bounds, records = Bounds(work), []
    endless = bounds.endless()
    for pages in sizes:
        if pages < bounds.longest + 1:  # an answer's last token takes no page, but the scheduler wants one
            progress(f"{work.name}: a request of {bounds.longest} pages does not fit into {pages}; left out")
            continue
        for policy, eviction in combinations:
            start = time.perf_counter()
            replay = Replay(work, pages, policy, eviction).run()
            order, plain = bounds.served(replay.order, pages)
            records.append({
                "workload": work.name, "cache_tokens": pages * work.page_size * work.item_tokens,
                "policy": policy, "eviction": eviction,
                "hit": replay.hit, "plain": plain, "order": order,
                "optimum": order if work.online else endless, "endless": endless,
                "held": replay.held / replay.steps / pages, "steps": replay.steps,
                "preemptions": replay.scheduler.preemptions,
            })  # fmt: skip
            progress(f"{work.name} {pages} {policy} {eviction}: {time.perf_counter() - start:.1f} s")
    return records


HEADERS = (
    "workload", "cache tokens", "policy", "eviction", "hit", "plain", "order", "optimum", "endless", "hit/optimum",
    "held", "preempted",
)  # fmt: skip


def row(record: dict[str, Any]) -> list[str]:
    shares = [f"{100 * record[name]:.1f}" for name in ("hit", "plain", "order", "optimum", "endless")]
    return [
        record["workload"], f"{record['cache_tokens']:,}", record["policy"], record["eviction"], *shares,
        f"{record['hit'] / record['optimum']:.3f}", f"{100 * record['held']:.0f} %", str(record["preemptions"]),
    ]  # fmt: skip


def summary(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each policy and eviction the mean and the least of hit / optimum."""
    shares: dict[str, list[float]] = {}
    for r in records:
        shares.setdefault(f"{r['policy']} {r['eviction']}", []).append(r["hit"] / r["optimum"])
    return {name: {"mean": statistics.mean(values), "least": min(values)} for name, values in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Hit rate of the prefix cache beside the best that could be.")
    parser.add_argument("--workloads", nargs="*", choices=GENERATED, default=list(GENERATED))
    parser.add_argument("--policies", nargs="+", default=["fcfs", "lpm", "dfs-weight"])
    parser.add_argument("--evictions", nargs="+", default=["lru", "lfu", "fifo"])
    parser.add_argument("--cache-tokens", nargs="+", type=int, default=[16384, 65536, 262144])
    parser.add_argument("--mooncake", type=Path, metavar="PATH", help="conversation_trace.jsonl of the FAST'25 release")
    parser.add_argument(
        "--cache-blocks", nargs="+", type=int, default=[1000, 10000, 30000, 100000], help="for the trace"
    )
    parser.add_argument(
        "--step-seconds", type=float, default=5.0, help="for the trace: 512 tokens decoded take as long"
    )
    parser.add_argument("--limit", type=int, help="requests of the trace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the JSON line to this file")
    args = parser.parse_args()
    combinations = [c for c in COMBINATIONS if c[0] in args.policies and c[1] in args.evictions]
    records = []
    for name in args.workloads:
        work = generate(name, args.seed)
        records += measure(work, [size // work.page_size for size in args.cache_tokens], combinations)
    generated = summary(records)
    if args.mooncake:
        records += measure(mooncake(args.mooncake, args.step_seconds, args.limit), args.cache_blocks, combinations)
    print(table(HEADERS, map(row, records)))
    if generated:
        shares = ([name, f"{s['mean']:.3f}", f"{s['least']:.3f}"] for name, s in generated.items())
        print("\nhit / optimum, generated workloads")
        print(table(("policy and eviction", "mean", "least"), shares))
    rounded = [{k: significant(v) if isinstance(v, float) else v for k, v in r.items()} for r in records]
    emit({"bench": "cache_sim", "seed": args.seed, "summary": generated, "results": rounded}, args.json)


if __name__ == "__main__":
    main()
