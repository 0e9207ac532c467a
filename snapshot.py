"""What the engine holds at one moment, for whoever looks: `engine.snapshot()`.

    engine.watch(True)
    engine.snapshot().requests

However much the engine holds, a snapshot is bounded: the prefixes used last, the requests that run or wait longest, a pool in so
many cells. It has token ids and no text, because the one who looks has the time to decode them.

    python -m pytest tests/test_snapshot.py
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from cache.radix import Node, RadixTree
from scheduler.request import Request
from stats import Stats
from timeline import Span

if TYPE_CHECKING:  # whoever only reads a snapshot needs no torch
    from scheduler.scheduler import Scheduler

MOST_NODES = 128
MOST_CELLS = 2048
MOST_REQUESTS = 48
MOST_SPANS = 150  # about 30 steps: each is planned, launched, maybe masked, computed and committed
PREVIEW = 24  # tokens of a node
FREE, OWN, LOCKED, CACHED = ".rlc"  # who has a page: nobody, a request, requests through the tree, the tree alone


@dataclass(frozen=True)
class NodeView:
    """A node of the radix tree."""

    id: int
    parent: int  # its id; 0: a root
    pages: int
    tokens: int
    first: list[int]  # the ids of its first tokens
    locks: int  # requests that run on it; 0: it may be evicted
    hits: int  # requests that have found it
    salted: bool  # shared only with requests of the same salt


@dataclass(frozen=True)
class RequestView:
    id: str
    index: int  # which of its n samples
    state: str  # scheduler.request.State
    prompt_tokens: int
    cached_tokens: int  # of these, found in the tree
    computed_tokens: int  # whose keys and values are in the pages, or soon will be
    new_tokens: int
    max_new_tokens: int
    pages: int
    node: int  # id of the tree's node where its shared pages end; 0: none


@dataclass(frozen=True)
class Snapshot:
    at: float  # seconds of the engine's `time.perf_counter`, as the spans are
    stats: Stats
    nodes: list[NodeView]  # parents first
    cells: str  # the pool, page 1 first; a letter for each `pages_per_cell`: FREE, OWN, LOCKED or CACHED
    pages_per_cell: int
    requests: list[RequestView]
    spans: list[Span]


def take(scheduler: "Scheduler", stats: Stats, spans: Iterable[Span]) -> Snapshot:
    """Between two steps only: it reads what a step changes."""
    cells, pages_per_cell = pool_cells(page_owners(scheduler))
    inside = chain(scheduler.running, scheduler.prefilling, scheduler.waiting)
    return Snapshot(
        at=time.perf_counter(),
        stats=stats,
        nodes=[view_node(scheduler.tree, node) for node in scheduler.tree.recent(MOST_NODES)],
        cells=cells,
        pages_per_cell=pages_per_cell,
        requests=[view_request(request) for request in islice(inside, MOST_REQUESTS)],
        spans=list(spans),
    )


def view_node(tree: RadixTree, node: Node) -> NodeView:
    tokens = memoryview(node.key).cast("i")
    root = node
    while root.parent is not None:
        root = root.parent
    return NodeView(
        id=node.id,
        parent=node.parent.id,
        pages=len(node.pages),
        tokens=len(tokens),
        first=tokens[:PREVIEW].tolist(),
        locks=node.locks,
        hits=node.hits,
        salted=bool(root.namespace),
    )


def view_request(request: Request) -> RequestView:
    return RequestView(
        id=request.id,
        index=request.index,
        state=request.state.value,
        prompt_tokens=request.num_prompt,
        cached_tokens=request.metrics.cached_tokens,
        computed_tokens=request.computed,
        new_tokens=request.new_tokens,
        max_new_tokens=request.max_new_tokens,
        pages=len(request.pages),
        node=0 if request.node is None else request.node.id,
    )


def page_owners(scheduler: "Scheduler") -> str:
    """A letter for each page, from page 1 on."""
    owners = [FREE] * (1 + scheduler.pool.total)
    for request in (*scheduler.running, *scheduler.prefilling, *scheduler.leaving):
        for page in request.pages[request.shared :]:
            owners[page] = OWN
    for node in scheduler.tree.nodes():
        letter = LOCKED if node.locks else CACHED
        for page in node.pages:
            owners[page] = letter
    return "".join(owners[1:])


def pool_cells(owners: str) -> tuple[str, int]:
    """-> at most MOST_CELLS letters, and how many pages each stands for: its letter is what most of those in use have."""
    size = -(-len(owners) // MOST_CELLS)
    if size == 1:
        return owners, 1
    groups = (owners[at : at + size] for at in range(0, len(owners), size))
    return "".join(max(set(group) - {FREE} or FREE, key=group.count) for group in groups), size
