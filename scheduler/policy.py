"""Who is admitted next. Requests wait in order of arrival (or of priority, then arrival); a policy reorders those in front.

fcfs        first come, first served
lpm         longest prefix match first: what is cached is used before it is evicted (SGLang)
dfs-weight  down the radix tree, the branch with most waiting requests first: neighbours in the tree run together (SGLang)
priority    the lowest `priority` value first (vLLM)

Of a long queue only a front is reordered: those who have waited longest, and those whose prompts are nearest to the last one's,
so that what shares a prefix still runs together. Whatever the policy, the request that has waited longest is passed over a
bounded number of times; then it goes first.

    python -m pytest tests/test_policy.py
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from cache.radix import RadixTree
from scheduler.request import Request

MAX_PASSED_OVER = 64  # admissions of later requests that the oldest one puts up with
MAX_REORDERED = 128  # prompts that one step matches; to match all of a long queue would cost more than it saves

Rank = Callable[[Request], tuple]


def longest_prefix_match(requests: list[Request], tree: RadixTree) -> list[Request]:
    return sorted(requests, key=lambda r: -len(tree.match(r.key(), r.namespace).pages))


def dfs_weight(requests: list[Request], tree: RadixTree) -> list[Request]:
    """Depth first through the tree: of a node's children, the one that leads to most requests first; then its own."""
    paths, weight = {}, {}
    for r in requests:
        node, path = tree.match(r.key(), r.namespace).node, []
        while node is not None:
            path.append(node)
            weight[node] = weight.get(node, 0) + 1
            node = node.parent
        paths[r] = path[::-1]
    end = (0, 0, 0)  # after every child
    return sorted(requests, key=lambda r: [*((-weight[node], node.created, id(node)) for node in paths[r]), end])


def _by_age(request: Request) -> tuple:
    return (request.arrival,)


def _by_priority(request: Request) -> tuple:
    return request.priority, request.arrival


def _by_prompt(request: Request) -> tuple:
    """Sorted by this, requests stand as a depth-first walk through a tree of all their prompts meets them."""
    return hash(request.namespace), request.tokens, request.arrival


REORDER: dict[str, Callable[[list[Request], RadixTree], list[Request]] | None] = {
    "fcfs": None,
    "lpm": longest_prefix_match,
    "dfs-weight": dfs_weight,
    "priority": None,
}


class WaitingQueue:
    """The requests that wait, new or preempted: sorted at all times, so that ten thousand cost no more than ten."""

    def __init__(self, policy: str):
        self._reorder = REORDER[policy]
        self._rank: Rank = _by_priority if policy == "priority" else _by_age
        self._sorted: dict[Rank, list[Request]] = {rank: [] for rank in {self._rank, _by_age}}
        if self._reorder is not None:
            self._sorted[_by_prompt] = []
        self._last: tuple | None = None  # the prompt's rank of the one admitted last
        self._order: tuple[int, list[Request]] | None = None  # the front as reordered at that time of the tree's clock

    def __len__(self) -> int:
        return len(self._sorted[_by_age])

    def __iter__(self) -> Iterator[Request]:
        return iter(self._sorted[self._rank])

    @property
    def oldest(self) -> Request:
        return self._sorted[_by_age][0]

    def add(self, request: Request) -> None:
        self._order = None
        for rank, requests in self._sorted.items():
            insort(requests, request, key=rank)

    def remove(self, request: Request) -> None:
        self._order = None
        for rank, requests in self._sorted.items():
            del requests[bisect_left(requests, rank(request), key=rank)]

    def admitted(self, request: Request) -> None:
        """Take out a request that was admitted, and note whom it has overtaken."""
        if self.oldest is not request:
            self.oldest.passed_over += 1
        self.remove(request)
        self._last = _by_prompt(request)
        request.passed_over = 0

    def candidates(self, tree: RadixTree, most: int) -> list[Request]:
        """Those to admit next, best first; at most about `most`, because the rest is not worth a look."""
        order = self._sorted[self._rank][:most]
        if self._reorder is not None:
            # while a full cache lets nobody in, neither queue nor tree changes, and the order stands from step to step
            if self._order is None or self._order[0] != tree.clock:
                self._order = tree.clock, self._reorder(self._front(), tree)
            order = list(dict.fromkeys(self._order[1] + order))
        if order and self.oldest.passed_over >= MAX_PASSED_OVER:
            order = list(dict.fromkeys([self.oldest, *order]))
        return order

    def _front(self) -> list[Request]:
        """Whose prompts are worth a match: all; of a long queue those who wait longest, and neighbours of the last admitted."""
        oldest = self._sorted[_by_age]
        if len(oldest) <= MAX_REORDERED:
            return oldest
        prompts = self._sorted[_by_prompt]
        at = bisect_left(prompts, self._last, key=_by_prompt) if self._last is not None else 0
        near = prompts[max(0, at - MAX_REORDERED // 4) : at + MAX_REORDERED // 4]
        return list(dict.fromkeys(oldest[: MAX_REORDERED // 2] + near))
