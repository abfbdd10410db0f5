"""Starts copies out, lets go of device memory, and brings bytes back, when it is told to."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Sequence

import torch

from ..errors import OffloadError
from ..marks import Mark, mark_of
from .allocation import Allocation, SavedAt, Stage, Unused
from .lanes import Source, Transport
from .ledger import Ledger
from .sections import Section
from .views import ViewSpec

# Copies start when so much has been gathered and another allocation is saved: one pair of events serves them all.
GATHER_BYTES = 4 << 20
# The window is filled up again once so much of it has been used: several copies then share a pair of events.
REFILL_AT = 0.75


class StillAlive:
    """Saves whose memory was found to be held by somebody else after it was let go of: moving it frees nothing."""

    def __init__(self) -> None:
        self._saves: set[SavedAt] = set()

    def add(self, allocation: Allocation) -> None:
        for saved in allocation.saved_at:
            self._saves.add(saved)

    def __contains__(self, save: SavedAt) -> bool:
        return save in self._saves

    def __bool__(self) -> bool:
        return bool(self._saves)


class Traffic:
    """The copies of an offloader. All methods but `load` are called with `lock` held."""

    def __init__(self, lock: threading.RLock, ledger: Ledger, *, only_marked: bool) -> None:
        self._lock = lock
        self._ledger = ledger
        self._only_marked = only_marked
        self._gathered: list[Allocation] = []
        self._gathered_bytes = 0
        self._gathered_on = 0
        self._gathered_by: Transport | None = None
        self.still_alive = StillAlive()
        self._queue: collections.deque[weakref.ref[Allocation]] = collections.deque()
        self._unused = Unused()
        self._window = 0

    # --- out ------------------------------------------------------------------------------------------------------

    def gather(self, allocation: Allocation, section: Section, fresh: int, mark: Mark | None) -> None:
        """Queue `fresh` more bytes of an allocation for copying; what was gathered before them may start."""
        if section.by_hand or (self._only_marked and mark is not Mark.OFFLOAD):
            section.undecided.append(weakref.ref(allocation))
            return
        transport = allocation.transport
        stream = transport.stream_key()
        if self._gathered and (
            stream != self._gathered_on
            or transport is not self._gathered_by
            or (self._gathered_bytes >= GATHER_BYTES and self._gathered[-1] is not allocation)
        ):
            self.flush()
        self._gathered_on, self._gathered_by = stream, transport
        self._gathered_bytes += fresh
        # Saves may take turns between two allocations: each is queued once, and copied whole.
        if not allocation.gathered:
            allocation.gathered = True
            self._gathered.append(allocation)

    def flush(self) -> None:
        """Start copying what was gathered."""
        gathered, transport = self._gathered, self._gathered_by
        if gathered and transport is not None:
            self.forget()
            self._evict(gathered, transport)

    def forget(self, section: Section | None = None) -> None:
        """Do not copy what was gathered (of `section`, where one is given): it stays as it is."""
        remaining: list[Allocation] = []
        for allocation in self._gathered:
            if section is None or section.saved(allocation):
                allocation.gathered = False
            else:
                remaining.append(allocation)
        self._gathered = remaining
        if not remaining:
            self._gathered_bytes = 0
            self._gathered_by = None

    def decide(self, section: Section) -> None:
        """Copy what `section` saved and was not copied at once: what was marked since, or was to wait for this call."""
        undecided, section.undecided = section.undecided, []
        for ref in undecided:
            allocation = ref()
            if allocation is None or not allocation.pending:
                continue
            if not self._only_marked or mark_of(allocation.key) is Mark.OFFLOAD:
                self._evict([allocation], allocation.transport)
            else:
                section.undecided.append(ref)

    def _evict(self, allocations: Sequence[Allocation], transport: Transport) -> None:
        chosen: list[Allocation] = []
        for allocation in allocations:
            if not allocation.pending or allocation.kept is not None:
                continue
            if mark_of(allocation.key) is Mark.NOT_OFFLOAD:
                self._stays(allocation, "mark_not_offload")
            elif not allocation.unchanged:
                self._stays(allocation, "changed in place after it was saved")
            elif allocation.capture != transport.capture():
                self._stays(allocation, "the capture of a graph began or ended before it was copied out")
            else:
                chosen.append(allocation)
        if not chosen:
            return
        sources: list[Source] = []
        ends: list[int] = []
        for allocation in chosen:
            sources += allocation.sources()
            ends.append(len(sources))
        with torch._C._DisableTorchDispatch():
            resting = transport.evict(sources)
        start = 0
        for allocation, end in zip(chosen, ends, strict=True):
            placed = [rest for rest in resting[start:end] if rest is not None]
            if len(placed) < end - start:
                for rest in placed:
                    rest.retire()
                reason = transport.refusal or "no room at rest"
                self._ledger.refusals[reason] += 1
                self._stays(allocation, reason)
            else:
                allocation.copied(sources[start:end], placed)
                row = allocation.row
                for rest in placed:
                    row.bytes_out += rest.nbytes
                row.copies_out += len(placed)
            start = end

    def _stays(self, allocation: Allocation, reason: str) -> None:
        allocation.keep(reason)
        kept = allocation.row.kept
        kept[reason] = kept.get(reason, 0) + sum(hi - lo for lo, hi in allocation.covered)

    # --- release --------------------------------------------------------------------------------------------------

    def release(self, section: Section) -> None:
        """Let go of the device memory of what `section` saved, ordered after its copies.

        Raises:
            OffloadError: copies failed; their allocations stay on the device.
        """
        self.decide(section)
        for ref in section.undecided:
            undecided = ref()
            if undecided is not None and undecided.pending:
                self._stays(undecided, "not marked")
        section.undecided = []
        ordered: set[int] = set()
        failure: OffloadError | None = None
        for allocation in section.live_allocations():
            leaving = allocation.leaving
            if leaving is None:
                continue
            if mark_of(allocation.key) is Mark.NOT_OFFLOAD:
                self._stays(allocation, "mark_not_offload")
                continue
            if id(leaving) not in ordered:
                try:
                    leaving.order()
                except OffloadError as error:
                    self._stays(allocation, "the transfer failed")
                    failure = failure or OffloadError(
                        f"{allocation.label} of section {section.name!r} could not be moved and stays on the device: "
                        f"{error}"
                    )
                    continue
                ordered.add(id(leaving))
            allocation.let_go()
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # its traceback holds this frame, and with it the section and its memory

    # --- back -----------------------------------------------------------------------------------------------------

    def come_back_for(self, section: Section, upcoming: Sequence[Section]) -> None:
        """Backward has come to `section`, and `upcoming` are expected next.

        What they saved is queued in the order of need, and started as far as the window allows: no more bytes wait on
        the device unused than `upcoming` saved. So a section's bytes come in while those before it are used up, and
        their memory becomes free. With nothing upcoming, `section` itself comes back at once.
        """
        away = _away(section)
        if not upcoming:
            self._queue.clear()
            self._bring_back(away)
            return
        later = [allocation for one in upcoming for allocation in _away(one)]
        # Two sections may have saved one allocation: it comes back once.
        wanted = {id(allocation): allocation for allocation in [*away, *later]}
        self._window = max(sum(a.nbytes for a in later), sum(a.nbytes for a in away))
        self._queue = collections.deque(weakref.ref(allocation) for allocation in wanted.values())
        self._pump()

    def _pump(self) -> None:
        if not self._queue:
            return
        unused = self._unused.nbytes
        if unused > REFILL_AT * self._window:
            return
        next_ones: list[Allocation] = []
        while self._queue:
            allocation = self._queue[0]()
            if allocation is not None and allocation.stage is Stage.AWAY:
                unused += allocation.nbytes
                if unused > self._window and unused > allocation.nbytes:
                    break
                next_ones.append(allocation)
            self._queue.popleft()
        self._bring_back(next_ones)

    def reload(self, section: Section) -> None:
        """Start bringing back what `section` saved, what it saved last first."""
        self._bring_back(_away(section))

    def _bring_back(self, away: list[Allocation]) -> None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self._bring_back(away)
            return
        groups: dict[int, list[Allocation]] = {}
        for allocation in away:
            groups.setdefault(id(allocation.transport), []).append(allocation)
        for group in groups.values():
            with torch._C._DisableTorchDispatch():
                assert len({id(allocation) for allocation in group}) == len(group), "an allocation comes back once"
                batches = [allocation.room() for allocation in group]
                fences = group[0].transport.restore(batches)
            for allocation, batch, fence in zip(group, batches, fences, strict=True):
                if allocation.still_alive:
                    allocation.row.alive.append((allocation.label, allocation.nbytes))
                    self.still_alive.add(allocation)
                allocation.returning(fence, self._unused)
                row = allocation.row
                for resting, _ in batch:
                    row.bytes_in += resting.nbytes
                row.copies_in += len(batch)

    def load(self, allocation: Allocation, spec: ViewSpec) -> torch.Tensor:
        """The saved tensor that `spec` describes, on the device, usable by what the calling thread issues next."""
        with self._lock:
            if allocation.elsewhere:
                allocation.leave_again()
            if allocation.stage is Stage.AWAY:
                self._bring_back([allocation])
            elif allocation.stage is Stage.HELD:
                allocation.wanted = True
                allocation.join()
            if self._unused.use(id(allocation)) and self._queue:
                self._pump()
        tensor, wait = allocation.use(spec)
        if wait is not None:
            with self._lock:
                self._ledger.step.note_wait(allocation.row, wait)
        return tensor


def _away(section: Section) -> list[Allocation]:
    """What `section` saved and what is away, what it saved last first: backward needs that first."""
    return [a for a in section.live_allocations() if a.stage is Stage.AWAY][::-1]
