"""Sets of channels that have one scale, as a union-find, and which of them have to keep it."""

from typing import Dict

import numpy as np

__all__ = ['NOBODY', 'ChannelSets']

NOBODY = -1
"""In the place of a slot: a channel that no layer with a weight wrote."""


class ChannelSets:
    """Disjoint sets of slots (channels that some layer reads or writes); some are fixed, for a reason.

    Args:
        count: Number of slots; at first each is a set of its own.

    Examples:
        >>> sets = ChannelSets(4)
        >>> sets.unite(np.array([0, 1]), np.array([2, 3]))
        >>> sets.fix(np.array([3]), 'a sigmoid')
        >>> sets.sets().tolist(), sets.fixed().tolist(), sets.reason(np.array([1]))
        ([0, 1, 0, 1], [False, True, False, True], 'a sigmoid')
    """

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)
        self._reasons: Dict[int, str] = {}

    def find(self, slot: int) -> int:
        """The slot that stands for the set of ``slot``."""
        parent, root = self._parent, slot
        while parent[root] != root:
            root = parent[root]
        while parent[slot] != root:
            parent[slot], slot = root, parent[slot]
        return int(root)

    def unite(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes channel i of ``a`` and channel i of ``b`` one set, for every i."""
        for x, y in zip(a.tolist(), b.tolist()):
            if x == y:
                continue
            if x == NOBODY or y == NOBODY:
                self.fix(np.array([max(x, y)]), 'no producer (joined with what no layer computed)')
                continue
            x, y = self.find(x), self.find(y)
            if x != y:
                low, high = min(x, y), max(x, y)
                self._parent[high] = low
                reason = self._reasons.pop(high, None)
                if reason is not None:
                    self._reasons.setdefault(low, reason)

    def fix(self, slots: np.ndarray, reason: str) -> None:
        """Says that the sets of ``slots`` have to keep their scale."""
        for slot in slots.tolist():
            if slot != NOBODY:
                self._reasons.setdefault(self.find(slot), reason)

    def reason(self, slots: np.ndarray) -> str:
        """Why the sets of ``slots`` have to keep their scale, the first reason; empty where they are free."""
        return next((self._reasons[r] for r in map(self.find, slots.tolist()) if r in self._reasons), '')

    def sets(self) -> np.ndarray:
        """(N,) the set of every slot, as the number of one slot of it."""
        return np.array([self.find(slot) for slot in range(len(self._parent))])

    def fixed(self) -> np.ndarray:
        """(N,) whether the set of each slot has to keep its scale."""
        roots = self.sets()
        marks = np.zeros(len(roots), dtype=bool)
        marks[list(self._reasons)] = True
        return marks[roots]
