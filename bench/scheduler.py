"""What a step costs the host, plan + commit, and what the radix tree costs, in time and in memory. No model runs.

    python -m bench.scheduler                     # about half a minute
    python -m bench.scheduler --running 256 --steps 1000

Steps are taken as the overlapped loop takes them: step N + 1 is planned, then step N is committed, with random tokens,
none of which ends anything. Goal: 1 us for each running request + 100 us; limit: 3 us + 200 us.

steady  All decode, and one in `page_size` needs a new page.
churn   Answers have 32 to 96 tokens, so that at each step some end and as many are admitted, with prompts of 64 to 256
        tokens that share their first 32. Between the steps the queue is filled up.
full    All decode. There are rows for more, but no pages: the queue is looked at and nobody admitted. Its prompts have
        2,048 tokens, half of which is cached.

The tree holds a million tokens of dialogues; what is asked for is a prompt of 8,192 tokens, the bytes of its array
included. `run`: cached as one edge. `chain`: cached as 512 nodes of a page each, one below the other, the worst case.
`new`: not cached.

Memory is what tracemalloc counts of tree and pool when all pages of the pool are cached, per token: of dialogues, and
of one-page leaves below one root, the worst case. All times are medians, with the 5th and the 95th percentile.
"""

import argparse
import random
import time
import tracemalloc
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from bench.cache_sim import generate, tokens
from bench.common import Stat, emit, machine_facts, progress, table
from cache.pages import PagePool
from cache.radix import RadixTree
from scheduler.batch import Batch
from scheduler.request import Request, SamplingParams
from scheduler.scheduler import Scheduler

PAGE_SIZE = 16
PROMPT = 8192
KINDS = ("steady", "churn", "full")
GOAL, LIMIT = (1.0, 100.0), (3.0, 200.0)  # us for each running request, us for the step


def percentiles(values: Sequence[float]) -> Stat:
    """Median, 5th and 95th percentile."""
    ordered = sorted(values)
    return Stat(*(ordered[round(share * (len(ordered) - 1))] for share in (0.5, 0.05, 0.95)))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = work()
    return (time.perf_counter() - start) * 1e6, result


# ---- a step


class Steps:
    """A scheduler with `running` requests inside and `waiting` outside, and steps of it in overlapped order."""

    def __init__(self, kind: str, running: int, waiting: int, policy: str, count: int, seed: int = 0):
        """count: steps that will be taken."""
        self.rng = random.Random(seed)
        self.kind, self.running, self.waiting = kind, running, waiting
        self.new = (32, 96) if kind == "churn" else (count + running + 64, count + running + 64)
        self.prompt, self.shared = (64, 256), [tokens(self.rng, 32)]
        pool = PagePool((running + 1) * (256 + self.new[1]) // PAGE_SIZE + 2048, PAGE_SIZE)
        rows = running + (64 if kind == "full" else 0)
        self.scheduler = Scheduler(pool, rows, chunk_size=8192, policy=policy)
        self.last: Batch | None = None
        self.hidden: list[int] = []  # pages that nobody can have
        self.add(running)
        while len(self.scheduler.running) < running and kind != "churn":
            self.step()
        if kind == "full":
            self.prompt, self.shared = (2048, 2048), [tokens(self.rng, 1024) for _ in range(8)]
            for document in self.shared:
                add(self.scheduler.tree, pool, document)
                self.scheduler.tree.lock_node(self.scheduler.tree.match(document.tobytes() + bytes(4)).node)
            self.hidden = pool.allocate(pool.free_pages)
        self.add(waiting)
        for _ in range(100 if kind == "churn" else 10):
            self.step()

    def add(self, count: int) -> None:
        for _ in range(count):
            shared = self.rng.choice(self.shared)
            prompt = shared + tokens(self.rng, *(length - len(shared) for length in self.prompt))
            new = self.rng.randint(*self.new)
            self.scheduler.add(Request(prompt, SamplingParams(temperature=0), frozenset(), new, 0))

    def step(self) -> tuple[float, float]:
        """Microseconds of plan and of commit."""
        scheduler, last = self.scheduler, self.last
        answers = array("H", self.rng.randbytes(2 * len(last.requests))).tolist() if last else []
        finite = [True] * len(answers)
        planning, self.last = timed(scheduler.plan)
        committing = timed(lambda: scheduler.commit(last, answers, finite))[0] if last else 0.0
        if self.kind == "churn":
            inside = len(scheduler.running) + len(scheduler.prefilling) + len(scheduler.waiting)
            self.add(self.running + self.waiting - inside)
        if self.hidden:  # as many as can be needed in the next step
            missing = max(0, self.running - scheduler.pool.free_pages)
            scheduler.pool.free(self.hidden[len(self.hidden) - missing :])
            del self.hidden[len(self.hidden) - missing :]
        return planning, committing

    def check(self) -> None:
        """Prove that the scheduler is sound, and that the steps were what they are said to be."""
        scheduler = self.scheduler
        if self.kind == "full":
            scheduler.pool.free(self.hidden)
            for document in self.shared:
                scheduler.tree.unlock(scheduler.tree.match(document.tobytes() + bytes(4)).node)
        scheduler.check()
        if self.kind != "churn" and (len(scheduler.running), len(scheduler.waiting)) != (self.running, self.waiting):
            raise RuntimeError(
                f"{len(scheduler.running)} running, {len(scheduler.waiting)} waiting: not as it was set up"
            )


def measure_steps(kind: str, running: int, waiting: int, policy: str, count: int) -> dict[str, Any]:
    steps = Steps(kind, running, waiting, policy, count)
    times = [steps.step() for _ in range(count)]
    steps.check()
    plan, commit, both = (percentiles(values) for values in (*zip(*times, strict=True), [sum(pair) for pair in times]))
    return {
        "kind": kind, "running": running, "waiting": waiting, "policy": policy,
        "plan": plan.json(), "commit": commit.json(), "both": both.json(), "shown": both.show(0),
        "goal": GOAL[0] * running + GOAL[1], "limit": LIMIT[0] * running + LIMIT[1],
    }  # fmt: skip


def row(record: dict[str, Any]) -> list[str]:
    return [
        record["kind"], f"{record['waiting']:,}", f"{record['running']:,}",
        f"{record['plan']['median']:,.0f}", f"{record['commit']['median']:,.0f}", record.pop("shown"),
        f"{record['both']['median'] / record['running']:.2f}", f"{record['goal']:,.0f}", f"{record['limit']:,.0f}",
    ]  # fmt: skip


# ---- the tree


def dialogues(tree: RadixTree, pool: PagePool, limit: int) -> None:
    """Fill a tree with dialogues, turn by turn, up to `limit` pages."""
    seed = 0
    while tree.pages < limit:
        for call in generate("multi_turn", seed).calls:
            for whole in (call.prompt, call.prompt + call.output):
                if tree.pages < limit:
                    add(tree, pool, whole, limit)
        seed += 1


def add(tree: RadixTree, pool: PagePool, items: array, limit: int | None = None) -> None:
    """Insert as a request does: what the tree has is matched, the rest gets pages of the pool."""
    full = len(items) // PAGE_SIZE
    key = items[: full * PAGE_SIZE].tobytes()
    have = tree.match(key + bytes(4)).pages
    new = full - len(have) if limit is None else min(full - len(have), limit - tree.pages)
    count = len(have) + new
    tree.insert(key[: count * tree.block], have + pool.allocate(new))


def measure_tree(repeats: int, seed: int = 0) -> tuple[dict[str, Stat], int]:
    """Microseconds of what a scheduler asks of a tree of a million tokens, and how many tokens it holds."""
    rng, pages = random.Random(seed), PROMPT // PAGE_SIZE
    pool = PagePool(2_000_000 // PAGE_SIZE, PAGE_SIZE)
    tree = RadixTree(PAGE_SIZE)
    dialogues(tree, pool, 1_000_000 // PAGE_SIZE)
    size = tree.pages * PAGE_SIZE
    run, chain = tokens(rng, PROMPT), tokens(rng, PROMPT)
    add(tree, pool, run)
    for at in range(0, PROMPT, PAGE_SIZE):  # a branch at each page makes a node of each
        add(tree, pool, chain[:at] + tokens(rng, PAGE_SIZE))
        add(tree, pool, chain[: at + PAGE_SIZE])
    times: dict[str, list[float]] = {}

    def clock(name: str, work: Callable[[], Any]) -> Any:
        taken, result = timed(work)
        times.setdefault(name, []).append(taken)
        return result

    for _ in range(repeats):
        new = tokens(rng, PROMPT)
        for name, prompt in (("run", run), ("chain", chain), ("new", new)):
            match = clock(f"match {name}", lambda prompt=prompt: tree.match(prompt.tobytes()))
            if match.pages:
                node = clock(f"lock {name}", lambda match=match: tree.lock(match))
                clock(f"unlock {name}", lambda node=node: tree.unlock(node))
            rest = tree.match(prompt.tobytes() + bytes(4)).pages
            own = rest + pool.allocate(pages - len(rest))
            clock(f"insert {name}", lambda prompt=prompt, own=own: tree.insert(prompt.tobytes(), own))
        tree.lock_node(tree.match(run.tobytes()).node), tree.lock_node(tree.match(chain.tobytes()).node)
        pool.free(clock("evict 512 pages", lambda: tree.evict(pages)))
        tree.unlock(tree.match(run.tobytes()).node), tree.unlock(tree.match(chain.tobytes()).node)
    tree.check()
    return {name: percentiles(values) for name, values in times.items()}, size


def leaves(tree: RadixTree, pool: PagePool, limit: int) -> None:
    """Fill a tree with prompts of one page."""
    rng = random.Random(0)
    while tree.pages < limit:
        add(tree, pool, tokens(rng, PAGE_SIZE))


def bytes_per_token(fill: Callable[[RadixTree, PagePool, int], None], pages: int) -> float:
    """Of tree and pool, when every page of the pool is cached."""
    tracemalloc.start()
    pool = PagePool(pages + 1, PAGE_SIZE)
    tree = RadixTree(PAGE_SIZE)
    fill(tree, pool, pages)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return used / (tree.pages * PAGE_SIZE)


# ---- all of it


def main() -> None:
    parser = argparse.ArgumentParser(description="Host time of a scheduler step; time and memory of the radix tree.")
    parser.add_argument("--running", nargs="+", type=int, default=[1, 64, 256, 1024])
    parser.add_argument("--waiting", nargs="+", type=int, default=[0, 100, 10000])
    parser.add_argument("--policy", default="lpm")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=100, help="of what is asked of the tree")
    parser.add_argument(
        "--pages", type=int, default=1_000_000 // PAGE_SIZE, help="in the trees whose memory is counted"
    )
    parser.add_argument("--json", help="also write the JSON line to this file")
    args = parser.parse_args()
    records = []
    for kind in KINDS:
        for waiting in args.waiting:
            for running in args.running:
                if waiting or kind != "full":
                    progress(f"{kind}, {waiting} waiting, {running} running")
                    records.append(measure_steps(kind, running, waiting, args.policy, args.steps))
    tree, size = measure_tree(args.repeats)
    memory = {
        "dialogues": bytes_per_token(dialogues, args.pages),
        "one-page leaves": bytes_per_token(leaves, args.pages),
    }
    print(
        table(("us a step", "waiting", "running", "plan", "commit", "both", "each", "goal", "limit"), map(row, records))
    )
    print(f"\ntree of {size:,} tokens, prompt of {PROMPT:,}; goal for match and insert: 1,000 us")
    print(table(("us", "median (5 %..95 %)"), ([name, stat.show()] for name, stat in tree.items())))
    print("\nhost memory, bytes per cached token; goal: 16")
    print(table(("tree", "bytes"), ([name, f"{value:.1f}"] for name, value in memory.items())))
    figures = {name: stat.json() for name, stat in tree.items()}
    emit({"bench": "scheduler", **machine_facts(), "steps": records, "tree_tokens": size, "tree": figures,
          "bytes_per_token": memory}, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
