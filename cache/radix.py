"""The radix tree: which pages hold which prefix, so that whoever comes next need not compute it again.

A node is a run of whole pages: the tokens of its edge and the page of each `page_size` of them. Two prompts that begin alike
share the nodes of that beginning, and part at a page's border. The tree owns the pages in it; requests lock what they use.
What nobody uses stays until its pages are wanted, then goes leaf by leaf, the tail first. (RadixAttention, Zheng et al., 2024.)

        root ── [system prompt] ─┬─ [question 1]         locks 0: evictable
                                 └─ [question 2 .......] locks 1: a request runs on it, so its path is locked too

Tokens are compared exactly, as bytes of int32, so that a long edge costs one memcmp and no hash can collide. Each namespace
has a root of its own: what else shaped the keys and values (an adapter, a user's salt, an image) is part of the key.

    python -m pytest tests/test_radix.py
"""

import heapq
import itertools
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

Namespace = tuple[Hashable, ...]
TOKEN_BYTES = 4


def tree_key(tokens: Iterable[int]) -> bytes:
    """Token ids as the tree compares them."""
    return array("i", tokens).tobytes()


_ids = itertools.count(1)


class Node:
    __slots__ = ("children", "created", "hits", "id", "key", "locks", "pages", "parent", "ticket", "used")

    def __init__(self, key: bytes, pages: list[int], parent: "Node | None", clock: int):
        self.key, self.pages, self.parent = key, pages, parent
        self.children: dict[bytes, Node] = {}  # by the first page of their key
        self.locks = 0  # requests whose path leads through here
        self.created = self.used = clock
        self.hits = 0
        self.id = next(_ids)  # for whoever watches: no other node has it, ever
        self.ticket = 0  # of this node's entry in the heap of evictable leaves; 0 = it has none


class Root(Node):
    __slots__ = ("namespace",)

    def __init__(self, namespace: Namespace):
        super().__init__(b"", [], None, 0)
        self.id = 0
        self.namespace = namespace


@dataclass(slots=True)
class Match:
    """The cached beginning of a prompt. Nothing is locked yet."""

    pages: list[int]
    node: Node | None  # where it ends; None: nothing is cached
    used: int  # how many of that node's pages belong to it
    evictable: int  # how many of the pages could be evicted now, and not once they are locked


@dataclass(slots=True)
class Insertion:
    """What the tree holds after an insert: its own pages for the whole key, and those of the caller's it had no use for."""

    pages: list[int]
    node: Node | None
    duplicates: list[int]


# What goes first: the leaf with the least of this.
EVICTION: dict[str, Callable[[Node], Any]] = {
    "lru": lambda node: node.used,
    "lfu": lambda node: (node.hits, node.used),
    "fifo": lambda node: node.created,
}


class RadixTree:
    def __init__(self, page_size: int, eviction: str = "lru"):
        self.page_size, self.block = page_size, page_size * TOKEN_BYTES
        self.roots: dict[Namespace, Root] = {}
        self.pages = 0  # in the tree
        self.locked_pages = 0
        self._priority = EVICTION[eviction]
        self.clock = 0  # inserts, locks and unlocks so far
        self._heap: list[tuple[Any, int, Node]] = []  # (priority, ticket, leaf); stale if the leaf has another ticket
        self._leaves = 0  # evictable ones
        self._tickets = 0

    @property
    def evictable_pages(self) -> int:
        """All that is not locked: below an unlocked node nothing is locked, so it can go leaf by leaf."""
        return self.pages - self.locked_pages

    # ---- find and add

    def match(self, key: bytes, namespace: Namespace = ()) -> Match:
        """The longest cached prefix of `key`, in whole pages, and at most length - 1 tokens: one must be computed.

        Changes nothing, so that a queue may ask as often as it likes.
        """
        key = key[: (len(key) // TOKEN_BYTES - 1) // self.page_size * self.block]
        pages: list[int] = []
        last, used, evictable = None, 0, 0
        for node, same in self._walk(key, namespace):
            last, used = node, same // self.block
            pages += node.pages[:used]
            evictable += 0 if node.locks else used
        return Match(pages, last, used, evictable)

    def insert(self, key: bytes, pages: list[int], namespace: Namespace = ()) -> Insertion:
        """Give the tree a page for each page of `key`. Where it has one already, the caller's is a duplicate.

        A page that the tree itself gave out for this place is no duplicate. Whole pages only: ValueError otherwise.
        """
        if len(key) != len(pages) * self.block:
            raise ValueError(f"{len(key) // TOKEN_BYTES} tokens do not fill {len(pages)} pages of {self.page_size}")
        if not pages:
            return Insertion([], None, [])
        self.clock += 1
        own: list[int] = []
        node: Node = self.roots.setdefault(namespace, Root(namespace))
        for child, same in self._walk(key, namespace):
            node = child if same == len(child.key) else self._split(child, same // self.block)
            own += node.pages
        at = len(own)
        duplicates = [mine for mine, theirs in zip(pages, own, strict=False) if mine != theirs]
        if at < len(pages):
            node = self._add_leaf(node, key[at * self.block :], pages[at:])
        return Insertion(own + pages[at:], node, duplicates)

    def _walk(self, key: bytes, namespace: Namespace) -> Iterator[tuple[Node, int]]:
        """The nodes on the way down, with how many bytes of each are the key's; only of the last it may be a part."""
        node: Node | None = self.roots.get(namespace)
        at = 0
        while node is not None and at < len(key):
            node = node.children.get(key[at : at + self.block])
            if node is not None:
                same = self._common(node.key, key, at)
                at += same
                part = same < len(node.key)  # asked before the yield: the caller may split the node
                yield node, same
                if part:
                    return

    def _common(self, edge: bytes, key: bytes, at: int) -> int:
        """How many bytes, in whole pages, `edge` and `key[at:]` begin with alike."""
        low, high, block = 0, min(len(edge), len(key) - at) // self.block, self.block
        if edge[: high * block] == key[at : at + high * block]:
            return high * block
        while low < high:
            middle = (low + high + 1) // 2
            if edge[low * block : middle * block] == key[at + low * block : at + middle * block]:
                low = middle
            else:
                high = middle - 1
        return low * block

    def _add_leaf(self, parent: Node, key: bytes, pages: list[int]) -> Node:
        leaf = Node(key, pages, parent, self.clock)
        parent.children[key[: self.block]] = leaf
        self.pages += len(pages)
        self._withdraw(parent)
        self._offer(leaf)
        return leaf

    def _split(self, node: Node, count: int) -> Node:
        """Put the first `count` pages of a node into a new one above it. The node keeps its end, and so its locks' meaning."""
        at = count * self.block
        upper = Node(node.key[:at], node.pages[:count], node.parent, node.created)
        upper.locks, upper.used, upper.hits = node.locks, node.used, node.hits
        upper.parent.children[node.key[: self.block]] = upper
        node.key, node.pages, node.parent = node.key[at:], node.pages[count:], upper
        upper.children[node.key[: self.block]] = node
        return upper

    # ---- hold and let go

    def lock(self, match: Match) -> Node | None:
        """Keep the matched pages from eviction. The node it returns is for `unlock`."""
        node = match.node
        if node is not None and match.used < len(node.pages):
            node = self._split(node, match.used)
        self.lock_node(node, hits=1)
        return node

    def lock_node(self, node: Node | None, hits: int = 0) -> None:
        """Lock a node that `insert` has returned: it was computed, so it is no hit."""
        self.clock += 1
        while node is not None and node.parent is not None:
            node.locks += 1
            node.hits += hits
            node.used = self.clock
            if node.locks == 1:
                self.locked_pages += len(node.pages)
                self._withdraw(node)
            node = node.parent

    def unlock(self, node: Node | None) -> None:
        """Undo one lock. RuntimeError if there is none."""
        self.clock += 1
        while node is not None and node.parent is not None:
            if node.locks == 0:
                raise RuntimeError("a node was unlocked that nobody had locked")
            node.locks -= 1
            node.used = self.clock
            if node.locks == 0:
                self.locked_pages -= len(node.pages)
                self._offer(node)
            node = node.parent

    # ---- let pages go

    def evict(self, count: int) -> list[int]:
        """Take `count` pages, or as many as are not locked, out of the tree: least wanted leaf first, its tail first."""
        freed: list[int] = []
        while len(freed) < count and self._heap:
            _, ticket, leaf = heapq.heappop(self._heap)
            if leaf.ticket == ticket:
                freed += self._cut(leaf, min(len(leaf.pages), count - len(freed)))
        return freed

    def prune(self, node: Node | None) -> list[int]:
        """Take a node out, and what is above it, as far up as nobody locks it or branches off."""
        freed: list[int] = []
        while node is not None and node.parent is not None and not node.locks and not node.children:
            parent = node.parent
            freed += self._cut(node, len(node.pages))
            node = parent
        return freed

    def _cut(self, leaf: Node, count: int) -> list[int]:
        """Drop the last `count` pages of an evictable leaf; all of them: the leaf goes, and its parent may be next."""
        self._withdraw(leaf)
        keep = len(leaf.pages) - count
        pages, parent = leaf.pages[keep:], leaf.parent
        self.pages -= count
        if keep:
            leaf.pages, leaf.key = leaf.pages[:keep], leaf.key[: keep * self.block]
            self._offer(leaf)
            return pages
        del parent.children[leaf.key[: self.block]]
        if not isinstance(parent, Root):
            self._offer(parent)
        elif not parent.children:
            del self.roots[parent.namespace]
        return pages

    # ---- the heap of evictable leaves: an entry whose ticket is no longer its leaf's counts for nothing

    def _offer(self, node: Node) -> None:
        """Enter a node, if it is an evictable leaf."""
        if node.locks or node.children or node.ticket:
            return
        self._tickets += 1
        node.ticket = self._tickets
        self._leaves += 1
        heapq.heappush(self._heap, (self._priority(node), node.ticket, node))
        if len(self._heap) > 2 * self._leaves + 64:  # more than half of it is stale
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapq.heapify(self._heap)

    def _withdraw(self, node: Node) -> None:
        if node.ticket:
            node.ticket = 0
            self._leaves -= 1

    # ---- all of it

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents first; the roots are left out."""
        stack = [child for root in self.roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def recent(self, most: int) -> Iterator[Node]:
        """The nodes used last, at most so many; parents first, for whoever uses a node uses what is above it."""
        heap = [(-child.used, child.id, child) for root in self.roots.values() for child in root.children.values()]
        heapq.heapify(heap)
        for _ in range(min(most, self.pages)):
            if not heap:
                return
            node = heapq.heappop(heap)[2]
            yield node
            for child in node.children.values():
                heapq.heappush(heap, (-child.used, child.id, child))

    def check(self) -> list[int]:
        """Prove that the counters and the heap say what the nodes say, RuntimeError otherwise. Returns every page held."""
        pages: list[int] = []
        locked = leaves = 0
        entries = {ticket for _, ticket, _ in self._heap}
        for node in self.nodes():
            pages += node.pages
            locked += len(node.pages) if node.locks else 0
            evictable = not node.locks and not node.children
            leaves += evictable
            if not node.pages or len(node.key) != len(node.pages) * self.block:
                raise RuntimeError(f"a node of {len(node.key)} bytes holds {len(node.pages)} pages")
            if node.parent.children.get(node.key[: self.block]) is not node:
                raise RuntimeError("a node is not where its key says")
            if not isinstance(node.parent, Root) and node.locks > node.parent.locks:
                raise RuntimeError("a node is locked and the way to it is not")
            if evictable != bool(node.ticket) or (evictable and node.ticket not in entries):
                raise RuntimeError("an evictable leaf is not in the heap, or another node is")
        if any(not root.children for root in self.roots.values()):
            raise RuntimeError("an empty namespace was kept")
        if (len(pages), locked, leaves) != (self.pages, self.locked_pages, self._leaves):
            raise RuntimeError(f"counted {len(pages)} pages, {locked} locked, {leaves} leaves; the tree says otherwise")
        return pages
