"""One moved allocation: its stages, its byte ranges, and the fences on its memory."""

from __future__ import annotations

import enum
import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from . import spans
from .buffers import Buffer, room_for
from .joint_fence import AllOf
from .lanes import Fence, Resting, Transport, Wait
from .ledger import Row
from .spans import Span
from .unused import Unused
from .views import ViewSpec, byte_view, changed_in_place, rebuild, share_counter

# Ranges nearer than this to each other travel in one copy: the bytes between cost less than a second call.
COPY_GAP = 4096
# Reloaded ranges farther apart than this get buffers of their own.
BUFFER_GAP = 1 << 20


class Stage(enum.Enum):
    """Where an allocation is in its life."""

    HELD = "held"
    """The engine holds the device memory; copies of it may be under way."""
    AWAY = "away"
    """The engine has let go of the device memory; the bytes rest elsewhere."""
    BACK = "back"
    """The bytes are in new device memory, or on their way into it."""


# Reading a member of an enum costs as much as calling a function; these are read several times a save.
_HELD, _AWAY, _BACK = Stage.HELD, Stage.AWAY, Stage.BACK

_Piece = tuple[int, int, Resting]
"""A range [lo, hi) that was copied out, and where it rests."""


SavedAt = tuple[str, int, int]
"""Section, number of the save within it, bytes of it: the same in every step, as long as the model does the same."""


class Allocation:
    """The bytes of one storage that saved tensors live in, at one version of its contents.

    Handles own it: when the last one is gone, the room at rest and the device memory are given back, each ordered after
    the copies that touch it. All methods but `use` are called with the offloader's lock held.
    """

    __slots__ = (
        "__weakref__",
        "_ground",
        "_left",
        "_left_from",
        "_owner",
        "_pieces",
        "address",
        "alias",
        "back_in",
        "buffers",
        "capture",
        "covered",
        "gathered",
        "kept",
        "key",
        "nbytes",
        "pending",
        "row",
        "saved_at",
        "spec",
        "stage",
        "storage",
        "storage_ref",
        "transport",
        "unused",
        "version",
        "wanted",
    )

    def __init__(
        self,
        transport: Transport,
        storage: torch.UntypedStorage,
        key: int,
        nbytes: int,
        address: int,
        alias: torch.Tensor,
        version: int,
        row: Row,
        spec: ViewSpec,
        owner: torch.Tensor,
        capture: int = 0,
    ) -> None:
        """`key`, `nbytes` and `address` are the storage's, `alias` has its version counter, which shows `version`.

        `spec` is the first view that is saved: its bytes are taken in. `owner` is the tensor or the base of its view.
        """
        self._owner = weakref.ref(owner)
        self.transport = transport
        self.capture = capture
        """The graph in whose capture it was saved, or 0: see Note [Copies inside a capture]."""
        self.back_in = 0
        """Its `context` when it came back."""
        self.row = row
        """What its traffic is counted on: the row of the section that saved it first."""
        self.spec = spec
        """The view that was saved first."""
        self.version = version
        """The version of the contents that was saved."""
        self.key = key
        self.nbytes = nbytes
        self.address = address
        self.alias = alias
        self.storage: torch.UntypedStorage | None = storage
        self.stage = _HELD
        self.kept: str | None = None
        """Why it stays on the device after all, or None."""
        self.gathered = False
        """Whether it is in the queue of those whose copies start next."""
        self.wanted = False
        """Whether backward has already asked for it while it was held: then it is not worth releasing."""
        lo, hi = spec.lo, spec.hi
        self.covered: Sequence[Span] = ((lo, hi),) if lo < hi else ()
        self.pending: Sequence[Span] = self.covered
        self.saved_at: list[SavedAt] = []
        self.buffers: Sequence[Buffer] = ()
        self._pieces: Sequence[_Piece] = ()
        self.storage_ref: StorageWeakRef | None = None
        self._ground: Buffer | None = None
        """What saved tensors that were asked for while it was held are rebuilt over."""
        self._left: Fence | None = None
        self._left_from: Sequence[int] = ()
        self.unused: Unused | None = None

    # --- saving -------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Shape and dtype of the tensor that was saved first, for people."""
        return f"{tuple(self.spec.size)} {str(self.spec.dtype).removeprefix('torch.')}"

    def sample(self, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor of `dtype` on its device, for people to be told of both."""
        return self.transport.allocate((0,), dtype)

    def shows(self, tensor: torch.Tensor, owner: torch.Tensor) -> bool:
        """Whether `tensor`, which lives in the same storage, has the contents that were saved.

        `owner`: the tensor itself or the base of its view. All views of one base share its version counter.
        """
        if tensor._version != self.version or not self.unchanged:
            return False
        return self._owner() is owner or share_counter(self.alias, tensor)

    @property
    def unchanged(self) -> bool:
        """Whether nothing was written since the first save."""
        return self.alias._version == self.version

    def takes(self, lo: int, hi: int) -> bool:
        """Whether a further save of bytes [lo, hi), unchanged since the first, can belong to this object."""
        return self.stage is not _BACK or spans.covers(self.covered, (lo, hi))

    def add(self, storage: torch.UntypedStorage, lo: int, hi: int) -> int:
        """Take a further saved range in; the number of its bytes that were not there yet. Those are to be copied."""
        fresh = spans.subtract((lo, hi), self.covered) if lo < hi else []
        if not fresh:
            return 0
        self.covered = spans.merge([*self.covered, *fresh])
        self.pending = (*self.pending, *fresh)
        if self.storage is None:
            self.storage = storage
            self.stage = _HELD
        return sum(b - a for a, b in fresh)

    def merge_pending(self) -> Sequence[Span]:
        """The ranges still to be copied, as few as possible."""
        self.pending = spans.merge(self.pending, COPY_GAP)
        return self.pending

    def copied(self, resting: Sequence[Resting], stream: int) -> None:
        """Record that copies of what is pending are under way into `resting`, after what was issued on `stream`."""
        if self._left is None and len(resting) == 1:  # most often there is one copy of it, ever
            ((lo, hi),) = self.pending
            (rest,) = resting
            self.pending = ()
            self._pieces = ((lo, hi, rest),)
            self._left = rest.left
            self._left_from = (stream,)
            return
        if stream not in self._left_from:
            self._left_from = (*self._left_from, stream)
        pieces = tuple([(lo, hi, rest) for (lo, hi), rest in zip(self.pending, resting, strict=True)])
        self.pending = ()
        if not self._pieces:
            self._pieces = pieces
        else:
            self._pieces = (*self._pieces, *pieces)
        for rest in resting:
            left = rest.left
            if self._left is None:
                self._left = left
            elif type(self._left) is AllOf:
                if self._left.fences[-1] is not left:
                    self._left.fences.append(left)
            elif self._left is not left:
                self._left = AllOf(self._left, left)

    # --- staying, leaving, coming back ----------------------------------------------------------------------------

    def keep(self, reason: str, storage: torch.UntypedStorage | None = None) -> None:
        """Stay on the device. `storage` is the memory, where it was let go of and somebody else still has it."""
        if self.stage is _BACK:
            return
        if self.storage is None:
            assert storage is not None
            self.storage = storage
        self.stage = _HELD
        self.kept = reason
        self.pending = ()
        self._pieces = ()

    @property
    def moved(self) -> bool:
        """Whether bytes of it were copied out."""
        return bool(self._pieces)

    @property
    def out(self) -> list[Span]:
        """The ranges of it that were copied out."""
        return [(lo, hi) for lo, hi, _ in self._pieces]

    @property
    def left(self) -> Fence | None:
        """After this they have been, or it has failed. None: nothing was copied out."""
        return self._left if self._pieces else None

    @property
    def leaving(self) -> Fence | None:
        """After this the device memory may go. None: there is nothing to let go of, or not yet."""
        if self.stage is _HELD and self.kept is None and not self.pending and not self.wanted:
            return self._left
        return None

    def let_go(self, stream: int) -> None:
        """Drop the device memory; the caller has ordered `stream`, the current one, after `leaving`."""
        storage = self.storage
        assert storage is not None
        if self._left_from != (stream,):
            # The memory belongs to another stream's pool, which does not wait for the copies.
            self.transport.share_with_lanes(storage)
        self.storage = self._ground = None
        if self.storage_ref is None and _somebody_else_holds(storage):
            self.storage_ref = StorageWeakRef(storage)
        self.stage = _AWAY

    @property
    def still_alive(self) -> bool:
        """Whether somebody else holds the device memory that was let go of."""
        return self.stage is _AWAY and self.storage_ref is not None and not self.storage_ref.expired()

    def join(self) -> None:
        """Let what comes next in a capture wait for copies out of memory that was not let go of, and now is used up."""
        if self.capture and self._left is not None:
            self._left.order()

    def context(self) -> int:
        """Where bytes that come back now are good: in this capture alone, or, if a capture saved it, in this backward.

        0: everywhere outside of captures. Replays of a forward graph write its bytes anew between backward passes.
        """
        capture = self.transport.capture()
        if capture or not self.capture:
            return capture
        return -2 - torch._C._current_graph_task_id()

    def leave_again(self) -> None:
        """Forget the memory that it came back to where it is of no use here: the bytes at rest are the right ones."""
        assert self.stage is _BACK
        for buffer in self.buffers:
            if not buffer.fence.ordered_on(buffer.made_on):
                self.transport.bury(buffer.memory.untyped_storage(), buffer.fence)
        if self.unused is not None:
            self.unused.use(id(self))
            self.unused = None
        self.stage = _AWAY

    def room(self, stream: int) -> list[tuple[Resting, torch.Tensor]]:
        """Allocate device memory to come back to, on the current `stream`.

        Returns the copies to make: the caller starts them and calls `returning`.
        """
        assert self.stage is _AWAY
        pieces = self._pieces
        if len(pieces) == 1:
            lo, hi, resting = pieces[0]
            buffer = room_for(self.transport, self.spec, self.address, lo, hi, stream)
            self.buffers = (buffer,)
            return [(resting, buffer.memory if buffer.spec is not None else buffer.bytes(lo, hi))]
        ranges = spans.merge([(lo, hi) for lo, hi, _ in pieces], BUFFER_GAP)
        self.buffers = [room_for(self.transport, self.spec, self.address, lo, hi, stream) for lo, hi in ranges]
        work: list[tuple[Resting, torch.Tensor]] = []
        for lo, hi, resting in pieces:
            buffer = next(b for b in self.buffers if b.lo <= lo and hi <= b.hi)
            work.append((resting, buffer.bytes(lo, hi)))
        return work

    def returning(self, fence: Fence, unused: Unused) -> None:
        """The copies that `room` named are under way. Until its first use it counts in `unused`."""
        for buffer in self.buffers:
            buffer.fence = fence
        unused.add(id(self), self.nbytes)
        self.unused = unused
        self.back_in = self.context()
        self.stage = _BACK  # at the end: whoever sees it may use the bytes without the lock

    # --- use ------------------------------------------------------------------------------------------------------

    def ground(self) -> Buffer:
        """What saved tensors are rebuilt over while the device memory is held."""
        buffer = self._ground
        if buffer is None:
            storage = self.storage
            assert storage is not None
            nbytes = storage.nbytes()
            buffer = self._ground = Buffer(0, nbytes, byte_view(storage, 0, nbytes), 0, None, 0)
        return buffer

    def use(self, spec: ViewSpec, held: Buffer | None) -> tuple[torch.Tensor, Wait | None]:
        """The saved tensor, usable by what the calling thread issues next, and the wait that this cost.

        `held`: its `ground`, taken with the lock held where the stage was HELD: another thread may let go of it
        meanwhile. Otherwise the stage is BACK. On the CPU this blocks until the bytes have arrived, so it is called
        without the offloader's lock.

        Raises:
            OffloadError: the bytes could not be brought back.
        """
        if held is not None:
            return self._on(held, spec, 0), None
        buffer = self.buffers[0]
        lo, hi = spec.lo, spec.hi
        if lo == hi:  # no byte of it was moved: it lies anywhere
            return self._on(buffer, spec, -lo), None
        if lo < buffer.lo or buffer.hi < hi:
            buffer = next(b for b in self.buffers if b.lo <= lo and hi <= b.hi)
        stream, fence = self.transport.stream_key(), buffer.fence
        wait = None if fence.ordered_on(stream) else fence.order()
        if stream != buffer.made_on:
            self._share(buffer, stream)
        memory = buffer.memory
        if memory._version == buffer.version and (spec is buffer.spec or spec == buffer.spec):
            return memory, wait
        return self._on(buffer, spec, buffer.shift), wait

    def _share(self, buffer: Buffer, stream: int) -> None:
        """Let the allocator know that `stream` uses the memory, which is from the pool of another."""
        if buffer.shared_with is None:
            buffer.shared_with = set()
        if stream not in buffer.shared_with:
            self.transport.share(buffer.memory.untyped_storage())
            buffer.shared_with.add(stream)

    def _on(self, buffer: Buffer, spec: ViewSpec, shift: int) -> torch.Tensor:
        num_changes = buffer.memory._version - buffer.version
        if num_changes:
            raise changed_in_place(str(spec.dtype), spec.size, self.version, self.version + num_changes, self.row.name)
        return rebuild(buffer.memory, spec, shift)

    def __del__(self) -> None:
        # Takes no lock: the garbage collector may run this at any moment, in any thread. What rests elsewhere gives its
        # room back by itself.
        if self.unused is not None:
            self.unused.drop(id(self))
        for buffer in self.buffers:
            if not buffer.fence.ordered_on(buffer.made_on):
                self.transport.bury(buffer.memory.untyped_storage(), buffer.fence)
        if self._left is not None and self.storage is not None:
            self.transport.bury(self.storage, self._left)


def _somebody_else_holds(storage: torch.UntypedStorage) -> bool:
    """Whether anything but the caller's only reference keeps `storage` alive; in doubt, yes.

    It saves a weak reference to each storage that goes at once, which most do.
    """
    # The references to the Python object: the caller's variable, this function's argument, and getrefcount's.
    return _use_count(storage._cdata) > 1 or sys.getrefcount(storage) > 3


_use_count: Callable[[int], int] = torch._C._storage_Use_Count
