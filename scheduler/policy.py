"""Who is admitted next. Requests wait in order of arrival (or of priority, then arrival); a policy reorders those in front.

fcfs        first come, first served
lpm         longest prefix match first: what is cached is used before it is evicted (SGLang)
dfs-weight  down the radix tree, the branch with most waiting requests first: neighbours in the tree run together (SGLang)
priority    the lowest `priority` value first (vLLM)

Whatever the policy, the request that has waited longest is passed over a bounded number of times; then it goes first.

    python -m pytest tests/test_policy.py
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator

from cache.radix import RadixTree
from scheduler.request import Request, State

MAX_PASSED_OVER = 64  # admissions of later requests that the oldest one puts up with
MAX_REORDERED = 128  # in a longer queue, matching every prompt would cost more than it saves: fcfs


def longest_prefix_match(requests: list[Request], tree: RadixTree) -> list[Request]:
    return sorted(requests, key=lambda r: -len(tree.match(r.tokens.tobytes(), r.namespace).pages))


def dfs_weight(requests: list[Request], tree: RadixTree) -> list[Request]:
    """Depth first through the tree: of a node's children, the one that leads to most requests first; then its own."""
    paths, weight = {}, {}
    for r in requests:
        node, path = tree.match(r.tokens.tobytes(), r.namespace).node, []
        while node is not None:
            path.append(node)
            weight[node] = weight.get(node, 0) + 1
            node = node.parent
        paths[r] = path[::-1]
    end = (0, 0, 0)  # after every child
    return sorted(requests, key=lambda r: [*((-weight[node], node.created, id(node)) for node in paths[r]), end])


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
        self._by_priority = policy == "priority"
        self._sorted: list[Request] = []
        self._by_age: deque[Request] = deque()  # with some that no longer wait

    def __len__(self) -> int:
        return len(self._sorted)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._sorted)

    def _rank(self, request: Request) -> tuple[int, int]:
        return (request.priority if self._by_priority else 0, request.arrival)

    def add(self, request: Request) -> None:
        insort(self._sorted, request, key=self._rank)
        if request.state is State.PREEMPTED:  # came before all that have never been admitted, or nearly so
            self._by_age.appendleft(request)
        else:
            self._by_age.append(request)

    def remove(self, request: Request) -> None:
        del self._sorted[bisect_left(self._sorted, self._rank(request), key=self._rank)]

    def candidates(self, tree: RadixTree, most: int) -> list[Request]:
        """Those to admit next, best first; at most `most`, because the rest is not worth a look."""
        order = self._sorted[:most]
        if self._reorder is not None and len(self._sorted) <= MAX_REORDERED:
            order = self._reorder(self._sorted, tree)
        oldest = self.oldest()
        if oldest is not None and oldest.passed_over >= MAX_PASSED_OVER:
            order = [oldest] + [r for r in order if r is not oldest]
        return order

    def admitted(self, request: Request) -> None:
        """Take out a request that was admitted, and note whom it has overtaken."""
        oldest = self.oldest()
        if oldest is not request:
            oldest.passed_over += 1
        self.remove(request)
        request.passed_over = 0

    def oldest(self) -> Request | None:
        while self._by_age and self._by_age[0].state not in (State.WAITING, State.PREEMPTED):
            self._by_age.popleft()
        return self._by_age[0] if self._by_age else None
