"""Who computes what in the next step, and on which pages.

`plan` fills one token budget: a token for each running request, then chunks of prompts (Sarathi-Serve; Dynamic SplitFuse),
so that a long prompt delays the others by one budget at most. `commit` takes the tokens of a step that has come home. Between
the two the device works, and with the overlapped loop the next step is planned before this one is committed: what a
request still has `in_flight` is counted, and its row and pages are given back only when that is nothing.

    waiting ──► prefilling ──► running ──► finished        any state ──► finished (abort, error)
       ▲             └── preempted ◄──┘
       └───────────────────┘

Pages: prompts are matched in the radix tree and locked there; what a committed step has filled is given to the tree. If
pages run out, unlocked leaves go first, then the request that loses least is preempted. Admission keeps a reserve for what those
that run will still need, a share of what they may ask for that adapts (SGLang's new-token ratio).

    python -m pytest tests/test_scheduler.py tests/test_stateful.py
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cache.pages import PagePool
from cache.radix import Match, Namespace, Node, RadixTree, tree_key
from errors import UserError
from scheduler.batch import Batch, Changes
from scheduler.policy import MAX_PASSED_OVER, WaitingQueue
from scheduler.request import Request, State

SHARED_AT_LEAST = 32  # tokens of a prefix that another request is computing, for which it is worth to wait (SGLang)
LOOKAHEAD = 128  # waiting requests that one step looks at beyond those it has rows for

RATIO_START, RATIO_LEAST = 0.7, 0.1  # share of max_new_tokens that a request is expected to use (SGLang's figures)
RATIO_DECAY = (RATIO_START - RATIO_LEAST) / 600  # a step
RATIO_MARGIN = 20  # new tokens that each is expected to want beyond what it has, after a preemption
MOST_EXPECTED = 4096  # new tokens; who asks for more is not expected to mean it


@dataclass(eq=False)
class Hold:
    """A prefix that somebody keeps in the cache, though no request runs on it now."""

    node: Node | None
    tokens: int


class Scheduler:
    def __init__(
        self,
        pool: PagePool,
        max_batch_size: int,
        chunk_size: int,
        *,
        policy: str = "lpm",
        radix: bool = True,
        chunked_prefill: bool = True,
        eviction: str = "lru",
    ):
        """chunk_size: the token budget of a step. Without `chunked_prefill` a prompt is computed whole, whatever its length."""
        self.pool, self.max_batch_size, self.chunk_size = pool, max_batch_size, chunk_size
        self.radix, self.chunked_prefill = radix, chunked_prefill
        self.tree = RadixTree(pool.page_size, eviction)
        self.waiting = WaitingQueue(policy)
        self.prefilling: dict[Request, None] = {}
        self.running: dict[Request, None] = {}
        self.leaving: set[Request] = set()  # ended, and still in flight
        self.computing: dict[Request, None] = {}  # admitted, and their prompt is not all in the tree yet
        self.holds: list[Hold] = []
        self.free_rows = list(range(max_batch_size, 0, -1))  # row 0 is padding
        self.ratio = RATIO_START
        self.arrivals = self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._by_priority = policy == "priority"
        self._changes = Changes()  # for the next batch
        self._in_flight = 0  # batches

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running or self.leaving)

    @property
    def capacity(self) -> int:
        """Tokens that the pool holds."""
        return self.pool.total * self.pool.page_size

    @property
    def available_pages(self) -> int:
        """Free, or free as soon as they are wanted."""
        return self.pool.free_pages + self.tree.evictable_pages

    def refuse_if_too_large(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """UserError if such a request could never fit, even alone."""
        tokens = prompt_tokens + max_new_tokens
        if self.pool.pages_for(tokens) > self.pool.total:
            raise UserError(f"{tokens} tokens (prompt and new) can never fit into a cache of {self.capacity}")

    def add(self, request: Request) -> None:
        """Queue it. UserError if it could never fit."""
        self.refuse_if_too_large(request.num_prompt, request.max_new_tokens)
        self.arrivals += 1
        request.arrival = self.arrivals
        if not self.radix:  # only the samples of one prompt share
            request.namespace = ("request", (request.leader or request).arrival)
        self.waiting.add(request)

    # ---- plan

    def plan(self) -> Batch | None:
        """The next step. None: there is nothing to do, or nothing before the step on its way is committed."""
        if not self._grow():
            return None
        batch = Batch()
        self._decode(batch)
        # when decodes alone fill the budget, prompts still get a page's worth, or they would never end
        budget = max(self.pool.page_size, self.chunk_size - batch.decodes)
        for request in list(self.prefilling):
            budget -= self._prefill(request, batch, budget)
        self._admit(batch, budget)
        if not batch.requests:
            if self.has_work and not self._in_flight:
                if self.holds:  # a wish, which gives way to whoever cannot run otherwise
                    for hold in list(self.holds):
                        self.let_go(hold)
                    return self.plan()
                raise RuntimeError(f"{len(self.waiting)} requests wait and {len(self.running)} run, but none can go on")
            return None
        batch.changes, self._changes = self._changes, Changes()
        self._in_flight += 1
        return batch

    def _grow(self) -> bool:
        """A page for each running request whose last one is full; what forced tokens need. False: a step must come home first."""
        size = self.pool.page_size
        missing = {r: 1 for r in self.running if r.computed == len(r.pages) * size and r.computed < r.last}
        missing |= {r: n for r in self.prefilling if (n := self.pool.pages_for(len(r.tokens)) - len(r.pages))}
        while (total := sum(missing.values())) > self.available_pages:
            if self._in_flight:  # it may end requests; and who is in flight cannot be preempted
                return False
            victim = min((*self.running, *self.prefilling), key=self._loss)
            self.preempt(victim)
            self._expect_more()
            missing.pop(victim, None)
        pages = self._allocate(total)
        for request, count in missing.items():
            new, pages = pages[:count], pages[count:]
            self._changes.tables.append((request.row, len(request.pages), new))
            request.pages += new
        return True

    def _decode(self, batch: Batch) -> None:
        for r in self.running:
            at = r.computed
            if at < r.last:  # else its last token is on the way
                batch.requests.append(r)
                batch.starts.append(at)
                batch.ids.append(r.tokens[at] if at < len(r.tokens) else -r.row)
                r.computed = at + 1
                r.in_flight += 1
        batch.decodes = len(batch.requests)
        batch.lengths = [1] * batch.decodes
        batch.samples = [True] * batch.decodes
        self.ratio = max(RATIO_LEAST, self.ratio - RATIO_DECAY) if batch.decodes else self.ratio

    def _prefill(self, request: Request, batch: Batch, budget: int) -> int:
        """Plan the next chunk of a prompt, as far as the budget goes. Returns the number of its tokens."""
        start, left = request.computed, len(request.tokens) - request.computed
        count = min(left, budget)
        if not self.chunked_prefill:  # all or nothing; the first of a step may exceed the budget
            first = len(batch.requests) == batch.decodes
            count = left if left <= budget or first else 0
        if count <= 0:
            return 0
        batch.requests.append(request)
        batch.starts.append(start)
        batch.ids += request.tokens[start : start + count]
        batch.lengths.append(count)
        batch.samples.append(count == left)
        request.computed += count
        request.in_flight += 1
        if count == left:
            del self.prefilling[request]
            self.running[request] = None
            request.state = State.RUNNING
        return count

    # ---- admit

    def _admit(self, batch: Batch, budget: int) -> None:
        """Let requests in while there are rows, budget, and pages beyond what those inside are expected to need."""
        if not self.waiting or not self.free_rows or budget <= 0:
            return
        reserve = self._expected_pages(self.running)
        for request in self.waiting.candidates(self.tree, len(self.free_rows) + LOOKAHEAD):
            if not self.free_rows or budget <= 0 or self.prefilling:  # a prompt that is not all planned has used it up
                return
            match = self.tree.match(request.key(), request.namespace)
            if self._waits_for_another(request, len(match.pages)):
                continue
            need = self.pool.pages_for(len(request.tokens)) - len(match.pages)
            expected = self._expected_pages([request])
            alone = not self.running and not self.leaving
            if need + match.evictable + (0 if alone else reserve + expected) > self.available_pages:
                return
            self._start(request, match)
            reserve += expected
            budget -= self._prefill(request, batch, budget)

    def _expected_pages(self, requests: Iterable[Request]) -> float:
        """Pages that requests are expected to fill beyond those for the tokens they have."""
        left = [r.last - len(r.tokens) for r in requests]
        tokens = sum([n if n < MOST_EXPECTED else MOST_EXPECTED for n in left])
        return self.ratio * tokens / self.pool.page_size

    def _waits_for_another(self, request: Request, cached: int) -> bool:
        """Is another request computing what this one needs next, beyond its `cached` pages? Then that is not computed twice."""
        size = self.pool.page_size
        leader = request.leader
        if leader is not None and leader.state in (State.WAITING, State.PREFILLING):
            return True
        if leader is not None and leader.state is State.RUNNING and leader in self.computing:
            return True
        if request.passed_over >= MAX_PASSED_OVER:
            return False
        end = (cached + self.pool.pages_for(SHARED_AT_LEAST)) * size
        if end > request.reusable:
            return False
        return any(
            len(other.tokens) >= end
            and other.tokens[end - 1] == request.tokens[end - 1]
            and other.namespace == request.namespace
            and other.tokens[:end] == request.tokens[:end]
            for other in self.computing
        )

    def _start(self, request: Request, match: Match) -> None:
        """Give a waiting request its row and the pages of its prompt, the cached ones first."""
        self.waiting.admitted(request)
        request.node = self.tree.lock(match)
        request.row = self.free_rows.pop()
        request.shared = len(match.pages)
        request.pages = match.pages + self._allocate(self.pool.pages_for(len(request.tokens)) - len(match.pages))
        request.computed = request.shared * self.pool.page_size
        self._copy_last_page(request)
        request.state = State.PREFILLING
        self.prefilling[request] = self.computing[request] = None
        self._changes.admitted[request] = len(request.tokens)
        self._changes.tables.append((request.row, 0, list(request.pages)))
        if request.metrics.admitted_at is None:
            request.metrics.admitted_at = time.perf_counter()
            request.metrics.cached_tokens = request.computed
            self.prompt_tokens += request.num_prompt
            self.cached_tokens += request.computed

    def _copy_last_page(self, request: Request) -> None:
        """Copy on write: take over the partly filled last page of a prompt from the sample that has computed it."""
        leader, end = request.leader, request.num_prompt - 1  # the last token of a prompt is always computed
        if leader is None or leader.state is not State.RUNNING or request.new_tokens:
            return
        if request.shared == end // self.pool.page_size and request.computed < end:
            self._changes.copies.append((leader.pages[request.shared], request.pages[request.shared]))
            request.computed = end

    def _allocate(self, count: int) -> list[int]:
        if count > self.pool.free_pages:
            self.pool.free(self.tree.evict(count - self.pool.free_pages))
        return self.pool.allocate(count)

    # ---- commit

    def commit(self, batch: Batch, tokens: Sequence[int], finite: Sequence[bool]) -> list[int]:
        """Take the tokens [B] of a step, and whether the logits [B] were finite. Returns who took its token, as indices.

        Who ends gives row and pages back, at once or when the step that it is still in comes home.
        """
        self._in_flight -= 1
        taken = []
        for i, r in enumerate(batch.requests):
            r.in_flight -= 1
            if not finite[i]:  # what the step has written is not to be trusted, and never enters the tree
                r.computed = min(r.computed, batch.starts[i])
                self.end(r, "error", "the model's logits are not finite")
            if r.state is State.FINISHED:
                if r in self.leaving and not r.in_flight:
                    self.leaving.remove(r)
                    self._release(r)
                continue
            if i >= batch.decodes:
                self._share(r, batch.starts[i] + batch.lengths[i], whole=batch.samples[i])
            if batch.samples[i] and batch.starts[i] + batch.lengths[i] == len(
                r.tokens
            ):  # else it was forced, and is there
                r.append(tokens[i])
                taken.append(i)
                if r.state is State.FINISHED:
                    self._leave(r)
        return taken

    def force(self, request: Request, token: int, sampled: bool) -> None:
        """Give a request that runs its next token without sampling it. What is forced is computed in one chunk.

        `sampled`: the step that is on its way will sample this very token, for its mask allows no other.
        """
        if not sampled:
            self._changes.forced.append((request.row, token))
        request.append(token)
        if request.state is State.FINISHED:
            self._leave(request)
        elif len(request.tokens) - request.computed > 1 and request in self.running:
            del self.running[request]
            self.prefilling[request] = None
            request.state = State.PREFILLING

    def end(self, request: Request, reason: str, detail: int | str | None = None) -> None:
        """End a request from outside (stop string, abort, error), whatever its state. Ended already: nothing happens."""
        state = request.state
        if state is State.FINISHED:
            return
        request.finish(reason, detail)
        if state in (State.WAITING, State.PREEMPTED):
            if request.arrival:  # else it was never queued
                self.waiting.remove(request)
        else:
            self._leave(request)

    def preempt(self, request: Request) -> None:
        """Send a running request back to waiting, with its tokens. RuntimeError if it has no row, or a step is on its way."""
        if request.in_flight or request.state not in (State.PREFILLING, State.RUNNING):
            raise RuntimeError(
                f"a request that is {request.state.value}, in {request.in_flight} steps, cannot be preempted"
            )
        self._forget(request)
        self._release(request)
        request.computed, request.state = 0, State.PREEMPTED
        request.metrics.preemptions += 1
        self.preemptions += 1
        self.waiting.add(request)

    def _share(self, request: Request, computed: int, whole: bool) -> None:
        """Give the tree the pages that a committed chunk has filled, and move to the tree's own where it had them already."""
        if whole:
            self.computing.pop(request, None)
        before = request.shared
        if (self.radix or request.params.n > 1) and self._insert(request, computed):
            self._changes.tables.append((request.row, before, request.pages[before : request.shared]))

    def _insert(self, request: Request, computed: int) -> bool:
        """Hand all full pages of the first `computed` tokens to the tree. True if the request's page list has changed."""
        full = computed // self.pool.page_size
        if full <= request.shared:
            return False
        key = request.tokens[: full * self.pool.page_size].tobytes()
        got = self.tree.insert(key, request.pages[:full], request.namespace)
        self.tree.lock_node(got.node)
        self.tree.unlock(request.node)
        request.node, request.pages[:full], request.shared = got.node, got.pages, full
        self.pool.free(got.duplicates)
        return bool(got.duplicates)

    def _leave(self, request: Request) -> None:
        """A request has ended: nothing more is planned for it."""
        self._forget(request)
        if request.in_flight:
            self.leaving.add(request)
        else:
            self._release(request)

    def _forget(self, request: Request) -> None:
        self.running.pop(request, None)
        self.prefilling.pop(request, None)
        self.computing.pop(request, None)

    def _release(self, request: Request) -> None:
        """The one place where row and pages are given back: full pages to the tree, the rest to the pool."""
        if self.radix:
            self._insert(request, min(request.computed, len(request.tokens)))
        self.tree.unlock(request.node)
        self.pool.free(request.pages[request.shared :])
        if not self.radix:
            self.pool.free(self.tree.prune(request.node))
        self._changes.forced = [(row, token) for row, token in self._changes.forced if row != request.row]
        self.free_rows.append(request.row)
        request.row, request.pages, request.node, request.shared = 0, [], None, 0

    def _loss(self, request: Request) -> tuple[int, int, int]:
        """What preempting this one costs: tokens to compute again, those that others hold too left out. The youngest of equals."""
        held, node = 0, request.node
        while node is not None:
            held += len(node.pages) if node.locks > 1 else 0
            node = node.parent
        rank = -request.priority if self._by_priority else 0
        return rank, request.computed - held * self.pool.page_size, -request.arrival

    def _expect_more(self) -> None:
        """After a preemption: what those that run have used so far, and a margin, is the share to expect."""
        admitted = [*self.running, *self.prefilling]
        used = sum(r.new_tokens + RATIO_MARGIN for r in admitted)
        self.ratio = min(1.0, max(self.ratio, used / max(1, sum(r.max_new_tokens for r in admitted))))

    # ---- hold

    def hold(self, tokens: Iterable[int], namespace: Namespace = ()) -> Hold:
        """Lock what is cached of a prefix, in whole pages, until `let_go`."""
        match = self.tree.match(tree_key([*tokens, 0]), namespace)  # it leaves out the last token
        hold = Hold(self.tree.lock(match), len(match.pages) * self.pool.page_size)
        self.holds.append(hold)
        return hold

    def let_go(self, hold: Hold) -> None:
        """One that has given way: nothing happens."""
        if hold in self.holds:
            self.holds.remove(hold)
            self.tree.unlock(hold.node)

    # ---- all of it

    def flush(self) -> int:
        """Drop all cached prefixes that nobody runs on or holds. Returns how many pages stay, because somebody does."""
        self.pool.free(self.tree.evict(self.tree.evictable_pages))
        return self.tree.pages

    def check(self) -> None:
        """Prove that pages, rows and locks are conserved; RuntimeError says what is lost."""
        inside = [*self.running, *self.prefilling, *self.leaving]
        self.pool.check([page for r in inside for page in r.pages[r.shared :]] + self.tree.check())
        rows = [r.row for r in inside] + self.free_rows
        if sorted(rows) != list(range(1, self.max_batch_size + 1)):
            raise RuntimeError(f"rows are lost or have two owners: {sorted(rows)} of {self.max_batch_size}")
        locks: Counter[Node | None] = Counter()
        for r in inside:
            path, node = [], r.node
            while node is not None:
                locks[node] += 1
                path, node = node.pages + path, node.parent
            if path != r.pages[: r.shared]:
                raise RuntimeError(f"request {r.id} runs on {r.shared} pages of the tree that it does not hold")
        for hold in self.holds:
            node = hold.node
            while node is not None:
                locks[node] += 1
                node = node.parent
        for node in self.tree.nodes():
            if node.locks != locks[node]:
                raise RuntimeError(f"a node of the tree has {node.locks} locks, for {locks[node]} requests and holds")
