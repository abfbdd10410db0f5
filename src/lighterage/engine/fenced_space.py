"""A linear space whose ranges come back with fences: what must have finished before a range is written again."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

from ..errors import OffloadError
from .free_list import FreeList
from .lanes import Fence
from .units import round_up

ALIGNMENT = 512
"""Every range starts at a multiple of this many bytes, and takes up a multiple of it."""

# Note [Retiring takes no lock]
# A range is retired by the destructor of whoever owned it, and a destructor can run inside the garbage collector at
# any moment, in any thread: also in one that holds the lock of this very space. So `Lease.retire` only appends to a
# deque, which is atomic, and whoever next holds the lock drains it. What it appends is the lease's number, not the
# lease: nothing is kept alive, and a second retire finds the number gone.


class Claim(NamedTuple):
    """What a space grants: the makings of a `Lease`."""

    number: int
    offset: int
    nbytes: int
    fences: tuple[Fence, ...]
    returned: deque[tuple[int, tuple[Fence, ...]]]


class _Live(NamedTuple):
    """A range that is not retired: what the space remembers of it."""

    offset: int
    taken: int
    nbytes: int
    fences: tuple[Fence, ...]


class Lease:
    """A range of a `FencedSpace` that belongs to whoever holds this, until it is retired."""

    __slots__ = ("_number", "_returned", "fences", "nbytes", "offset")

    def __init__(self, claim: Claim) -> None:
        self._number, self._returned = claim.number, claim.returned
        self.offset = claim.offset
        """Where the range starts in its space, in bytes."""
        self.nbytes = claim.nbytes
        """The bytes that were asked for."""
        self.fences = claim.fences
        """What must have finished before somebody writes to the range: its earlier users' copies."""

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        """Give the range back; it is written again only after `fences`, and after `self.fences`.

        Takes no lock and may run inside the garbage collector: see Note [Retiring takes no lock]. A second call does
        nothing.
        """
        self._returned.append((self._number, tuple(fences)))


class PendingFences:
    """The unfinished fences of the free ranges of a space, by the very bytes that they guard."""

    __slots__ = ("_entries", "_starts", "_sweep_at")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: list[tuple[int, int, tuple[Fence, ...]]] = []  # (lo, hi, fences), sorted and disjoint
        self._sweep_at = 64

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, lo: int, hi: int, fences: Iterable[Fence]) -> None:
        """Guard `[lo, hi)`, which nothing guards yet, by those of `fences` that have not finished."""
        pending = _unfinished(fences)
        if not pending:
            return
        at = bisect_left(self._starts, lo)
        self._starts.insert(at, lo)
        self._entries.insert(at, (lo, hi, pending))
        if len(self._entries) >= self._sweep_at:
            self._sweep()

    def claim(self, lo: int, hi: int) -> tuple[Fence, ...]:
        """Take out and return every unfinished fence that guards a byte of `[lo, hi)`; bytes beside it stay guarded."""
        first = bisect_right(self._starts, lo)
        if first > 0 and self._entries[first - 1][1] > lo:
            first -= 1
        last = bisect_left(self._starts, hi, first)
        claimed: list[Fence] = []
        beside: list[tuple[int, int, tuple[Fence, ...]]] = []
        for entry_lo, entry_hi, fences in self._entries[first:last]:
            pending = _unfinished(fences)
            claimed += pending
            if pending and entry_lo < lo:
                beside.append((entry_lo, lo, pending))
            if pending and entry_hi > hi:
                beside.append((hi, entry_hi, pending))
        self._entries[first:last] = beside
        self._starts[first:last] = [entry[0] for entry in beside]
        return tuple({id(fence): fence for fence in claimed}.values())

    def all(self) -> tuple[Fence, ...]:
        """Every unfinished fence of the space."""
        return _unfinished(fence for _, _, fences in self._entries for fence in fences)

    def _sweep(self) -> None:
        """Drop what has finished; the next sweep is due at twice what is left, so that sweeping costs O(1) an entry."""
        swept = ((lo, hi, _unfinished(fences)) for lo, hi, fences in self._entries)
        self._entries = [entry for entry in swept if entry[2]]
        self._starts = [entry[0] for entry in self._entries]
        self._sweep_at = max(64, 2 * len(self._entries))


class FencedSpace:
    """Grants and takes back ranges of one growing space, counts them, and remembers their fences. Thread-safe.

    `name` says in errors whose space it is. `bytes_peak` is the most bytes that were ever in use at once, in the sizes
    that were asked for.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._free = FreeList()
        self._pending = PendingFences()
        self._returned: deque[tuple[int, tuple[Fence, ...]]] = deque()
        self._live: dict[int, _Live] = {}  # by number
        self._num_claims = 0
        self._bytes_in_use = 0
        self.bytes_peak = 0

    def acquire(self, nbytes: int, grow: Callable[[int], int]) -> Claim | None:
        """A range of `nbytes` bytes, or None when there is none and `grow` refuses.

        `grow(needed)` is called with the lock held and with the bytes that the space lacks at its end; it returns by
        how many bytes the space has grown, 0 when it cannot.

        Raises:
            OffloadError: in a forked child.
        """
        self.check_process()
        assert nbytes >= 0, f"a block cannot have {nbytes} bytes"
        taken = round_up(max(nbytes, 1), ALIGNMENT)
        with self._lock:
            self._drain()
            while (offset := self._free.take(taken)) is None:
                grown = grow(taken - self._free.tail_free)
                if not grown:
                    return None
                self._free.grow(grown)
            self._num_claims += 1
            self._bytes_in_use += nbytes
            self.bytes_peak = max(self.bytes_peak, self._bytes_in_use)
            fences = self._pending.claim(offset, offset + taken)
            self._live[self._num_claims] = _Live(offset, taken, nbytes, fences)
            return Claim(self._num_claims, offset, nbytes, fences, self._returned)

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the ranges that are not retired, in the sizes that were asked for."""
        if os.getpid() == self._pid:  # in a forked child the lock may be held for ever
            with self._lock:
                self._drain()
        return self._bytes_in_use

    @property
    def size(self) -> int:
        """Bytes of the space: it never shrinks, so this is also its high-water mark."""
        return self._free.size

    @property
    def is_empty(self) -> bool:
        """Whether every range is retired."""
        with self._lock:
            self._drain()
            return not self._live

    def settle(self) -> None:
        """Block the calling thread until every fence that a range was retired with has finished, well or badly."""
        with self._lock:
            self._drain()
            fences = [*self._pending.all(), *(fence for live in self._live.values() for fence in live.fences)]
        for fence in fences:
            with suppress(Exception):  # a copy that failed has finished too, and its owner has been told
                fence.wait()

    def check_process(self) -> None:
        """Raise OffloadError in a forked child: what rests here belongs to the parent."""
        if os.getpid() != self._pid:
            raise OffloadError(
                f"{self._name} belongs to the process that made it: it was made in process {self._pid} and used in its "
                f"forked child {os.getpid()}. The graph belongs to the parent process: run its backward there, or run "
                "forward and backward in the child with an offloader made in the child."
            )

    def is_foreign(self) -> bool:
        """Whether this is a forked child's copy of another process's space."""
        return os.getpid() != self._pid

    def _drain(self) -> None:
        """Take back what was retired. The lock is held."""
        while self._returned:
            number, fences = self._returned.popleft()
            live = self._live.pop(number, None)
            if live is None:  # retired before
                continue
            self._bytes_in_use -= live.nbytes
            self._free.give(live.offset, live.taken)
            # With the fences it came with: its holder may have retired it unused, without ever waiting for them.
            self._pending.add(live.offset, live.offset + live.taken, (*live.fences, *fences))


def _unfinished(fences: Iterable[Fence]) -> tuple[Fence, ...]:
    return tuple({id(fence): fence for fence in fences if not fence.done()}.values())
