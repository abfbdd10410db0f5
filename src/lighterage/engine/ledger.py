"""What happened: bytes seen, moved, kept and why, late, still alive; by section and step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from ..errors import OffloadError
from . import spans
from .lanes import Fence, Wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class OffloadStats:
    """Figures of one step, or of all finished steps. Sizes are in bytes, times in milliseconds."""

    saved_bytes: int = 0
    """What autograd saved, each view counted."""
    unique_bytes: int = 0
    """The same, each byte of memory counted once."""
    bytes_out: int = 0
    bytes_in: int = 0
    copies_out: int = 0
    copies_in: int = 0
    kept_bytes: int = 0
    """What stayed on the device, each byte counted once; the report says why."""
    still_alive_bytes: int = 0
    """What was moved and let go of, but is held by somebody else, so that nothing was freed."""
    late_reloads: int = 0
    late_ms: float = 0.0
    """Time for which reloaded bytes were waited for."""
    num_sections: int = 0
    host_bytes_in_use: int = 0
    """Bytes at rest now, on whichever tier."""
    disk_bytes_in_use: int = 0
    host_bytes_peak: int = 0
    host_bytes_reserved: int = 0
    """Host memory held for bytes at rest, in use or not."""


TRANSFER_FAILED = "the transfer failed"
"""The reason for which something stays whose copy out did not succeed."""


class Row:
    """The figures of one run of one section."""

    __slots__ = (
        "alive",
        "at_rest",
        "bytes_in",
        "bytes_out",
        "copies_in",
        "copies_out",
        "gap",
        "kept",
        "last_kept",
        "late_ms",
        "late_reloads",
        "name",
        "saved_bytes",
        "saves",
        "unique_bytes",
        "unseen_bytes",
    )

    def __init__(self, name: str, gap: bool) -> None:
        self.name = name
        self.gap = gap
        self.saves = 0
        self.saved_bytes = 0
        self.unique_bytes = 0
        self.bytes_out = 0
        self.bytes_in = 0
        self.copies_out = 0
        self.copies_in = 0
        self.kept: dict[str, int] = {}
        self.last_kept: str | None = None
        """Why what was kept last was."""
        self.alive: list[tuple[str, int]] = []
        self.late_reloads = 0
        self.late_ms = 0.0
        self.unseen_bytes: int | None = None
        self.at_rest = False
        """Whether it ran without hooks, so that what it saved was not seen."""

    def note_at_rest(self, saves: int, kept: dict[str, int]) -> None:
        """Nothing of it leaves, and its saves are not seen: they are what they were when it was measured."""
        self.at_rest = True
        self.saves = saves
        self.kept = dict(kept)
        self.saved_bytes = self.unique_bytes = sum(kept.values())

    @property
    def kept_bytes(self) -> int:
        return sum(self.kept.values())

    @property
    def alive_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.alive)


class Step:
    """The rows of one step, and what is needed to count each byte once."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.kept: dict[int, Sequence[spans.Span]] = {}
        """What was counted as kept, by storage."""
        self._waits: list[tuple[Row, Wait]] = []
        self._unproven: list[tuple[Row, Fence, int, int]] = []

    def note_unproven(self, row: Row, fence: Fence, nbytes: int, num_copies: int) -> None:
        """Copies out that nothing has waited for: backward found the bytes on the device still."""
        self._unproven.append((row, fence, nbytes, num_copies))

    def note_failed(self, row: Row, nbytes: int, num_copies: int) -> None:
        """Copies out that were counted when they started, and have failed."""
        row.bytes_out -= nbytes
        row.copies_out -= num_copies
        row.kept[TRANSFER_FAILED] = row.kept.get(TRANSFER_FAILED, 0) + nbytes

    def note_kept(self, row: Row, key: int, lo: int, hi: int, reason: str) -> None:
        """Count a kept range, but for what another save of this step kept of it."""
        row.last_kept = reason
        known = self.kept.get(key)
        if known is None:
            self.kept[key] = ((lo, hi),)
            fresh = hi - lo
        elif (lo, hi) in known:
            return
        else:
            fresh = sum(b - a for a, b in spans.subtract((lo, hi), known))
            self.kept[key] = spans.merge([*known, (lo, hi)])
        row.unique_bytes += fresh
        row.kept[reason] = row.kept.get(reason, 0) + fresh

    def note_wait(self, row: Row, wait: Wait) -> None:
        self._waits.append((row, wait))
        if len(self._waits) > 256:
            self.settle()

    def settle(self) -> None:
        """Read the waits that are known by now. Never blocks."""
        unknown: list[tuple[Row, Wait]] = []
        waits, self._waits = self._waits, unknown
        for row, wait in waits:
            ms = wait.milliseconds()
            if ms is None:
                unknown.append((row, wait))
            elif ms > 0.0:
                row.late_reloads += 1
                row.late_ms += ms
        unproven, self._unproven = self._unproven, []
        for entry in unproven:
            row, fence, nbytes, num_copies = entry
            if not fence.done():
                self._unproven.append(entry)
                continue
            try:
                fence.wait()
            except OffloadError:
                self.note_failed(row, nbytes, num_copies)

    def stats(self) -> OffloadStats:
        self.settle()
        rows = self.rows
        return OffloadStats(
            saved_bytes=sum(r.saved_bytes for r in rows),
            unique_bytes=sum(r.unique_bytes for r in rows),
            bytes_out=sum(r.bytes_out for r in rows),
            bytes_in=sum(r.bytes_in for r in rows),
            copies_out=sum(r.copies_out for r in rows),
            copies_in=sum(r.copies_in for r in rows),
            kept_bytes=sum(r.kept_bytes for r in rows),
            still_alive_bytes=sum(r.alive_bytes for r in rows),
            late_reloads=sum(r.late_reloads for r in rows),
            late_ms=sum(r.late_ms for r in rows),
            num_sections=sum(not r.gap for r in rows),
        )


class Ledger:
    """The step under way, the last finished one, and the sums."""

    def __init__(self) -> None:
        self.step = Step()
        self.last = Step()
        self.num_steps = 0
        self._settling: collections.deque[Step] = collections.deque()
        self._total = OffloadStats()
        self.stood_aside: collections.Counter[tuple[str, str]] = collections.Counter()
        self.refusals: collections.Counter[str] = collections.Counter()

    def finish_step(self) -> None:
        self.last = self.step
        self.step = Step()
        self.num_steps += 1
        self._settling.append(self.last)
        while len(self._settling) > 2:
            self._fold(self._settling.popleft().stats())

    def settle_waits(self) -> None:
        """Read what waits of the steps that were lately finished took, as far as is known by now. Never blocks."""
        for step in self._settling:
            step.settle()

    def _fold(self, stats: OffloadStats) -> None:
        self._total = _sum(self._total, stats)

    def total(self) -> OffloadStats:
        total = self._total
        for step in self._settling:
            total = _sum(total, step.stats())
        return total


_SUMMED = (
    "saved_bytes",
    "unique_bytes",
    "bytes_out",
    "bytes_in",
    "copies_out",
    "copies_in",
    "kept_bytes",
    "still_alive_bytes",
    "late_reloads",
    "late_ms",
    "num_sections",
)


def _sum(a: OffloadStats, b: OffloadStats) -> OffloadStats:
    return dataclasses.replace(a, **{name: getattr(a, name) + getattr(b, name) for name in _SUMMED})
