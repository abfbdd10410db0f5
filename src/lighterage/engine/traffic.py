"""Starts copies out, lets go of device memory, and brings bytes back, when it is told to."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from ..errors import OffloadError
from ..marks import Mark, any_marks, mark_of
from .allocation import Allocation, SavedAt, Stage
from .lanes import Source, Transport, Wait
from .ledger import TRANSFER_FAILED, Ledger
from .sections import Section
from .unused import Unused
from .views import ViewSpec

# Copies start when so much has been gathered and another allocation is saved: one pair of events serves them all. Under
# a plan they start as soon as no more of the last one can come: another may be a long time of computing away, and a
# mark that comes after a save was seen when the plan was made.
GATHER_BYTES = 4 << 20
# The window is filled up again once so much of it has been used: several copies then share a pair of events.
REFILL_AT = 0.75

HELD_ELSEWHERE = "held by somebody else when it was moved in an earlier step"
"""The reason for which something stays that frees nothing where it is moved."""

# So many steps after something was found to be held by somebody else, it is moved again.
TRY_AGAIN_STEPS = 16

# Reading a member of an enum costs as much as calling a function.
_HELD, _AWAY, _BACK = Stage.HELD, Stage.AWAY, Stage.BACK


class StillAlive:
    """Saves whose memory was found to be held by somebody else after it was let go of: moving it frees nothing.

    They stay, and are tried again after some steps: whoever held them may have let go. If not, after twice as many.
    """

    def __init__(self) -> None:
        self.saves: set[SavedAt] = set()
        """What is not to be moved now."""
        self._until: dict[SavedAt, tuple[int, int]] = {}  # steps left, and how many there were

    def add(self, allocation: Allocation) -> None:
        for saved in allocation.saved_at:
            if saved not in self.saves:
                steps = 2 * self._until.get(saved, (0, TRY_AGAIN_STEPS // 2))[1]
                self.saves.add(saved)
                self._until[saved] = (steps + 1, steps)  # this one, and so many more

    def finish_step(self) -> None:
        """One step less to wait."""
        for saved in list(self.saves):
            left, steps = self._until[saved]
            self._until[saved] = (left - 1, steps)
            if left <= 1:
                self.saves.discard(saved)


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
        self._gathered_at: torch.Event | None = None
        self.still_alive = StillAlive()
        self._queue: collections.deque[weakref.ref[Allocation]] = collections.deque()
        self._num_urgent = 0
        """So many at the head of the queue are of the section that backward is in."""
        self._unused = Unused()
        self._window = 0
        self._refill_at = 0.0
        self.on_wait: Callable[[Wait], None] | None = None
        """Told of each wait of the compute stream for a copy out."""

    # --- out ------------------------------------------------------------------------------------------------------

    def gather(self, allocation: Allocation, section: Section, fresh: int, mark: Mark | None) -> None:
        """Queue `fresh` more bytes of an allocation for copying; what was gathered before them may start."""
        if section.by_hand or (self._only_marked and mark is not Mark.OFFLOAD):
            section.undecided.append(weakref.ref(allocation))
            return
        transport = allocation.transport
        stream = transport.stream_key()
        gathered = self._gathered
        if gathered and (
            stream != self._gathered_on
            or transport is not self._gathered_by
            or (self._gathered_bytes >= GATHER_BYTES and gathered[-1] is not allocation)
        ):
            self.flush()
            gathered = self._gathered
        self._gathered_on, self._gathered_by = stream, transport
        self._gathered_bytes += fresh
        # Saves may take turns between two allocations: each is queued once, and copied whole.
        if not allocation.gathered:
            allocation.gathered = True
            gathered.append(allocation)
        if allocation.capture:
            self._gathered_at = transport.point()  # see Note [Copies inside a capture]
        elif section.orders is not None and self._gathered_bytes >= GATHER_BYTES and _is_whole(allocation):
            self.flush()

    def flush(self) -> None:
        """Start copying what was gathered."""
        gathered, transport = self._gathered, self._gathered_by
        if gathered and transport is not None:
            self._gathered, self._gathered_bytes, self._gathered_by = [], 0, None
            since, self._gathered_at = self._gathered_at, None
            for allocation in gathered:
                allocation.gathered = False
            self._evict(gathered, transport, since)

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

    def _evict(self, allocations: Sequence[Allocation], transport: Transport, since: torch.Event | None = None) -> None:
        marked = any_marks()
        capture = transport.capture()
        chosen: list[Allocation] = []
        sources: list[Source] = []
        for allocation in allocations:
            pending = allocation.pending
            if not pending or allocation.kept is not None:
                continue
            if marked and mark_of(allocation.key) is Mark.NOT_OFFLOAD:
                self._stays(allocation, "mark_not_offload")
            elif allocation.alias._version != allocation.version:
                self._stays(allocation, "changed in place after it was saved")
            elif allocation.capture != capture:
                self._stays(allocation, "the capture of a graph began or ended before it was copied out")
            else:
                chosen.append(allocation)
                if len(pending) > 1:
                    pending = allocation.merge_pending()
                storage = allocation.storage
                assert storage is not None, "what is pending is held"
                sources += [(storage, lo, hi) for lo, hi in pending]
        if not chosen:
            return
        with torch._C._DisableTorchDispatch():
            resting = transport.evict(sources, since=since)
        stream = transport.stream_key()
        start = 0
        for allocation in chosen:
            pending = allocation.pending
            end = start + len(pending)
            placed = resting[start:end]
            start = end
            if None in placed:
                reason = transport.refusal or "no room at rest"
                self._ledger.refusals[reason] += 1
                self._stays(allocation, reason)
                continue
            row = allocation.row
            row.copies_out += len(pending)
            for lo, hi in pending:
                row.bytes_out += hi - lo
            allocation.copied(placed, stream)  # type: ignore[arg-type]

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
        self.release_some(section, list(section.live_allocations()))

    def release_some(self, section: Section, allocations: Sequence[Allocation]) -> None:
        """Let go of the device memory of some of what `section` saved, ordered after its copies.

        Raises:
            OffloadError: copies failed; their allocations stay on the device.
        """
        self.decide(section)
        for ref in section.undecided:
            undecided = ref()
            if undecided is not None and undecided.pending:
                self._stays(undecided, "not marked")
        section.undecided = []
        marked = any_marks()
        ordered: dict[int, int] = {}
        failure: OffloadError | None = None
        for allocation in allocations:
            leaving = allocation.leaving
            if leaving is None:
                continue
            if marked and mark_of(allocation.key) is Mark.NOT_OFFLOAD:
                self._stays(allocation, "mark_not_offload")
                continue
            stream = ordered.get(id(leaving))
            if stream is None:
                try:
                    wait = leaving.order()
                    if wait is not None and self.on_wait is not None:
                        self.on_wait(wait)
                except OffloadError as error:
                    copies = [hi - lo for lo, hi in allocation.out]
                    self._ledger.step.note_failed(allocation.row, sum(copies), len(copies))
                    allocation.keep(TRANSFER_FAILED)
                    failure = failure or OffloadError(
                        f"{allocation.label} of section {section.name!r} could not be moved and stays on the device: "
                        f"{error}"
                    )
                    continue
                stream = ordered[id(leaving)] = allocation.transport.stream_key()
            allocation.let_go(stream)
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # its traceback holds this frame, and with it the section and its memory

    def note_unproven(self, section: Section) -> None:
        """Backward has come to `section`: have an eye on copies of it that no release has waited for."""
        for allocation in section.live_allocations():
            left = allocation.left
            if allocation.stage is _HELD and left is not None and allocation.row is section.row:
                copies = [hi - lo for lo, hi in allocation.out]
                self._ledger.step.note_unproven(allocation.row, left, sum(copies), len(copies))

    # --- back -----------------------------------------------------------------------------------------------------

    def come_back_for(self, section: Section, upcoming: Sequence[Section], asked: Allocation | None = None) -> None:
        """Backward has come to `section`, where it asks for `asked`, and `upcoming` are expected next.

        What they saved is queued in the order of need, and started as far as the window allows: no more bytes wait on
        the device unused than `upcoming` saved. So a section's bytes come in while those before it are used up, and
        their memory becomes free. With nothing upcoming, `section` itself comes back at once. What of `section` is away
        is urgent where it was not expected, since other things then come before it: see Note [Urgent reloads].
        """
        away = _away(section)
        if len(away) > 1 and asked in away:
            away.remove(asked)
            away.insert(0, asked)
        if not upcoming:
            self._queue.clear()
            self._num_urgent = 0
            self._bring_back(away, urgent=True)
            return
        nbytes = sum([a.nbytes for a in away])
        later: list[Allocation] = []
        for one in upcoming:
            later += _away(one)
        later_nbytes = sum([a.nbytes for a in later])
        self._window = max(later_nbytes, nbytes)
        self._refill_at = REFILL_AT * self._window
        # What still waits in the queue is next in turn: the link is merely behind.
        queued = {id(allocation) for ref in self._queue if (allocation := ref()) is not None}
        in_turn = any(id(allocation) in queued for allocation in away)
        # Two sections may have saved one allocation: it comes back once.
        wanted = dict.fromkeys([*away, *later])
        self._queue = collections.deque([weakref.ref(allocation) for allocation in wanted])
        self._num_urgent = 0 if in_turn else len(away)
        self._pump()

    def _pump(self) -> None:
        queue, window, unused = self._queue, self._window, self._unused.nbytes
        if unused > self._refill_at:
            return
        urgent: list[Allocation] = []
        next_ones: list[Allocation] = []
        while queue:
            allocation = queue[0]()
            if allocation is not None and allocation.stage is _AWAY:
                nbytes = allocation.nbytes
                unused += nbytes
                if unused > window and unused > nbytes:
                    break
                (urgent if self._num_urgent else next_ones).append(allocation)
            queue.popleft()
            if self._num_urgent:
                self._num_urgent -= 1
        if urgent:
            self._bring_back(urgent, urgent=True)
        self._bring_back(next_ones)

    def _takes_turn(self, allocation: Allocation) -> bool:
        """Take `allocation` from the queue's head; whether it was there, and none of those out of turn."""
        queue = self._queue
        while queue and ((first := queue[0]()) is None or first.stage is not _AWAY):
            queue.popleft()
            self._num_urgent = max(self._num_urgent - 1, 0)
        if not queue or self._num_urgent or queue[0]() is not allocation:
            return False
        queue.popleft()
        return True

    def fetch(self, allocations: Sequence[Allocation]) -> None:
        """Start bringing back those of `allocations` that are away, in this order."""
        wanted = {id(a): a for a in allocations if a.stage is Stage.AWAY}
        if wanted:
            self._bring_back(list(wanted.values()))

    def reload(self, section: Section) -> None:
        """Start bringing back what `section` saved, what it saved last first."""
        self._bring_back(_away(section))

    def _bring_back(self, away: list[Allocation], *, urgent: bool = False) -> None:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self._bring_back(away, urgent=urgent)
            return
        transports = {allocation.transport for allocation in away}
        for transport in transports:
            group = away if len(transports) == 1 else [a for a in away if a.transport is transport]
            assert len(set(group)) == len(group), "an allocation comes back once"
            with torch._C._DisableTorchDispatch():
                stream = transport.stream_key()
                batches = [allocation.room(stream) for allocation in group]
                fences = transport.restore(batches, urgent=urgent)
            for allocation, batch, fence in zip(group, batches, fences, strict=True):
                row = allocation.row
                if allocation.storage_ref is not None and allocation.still_alive:
                    row.alive.append((allocation.label, allocation.nbytes))
                    self.still_alive.add(allocation)
                allocation.returning(fence, self._unused)
                row.copies_in += len(batch)
                for resting, _ in batch:
                    row.bytes_in += resting.nbytes

    def load(self, allocation: Allocation, spec: ViewSpec, in_backward: bool = True) -> torch.Tensor:
        """The saved tensor that `spec` describes, on the device, usable by what the calling thread issues next.

        Where it is backward that asks, what is still on the device then stays there.
        """
        # What is back stays back, but for captures: without the lock this may be seen too late, but not too early.
        context = allocation.context()
        held = None
        if allocation.stage is not _BACK or allocation.unused is not None or allocation.back_in != context:
            with self._lock:
                if allocation.stage is _BACK and allocation.back_in != context:
                    allocation.leave_again()
                if allocation.stage is _AWAY:
                    self._bring_back([allocation], urgent=not self._takes_turn(allocation))
                elif allocation.stage is _HELD:
                    allocation.wanted = allocation.wanted or in_backward
                    allocation.join()
                    held = allocation.ground()
                unused, allocation.unused = allocation.unused, None
                if unused is not None and unused.use(id(allocation)) and self._queue:
                    self._pump()
        tensor, wait = allocation.use(spec, held)
        if wait is not None:
            with self._lock:
                self._ledger.step.note_wait(allocation.row, wait)
        return tensor


def _is_whole(allocation: Allocation) -> bool:
    """Whether all of its storage was saved, so that no more of it can come."""
    storage = allocation.storage
    return storage is not None and tuple(allocation.covered) == ((0, storage.nbytes()),)


def _away(section: Section) -> list[Allocation]:
    """What `section` saved and what is away, what it saved last first: backward needs that first."""
    refs = reversed(section.allocations.values())
    return [a for ref in refs if (a := ref()) is not None and a.stage is _AWAY]
