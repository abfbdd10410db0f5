"""Records one step: when its phases began, and what each section saved and when that was read."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..marks import Mark as Marked
from ..marks import mark_of
from ..planner.timeline import Direction, Kind
from . import spans
from .allocation import Allocation, Stage
from .clock import Clock, Gauge, Mark
from .lanes import Wait
from .ledger import Row
from .origins import kind_of
from .views import byte_range
from .wrappers import is_wrapper, parts_of

if TYPE_CHECKING:
    from .sections import Section

MEASURED = "measured: nothing is moved"
"""The reason for which all stays in a step that is measured."""

READ_TWICE = "its backward asks for a saved tensor twice"
"""The reason for which PyTorch cannot compute a section again."""

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


class _Unpackable(Protocol):
    def unpack(self) -> torch.Tensor: ...


class SaveLog:
    """One allocation, under the save that brought it."""

    __slots__ = (
        "_allocation",
        "_refs",
        "born",
        "covered",
        "held_bytes",
        "kept",
        "keys",
        "kind",
        "label",
        "module",
        "save",
        "uses",
    )

    def __init__(self, save: int, label: str, kind: Kind, born: Mark) -> None:
        self.save = save
        self.label = label
        self.kind: Kind = kind
        self.born = born
        self.kept: str | None = None
        self.module = ""
        """Which module inside the section saved it, where that was watched."""
        self.held_bytes = 0
        self.covered: dict[int, list[spans.Span]] = {}
        self.keys: list[int] = []
        self.uses: list[tuple[int, Mark]] = []
        """The phase, by its place in the step, and the moment of each read."""
        self._refs: list[StorageWeakRef] = []
        self._allocation: weakref.ref[Allocation] | None = None

    def take(self, tensor: torch.Tensor) -> None:
        """A part of it that was not known: a plain tensor, of which nothing is held."""
        storage = tensor.untyped_storage()
        self.keys.append(storage._cdata)
        self.held_bytes += storage.nbytes()
        self._refs.append(StorageWeakRef(storage))

    def cover(self, key: int, lo: int, hi: int) -> None:
        known = self.covered.get(key)
        if known is None:
            self.covered[key] = [(lo, hi)]
        elif (lo, hi) not in known:
            self.covered[key] = spans.merge([*known, (lo, hi)])

    def follow(self, allocation: Allocation) -> None:
        self._allocation = weakref.ref(allocation)

    @property
    def nbytes(self) -> int:
        return sum(hi - lo for covered in self.covered.values() for lo, hi in covered)

    def holds(self, key: int) -> bool:
        """Whether the storage with this id is still the one that was taken."""
        return any(k == key and not ref.expired() for k, ref in zip(self.keys, self._refs, strict=True))

    @property
    def live_bytes(self) -> int:
        """Device memory that it takes now."""
        allocation = None if self._allocation is None else self._allocation()
        if allocation is not None and allocation.stage is Stage.BACK:
            return self.held_bytes
        return self.held_bytes if any(not ref.expired() for ref in self._refs) else 0


StateKey = tuple[str, tuple[bool, ...]]
"""A section, and which of its modules train: what its forward changes depends on both."""


class SectionLog:
    """One run of one section."""

    __slots__ = (
        "__weakref__",
        "gap",
        "index",
        "input_keys",
        "inside",
        "key",
        "kind",
        "name",
        "not_recomputed",
        "overwritten",
        "products",
        "row",
        "saves",
        "watch",
    )

    def __init__(self, name: str, gap: bool, row: Row) -> None:
        self.name = name
        self.gap = gap
        self.row = row
        self.index: int | None = None
        self.saves: list[SaveLog] = []
        self.input_keys: dict[int, int] = {}
        """Storages of the call's tensors, and their places among them."""
        self.products: list[ProductLog] = []
        self.overwritten = False
        """Whether its forward writes over a product, so that the product cannot be put by."""
        self.not_recomputed: str | None = None
        self.inside: list[str] = []
        """The modules inside the section that run now, where that is watched."""
        self.key: StateKey | None = None
        self.watch: Callable[[], str | None] | None = None
        """Tells, as backward comes to it, what has changed that its forward started from."""
        self.kind: object = None
        """Sections of one kind take the same time: the class of the module."""


class ProductLog:
    """One product that a section's forward computed, in the order of computing."""

    __slots__ = ("_refs", "keys", "nbytes", "saves_before")

    def __init__(self, saves_before: int) -> None:
        self.saves_before = saves_before
        """How many saves its section had made before."""
        self.nbytes = 0
        self.keys: list[int] = []
        self._refs: list[StorageWeakRef] = []

    def take(self, tensor: torch.Tensor) -> None:
        """One of the tensors that it gave."""
        storage = tensor.untyped_storage()
        # While the weak reference is there no other storage has this id.
        self._refs.append(StorageWeakRef(storage))
        self.keys.append(storage._cdata)
        self.nbytes = max(self.nbytes, storage.nbytes())


class Boundary:
    """Where a phase begins, which is where the one before it ends."""

    __slots__ = ("at", "direction", "live_bytes", "peak_bytes", "section")

    def __init__(self, direction: Direction, section: SectionLog | None, at: Mark) -> None:
        self.direction: Direction = direction
        self.section = section
        self.at = at
        self.peak_bytes: int | None = None
        """The peak of the phase that ended here."""
        self.live_bytes = 0
        """Of what was recorded, here."""


class StepLog:
    """What is recorded of one step.

    `detailed`: every allocation and each read of it too; otherwise the phases alone.
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
        self.gauge.start()
        self._bound("other", None)

    # --- phases -----------------------------------------------------------------------------------------------------

    def _bound(self, direction: Direction, section: SectionLog | None) -> None:
        with self._lock:
            boundary = Boundary(direction, section, self.clock.mark())
            boundary.peak_bytes = self.gauge.peak()
            self.gauge.start()
            self.boundaries.append(boundary)
            self.settle_live()

    def settle_live(self) -> None:
        """Take what is alive now for what is alive at the last boundary."""
        if self.detailed:
            live = sum(save.live_bytes for one in self.sections for save in one.saves)
            self.boundaries[-1].live_bytes = max(self.boundaries[-1].live_bytes, live)

    def entered(self, section: SectionLog) -> None:
        """A section's forward begins."""
        if self.closed:
            return
        for outer in self._open:
            if not outer.gap:
                outer.not_recomputed = "other sections run inside it"
        self._open.append(section)
        self._bound("forward", section)

    def left(self, section: SectionLog) -> None:
        """A section's forward has ended."""
        if self.closed or section not in self._open:
            return
        self._open.remove(section)
        outer = self._open[-1] if self._open else None
        self._bound("forward" if outer is not None else "other", outer)

    def visited(self, section: SectionLog) -> None:
        """Backward has come to a section."""
        if self.closed:
            return
        self._bound("backward", section)
        task = torch._C._current_graph_task_id()
        if task != -1 and task not in self._callbacks:
            self._callbacks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        if not self.closed:
            self._bound("other", None)

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

    def saved(self, tensor: torch.Tensor, section: Section, log: SectionLog, handle: _Unpackable) -> _Unpackable:
        """Note one save, which `handle` stands for; the handle to give to autograd instead."""
        if self.closed:
            return handle
        parts = _parts(tensor)
        if not parts:
            return handle
        allocations = _allocations(handle)
        brought: SaveLog | None = None
        read: list[SaveLog] = []
        kept = section.row.last_kept if not allocations else None
        if kept in _RESIDENT:
            return handle
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
        return Measured(handle, self, log, read)

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


class Measured:
    """A handle in a step that is measured: tells when it is read."""

    __slots__ = ("_handle", "_log", "_saves", "_section", "_task")

    def __init__(self, handle: _Unpackable, log: StepLog, section: SectionLog, saves: list[SaveLog]) -> None:
        self._handle = handle
        self._log = log
        self._section = section
        self._saves = saves
        self._task = -1

    def unpack(self) -> torch.Tensor:
        task = torch._C._current_graph_task_id()
        if task == self._task and task != -1:
            self._section.not_recomputed = READ_TWICE
        self._task = task
        tensor = self._handle.unpack()
        self._log.used(self._saves)
        return tensor


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


Pack = Callable[[torch.Tensor, "Section"], _Unpackable]


class Once:
    """A handle of a section that may be computed again later: tells if it is read twice in one backward."""

    __slots__ = ("_handle", "_task", "_twice")

    def __init__(self, handle: _Unpackable, twice: Callable[[], None]) -> None:
        self._handle = handle
        self._twice = twice
        self._task = -1

    def unpack(self) -> torch.Tensor:
        task = torch._C._current_graph_task_id()
        if task == self._task and task != -1:
            self._twice()
        self._task = task
        return self._handle.unpack()


class WatchingPack:
    """The pack of a section that may be computed again later, if its backward reads each saved tensor once."""

    __slots__ = ("_pack", "_twice")

    def __init__(self, pack: Pack, twice: Callable[[], None]) -> None:
        self._pack = pack
        self._twice = twice

    def __call__(self, tensor: torch.Tensor, section: Section) -> _Unpackable:
        return Once(self._pack(tensor, section), self._twice)


class MeasuringPack:
    """The pack of a section in a step that is measured."""

    __slots__ = ("_log", "_pack", "_section")

    def __init__(self, pack: Pack, log: StepLog, section: SectionLog) -> None:
        self._pack = pack
        self._log = log
        self._section = section

    def __call__(self, tensor: torch.Tensor, section: Section) -> _Unpackable:
        section.row.last_kept = None
        handle = self._pack(tensor, section)
        return self._log.saved(tensor, section, self._section, handle)
