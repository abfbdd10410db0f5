"""The host memory that allocations rest in."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Protocol

import torch

from .. import background
from . import host_memory, prefault
from .captures import Tenure
from .fenced_space import Claim, FencedSpace, Lease
from .reservation import HUGE_PAGE, reserve
from .units import MIB, format_bytes, round_up

_PAGE = mmap.PAGESIZE
_SMALL_NEED = MIB
_SMALL_ARENA = 32 * MIB
_AHEAD = 512 * MIB
"""At least so much is committed ahead of what is pinned, while an arena grows for callers that have to wait."""
_AT_FIRST = 16384 * MIB
"""Of what a step did without, at most so much is made ready for the next, or as much again as there is.

A step of many microbatches does without the same bytes many times over, and other processes may want memory too.
"""
_PIN_RETRY_S = 5.0
"""For so long a growth as large as one that could not be pinned is refused untried: trying costs 0.7 s a GiB."""
_LOOK_AGAIN_S = 0.1
"""For so long what the machine could spare is not asked again: asking takes up to half a millisecond."""

_AT_ONCE = 128 * MIB
"""So much is waited for in any case: it takes some tens of milliseconds."""

# Note [The first step]
# Fresh pages have to be zeroed, and whoever maps memory meanwhile waits for those that do it. A first step maps much:
# the device's code is loaded and the device's memory taken. Measured on a decoder of 8 layers (H100, 2.6 GiB to move):
# 0.40 s without offload, 0.67 s with memory committed beside the first step on four threads, 0.42 s with nothing
# committed in it. So what a caller can do without is not even begun in the first step. When it ends it is known what
# was missing, and that is committed in the background, while the second step begins, which waits for what it is ahead
# of: after two steps an arena has what it needs.

_CLOSED = "the arena is closed"
_NOT_READY = "host memory was still being made ready, and the device had room"

# Note [One range, many registrations]
# An arena is one contiguous range of virtual memory, reserved when it is made and committed as it grows, so that
# neighbouring blocks coalesce whenever they were committed. With a pinner each growth is pinned on its own, and a copy
# must not cross from one registration into the next: the parts of a block are split where segments meet.


_GRAPHS_AGAIN_S = 0.02
"""For so long graphs are not asked again whether they are gone."""


class Pinner(Protocol):
    """Registers host memory with a device, so that its copies are asynchronous and run at the link's speed."""

    def pin(self, address: int, nbytes: int) -> None:
        """Pin the pages of `[address, address + nbytes)`. Raises OSError, with the reason, when that fails."""
        ...

    def unpin(self, address: int) -> None:
        """Undo the `pin` that was called with this `address`."""
        ...


class Block(Lease):
    """A range of an `Arena`."""

    __slots__ = ("parts",)

    def __init__(self, claim: Claim, parts: tuple[torch.Tensor, ...]) -> None:
        super().__init__(claim)
        self.parts = parts
        """uint8 CPU tensors over the block, in order; more than one only where pinned segments meet."""


def slice_parts(parts: tuple[torch.Tensor, ...], lo: int, hi: int) -> tuple[torch.Tensor, ...]:
    """uint8 tensors over bytes [lo, hi) of a block with these `parts`, in order."""
    if len(parts) == 1:
        return parts if hi - lo == parts[0].numel() else (parts[0][lo:hi],)
    cut = []
    for part in parts:
        size = part.numel()
        if lo < size and hi > 0:
            cut.append(part[max(0, lo) : min(size, hi)])
        lo, hi = lo - size, hi - size
    return tuple(cut)


class Arena:
    """Hands out blocks of one growing range of host memory: byte-exact, budgeted, pinned if there is a `pinner`.

    `budget`: the most bytes to reserve; None for no limit but the machine's. `capacity`: bytes of virtual memory; None
    for the memory of the machine or of its control group, or the budget where that is less.
    """

    def __init__(self, *, pinner: Pinner | None, budget: int | None, capacity: int | None = None) -> None:
        self.refusal: str | None = None
        """Why the last `acquire` that returned None did; None as long as none has."""
        self._space = FencedSpace("host memory of lighterage")
        self._closed = False
        self._pinner = pinner
        self._budget = budget
        self._segment_ends: list[int] = []
        self._spare_bytes, self._spare_until = 0, 0.0  # what the machine can spare, and how long that is believed
        self._pin_failed: tuple[int, float, str] | None = None  # bytes, when (monotonic seconds), why
        if capacity is None:
            capacity = host_memory.total_bytes()
            capacity = capacity if budget is None else min(capacity, budget)
        self._map, self._map_skip, self._memory = reserve(max(round_up(capacity, _PAGE), _PAGE))
        self._address = self._memory.data_ptr()
        self._limit = self._memory.numel() if budget is None else min(self._memory.numel(), budget)
        self._frontier: prefault.Frontier | None = None
        self._declined_bytes = 0  # what this step would have used, had it been ready
        if pinner is not None:
            self._limit -= self._limit % _PAGE
        self._tenures: list[Tenure] = []  # of graphs that use blocks of this arena
        self._look_at_tenures_at = 0.0

    def prepare(self) -> None:
        """Commit memory on several threads, and in the background where that serves, until `settle` says otherwise.

        See Note [The first step]. Nothing of it is pinned or counted before it is used.
        """
        if self._pinner is not None and self._frontier is None and not self._closed:
            self._frontier = prefault.Frontier(self._memory[: self._limit])
            self._advise("MADV_HUGEPAGE", 0, self._limit)

    def settle(self) -> bool:
        """A step is over. Whether the needs are known, since nothing was declined: what is left over is given back.

        Otherwise what was declined is made ready beside the next step.
        """
        declined, self._declined_bytes = self._declined_bytes, 0
        if declined:
            reserved = self.bytes_reserved
            ahead = min(declined, max(_AT_FIRST, reserved))
            self._look_ahead(reserved + growth_step(ahead, reserved, self._limit - reserved))
            return False
        self._stop_preparing()
        return True

    def _stop_preparing(self) -> None:
        """Give back what is committed and not pinned."""
        frontier, self._frontier = self._frontier, None
        if frontier is not None:
            start, end = self.bytes_reserved, frontier.stop()
            if start < end:
                self._advise("MADV_DONTNEED", start, end - start)

    def _look_ahead(self, end: int) -> None:
        """Have the first `end` bytes committed some time soon, as far as the machine can spare them."""
        assert self._frontier is not None
        ahead = min(end, self._limit) - self._frontier.committed_or_under_way
        if ahead > 0 and self._lack_of_memory(ahead) is None:
            self._frontier.advance(min(end, self._limit))

    def acquire(self, nbytes: int, can_do_without: Callable[[], bool] | None = None) -> Block | None:
        """A block of `nbytes` bytes, or None: then `refusal` says why.

        The caller orders its first write to the block after the block's `fences`. Growing may take long when pinned;
        an acquire that finds room takes microseconds. While memory is being prepared, and there is none yet, a caller
        who `can_do_without` gets None at once instead.

        Raises:
            OffloadError: in a forked child.
        """
        claim = None
        if self._tenures and time.monotonic() >= self._look_at_tenures_at:
            self.take_back()
            self._look_at_tenures_at = time.monotonic() + _GRAPHS_AGAIN_S
        if not self._closed:
            claim = self._space.acquire(nbytes, lambda needed: self._grow(needed, can_do_without))
        if claim is None:
            self.refusal = _CLOSED if self._closed else self.refusal
            return None
        block = Block(claim, ())
        try:
            block.parts = self._parts(claim.offset, claim.offset + nbytes)
        except BaseException:
            block.retire()
            raise
        return block

    def lend(self, tenure: Tenure) -> None:
        """Note that a graph uses blocks: they stay pinned until it is gone, whatever becomes of this arena's owner."""
        if tenure not in self._tenures:
            self._tenures.append(tenure)

    def take_back(self) -> None:
        """Take back the blocks of graphs that are gone."""
        self._tenures = [tenure for tenure in self._tenures if not tenure.end_if_over()]

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the blocks that are not retired."""
        self.take_back()
        return self._space.bytes_in_use

    @property
    def bytes_peak(self) -> int:
        """The most bytes that were ever in use at once."""
        return self._space.bytes_peak

    @property
    def bytes_reserved(self) -> int:
        """Bytes taken from the machine: pinned, or for an arena without a pinner its high-water mark."""
        if self._closed and not self._tenures:
            return 0
        return self._segment_ends[-1] if self._segment_ends else self._space.size

    def close(self) -> None:
        """Wait for the copies of retired blocks, unpin, and let go of the memory.

        Calling it again, or in a forked child, does nothing. The memory itself is freed with the last tensor over it:
        a block that is still live stays readable, but is no longer pinned. While graphs use blocks nothing is unpinned:
        that is done when the last of them is gone.
        """
        if self._closed or self._space.is_foreign():
            return
        self._stop_preparing()  # while it is still known which bytes are pinned: those may be somebody's
        self._closed = True
        self.take_back()
        if self._tenures:
            # The thread holds this arena, also where nobody else does any more.
            threading.Thread(target=self._outlive_graphs, name="lighterage-graphs", daemon=True).start()
        else:
            self._let_go()

    def _outlive_graphs(self) -> None:
        for tenure in self._tenures:
            tenure.wait()
        with background.unless_ending() as permitted:
            if permitted:
                self.take_back()
                self._let_go()

    def _let_go(self) -> None:
        self._space.settle()
        self._unpin()
        # Not self._map.close(): torch.frombuffer keeps the map alive, but holds no buffer export on it, so closing
        # would pull the memory from under the tensors that remain. Dropping it frees it exactly when they are gone.
        del self._map, self._memory

    def __del__(self) -> None:
        # Without pins there is nothing to undo, and waiting here could wait for the thread that this runs on.
        if getattr(self, "_segment_ends", None) and not sys.is_finalizing():
            self.close()

    def _grow(self, needed: int, can_do_without: Callable[[], bool] | None) -> int:
        """Commit at least `needed` more bytes; returns how many, 0 when refused. Called with the space's lock held."""
        size = self._space.size
        if self._closed:
            return self._refuse(_CLOSED)
        if self.bytes_reserved > size:  # pinned by a growth that an exception interrupted
            return self.bytes_reserved - size
        room = self._limit - size
        if needed > room:
            return self._refuse(self._describe_limit())
        if self._pinner is None:
            reason = self._lack_of_memory(needed)
            return needed if reason is None else self._refuse(reason)
        generous, exact = growth_step(needed, size, room), round_up(needed, _PAGE)
        if self._frontier is not None and size + needed > _AT_ONCE:
            if can_do_without is None or not can_do_without():
                # The caller waits for these, and will for the next.
                self._look_ahead(size + generous + max(_AHEAD, size // 2))
            elif self._frontier.committed_or_under_way < size + needed:
                self._declined_bytes += needed
                return self._refuse(_NOT_READY)
        reason = None
        for step in (generous, exact) if exact < generous else (generous,):
            reason = self._lack_of_memory(self._uncommitted(size, step)) or self._pin(self._pinner, size, step)
            if reason is None:
                return step
        return self._refuse(reason or "")

    def _uncommitted(self, offset: int, nbytes: int) -> int:
        """How many bytes of `[offset, offset + nbytes)` the machine has not given yet."""
        ready = 0 if self._frontier is None else self._frontier.committed_or_under_way - offset
        return nbytes - min(max(ready, 0), nbytes)

    def _pin(self, pinner: Pinner, offset: int, nbytes: int) -> str | None:
        """Commit and pin `[offset, offset + nbytes)`; returns why it could not be done."""
        if self._pin_failed is not None:
            failed_bytes, failed_at, reason = self._pin_failed
            if nbytes >= failed_bytes and time.monotonic() - failed_at < _PIN_RETRY_S:
                return reason
        if self._frontier is None:
            self._advise("MADV_HUGEPAGE", offset, nbytes)
            prefault.prefault(self._address + offset, nbytes)
        else:
            self._frontier.reach(offset + nbytes)
        # Recorded first: an interrupt that lands while the driver pins leaves a segment that the next growth finds.
        self._segment_ends.append(offset + nbytes)
        try:
            pinner.pin(self._address + offset, nbytes)
        except OSError as error:
            self._segment_ends.pop()
            self._advise("MADV_DONTNEED", offset, nbytes)
            reason = f"pinning {format_bytes(nbytes)} failed: {error}"
            self._pin_failed = (nbytes, time.monotonic(), reason)
            return reason
        self._pin_failed = None
        self._advise("MADV_DONTFORK", offset, nbytes)
        return None

    def _unpin(self) -> None:
        start = 0
        for end in self._segment_ends:
            assert self._pinner is not None
            with suppress(OSError):  # the device may be gone already
                self._pinner.unpin(self._address + start)
            self._advise("MADV_DOFORK", start, end - start)
            start = end
        self._segment_ends.clear()

    def _advise(self, advice: str | int, offset: int, nbytes: int) -> None:
        """Give the kernel an advice about a page-aligned range, where the kernel knows it; never an error."""
        option = advice if isinstance(advice, int) else getattr(mmap, advice, None)
        if option is not None and sys.platform == "linux":
            with suppress(OSError):
                self._map.madvise(option, self._map_skip + offset, nbytes)

    def _parts(self, lo: int, hi: int) -> tuple[torch.Tensor, ...]:
        ends = self._segment_ends
        first = bisect_right(ends, lo)
        if first == len(ends) or hi <= ends[first]:
            return (self._memory[lo:hi],)
        cuts = [lo, *(end for end in ends[first:] if end < hi), hi]
        return tuple(self._memory[start:end] for start, end in pairwise(cuts))

    def _lack_of_memory(self, nbytes: int) -> str | None:
        """Why the machine cannot spare `nbytes` more bytes, or None when it can: then they count as spent."""
        now = time.monotonic()
        if nbytes > self._spare_bytes or now >= self._spare_until:
            available, kept = host_memory.available_bytes(), host_memory.spare_bytes()
            if available is None:
                return None
            self._spare_bytes, self._spare_until = available - kept, now + _LOOK_AGAIN_S
            if nbytes > self._spare_bytes:
                return (
                    f"host memory is nearly full: {format_bytes(available)} are available, {format_bytes(nbytes)} are "
                    f"needed, and {format_bytes(kept)} must be left"
                )
        self._spare_bytes -= nbytes
        return None

    def _describe_limit(self) -> str:
        if self._budget is not None and self._limit > self._budget - _PAGE:
            return f"host budget of {format_bytes(self._budget)} is spent"
        return f"host memory range of {format_bytes(self._limit)} is full"

    def _refuse(self, reason: str) -> int:
        self.refusal = reason
        return 0


def growth_step(needed: int, reserved: int, room: int) -> int:
    """By how many bytes a pinned arena of `reserved` bytes grows when it lacks `needed` and may grow by `room`.

    At least 1/32 of what there is, so that growths are few and the overhead stays under 5 %; in huge pages, but in
    small ones while the arena is small.

    >>> growth_step(3 * MIB, 1024 * MIB, room=4096 * MIB) // MIB
    32
    """
    page = _PAGE if needed < _SMALL_NEED and reserved < _SMALL_ARENA else HUGE_PAGE
    end = round_up(reserved + max(needed, reserved // 32), page)
    return min(end - reserved, room)
