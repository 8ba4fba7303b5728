"""The minimum cut of a network: Ford and Fulkerson's theorem (1956), by shortest augmenting paths (Edmonds and Karp 1972)."""

from __future__ import annotations

import collections
import itertools
from typing import Any

__all__ = ["Flow"]


class Flow:
    """A network of capacities, whose minimum cut nearest to the sink is asked for."""

    #: More than all bytes together; whole numbers, so that nothing is lost to rounding.
    MOST = 1 << 60

    def __init__(self) -> None:
        self.left: dict[Any, dict[Any, int]] = collections.defaultdict(dict)

    def edge(self, one: Any, other: Any, capacity: int) -> None:
        self.left[one][other] = self.left[one].get(other, 0) + capacity
        self.left[other].setdefault(one, 0)

    def sink_side(self) -> set[Any]:
        """What can still reach the sink once the flow is at its most."""
        while path := self._path():
            amount = min(self.left[a][b] for a, b in itertools.pairwise(path))
            for a, b in itertools.pairwise(path):
                self.left[a][b] -= amount
                self.left[b][a] += amount
        found = {"sink"}
        waiting: list[Any] = ["sink"]
        while waiting:
            node = waiting.pop()
            for other in self.left[node]:
                if other not in found and self.left[other][node] > 0:
                    found.add(other)
                    waiting.append(other)
        return found

    def _path(self) -> list[Any]:
        parents: dict[Any, Any] = {"source": None}
        waiting: collections.deque[Any] = collections.deque(["source"])
        while waiting:
            node = waiting.popleft()
            for other, capacity in self.left[node].items():
                if capacity > 0 and other not in parents:
                    parents[other] = node
                    waiting.append(other)
            if "sink" in parents:
                break
        path: list[Any] = []
        node = "sink" if "sink" in parents else None
        while node is not None:
            path.append(node)
            node = parents[node]
        return path[::-1]
