"""Device memory to pinned host memory and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..errors import OffloadError
from .accelerator import Accelerator, copy_in, copy_out
from .arena import Arena, Block
from .captures import Tenure
from .cuda import copy_batches
from .lanes import FINISHED, Fence, Resting, Source
from .streams import await_on
from .views import as_bytes, byte_view

# Ranges that share a block start on multiples of this many bytes.
_ROOM = 512
_NO_GRAPHS = "a graph is captured, and this driver (before 12.3, or none of NVIDIA's) does not say when it is destroyed"
# What comes back together shares one fence up to so many bytes: a first use never waits for much that it does not need.
FENCE_BYTES = 4 << 20


class _Shared:
    """One block for all that was evicted together. It is given back when the last of them has been."""

    __slots__ = ("_fences", "_users", "address", "block", "left")

    def __init__(self, block: Block, num_users: int) -> None:
        self.block = block
        # Where a block crosses from one registration into the next it has no single address to copy to.
        self.address = block.parts[0].data_ptr() if len(block.parts) == 1 else None
        self.left: Fence = FINISHED
        self._users = [None] * num_users
        self._fences: set[Fence] = set()

    def hold(self) -> None:
        self._users.append(None)

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        # Called from finalizers in any thread: each operation is atomic, and the last pop tells the last user.
        self._fences.update(fences)
        self._users.pop()
        if not self._users:
            self.block.retire((self.left, *self._fences))


class _RestedInHost:
    """Bytes in a pinned block."""

    __slots__ = ("_at", "_retired", "nbytes", "shared")

    def __init__(self, shared: _Shared, at: int, nbytes: int) -> None:
        self.shared = shared
        self.nbytes = nbytes
        self._at = at
        self._retired = False

    @property
    def left(self) -> Fence:
        return self.shared.left

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Address and bytes of each registration's share, in order."""
        if self.shared.address is not None:
            return [(self.shared.address + self._at, self.nbytes)]
        return [(part.data_ptr(), part.numel()) for part in self.parts]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """uint8 tensors over the bytes, in order."""
        return _slice(self.shared.block.parts, self._at, self._at + self.nbytes)

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        # Only its owner calls this: under the offloader's lock, or, when nobody can any more, in its finalizer.
        if not self._retired:
            self._retired = True
            self.shared.retire(fences)


def _overlaps(data: torch.Tensor, others: Sequence[tuple[object, torch.Tensor]]) -> bool:
    lo, hi = data.data_ptr(), data.data_ptr() + data.nbytes
    return any(lo < other.data_ptr() + other.nbytes and other.data_ptr() < hi for _, other in others)


def _slice(parts: tuple[torch.Tensor, ...], lo: int, hi: int) -> tuple[torch.Tensor, ...]:
    if len(parts) == 1:
        return parts if hi - lo == parts[0].numel() else (parts[0][lo:hi],)
    cut = []
    for part in parts:
        size = part.numel()
        if lo < size and hi > 0:
            cut.append(part[max(0, lo) : min(size, hi)])
        lo, hi = lo - size, hi - size
    return tuple(cut)


class HostTransport(Accelerator):
    """Device memory to pinned host memory and back."""

    def __init__(self, device: torch.device, arena: Arena, before_copies: Callable[[], None] | None = None) -> None:
        super().__init__(device, before_copies)
        self._arena = arena
        self._batches = copy_batches(device)
        self._no_graphs: str | None = None

    @property
    def refusal(self) -> str | None:
        return self._no_graphs or self._arena.refusal

    def _tenure(self) -> Tenure | None:
        """What belongs to the graph that is captured now, if one is.

        Raises:
            OffloadError: the driver does not say when that graph is destroyed.
        """
        if not self._streams.capturing():
            return None
        capture = self._streams.capture()
        tenure = None if capture is None else capture.tenure()
        if tenure is None:
            raise OffloadError(_NO_GRAPHS)
        self._arena.lend(tenure)
        return tenure

    # --- out ------------------------------------------------------------------------------------------------------

    def evict(self, sources: Sequence[Source]) -> list[Resting | None]:
        try:
            tenure = self._tenure()
        except OffloadError as error:
            self._no_graphs = str(error)
            return [None] * len(sources)
        self._no_graphs = None
        placed = self._place([hi - lo for _, lo, hi in sources])
        work = [(one, source) for one, source in zip(placed, sources, strict=True) if one is not None]
        if work:
            try:
                self._start(work, tenure)
            except BaseException:
                for one, _ in work:
                    one.retire()
                raise
        return list(placed)

    def _start(self, work: Sequence[tuple[_RestedInHost, Source]], tenure: Tenure | None) -> None:
        streams = self._streams
        lane, current = streams.outbound, streams.current()
        streams.after(current, lane)
        rooms = {one.shared: None for one, _ in work}
        for shared in rooms:
            for earlier in shared.block.fences:
                await_on(lane, earlier)
            if tenure is not None:
                tenure.hold(shared)
        with streams.on(lane, current):
            try:
                self._copy_out(work, lane, current)
            finally:  # some may be under way where others failed
                left = streams.fence(lane)
                for shared in rooms:
                    shared.left = left

    def _place(self, sizes: Sequence[int]) -> list[_RestedInHost | None]:
        """Room for ranges that leave together: one block if there is one, or one each."""
        if len(sizes) > 1:
            starts, total = [], 0
            for size in sizes:
                starts.append(total)
                total += -(-size // _ROOM) * _ROOM
            block = self._arena.acquire(total, self.has_room)
            if block is not None:
                shared = _Shared(block, len(sizes))
                return [_RestedInHost(shared, at, size) for at, size in zip(starts, sizes, strict=True)]
        blocks = [self._arena.acquire(size, self.has_room) for size in sizes]
        return [None if one is None else _RestedInHost(_Shared(one, 1), 0, one.nbytes) for one in blocks]

    def _copy_out(
        self, work: Sequence[tuple[_RestedInHost, Source]], lane: torch.Stream, current: torch.Stream
    ) -> None:
        if self._several_streams:
            for _, (storage, lo, hi) in work:
                self._claim(byte_view(storage, lo, hi), lane, current)
        if self._batches is not None:
            to, here, sizes = [], [], []
            for one, (storage, lo, _) in work:
                at = storage.data_ptr() + lo
                for address, nbytes in one.pieces:
                    to.append(address)
                    here.append(at)
                    sizes.append(nbytes)
                    at += nbytes
            if self._batches.copy(to, here, sizes, self._streams.key()):
                return
        for one, (storage, lo, hi) in work:
            copy_out(one.parts, byte_view(storage, lo, hi))

    # --- back -----------------------------------------------------------------------------------------------------

    def restore(self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]]) -> list[Fence]:
        streams = self._streams
        lane, current = streams.inbound, streams.current()
        tenure = self._tenure()
        if tenure is not None:
            for resting, _ in (one for batch in batches for one in batch):
                tenure.hold(resting.shared)  # type: ignore[attr-defined]
        streams.after(current, lane)
        fences: list[Fence] = []
        gathered: list[tuple[_RestedInHost, torch.Tensor]] = []
        nbytes = num_batches = 0
        with streams.on(lane, current):
            for batch in batches:
                for resting, data in batch:
                    if len(batch) > 1 and _overlaps(data, gathered):
                        # What was copied out last is newer, and copies of one call come in no order.
                        self._copy_in(gathered, lane, current)
                        gathered = []
                    nbytes += resting.nbytes
                    gathered.append((resting, data))  # type: ignore[arg-type]
                num_batches += 1
                if nbytes >= FENCE_BYTES or num_batches + len(fences) == len(batches):
                    self._copy_in(gathered, lane, current)
                    fences.extend([streams.fence(lane)] * num_batches)
                    gathered, nbytes, num_batches = [], 0, 0
        return fences

    def _copy_in(
        self, work: Sequence[tuple[_RestedInHost, torch.Tensor]], lane: torch.Stream, current: torch.Stream
    ) -> None:
        for left in {one.shared.left: None for one, _ in work}:
            await_on(lane, left)
        if self._several_streams:
            for _, data in work:
                self._claim(data, lane, current)
        if self._batches is not None:
            to, there, sizes = [], [], []
            for one, data in work:
                at = data.data_ptr()
                for address, nbytes in one.pieces:
                    to.append(at)
                    there.append(address)
                    sizes.append(nbytes)
                    at += nbytes
            if self._batches.copy(to, there, sizes, self._streams.key()):
                return
        for one, data in work:
            copy_in(as_bytes(data.data), one.parts)

    def close(self) -> None:
        self._streams.outbound.synchronize()
        self._streams.inbound.synchronize()
        self._buried.clear()
