"""Records one step: when its phases began, and what each section saved and when that was read."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import torch

from ...marks import Mark as Marked
from ...marks import mark_of
from ...planner.timeline import Direction, Kind
from ..allocation import Allocation
from ..lanes import Wait
from ..scopes import Unpackable
from ..sections import Section
from ..views import byte_range
from ..wrappers import is_wrapper, parts_of
from .clock import Clock, Gauge, Mark
from .origins import kind_of
from .section_log import MEASURED, SaveLog, SectionLog

# What is kept for these reasons is no activation: it counts as the model's own memory.
_RESIDENT = frozenset(
    [
        "parameter",
        "buffer",
        "cast of a parameter",
        "under min_bytes",
        "on another device",
        "saved in an earlier section",
    ]
)


OTHERS_INSIDE = "other sections run inside it"
"""The reason for which a section is not computed again that has others inside."""


class Boundary:
    """Where a phase begins, which is where the one before it ends."""

    __slots__ = ("again_bytes", "at", "caught_up", "direction", "live_bytes", "peak_bytes", "section")

    def __init__(self, direction: Direction, section: SectionLog | None, at: Mark) -> None:
        self.direction: Direction = direction
        self.section = section
        self.at = at
        self.caught_up = True
        """Whether the device had begun the phase that ended here before all of it was issued: it waits for its host."""
        self.peak_bytes: int | None = None
        """The peak of the phase that ended here, or, as backward ends, of the step; None where it was not asked."""
        self.live_bytes = 0
        """Of what was recorded, here."""
        self.again_bytes = 0
        """Of what the phase that begins here computes again: that is saved in no section, so that none records it."""


class StepLog:
    """What is recorded of one step.

    `detailed`: every allocation and each read of it too, and the peak of each phase; otherwise times, and one peak.
    """

    def __init__(self, clock: Clock, gauge: Gauge, *, detailed: bool) -> None:
        self.clock = clock
        self.gauge = gauge
        self.detailed = detailed
        self.boundaries: list[Boundary] = []
        self.sections: list[SectionLog] = []
        self.waits: list[tuple[int, Wait]] = []
        """The phase, by its place in the step, and a wait of the compute stream for copies out."""
        self._by_key: dict[int, SaveLog] = {}
        self._open: list[SectionLog] = []
        self._lock = threading.Lock()
        self._callbacks: set[int] = set()
        self.closed = False
        self.used_bytes = gauge.now()
        """Of the device's memory, as it begins; None where no allocator can tell."""
        self._begun_s = self._ended_s = time.perf_counter()
        self.input_bytes = 0
        """What its sections are called with, as plain strided tensors."""
        self.is_whole = False
        """Whether its backward has come to its end, and nothing after that."""
        self.gauge.start()
        self._bound("other", None)

    @property
    def host_ms(self) -> float:
        """What the host took to issue it, up to the end of backward."""
        return 1e3 * (self._ended_s - self._begun_s)

    def called_with(self, tensors: Iterable[torch.Tensor]) -> None:
        """A section is."""
        plain = (tensor for tensor in tensors if type(tensor) is torch.Tensor and tensor.layout is torch.strided)
        self.input_bytes += sum(tensor.nbytes for tensor in plain)

    # --- phases -----------------------------------------------------------------------------------------------------

    def _bound(self, direction: Direction, section: SectionLog | None, *, ends: bool = False) -> None:
        with self._lock:
            boundary = Boundary(direction, section, self.clock.mark())
            if self.boundaries:
                boundary.caught_up = self.clock.passed(self.boundaries[-1].at)
            self.is_whole = ends
            if ends:
                self._ended_s = time.perf_counter()
            # To ask an allocator takes tens of microseconds: where the host is what phases wait for, that is told too.
            if self.detailed or ends:
                boundary.peak_bytes = self.gauge.peak()
            if self.detailed:
                self.gauge.start()
            self.boundaries.append(boundary)
            self.settle_live()

    def settle_live(self) -> None:
        """Take what is alive now for what is alive at the last boundary."""
        if self.detailed:
            here = self.boundaries[-1]
            live = sum(save.live_bytes for one in self.sections for save in one.saves)
            here.live_bytes = max(here.live_bytes, live + here.again_bytes)

    def entered(self, section: SectionLog) -> None:
        """A section's forward begins."""
        if self.closed:
            return
        for outer in self._open:
            if not outer.gap:
                outer.not_recomputed = OTHERS_INSIDE
        self._open.append(section)
        self._bound("forward", section)

    def left(self, section: SectionLog) -> None:
        """A section's forward has ended."""
        if self.closed or section not in self._open:
            return
        self._open.remove(section)
        outer = self._open[-1] if self._open else None
        self._bound("forward" if outer is not None else "other", outer)

    def visited(self, section: SectionLog, again_bytes: int = 0) -> None:
        """Backward has come to a section, of which it computes so much again."""
        if self.closed:
            return
        self._bound("backward", section)
        if again_bytes:
            self.boundaries[-1].again_bytes = again_bytes
            self.settle_live()
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._callbacks:
            self._callbacks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        if not self.closed:
            self._bound("other", None, ends=True)

    def close(self) -> None:
        """Nothing more belongs to this step."""
        self.closed = True

    def waited(self, wait: Wait) -> None:
        """The compute stream was made to wait for a copy out."""
        if not self.closed:
            self.waits.append((len(self.boundaries) - 1, wait))

    @property
    def readable(self) -> bool:
        """Whether the device has come past all marks. Never blocks."""
        return all(self.clock.passed(boundary.at) for boundary in reversed(self.boundaries))

    # --- saves ------------------------------------------------------------------------------------------------------

    def saved(self, tensor: torch.Tensor, section: Section, log: SectionLog, handle: Unpackable) -> list[SaveLog]:
        """Note one save, which `handle` stands for; what backward reads when it reads the handle."""
        parts = [] if self.closed else _parts(tensor)
        if not parts:
            return []
        allocations = _allocations(handle)
        brought: SaveLog | None = None
        read: list[SaveLog] = []
        kept = section.row.last_kept if not allocations else None
        if kept in _RESIDENT:
            return []
        for part in parts:
            key = part.untyped_storage()._cdata
            known = self._by_key.get(key)
            if known is None or not known.holds(key):
                if brought is None:
                    kind: Kind = "input" if key in log.input_keys else kind_of(tensor)
                    label = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                    brought = SaveLog(section.row.saves, label, kind, self.clock.mark())
                    brought.module = log.inside[-1] if log.inside else ""
                    log.saves.append(brought)
                brought.take(part)
                self._by_key[key] = known = brought
            known.cover(key, *byte_range(part, part.nbytes))
            if known not in read:
                read.append(known)
        if brought is not None:
            if kept is not None and kept != MEASURED:
                brought.kept = kept
            for allocation in allocations:
                brought.follow(allocation)
        return read

    def used(self, saves: list[SaveLog]) -> None:
        """Backward has read what these saves brought."""
        if self.closed:
            return
        at, phase = self.clock.mark(), len(self.boundaries) - 1
        for save in saves:
            save.uses.append((phase, at))

    def settle_marks(self, section: SectionLog, only_marked: bool, reason: str | None) -> None:
        """A section has ended: what was not marked by now stays, where marks decide; all, where there is a reason."""
        for save in section.saves:
            save.kept = save.kept or reason
            if save.kept is None:
                marks = [mark_of(key) for key in save.keys if save.holds(key)]
                if Marked.NOT_OFFLOAD in marks:
                    save.kept = "mark_not_offload"
                elif only_marked and Marked.OFFLOAD not in marks:
                    save.kept = "not marked"


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain strided tensors that a saved tensor is made of."""
    if is_wrapper(tensor):
        found: list[torch.Tensor] = []
        for part, movable in parts_of(tensor)[1].values():
            if movable and isinstance(part, torch.Tensor):
                found += _parts(part)
        return found
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return []
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.untyped_storage().nbytes() == 0:
        return []
    return [tensor]


def _allocations(handle: object) -> list[Allocation]:
    inner = getattr(handle, "_inner", None)
    if inner is not None:
        return [a for part in inner.values() for a in _allocations(part)]
    allocation = getattr(handle, "_allocation", None)
    return [] if allocation is None else [allocation]
