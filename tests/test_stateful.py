"""Random traffic through tree, pool, scheduler and both loops, on a device that remembers what was written to every slot.

The stand-in device keeps, for each slot, a hash of all that its keys and values depend on: the salt and every token up to
there. A token is a function of that hash and the request's seed. So what a request must say is known before it runs, alone or
in any company, and each step proves that the history a request reads through the page table of its row is its own.

    python -m pytest tests/test_stateful.py
    python tests/test_stateful.py --steps 200000            # random worlds, one after the other
    python tests/test_stateful.py --steps 1 --seed 12345    # the one world with this seed
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).parents[1]))  # when it is run as a program

from cache.pages import PagePool
from cache.radix import EVICTION
from errors import UserError
from scheduler.batch import Batch
from scheduler.loop import Masks, normal_loop, overlap_loop
from scheduler.policy import REORDER
from scheduler.request import Request, SamplingParams, State
from scheduler.scheduler import RATIO_START, Scheduler

STOP, VOCABULARY = 0, 12
EMPTY, NAN = "never written", "NaN"  # of a slot; otherwise a hash
ALPHABET = [1, 2]  # of prompts, few, so that they often begin alike
LEAST_STEPS = 2000  # of the normal test run


def fold(before: int, token: int) -> int:
    return hash((before, token))


def sampled(content: int, seed: int) -> int:
    return hash((content, seed)) % VOCABULARY


class Traced(Request):
    """A request that knows what it must say and what its slots must hold, and counts how often it ended."""

    def __init__(self, *args, salt: int, group: int, **kwargs):
        super().__init__(*args, namespace=(salt,), **kwargs)
        self.ends, self.harmed = 0, False  # harmed: NaN was put into it
        self.beginning = fold(salt, group)
        self.sequence, self.contents, content = self.tokens.tolist(), [], self.beginning
        for at in range(self.last + 1):
            if at == len(self.sequence):
                self.sequence.append(sampled(content, self.seed))
            content = fold(content, self.sequence[at])
            self.contents.append(content)

    @property
    def expected(self) -> list[int]:
        """The output, if it is left to end by itself."""
        output = self.sequence[self.num_prompt :]
        ends = [i + 1 for i, t in enumerate(output) if t in self.stop_ids and i + 1 > self.params.min_new_tokens]
        return output[: min([*ends, self.max_new_tokens])]

    def finish(self, *args) -> None:
        super().finish(*args)
        self.ends += 1


class Step:
    """A step whose forward has run; of a masked one the sampling waits for the host."""

    def __init__(self, device: "Device", batch: Batch):
        self.device, self.batch = device, batch
        self.planned = self.snapshot()
        self.rows = [r.row for r in batch.requests]
        each = zip(*self.planned[:3], self.rows, device.ids(batch), strict=True)
        self.finite = [device.forward(*arguments) for arguments in each]
        self.tokens: list[int] | None = None
        if not batch.masked:
            self.sample(None)

    def snapshot(self) -> tuple[list, ...]:
        batch = self.batch
        return list(batch.requests), list(batch.starts), list(batch.lengths), list(batch.samples), list(batch.ids)

    def sample(self, masks: Masks) -> None:
        assert self.tokens is None, "a step was sampled twice"
        self.tokens = [self.device.sample(*each) for each in zip(*self.planned[:4], self.rows, strict=True)]

    def wait(self) -> tuple[list[int], list[bool]]:
        assert self.snapshot() == self.planned, "a batch changed after it was planned"
        assert self.tokens is not None, "nobody sampled this step"
        return self.tokens, self.finite


class Device:
    """Memory, page tables and future tokens, and a forward that reads the history of each request through them."""

    def __init__(self, pages: int, page_size: int, rows: int):
        self.page_size = page_size
        self.memory: list[list[Any]] = [[EMPTY] * page_size for _ in range(pages + 1)]
        self.tables = [[0] * (pages + 1) for _ in range(rows + 1)]
        self.future: list[int | None] = [None] * (rows + 1)
        self.seeds = [0] * (rows + 1)
        self.to_harm: set[Traced] = set()  # whose next step yields NaN
        self.launched = 0
        self.planned: Callable[[Batch], None] = lambda batch: None  # called between the plan and the launch

    def launch(self, batch: Batch) -> Step:
        self.launched += 1
        self.planned(batch)
        changes = batch.changes
        for source, target in changes.copies:
            self.memory[target] = list(self.memory[source])
        for r in changes.admitted:
            assert r.row > 0
            self.seeds[r.row], self.tables[r.row], self.future[r.row] = r.seed, [0] * len(self.memory), None
        for row, first, pages in changes.tables:
            self.tables[row][first : first + len(pages)] = pages
            assert len(self.tables[row]) == len(self.memory), "a page table without end"
        return Step(self, batch)

    def ids(self, batch: Batch) -> list[list[int]]:
        """The tokens of each request, the future ones looked up by row."""
        ids = [self.future[-i] if i < 0 else i for i in batch.ids]
        ends = [sum(batch.lengths[: i + 1]) for i in range(len(batch.lengths))]
        return [ids[end - length : end] for end, length in zip(ends, batch.lengths, strict=True)]

    def forward(self, r: Traced, start: int, length: int, row: int, ids: list[int]) -> bool:
        """Prove that the request reads its own history, and write its new slots. Returns whether the logits are finite."""
        size, end = self.page_size, start + length
        pages = self.tables[row][: -(-end // size)]
        assert len(pages) * size >= end, "no page for a new token"
        assert 0 not in pages, "page 0 belongs to nobody"
        slots = [content for page in pages for content in self.memory[page]]
        if r in self.to_harm or r.harmed:
            self.to_harm.discard(r)
            r.harmed = True
        else:
            assert slots[:start] == r.contents[:start], "a request reads what is not its history"
            assert ids == r.sequence[start:end], "a wrong token, or one at a wrong position"
        for at in range(start, end):
            self.memory[pages[at // size]][at % size] = NAN if r.harmed else r.contents[at]
        return not r.harmed

    def sample(self, r: Traced, start: int, length: int, samples: bool, row: int) -> int:
        if not samples or r.harmed:
            return STOP  # junk, which nobody may take
        at = start + length - 1
        page = self.tables[row][at // self.page_size]
        self.future[row] = sampled(self.memory[page][at % self.page_size], self.seeds[row])
        return self.future[row]


class World:
    """A scheduler, its device and its loop, and the requests that pass through. Every rule of the traffic is a method."""

    def __init__(
        self, *, pages: int, page_size: int, rows: int, chunk_size: int, overlap: bool, radix: bool, chunked: bool,
        ratio: float, **options,
    ):  # fmt: skip
        self.radix, self.chunked, self.count = radix, chunked, Counter()
        self.pool = PagePool(pages + 1, page_size)
        self.device = Device(pages, page_size, rows)
        self.device.planned = self._planned
        options |= {"radix": radix, "chunked_prefill": chunked}
        self.scheduler = Scheduler(self.pool, rows, chunk_size, **options)
        self.scheduler.ratio = ratio
        self.loop = (overlap_loop if overlap else normal_loop)(self.scheduler, self.device, self)
        self.everyone: list[Traced] = []
        self.alive: list[Traced] = []
        self.committed = 0
        self.soon: list[Callable[[], None]] = []  # to do between the next plan and its commit

    # ---- the host's part of the loop

    def commit(self, batch: Batch, results: tuple[list[int], list[bool]]) -> None:
        while self.soon:
            self.soon.pop()()
        self.committed += 1
        before = [r.new_tokens for r in batch.requests]
        wanted = [r.finish_reason is None and samples for r, samples in zip(batch.requests, batch.samples, strict=True)]
        forced = [len(r.tokens) > at + n for r, at, n in zip(batch.requests, batch.starts, batch.lengths, strict=True)]
        taken = self.scheduler.commit(batch, *results)
        for i, r in enumerate(batch.requests):
            assert r.new_tokens - before[i] == (i in taken)
            assert (i in taken) == (wanted[i] and results[1][i] and not forced[i])
        self.scheduler.check()

    def masks(self, batch: Batch) -> Masks:
        """Now and then force what a request would sample anyway, one token or several."""
        for r, start, length, samples in zip(batch.requests, batch.starts, batch.lengths, batch.samples, strict=True):
            complete = len(r.tokens) >= start + length
            assert complete or r.state is State.FINISHED, (
                "a mask is asked for before the tokens it depends on are there"
            )
            if r.constraint is not None and samples and not r.harmed:
                at = len(r.tokens)
                for token in r.sequence[at : at + max(0, hash((r.seed, at)) % 12 - 4)]:
                    if r.finish_reason is None:
                        self.count["forced"] += 1
                        self.scheduler.force(r, token, sampled=len(r.tokens) == at)
                        self.scheduler.check()
        return None

    def _planned(self, batch: Batch) -> None:
        """What must be true of any plan."""
        s = self.scheduler
        s.check()
        assert len(batch.requests) == len({r.row for r in batch.requests}) <= s.max_batch_size
        assert len(batch.requests) == len(batch.starts) == len(batch.lengths) == len(batch.samples) > 0
        assert sum(batch.lengths) == len(batch.ids) and min(batch.lengths) > 0
        assert batch.lengths[: batch.decodes] == [1] * batch.decodes and all(batch.samples[: batch.decodes])
        assert all(i >= 0 for i in batch.ids[batch.decodes :])
        budget = max(s.pool.page_size, s.chunk_size - batch.decodes)
        if not self.chunked and len(batch.requests) > batch.decodes:
            budget = max(budget, batch.lengths[batch.decodes])  # the first of a step may exceed it
        assert sum(batch.lengths[batch.decodes :]) <= budget
        left_out = set(s.running) - set(batch.requests)
        assert all(r.computed == r.last for r in left_out), "a running request was left out of a step"
        for key in ("copies", "admitted"):
            self.count[key] += len(getattr(batch.changes, key))

    # ---- rules

    def arrive(
        self, prompt: list[int], new: int, n: int, salt: int, priority: int, least: int, masked: bool, stops: bool
    ) -> None:
        params = SamplingParams(n=n, min_new_tokens=min(least, new))
        stop_ids = frozenset([STOP]) if stops else frozenset()
        group, leader = len(self.everyone), None
        for index in range(n):
            r = Traced(
                prompt, params, stop_ids, new, group + index, index, id=str(group + index), leader=leader,
                priority=priority, salt=salt, group=0 if self.radix else group + 1,
            )  # fmt: skip
            leader = leader or r
            r.constraint = "a grammar" if masked else None
            try:
                self.scheduler.add(r)
            except UserError:
                assert self.pool.pages_for(len(prompt) + new) > self.pool.total
                self.count["refused"] += 1
                return
            self.everyone.append(r)
            self.alive.append(r)

    def step(self) -> None:
        self.count["steps"] += 1
        busy, before = self.scheduler.has_work, (self.device.launched, self.committed)
        next(self.loop)
        while self.soon:
            self.soon.pop()()
        self.scheduler.check()
        assert not busy or before != (self.device.launched, self.committed), "there is work, and nothing happens"
        self.alive = [r for r in self.alive if r.finish_reason is None]
        if self.count["steps"] % 8 == 0:
            self.check_tree()

    def abort(self, which: int, midway: bool) -> None:
        """Now, or between the next plan and its commit."""
        r = self.alive[which % len(self.alive)]

        def act() -> None:
            self.count["aborts"] += r.finish_reason is None
            self.scheduler.end(r, "abort")
            self.scheduler.check()

        self.soon.append(act) if midway else act()

    def harm(self, which: int) -> None:
        """The next step of a request yields NaN."""
        self.device.to_harm.add(self.alive[which % len(self.alive)])

    def preempt(self, which: int) -> None:
        inside = [r for r in (*self.scheduler.running, *self.scheduler.prefilling) if not r.in_flight]
        if inside:
            self.scheduler.preempt(inside[which % len(inside)])
            self.scheduler.check()

    def flush(self) -> None:
        assert self.scheduler.flush() == self.scheduler.tree.locked_pages
        self.scheduler.check()

    # ---- proof

    def check_tree(self) -> None:
        """Every page of the tree holds what its key says, in the namespace that it is in."""
        tree = self.scheduler.tree
        if not self.radix:
            return
        for (salt,), root in tree.roots.items():
            stack = [(child, fold(salt, 0)) for child in root.children.values()]
            while stack:
                node, content = stack.pop()
                tokens = memoryview(node.key).cast("i")
                slots = [slot for page in node.pages for slot in self.device.memory[page]]
                for token, slot in zip(tokens, slots, strict=True):
                    content = fold(content, token)
                    assert slot == content, "a page of the tree holds something else"
                stack += [(child, content) for child in node.children.values()]

    def drain(self) -> None:
        for _ in range(100_000):
            if not self.scheduler.has_work:
                break
            self.step()
        s = self.scheduler
        assert not s.has_work, "the work never ends"
        self.check_tree()
        assert s.tree.locked_pages == 0 and self.pool.free_pages + s.tree.pages == self.pool.total
        assert self.radix or s.tree.pages == 0, "something is shared though nothing may be"
        assert sorted(s.free_rows) == list(range(1, s.max_batch_size + 1))
        for r in self.everyone:
            assert (r.ends, r.in_flight, r.row, r.pages, r.node) == (1, 0, 0, [], None)
            if r.finish_reason in ("stop", "length"):
                assert r.output_ids == r.expected
            else:
                assert r.output_ids == r.expected[: r.new_tokens]
                assert r.finish_reason == "abort" or r.harmed
            self.count[r.finish_reason] += 1
        self.flush()
        assert self.pool.free_pages == self.pool.total and not s.tree.roots
        self.count += Counter(requests=len(self.everyone), preemptions=s.preemptions)
        self.count += Counter(cached_tokens=s.cached_tokens, prompt_tokens=s.prompt_tokens)


def prompts(pages: int, page_size: int) -> list[list[int]]:
    """Long beginnings that many prompts of a world share."""
    rng = random.Random(pages * 7 + page_size)
    return [[rng.choice(ALPHABET) for _ in range(length)] for length in (0, 9, 30, 50)]


WORLDS = st.fixed_dictionaries(
    {
        "pages": st.integers(4, 60),
        "page_size": st.sampled_from([1, 2, 4]),
        "rows": st.integers(1, 6),
        "chunk_size": st.sampled_from([1, 3, 8, 64]),
        "policy": st.sampled_from(list(REORDER)),
        "eviction": st.sampled_from(list(EVICTION)),
        "radix": st.sampled_from([True, True, True, False]),
        "chunked": st.booleans(),
        "overlap": st.booleans(),
        "ratio": st.sampled_from([RATIO_START, 0.0]),
    }
)


class Traffic(RuleBasedStateMachine):
    """Hypothesis chooses a world and what happens in it, and shrinks what fails."""

    total = Counter()

    @initialize(options=WORLDS)
    def begin(self, options: dict[str, Any]) -> None:
        self.world = World(**options)
        self.bases = prompts(options["pages"], options["page_size"])

    @rule(
        base=st.integers(0, 3), cut=st.integers(0, 50), tail=st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=6),
        new=st.integers(1, 24), n=st.sampled_from([1, 1, 1, 2, 4]), salt=st.sampled_from([0, 0, 0, 1]),
        priority=st.integers(0, 2), least=st.sampled_from([0, 0, 3]), masked=st.sampled_from([False] * 3 + [True]),
        stops=st.booleans(),
    )  # fmt: skip
    def arrive(self, base: int, cut: int, tail: list[int], **rest) -> None:
        self.world.arrive(self.bases[base][:cut] + tail, **rest)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.world.alive)
    @rule(which=st.integers(0, 63), midway=st.booleans())
    def abort(self, which: int, midway: bool) -> None:
        self.world.abort(which, midway)

    @precondition(lambda self: self.world.alive)
    @rule(which=st.integers(0, 63))
    def harm(self, which: int) -> None:
        self.world.harm(which)

    @precondition(lambda self: self.world.scheduler.running or self.world.scheduler.prefilling)
    @rule(which=st.integers(0, 63))
    def preempt(self, which: int) -> None:
        self.world.preempt(which)

    @rule()
    def flush(self) -> None:
        self.world.flush()

    def teardown(self) -> None:
        if hasattr(self, "world") and sys.exc_info()[0] is None:
            self.world.drain()
            Traffic.total += self.world.count


def test_random_traffic():
    """Whatever happens, each request reads its own history, says what it would say alone, and gives everything back."""
    Traffic.total = Counter()
    run_state_machine_as_test(
        Traffic,
        settings=settings(max_examples=150, stateful_step_count=40),
    )
    assert Traffic.total["steps"] >= LEAST_STEPS and Traffic.total["forced"] > 100


# ---- the same worlds without hypothesis: faster, and for as long as one likes


def random_world(seed: int, steps: int) -> Counter:
    """One world of about so many steps, driven by a seed alone."""
    rng = random.Random(seed)
    options = {
        "pages": rng.randint(4, 60), "page_size": rng.choice([1, 2, 4]), "rows": rng.randint(1, 6),
        "chunk_size": rng.choice([1, 3, 8, 64]), "policy": rng.choice(list(REORDER)), "eviction": rng.choice(list(EVICTION)),
        "radix": rng.random() < 0.75, "chunked": rng.random() < 0.6, "overlap": rng.random() < 0.6,
        "ratio": rng.choice([RATIO_START, 0.0]),
    }  # fmt: skip
    world, bases = World(**options), prompts(options["pages"], options["page_size"])
    arrivals, trouble = rng.choice([0.05, 0.2, 0.6]), rng.choice([0.0, 0.02, 0.1])
    for _ in range(steps):
        if rng.random() < arrivals:
            base = rng.choice(bases)
            world.arrive(
                base[: rng.randint(0, len(base))] + rng.choices(ALPHABET, k=rng.randint(1, 6)), rng.randint(1, 24),
                n=rng.choice([1, 1, 1, 2, 4]), salt=rng.choice([0, 0, 0, 1]), priority=rng.randint(0, 2),
                least=rng.choice([0, 0, 3]), masked=rng.random() < 0.2, stops=rng.random() < 0.5,
            )  # fmt: skip
        if world.alive and rng.random() < trouble:
            world.abort(rng.randrange(64), rng.random() < 0.5)
        if world.alive and rng.random() < trouble / 2:
            world.harm(rng.randrange(64))
        if rng.random() < trouble:
            world.preempt(rng.randrange(64))
        if rng.random() < trouble / 10:
            world.flush()
        world.step()
    world.drain()
    return world.count


def main() -> None:
    parser = argparse.ArgumentParser(description="Random traffic through the scheduler, on a device that remembers.")
    parser.add_argument("--steps", type=int, default=200_000, help="at least so many in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the first world; the next ones count up from it")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    total, worlds, began = Counter(), 0, time.perf_counter()
    while total["steps"] < args.steps:
        try:
            total += random_world(seed + worlds, 300)
        except BaseException:
            print(f"failed: python tests/test_stateful.py --steps 1 --seed {seed + worlds}", file=sys.stderr)
            raise
        worlds += 1
    print(f"{worlds} worlds from seed {seed} in {time.perf_counter() - began:.0f} s")
    print(", ".join(f"{name} {total[name]}" for name in sorted(total)))


if __name__ == "__main__":
    main()
