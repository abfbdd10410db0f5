"""One moved allocation: its stages, its byte ranges, and the fences on its memory."""

from __future__ import annotations

import collections
import enum
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from . import spans
from .lanes import FINISHED, Fence, Resting, Source, Transport, Wait
from .ledger import Row
from .spans import Span
from .views import Ground, InPlaceWatch, ViewSpec, as_bytes, byte_view, changed_in_place

# Ranges nearer than this to each other travel in one copy: the bytes between cost less than a second call.
COPY_GAP = 4096
# Reloaded ranges farther apart than this get buffers of their own.
BUFFER_GAP = 1 << 20
# Reloaded bytes keep their address modulo this, so that kernels choose the same code path (vector width, alignment).
CONGRUENCE = 512


class Stage(enum.Enum):
    """Where an allocation is in its life."""

    HELD = "held"
    """The engine holds the device memory; copies of it may be under way."""
    AWAY = "away"
    """The engine has let go of the device memory; the bytes rest elsewhere."""
    BACK = "back"
    """The bytes are in new device memory, or on their way into it."""


_Piece = tuple[int, int, Resting]
"""A range [lo, hi) that was copied out, and where it rests."""


class _Buffer:
    """Device memory that ranges were reloaded into. Byte 0 of the allocation lies at byte `shift` of it."""

    __slots__ = ("fence", "ground", "hi", "lo", "made_on", "shared_with", "shift")

    def __init__(self, lo: int, hi: int, ground: Ground, shift: int, made_on: int) -> None:
        self.lo = lo
        self.hi = hi
        self.ground = ground
        """What saved tensors are rebuilt over."""
        self.shift = shift
        self.fence: Fence = FINISHED
        self.made_on = made_on
        """The stream whose pool the memory is from."""
        self.shared_with: set[int] | None = None
        """Other streams that the allocator knows to use it."""

    def bytes(self, lo: int, hi: int) -> torch.Tensor:
        """Bytes [lo, hi) of the allocation, as a contiguous tensor."""
        memory = self.ground.memory
        if lo + self.shift == 0 and hi - lo == memory.nbytes:
            return memory
        return as_bytes(memory)[lo + self.shift : hi + self.shift]


SavedAt = tuple[str, int, int]
"""Section, number of the save within it, bytes of it: the same in every step, as long as the model does the same."""


class Allocation:
    """The bytes of one storage that saved tensors live in, at one version of its contents.

    Handles own it: when the last one is gone, the room at rest and the device memory are given back, each ordered after
    the copies that touch it. All methods but `use` are called with the offloader's lock held.
    """

    __slots__ = (
        "__weakref__",
        "_earlier",
        "_ground",
        "_left",
        "_left_from",
        "_pieces",
        "_storage",
        "_storage_ref",
        "_unused",
        "_watch",
        "address",
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
        "transport",
        "wanted",
    )

    def __init__(
        self,
        transport: Transport,
        storage: torch.UntypedStorage,
        watch: InPlaceWatch,
        row: Row,
        spec: ViewSpec,
        capture: int = 0,
    ) -> None:
        self.transport = transport
        self.capture = capture
        """The graph in whose capture it was saved, or 0: see Note [Copies inside a capture]."""
        self.back_in = 0
        """Its `context` when it came back."""
        self._earlier: list[Fence] = []
        self.row = row
        """What its traffic is counted on: the row of the section that saved it first."""
        self._storage: torch.UntypedStorage | None = storage
        self._storage_ref: StorageWeakRef | None = None
        self._watch = watch
        self._pieces: list[_Piece] = []
        self._ground: Ground | None = None
        """What saved tensors that were asked for while it was held are rebuilt over."""
        self._left: Fence | None = None
        self._left_from: tuple[int, ...] = ()
        self._unused: Unused | None = None
        self.spec = spec
        """The view that was saved first."""
        self.stage = Stage.HELD
        self.kept: str | None = None
        """Why it stays on the device after all, or None."""
        self.gathered = False
        """Whether it is in the queue of those whose copies start next."""
        self.wanted = False
        """Whether backward has already asked for it while it was held: then it is not worth releasing."""
        self.covered: list[Span] = []
        self.pending: list[Span] = []
        self.buffers: list[_Buffer] = []
        self.saved_at: list[SavedAt] = []
        self.key: int = storage._cdata
        self.nbytes = storage.nbytes()
        self.address = storage.data_ptr()

    # --- saving -------------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """Shape and dtype of the tensor that was saved first, for people."""
        return f"{tuple(self.spec.size)} {str(self.spec.dtype).removeprefix('torch.')}"

    @property
    def version(self) -> int:
        """The version of the contents that was saved."""
        return self._watch.version

    def shows(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor`, which lives in the same storage, has the contents that were saved."""
        return self.version == tensor._version and self.unchanged and self._watch.shared_with(tensor)

    @property
    def unchanged(self) -> bool:
        """Whether nothing was written since the first save."""
        return self._watch.now == self._watch.version

    def takes(self, lo: int, hi: int) -> bool:
        """Whether a further save of bytes [lo, hi), unchanged since the first, can belong to this object."""
        return self.stage is not Stage.BACK or spans.covers(self.covered, (lo, hi))

    def add(self, storage: torch.UntypedStorage, lo: int, hi: int) -> int:
        """Take a saved range in; the number of its bytes that were not there yet. Those are to be copied."""
        if lo == hi:
            return 0
        if not self.covered:
            self.covered = [(lo, hi)]
            self.pending = [(lo, hi)]
            return hi - lo
        fresh = spans.subtract((lo, hi), self.covered)
        if not fresh:
            return 0
        self.covered = spans.merge([*self.covered, *fresh])
        self.pending.extend(fresh)
        if self._storage is None:
            self._storage = storage
            self.stage = Stage.HELD
        return sum(b - a for a, b in fresh)

    def sources(self) -> list[Source]:
        """The ranges still to be copied, as few as possible."""
        assert self._storage is not None
        pending = self.pending if len(self.pending) == 1 else spans.merge(self.pending, COPY_GAP)
        return [(self._storage, lo, hi) for lo, hi in pending]

    def copied(self, sources: Sequence[Source], resting: Sequence[Resting]) -> None:
        """Record that copies of `sources` are under way into `resting`."""
        stream = self.transport.stream_key()
        if stream not in self._left_from:
            self._left_from = (*self._left_from, stream)
        for (_, lo, hi), rest in zip(sources, resting, strict=True):
            self._pieces.append((lo, hi, rest))
            left = rest.left
            if self._left is None:
                self._left = left
            elif type(self._left) is _All:
                if self._left.fences[-1] is not left:
                    self._left.fences.append(left)
            elif self._left is not left:
                self._left = _All(self._left, left)
        self.pending.clear()

    # --- staying, leaving, coming back ----------------------------------------------------------------------------

    def keep(self, reason: str, storage: torch.UntypedStorage | None = None) -> None:
        """Stay on the device. `storage` is the memory, where it was let go of and somebody else still has it."""
        if self.stage is Stage.BACK:
            return
        if self._storage is None:
            assert storage is not None
            self._storage = storage
        self.stage = Stage.HELD
        self.kept = reason
        self.pending.clear()
        for _, _, resting in self._pieces:
            resting.retire()
        self._pieces.clear()

    @property
    def moved(self) -> bool:
        """Whether bytes of it were copied out."""
        return bool(self._pieces)

    @property
    def leaving(self) -> Fence | None:
        """After this the device memory may go. None: there is nothing to let go of, or not yet."""
        if self.stage is Stage.HELD and self.kept is None and not self.pending and not self.wanted:
            return self._left
        return None

    def let_go(self) -> int:
        """Drop the device memory; the caller has ordered the current stream after `leaving`. Bytes of it."""
        assert self._storage is not None
        if self._left_from != (self.transport.stream_key(),):
            # The memory belongs to another stream's pool, which does not wait for the copies.
            self.transport.share_with_lanes(self._storage)
        if self._storage_ref is None:
            self._storage_ref = StorageWeakRef(self._storage)
        self._storage = self._ground = None
        self.stage = Stage.AWAY
        return self.nbytes

    @property
    def still_alive(self) -> bool:
        """Whether somebody else holds the device memory that was let go of."""
        return self.stage is Stage.AWAY and self._storage_ref is not None and not self._storage_ref.expired()

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

    @property
    def elsewhere(self) -> bool:
        """Whether it came back where its bytes were good, and that is not here."""
        return self.stage is Stage.BACK and self.back_in != self.context()

    def leave_again(self) -> None:
        """Forget the memory that it came back to elsewhere: the bytes at rest are the right ones."""
        assert self.stage is Stage.BACK
        for buffer in self.buffers:
            if buffer.fence is not FINISHED:
                self._earlier.append(buffer.fence)
                if not buffer.fence.ordered_on(buffer.made_on):
                    self.transport.bury(buffer.ground.memory.untyped_storage(), buffer.fence)
        self.buffers = []
        self.stage = Stage.AWAY
        if self._unused is not None:
            self._unused.use(id(self))

    def room(self) -> list[tuple[Resting, torch.Tensor]]:
        """Allocate device memory to come back to. The copies to make: the caller starts them and calls `returning`."""
        assert self.stage is Stage.AWAY
        pieces = self._pieces
        if len(pieces) == 1:
            lo, hi, resting = pieces[0]
            buffer = self._buffer(lo, hi)
            self.buffers = [buffer]
            return [(resting, buffer.bytes(lo, hi))]
        self.buffers = [self._buffer(lo, hi) for lo, hi in spans.merge([p[:2] for p in pieces], BUFFER_GAP)]
        work: list[tuple[Resting, torch.Tensor]] = []
        for lo, hi, resting in pieces:
            buffer = next(b for b in self.buffers if b.lo <= lo and hi <= b.hi)
            work.append((resting, buffer.bytes(lo, hi)))
        return work

    def _buffer(self, lo: int, hi: int) -> _Buffer:
        # Note [Same address modulo 512]: an allocator that starts on multiples of 512 needs no more bytes than there
        # are, which lets the buffer fit into the hole that the original left. Memory at odd addresses came from
        # elsewhere; it keeps its offset instead, so that elements stay aligned.
        transport, spec = self.transport, self.spec
        address = self.address if self.address % 16 == 0 else 0
        start = (address + lo) % CONGRUENCE
        if transport.alignment % CONGRUENCE == 0:
            if start == 0 and spec.fills(lo, hi):  # the most usual case: it needs no view at all
                ground = Ground(transport.allocate(spec.size, spec.dtype), spec)
            else:
                ground = Ground(transport.allocate((hi - lo + start,), torch.uint8))
        else:
            memory = transport.allocate((hi - lo + CONGRUENCE,), torch.uint8)
            ground = Ground(memory)
            start = (address + lo - memory.data_ptr()) % CONGRUENCE if address else lo % CONGRUENCE
        return _Buffer(lo, hi, ground, start - lo, transport.stream_key())

    def returning(self, fence: Fence, unused: Unused) -> None:
        """The copies that `room` named are under way. Until its first use it counts in `unused`."""
        for buffer in self.buffers:
            buffer.fence = fence
        self.stage = Stage.BACK
        self.back_in = self.context()
        self._unused = unused
        unused.add(id(self), self.nbytes)

    # --- use ------------------------------------------------------------------------------------------------------

    def use(self, spec: ViewSpec) -> tuple[torch.Tensor, Wait | None]:
        """The saved tensor, usable by what the calling thread issues next, and the wait that this cost.

        The stage is HELD or BACK; on the CPU this blocks until the bytes have arrived, so it is called without the
        offloader's lock.

        Raises:
            OffloadError: the bytes could not be brought back.
        """
        if self.stage is Stage.HELD:
            assert self._storage is not None
            if self._ground is None:
                self._ground = Ground(byte_view(self._storage, 0, self._storage.nbytes()))
            return self._on(self._ground, spec, 0), None
        if spec.lo == spec.hi:  # no byte of it was moved: it lies anywhere
            return self._on(self.buffers[0].ground, spec, -spec.lo), None
        for buffer in self.buffers:
            if buffer.lo <= spec.lo and spec.hi <= buffer.hi:
                break
        else:
            raise AssertionError("a saved view lies outside every range that was moved")
        wait = buffer.fence.order()
        stream = self.transport.stream_key()
        if stream != buffer.made_on:
            if buffer.shared_with is None:
                buffer.shared_with = set()
            if stream not in buffer.shared_with:
                self.transport.share(buffer.ground.memory.untyped_storage())
                buffer.shared_with.add(stream)
        return self._on(buffer.ground, spec, buffer.shift), wait

    def _on(self, ground: Ground, spec: ViewSpec, shift: int) -> torch.Tensor:
        if ground.num_changes:
            version = self._watch.version
            raise changed_in_place(str(spec.dtype), spec.size, version, version + ground.num_changes, self.row.name)
        return ground.rebuild(spec, shift)

    def __del__(self) -> None:
        # Takes no lock: the garbage collector may run this at any moment, in any thread.
        if self._left is not None and self._storage is not None:
            self.transport.bury(self._storage, self._left)
        if self._unused is not None:
            self._unused.drop(id(self))
        read = self._earlier
        for buffer in self.buffers:
            fence = buffer.fence
            if fence is not FINISHED:
                read.append(fence)
                if not fence.ordered_on(buffer.made_on):
                    self.transport.bury(buffer.ground.memory.untyped_storage(), fence)
        for _, _, resting in self._pieces:
            resting.retire(read)


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


class _All:
    """Copies that were started at different times: an earlier one may have failed where the last one has not."""

    def __init__(self, *fences: Fence) -> None:
        self.fences = list(fences)

    def done(self) -> bool:
        return all(fence.done() for fence in self.fences)

    def wait(self) -> None:
        for fence in self.fences:
            fence.wait()

    def order(self) -> Wait | None:
        wait = None
        for fence in self.fences:
            wait = fence.order()
        return wait

    def ordered_on(self, stream: int) -> bool:
        return all(fence.ordered_on(stream) for fence in self.fences)
