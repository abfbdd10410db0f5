"""Counts the bytes that have come back to the device and wait for their first use."""

from __future__ import annotations

import collections


class Unused:
    """Bytes that have come back and wait for their first use, by allocation."""

    __slots__ = ("_by_id", "_dropped", "_total")

    def __init__(self) -> None:
        self._by_id: dict[int, int] = {}
        self._dropped: collections.deque[int] = collections.deque()
        self._total = 0

    def add(self, allocation: int, nbytes: int) -> None:
        self._by_id[allocation] = nbytes
        self._total += nbytes

    def use(self, allocation: int) -> bool:
        """Count an allocation as used; whether it was not before. Called with the offloader's lock held."""
        nbytes = self._by_id.pop(allocation, None)
        if nbytes is None:
            return False
        self._total -= nbytes
        return True

    def drop(self, allocation: int) -> None:
        """An allocation is gone. Called from finalizers in any thread, so the sum is left to whoever has the lock."""
        nbytes = self._by_id.pop(allocation, None)
        if nbytes is not None:
            self._dropped.append(nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes in all. Called with the lock held."""
        while self._dropped:
            self._total -= self._dropped.popleft()
        return self._total
