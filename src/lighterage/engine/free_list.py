"""The free ranges of one linear space that grows at its end."""

from __future__ import annotations

from bisect import bisect_left, insort


class FreeList:
    """Hands out byte ranges of the space `[0, size)`, which starts empty and only ever grows.

    A range comes from the smallest hole that fits, the lowest of equals. The free tail at the end of the space is the
    last resort, whatever its size. So no choice depends on how large the space is: a program of takes and gives that
    is run again from an empty space makes the same choices, and never needs more room than it did the first time.
    """

    __slots__ = ("_by_size", "_end_of", "_starts", "_tail", "in_use", "size")

    def __init__(self) -> None:
        self.size = 0
        """Bytes of the space, free or not."""
        self.in_use = 0
        """Bytes taken and not yet given back."""
        self._tail = 0  # [_tail, size) is free; the byte before it is not
        self._starts: list[int] = []  # of the holes, which are all the free ranges below the tail
        self._end_of: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []  # (nbytes, start) of the same holes

    @property
    def tail_free(self) -> int:
        """Free bytes at the very end of the space: what a growth would join."""
        return self.size - self._tail

    def grow(self, nbytes: int) -> None:
        """Extend the space at its end by `nbytes` free bytes."""
        assert nbytes > 0, f"a space grows by a positive number of bytes; got {nbytes}"
        self.size += nbytes

    def take(self, nbytes: int) -> int | None:
        """The offset of a range of `nbytes` bytes that is now taken, or None when no free range is long enough."""
        assert nbytes > 0, f"a range has a positive number of bytes; got {nbytes}"
        at = bisect_left(self._by_size, (nbytes, 0))
        if at < len(self._by_size):
            offset = self._by_size[at][1]
            end = self._remove(offset)
            if offset + nbytes < end:
                self._insert(offset + nbytes, end)
        elif nbytes <= self.tail_free:
            offset = self._tail
            self._tail += nbytes
        else:
            return None
        self.in_use += nbytes
        return offset

    def give(self, offset: int, nbytes: int) -> None:
        """Give back the taken range `[offset, offset + nbytes)`, joining it with its free neighbours.

        Raises:
            AssertionError: when a byte of the range is outside the space or free already.
        """
        lo, hi = offset, offset + nbytes
        at = bisect_left(self._starts, lo)
        below = self._starts[at - 1] if at > 0 else None
        above = self._starts[at] if at < len(self._starts) else None
        assert 0 <= lo < hi <= self._tail, f"[{lo}, {hi}) is free already or outside the space of {self.size} bytes"
        assert above is None or hi <= above, f"[{lo}, {hi}) overlaps the free range that starts at {above}"
        if below is not None:
            assert self._end_of[below] <= lo, f"[{lo}, {hi}) overlaps the free range [{below}, {self._end_of[below]})"
        self.in_use -= nbytes
        if above == hi:
            hi = self._remove(above)
        if below is not None and self._end_of[below] == lo:
            self._remove(below)
            lo = below
        if hi == self._tail:
            self._tail = lo
        else:
            self._insert(lo, hi)

    def free_ranges(self) -> list[tuple[int, int]]:
        """Every free range `[lo, hi)`, in order of address."""
        ranges = [(lo, self._end_of[lo]) for lo in self._starts]
        return [*ranges, (self._tail, self.size)] if self._tail < self.size else ranges

    def _insert(self, lo: int, hi: int) -> None:
        insort(self._starts, lo)
        insort(self._by_size, (hi - lo, lo))
        self._end_of[lo] = hi

    def _remove(self, lo: int) -> int:
        """Take the hole that starts at `lo` out of the lists; returns where it ends."""
        hi = self._end_of.pop(lo)
        del self._starts[bisect_left(self._starts, lo)]
        del self._by_size[bisect_left(self._by_size, (hi - lo, lo))]
        return hi
