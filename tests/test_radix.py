"""The radix tree: what it finds, shares, locks and lets go, node by node and against a plain dictionary of prefixes.

python -m pytest tests/test_radix.py
"""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.radix import EVICTION, Node, RadixTree, tree_key


def tree(*prompts: Sequence[int], page_size: int = 1, eviction: str = "lru") -> RadixTree:
    """A tree with these prompts in it, its pages numbered from 1 in order of arrival."""
    t = RadixTree(page_size, eviction)
    for prompt in prompts:
        known = find(t, prompt)
        new = range(t.pages + 1, t.pages + 1 + len(prompt) // page_size - len(known))
        t.insert(tree_key(prompt), [*known, *new])
    t.check()
    return t


def find(t: RadixTree, prompt: Sequence[int], namespace: tuple = ()) -> list[int]:
    """All pages of a prompt: one token more than there is gets round the cut."""
    return t.match(tree_key([*prompt, 99]), namespace).pages


def hold(t: RadixTree, prompt: Sequence[int]) -> Node | None:
    node = t.lock(t.match(tree_key([*prompt, 99])))
    t.check()
    return node


def shape(t: RadixTree) -> list[tuple[int, list[int]]]:
    """Depth and pages of every node, sorted."""

    def depth(node: Node) -> int:
        return 0 if node.parent.parent is None else 1 + depth(node.parent)

    return sorted((depth(node), node.pages) for node in t.nodes())


# ---- match


@pytest.mark.parametrize(
    "page_size, tokens, pages",
    [
        (1, 0, 0),
        (1, 1, 0),
        (1, 2, 1),
        (1, 8, 7),
        (1, 9, 8),
        (1, 20, 8),
        (4, 4, 0),
        (4, 5, 1),
        (4, 8, 1),
        (4, 9, 2),
        (4, 30, 2),
    ],
)
def test_a_match_is_cut_at_length_minus_1_in_whole_pages(page_size: int, tokens: int, pages: int):
    t = tree(range(8), page_size=page_size)
    got = t.match(tree_key(range(tokens)))
    assert got.pages == list(range(1, pages + 1))
    assert (got.used, got.evictable) == (pages, pages)
    assert (got.node is None) == (pages == 0)


def test_a_match_ends_where_the_tokens_differ():
    t = tree(range(12), page_size=4)
    assert find(t, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]) == [1, 2]
    assert find(t, [0, 1, 2, 3, 0, 5, 6, 7]) == [1]
    assert find(t, [1, 2, 3, 4]) == []


def test_a_match_goes_down_through_nodes():
    t = tree([1, 2, 3], [1, 2, 4, 5], [1, 6])
    assert shape(t) == [(0, [1]), (1, [2]), (1, [6]), (2, [3]), (2, [4, 5])]
    assert find(t, [1, 2, 4, 5]) == [1, 2, 4, 5]
    assert find(t, [1, 2, 4]) == [1, 2, 4]
    assert find(t, [1, 6, 4]) == [1, 6]


def test_a_match_changes_nothing():
    t = tree([1, 2, 3], [1, 2, 4])
    before = [(n.key, n.used, n.hits, n.locks, n.ticket) for n in t.nodes()], t.clock, len(t._heap)
    for prompt in ([1], [1, 2], [1, 2, 3, 4], [5]):
        t.match(tree_key(prompt))
    assert before == ([(n.key, n.used, n.hits, n.locks, n.ticket) for n in t.nodes()], t.clock, len(t._heap))


def test_a_match_says_how_much_of_it_a_lock_would_take_from_eviction():
    t = tree([1, 2, 3, 4, 5])
    hold(t, [1, 2])
    got = t.match(tree_key([1, 2, 3, 4, 9]))
    assert (got.pages, got.used, got.evictable) == ([1, 2, 3, 4], 2, 2)


def test_tokens_beyond_a_byte_and_negative_ones_are_told_apart():
    t = tree([1, 256, 65536, 2**31 - 1, -1])
    assert find(t, [1, 256, 65536, 2**31 - 1, -1]) == [1, 2, 3, 4, 5]
    assert find(t, [1, 257]) == [1]
    assert find(t, [256]) == []


# ---- insert


def test_the_tree_gives_back_its_own_pages_and_the_duplicates():
    t = tree([1, 2, 3])
    got = t.insert(tree_key([1, 2, 9, 9]), [11, 12, 13, 14])
    assert (got.pages, got.duplicates, got.node.pages) == ([1, 2, 13, 14], [11, 12], [13, 14])
    assert t.pages == 5
    t.check()


def test_a_page_that_came_from_the_tree_is_no_duplicate():
    t = tree([1, 2, 3])
    got = t.insert(tree_key([1, 2, 3, 4]), [1, 12, 3, 14])
    assert (got.pages, got.duplicates) == ([1, 2, 3, 14], [12])


@pytest.mark.parametrize("prompt", [[1, 2, 3], [1, 2], [1]])
def test_what_is_there_already_adds_nothing(prompt: list[int]):
    t = tree([1, 2, 3])
    mine = list(range(11, 11 + len(prompt)))
    got = t.insert(tree_key(prompt), mine)
    assert (got.pages, got.duplicates, t.pages) == ([1, 2, 3][: len(prompt)], mine, 3)
    assert got.node.pages[-1] == len(prompt), "the node ends where the key ends"
    t.check()


def test_inserting_nothing():
    t = tree()
    got = t.insert(b"", [])
    assert (got.pages, got.node, got.duplicates, t.roots) == ([], None, [], {})


@pytest.mark.parametrize("tokens, pages", [(4, 2), (5, 1), (3, 1), (0, 1), (4, 0)])
def test_only_whole_pages_are_taken(tokens: int, pages: int):
    t = RadixTree(4)
    with pytest.raises(ValueError, match=f"{tokens} tokens do not fill {pages} pages of 4"):
        t.insert(tree_key(range(tokens)), list(range(1, pages + 1)))
    assert t.check() == [] and not t.roots


def test_a_split_leaves_locks_and_their_nodes_where_they_were():
    t = tree([1, 2, 3, 4])
    node = hold(t, [1, 2, 3, 4])
    t.insert(tree_key([1, 2, 9]), [1, 2, 13])
    t.check()
    assert node.pages == [3, 4] and node.locks == node.parent.locks == 1
    assert (t.locked_pages, t.evictable_pages) == (4, 1)
    t.unlock(node)
    t.check()
    assert t.locked_pages == 0


def test_namespaces_never_share():
    t = RadixTree(1)
    t.insert(tree_key([1, 2]), [1, 2], ("a",))
    t.insert(tree_key([1, 2]), [3, 4], ("b",))
    assert t.insert(tree_key([1, 2]), [5, 6]).duplicates == []
    assert [find(t, [1, 2], namespace) for namespace in (("a",), ("b",), (), ("c",))] == [[1, 2], [3, 4], [5, 6], []]
    assert sorted(t.check()) == [1, 2, 3, 4, 5, 6]


def test_an_empty_namespace_disappears():
    t = RadixTree(1)
    for i in range(100):
        t.insert(tree_key([1, 2]), [2 * i + 1, 2 * i + 2], ("salt", i))
    assert len(t.roots) == 100
    t.evict(199)
    assert len(t.roots) == 1
    t.evict(1)
    assert t.roots == {} and t.check() == []


# ---- lock and unlock


def test_a_lock_holds_the_way_up_and_what_is_below_stays_free():
    t = tree([1, 2, 3, 4, 5])
    node = hold(t, [1, 2, 3])
    assert node.pages == [1, 2, 3] and (t.locked_pages, t.evictable_pages) == (3, 2)
    assert t.evict(5) == [4, 5]
    assert find(t, [1, 2, 3, 4]) == [1, 2, 3]
    t.unlock(node)
    assert sorted(t.evict(5)) == [1, 2, 3]


def test_locks_are_counted():
    t = tree([1, 2, 3])
    a, b, c = hold(t, [1, 2, 3]), hold(t, [1, 2, 3]), hold(t, [1])
    for node, locked in ((b, 3), (a, 1), (c, 0)):
        t.unlock(node)
        t.check()
        assert t.locked_pages == locked


def test_locking_nothing_is_nothing():
    t = tree([1, 2])
    assert hold(t, [3]) is None
    t.unlock(None)
    assert t.locked_pages == 0


def test_unlocking_what_is_not_locked_raises():
    t = tree([1, 2, 3])
    node = hold(t, [1, 2])
    t.unlock(node)
    with pytest.raises(RuntimeError, match="nobody had locked"):
        t.unlock(node)


# ---- evict


def test_the_least_recently_used_leaf_goes_first():
    t = tree([1, 10], [2, 20], [3, 30])
    for prompt in ([2, 20], [1, 10]):
        t.unlock(hold(t, prompt))
    assert [t.evict(2) for _ in range(3)] == [[5, 6], [3, 4], [1, 2]]


def test_a_leaf_is_in_use_until_it_is_let_go():
    t = tree([1], [2])
    first, second = hold(t, [1]), hold(t, [2])
    t.unlock(second)
    t.unlock(first)
    assert [t.evict(1) for _ in range(2)] == [[2], [1]]


def test_the_tail_of_a_leaf_goes_first():
    t = tree(range(8), page_size=2)
    for evicted, left in ((4, [1, 2, 3]), (3, [1, 2]), (2, [1])):
        assert t.evict(1) == [evicted]
        t.check()
        assert find(t, range(8)) == left


def test_leaves_go_before_what_they_stand_on():
    t = tree([1, 2, 3], [1, 2, 4])
    assert t.evict(1) == [3]
    assert t.evict(1) == [4]
    assert t.evict(1) == [2], "now it is a leaf, and its tail goes"
    assert t.evict(9) == [1]


def test_what_is_locked_stays():
    t = tree([1, 2, 3], [1, 4])
    node = hold(t, [1, 2])
    assert sorted(t.evict(99)) == [3, 4]
    assert t.evict(99) == []
    assert sorted(t.check()) == [1, 2]
    t.unlock(node)
    assert sorted(t.evict(99)) == [1, 2]


def test_evicting_nothing():
    t = tree([1, 2])
    assert t.evict(0) == [] and t.pages == 2
    assert RadixTree(4).evict(3) == []


@pytest.mark.parametrize("eviction, order", [("lru", [3, 1, 2]), ("lfu", [3, 2, 1]), ("fifo", [1, 2, 3])])
def test_what_eviction_goes_by(eviction: str, order: list[int]):
    """1 is the oldest and used most, 2 was used last, 3 never."""
    t = tree([1], [2], [3], eviction=eviction)
    for prompt in ([1], [1], [2]):
        t.unlock(hold(t, prompt))
    assert [t.evict(1)[0] for _ in range(3)] == order


def test_an_unknown_eviction_is_refused():
    with pytest.raises(KeyError):
        RadixTree(1, "mru")


def test_a_lock_in_the_meantime_keeps_a_leaf_from_its_old_place_in_the_queue():
    t = tree([1], [2])
    node = hold(t, [1])
    assert t.evict(1) == [2]
    t.unlock(node)
    assert t.evict(1) == [1]


def test_the_heap_does_not_grow_with_locks():
    t = tree(*[[i, 0] for i in range(10)])
    for i in range(5000):
        t.unlock(t.lock(t.match(tree_key([i % 10, 0, 0]))))
    assert len(t._heap) <= 2 * 10 + 65
    t.check()
    assert len(t.evict(99)) == 20


# ---- prune


def test_prune_takes_a_branch_out_up_to_where_another_begins():
    t = tree([1, 2, 3, 4], [1, 2, 5])
    node = hold(t, [1, 2, 3, 4])
    t.unlock(node)
    assert sorted(t.prune(node)) == [3, 4]
    t.check()
    assert sorted(t.check()) == [1, 2, 5]


def test_prune_stops_at_a_lock():
    t = tree([1, 2, 3, 4])
    upper, node = hold(t, [1, 2]), hold(t, [1, 2, 3, 4])
    t.unlock(node)
    assert t.prune(node) == [3, 4]
    assert t.prune(upper) == []
    t.unlock(upper)
    assert t.prune(upper) == [1, 2] and t.roots == {}


def test_prune_leaves_what_has_children_and_takes_nothing_for_nothing():
    t = tree([1, 2, 3])
    node = hold(t, [1])
    t.unlock(node)
    assert t.prune(node) == [] and t.prune(None) == []
    assert t.pages == 3


# ---- check


def leaf(t: RadixTree) -> Node:
    return next(node for node in t.nodes() if not node.children and not node.locks)


def inner(t: RadixTree) -> Node:
    return next(node for node in t.nodes() if node.children)


def moved(t: RadixTree) -> None:
    node = leaf(t)
    node.parent.children[tree_key([77])] = node.parent.children.pop(node.key[: t.block])


def set_to(name: str, value: Callable[[RadixTree], object], of: Callable[[RadixTree], object] = lambda t: t):
    return lambda t: setattr(of(t), name, value(t))


CORRUPTIONS: dict[str, Callable[[RadixTree], None]] = {
    "a page too many is counted": set_to("pages", lambda t: t.pages + 1),
    "a locked page too few is counted": set_to("locked_pages", lambda t: t.locked_pages - 1),
    "a leaf too few is counted": set_to("_leaves", lambda t: t._leaves - 1),
    "a node without its last page": lambda t: leaf(t).pages.pop(),
    "a node with a page too many": lambda t: leaf(t).pages.append(50),
    "a node with a token too few": set_to("key", lambda t: leaf(t).key[:-4], leaf),
    "a node that is not where its key says": moved,
    "a lock on a leaf only": set_to("locks", lambda t: 1, leaf),
    "a lock that is lost": set_to("locks", lambda t: 0, inner),
    "a leaf that left the heap": set_to("ticket", lambda t: 0, leaf),
    "a leaf with a ticket of no entry": set_to("ticket", lambda t: 999, leaf),
    "an inner node in the heap": set_to("ticket", lambda t: t._heap[0][1], inner),
    "an emptied heap": lambda t: t._heap.clear(),
    "an empty namespace": lambda t: t.roots.__setitem__(("x",), type(t.roots[()])(("x",))),
    "a branch that is cut off": lambda t: inner(t).children.clear(),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_sees(corruption: str):
    t = tree([1, 2, 3, 4], [1, 2, 5, 6])
    hold(t, [1, 2, 3, 4])
    CORRUPTIONS[corruption](t)
    with pytest.raises(RuntimeError):
        t.check()


# ---- against a plain model: a dictionary of prefixes

Prefix = tuple[int, tuple[int, ...]]  # namespace, tokens in whole pages


class Model:
    """Every cached prefix with its last page, and how many locks lead over it. Slow, and obviously right."""

    def __init__(self, page_size: int):
        self.size = page_size
        self.pages: dict[Prefix, int] = {}
        self.locks: Counter[Prefix] = Counter()

    def prefixes(self, namespace: int, tokens: Sequence[int]) -> list[Prefix]:
        return [(namespace, tuple(tokens[:end])) for end in range(self.size, len(tokens) + 1, self.size)]

    def match(self, namespace: int, tokens: Sequence[int]) -> list[Prefix]:
        return [p for p in self.prefixes(namespace, tokens[:-1]) if p in self.pages]

    def insert(self, namespace: int, tokens: Sequence[int], pages: list[int]) -> tuple[list[int], list[int]]:
        own = [self.pages.setdefault(p, page) for p, page in zip(self.prefixes(namespace, tokens), pages, strict=True)]
        return own, [mine for mine, theirs in zip(pages, own, strict=True) if mine != theirs]

    def lock(self, prefixes: list[Prefix], by: int) -> None:
        for p in prefixes:
            self.locks[p] += by

    def is_leaf(self, prefix: Prefix) -> bool:
        namespace, tokens = prefix
        return not any(n == namespace and len(t) > len(tokens) and t[: len(tokens)] == tokens for n, t in self.pages)

    def prune(self, prefixes: list[Prefix]) -> set[int]:
        gone = set()
        for p in reversed(prefixes):
            if self.locks[p] or not self.is_leaf(p):
                break
            gone.add(self.pages.pop(p))
        return gone

    @property
    def unlocked(self) -> int:
        return sum(not self.locks[p] for p in self.pages)


Tokens = st.lists(st.integers(0, 2), max_size=14)
Operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["insert", "match", "lock"]), st.integers(0, 1), Tokens),
        st.tuples(st.sampled_from(["unlock", "release"]), st.integers(0, 9), st.just([])),
        st.tuples(st.just("evict"), st.integers(0, 12), st.just([])),
    ),
    max_size=40,
)


@settings(max_examples=250)
@given(st.sampled_from([1, 2, 4]), st.sampled_from(list(EVICTION)), Operations)
def test_the_tree_does_what_a_dictionary_of_prefixes_does(page_size: int, eviction: str, operations: list[tuple]):
    t, model = RadixTree(page_size, eviction), Model(page_size)
    held: list[tuple[Node | None, list[Prefix]]] = []
    page = 1
    for name, number, tokens in operations:
        if name == "insert":
            tokens = tokens[: len(tokens) // page_size * page_size]
            mine = list(range(page, page + len(tokens) // page_size))
            page += len(mine)
            got = t.insert(tree_key(tokens), mine, (number,))
            assert (got.pages, got.duplicates) == model.insert(number, tokens, mine)
        elif name in ("match", "lock"):
            got, expected = t.match(tree_key(tokens), (number,)), model.match(number, tokens)
            assert got.pages == [model.pages[p] for p in expected]
            assert got.evictable == sum(not model.locks[p] for p in expected)
            if name == "lock":
                held.append((t.lock(got), expected))
                model.lock(expected, 1)
        elif name == "evict":
            freed, unlocked = t.evict(number), model.unlocked
            assert len(freed) == len(set(freed)) == min(number, unlocked)
            gone = [p for p in model.pages if model.pages[p] in set(freed)]
            assert len(gone) == len(freed) and not any(model.locks[p] for p in gone)
            for p in sorted(gone, key=lambda p: -len(p[1])):
                assert model.is_leaf(p), "what others stand on was evicted"
                del model.pages[p]
        elif held:
            node, prefixes = held.pop(number % len(held))
            t.unlock(node)
            model.lock(prefixes, -1)
            if name == "release":
                assert set(t.prune(node)) == model.prune(prefixes)
        assert sorted(t.check()) == sorted(model.pages.values())
        assert (t.pages, t.evictable_pages) == (len(model.pages), model.unlocked)
        assert set(t.roots) == {(namespace,) for namespace, _ in model.pages}
        assert len(t._heap) <= 2 * t._leaves + 65
    for node, _ in held:
        t.unlock(node)
    assert len(t.evict(10**6)) == len(model.pages) and t.roots == {}
