"""Device memory to pinned host memory and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

import torch

from ..errors import OffloadError
from .accelerator import Accelerator, copy_in, copy_out
from .arena import Arena, Block, slice_parts
from .captures import Tenure
from .cuda import copy_batches
from .host_reader import HostReader
from .lanes import FINISHED, Fence, Resting, Source, in_chunks
from .streams import await_on
from .views import as_bytes, byte_view

# Ranges that share a block start on multiples of this many bytes.
_ROOM = 512
_NO_GRAPHS = "a graph is captured, and this driver (before 12.3, or none of NVIDIA's) does not say when it is destroyed"
# What comes back together shares one fence up to so many bytes: a first use never waits for much that it does not need.
FENCE_BYTES = 4 << 20


class _Shared:
    """One block for all that was evicted together. It is given back when the last of them is gone."""

    __slots__ = ("address", "block", "left", "reads")

    def __init__(self, block: Block) -> None:
        self.block = block
        # Where a block crosses from one registration into the next it has no single address to copy to.
        self.address = block.parts[0].data_ptr() if len(block.parts) == 1 else None
        self.left: Fence = FINISHED
        self.reads: dict[Fence, None] = {}

    def __del__(self) -> None:
        # Whatever drops the last of them runs this: it takes no lock.
        self.block.retire((self.left, *self.reads))


class _RestedInHost:
    """Bytes in a pinned block."""

    __slots__ = ("_at", "address", "left", "nbytes", "shared")

    def __init__(self, shared: _Shared, at: int, nbytes: int) -> None:
        self.shared = shared
        self.nbytes = nbytes
        self.address = None if shared.address is None else shared.address + at
        """Where the bytes are, if the block has an address."""
        self._at = at
        self.left: Fence = FINISHED

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """uint8 tensors over the bytes, in order."""
        return slice_parts(self.shared.block.parts, self._at, self._at + self.nbytes)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Address and bytes of each registration's share, in order."""
        return [(part.data_ptr(), part.numel()) for part in self.parts]

    @property
    def starts(self) -> list[int]:
        """Where each of them starts among the bytes."""
        ends = list(accumulate(part.numel() for part in self.parts))
        return [0, *ends[:-1]]

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        if hasattr(self, "shared"):
            self.shared.reads.update(dict.fromkeys(fences))
            del self.shared


def _overlaps(data: torch.Tensor, others: Sequence[tuple[object, torch.Tensor]]) -> bool:
    lo, hi = data.data_ptr(), data.data_ptr() + data.nbytes
    return any(lo < other.data_ptr() + other.nbytes and other.data_ptr() < hi for _, other in others)


class HostTransport(Accelerator):
    """Device memory to pinned host memory and back."""

    def __init__(self, device: torch.device, arena: Arena, before_copies: Callable[[], None] | None = None) -> None:
        super().__init__(device, before_copies)
        self._arena = arena
        self._batches = copy_batches(device)
        self._reader = HostReader(device) if device.type == "cuda" else None
        self._last_in: Fence = FINISHED
        """After the copies that the inbound lane was given last."""
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

    def evict(self, sources: Sequence[Source], *, since: torch.Event | None = None) -> list[Resting | None]:
        try:
            tenure = self._tenure()
        except OffloadError as error:
            self._no_graphs = str(error)
            return [None] * len(sources)
        self._no_graphs = None
        placed = self._place([hi - lo for _, lo, hi in sources])
        work = [(one, source) for one, source in zip(placed, sources, strict=True) if one is not None]
        if work:
            streams = self._streams
            lane, current = streams.outbound, streams.current()
            streams.after(current, lane, since)
            if self._goes_first and tenure is None:
                self._give_way(lane)
            rooms = {one.shared: None for one, _ in work}
            for shared in rooms:
                if tenure is not None:
                    tenure.hold(shared)
                for earlier in shared.block.fences:
                    await_on(lane, earlier)
            with streams.on(lane, current):
                try:
                    self._copy_out(work, lane, current)
                finally:  # some may be under way where others failed
                    left = streams.fence(lane)
                    for shared in rooms:
                        shared.left = left
            for one, _ in work:
                one.left = left
        return list(placed)

    def _place(self, sizes: Sequence[int]) -> list[_RestedInHost | None]:
        """Room for ranges that leave together: one block if there is one, or one each."""
        if len(sizes) > 1:
            starts, total = [], 0
            for size in sizes:
                starts.append(total)
                total += -(-size // _ROOM) * _ROOM
            block = self._arena.acquire(total, self.has_room)
            if block is not None:
                shared = _Shared(block)
                return [_RestedInHost(shared, at, size) for at, size in zip(starts, sizes, strict=True)]
        placed: list[_RestedInHost | None] = []
        for size in sizes:
            block = self._arena.acquire(size, self.has_room)
            if block is None:
                placed.append(None)
            else:
                placed.append(_RestedInHost(_Shared(block), 0, size))
        return placed

    def _copy_out(
        self, work: Sequence[tuple[_RestedInHost, Source]], lane: torch.Stream, current: torch.Stream
    ) -> None:
        if self._several_streams:
            for _, (storage, lo, hi) in work:
                self._claim(byte_view(storage, lo, hi), lane, current)
        to = [address for one, _ in work if (address := one.address) is not None]
        if self._streams.capturing():
            pieces = [(address, nbytes) for one, _ in work for address, nbytes in one.pieces]
            here = [storage.data_ptr() + lo + at for one, (storage, lo, _) in work for at in one.starts]
            self._capture_copies([address for address, _ in pieces], here, [nbytes for _, nbytes in pieces])
            return
        if self._batches is not None and len(to) == len(work):
            here = [storage.data_ptr() + lo for _, (storage, lo, _) in work]
            sizes = [one.nbytes for one, _ in work]
            if self._batches.copy(to, here, sizes, self._streams.key()):
                return
        for one, (storage, lo, hi) in work:
            copy_out(one.parts, byte_view(storage, lo, hi))

    # --- back -----------------------------------------------------------------------------------------------------

    def restore(
        self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]], *, urgent: bool = False
    ) -> list[Fence]:
        streams = self._streams
        tenure = self._tenure()
        urgent = urgent and tenure is None
        lane, current = streams.urgent if urgent else streams.inbound, streams.current()
        if tenure is not None:
            for resting, _ in (one for batch in batches for one in batch):
                tenure.hold(resting.shared)  # type: ignore[attr-defined]
        streams.after(current, lane)
        if self._goes_first and not urgent and tenure is None:
            self._give_way(lane)
        if urgent and not self._last_in.done() and (fence := self._read(batches, lane, current)) is not None:
            self._go_first(fence)
            return [fence] * len(batches)
        fences: list[Fence] = []
        gathered: list[tuple[_RestedInHost, torch.Tensor]] = []
        several: list[list[tuple[_RestedInHost, torch.Tensor]]] = []
        nbytes = num_batches = 0
        with streams.on(lane, current):
            for batch in batches:
                for resting, data in batch:
                    if len(batch) > 1 and _overlaps(data, gathered):
                        # What was copied out last is newer, and copies of one call come in no order.
                        several.append(gathered)
                        gathered = []
                    nbytes += resting.nbytes
                    gathered.append((resting, data))  # type: ignore[arg-type]
                num_batches += 1
                if nbytes >= FENCE_BYTES or num_batches + len(fences) == len(batches):
                    several.append(gathered)
                    fences.extend([self._copy_in(several, lane, current)] * num_batches)
                    gathered, several, nbytes, num_batches = [], [], 0, 0
        if urgent and fences:
            self._go_first(fences[-1])
        elif fences and tenure is None:
            self._last_in = fences[-1]
        return fences

    def _read(
        self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]], lane: torch.Stream, current: torch.Stream
    ) -> Fence | None:
        """Let a kernel bring them back, in this order, past what is on its way: see Note [Why a kernel reads]."""
        if self._reader is None:
            return None
        work: list[tuple[_RestedInHost, torch.Tensor]] = [one for batch in batches for one in batch]  # type: ignore[misc]
        rooms = {one.shared: None for one, _ in work}
        with self._streams.on(lane, current):
            for left in {shared.left: None for shared in rooms}:
                await_on(lane, left)
            if not self._reader.read([(as_bytes(data.data), one.parts) for one, data in work]):
                return None
            if self._several_streams:
                for _, data in work:
                    self._claim(data, lane, current)
            fence = self._streams.fence(lane)
        for shared in rooms:
            shared.reads[fence] = None
        return fence

    def _copy_in(
        self,
        several: Sequence[Sequence[tuple[_RestedInHost, torch.Tensor]]],
        lane: torch.Stream,
        current: torch.Stream,
    ) -> Fence:
        """Start these copies, in this order as far as they are not of one list; the fence after them all."""
        rooms = {one.shared: None for work in several for one, _ in work}
        for left in {shared.left: None for shared in rooms}:
            await_on(lane, left)
        for work in several:
            self._start(work, lane, current)
        fence = self._streams.fence(lane)
        for shared in rooms:
            shared.reads[fence] = None
        return fence

    def _start(
        self, work: Sequence[tuple[_RestedInHost, torch.Tensor]], lane: torch.Stream, current: torch.Stream
    ) -> None:
        if self._several_streams:
            for _, data in work:
                self._claim(data, lane, current)
        there = [address for one, _ in work if (address := one.address) is not None]
        if self._streams.capturing():
            pieces = [(address, nbytes) for one, _ in work for address, nbytes in one.pieces]
            to = [data.data_ptr() + at for one, data in work for at in one.starts]
            self._capture_copies(to, [address for address, _ in pieces], [nbytes for _, nbytes in pieces])
            return
        if self._batches is not None and len(there) == len(work):
            to = [data.data_ptr() for _, data in work]
            sizes = [one.nbytes for one, _ in work]
            if self._batches.copy(*in_chunks(to, there, sizes), self._streams.key()):
                return
        for one, data in work:
            copy_in(as_bytes(data.data), one.parts)

    def _capture_copies(self, destinations: list[int], sources: list[int], sizes: list[int]) -> None:
        """Copies of a capture, each within one registration of pinned memory."""
        batches = self._batches
        if batches is None or not batches.copy(destinations, sources, sizes, self._streams.key()):
            raise OffloadError(
                "a copy was refused inside a graph's capture. The capture has failed, or the device of the tensors is "
                "not the current one: capture under torch.cuda.device."
            )

    def close(self) -> None:
        self._synchronize_lanes()
        self._buried.clear()
