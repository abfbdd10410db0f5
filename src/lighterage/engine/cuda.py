"""The accelerator backend: lanes are streams, fences are events, and host memory is pinned."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from .arena import Arena, Block
from .cpu import WorkerFence, WorkerLane
from .disk import DiskStore, Extent
from .lanes import FINISHED, Fence, Resting, Source
from .units import round_up
from .views import byte_view

# Note [Block lifetime across lanes]
# A host block is written by the outbound lane and read by the inbound lane. Whoever writes it next must come after
# both: the block carries the fences of its earlier users, and the outbound lane waits for them before it copies.
# A device range is read by the outbound lane: its memory goes back to the allocator only after the stream that frees it
# waits for the copy (`order` at release); where a finalizer drops it while it is copied, it is buried, and the
# allocator is told of the lane. A reloaded range is written by the inbound
# lane: it is allocated on the stream that asks for it, the lane waits for that stream first (the allocator may have
# handed out memory that earlier work still uses), and each stream that reads it waits for the copy.


# Ranges that share a block start on multiples of this many bytes.
_ROOM = 512


class CudaPinner:
    """Page-locks host memory for every device of this process."""

    def pin(self, address: int, nbytes: int) -> None:
        """Register [address, address + nbytes) with the driver.

        Raises:
            OSError: the driver refused; the message holds its reason.
        """
        cudart = torch.cuda.cudart()
        code = int(cudart.cudaHostRegister(address, nbytes, 1))
        if code:
            raise OSError(f"cudaHostRegister of {nbytes} bytes failed with error {code}")

    def unpin(self, address: int) -> None:
        """Undo `pin` for the registration that begins at `address`."""
        torch.cuda.cudart().cudaHostUnregister(address)


class _DeviceWait:
    """A wait of the device: how long after the stream arrived the copies were finished."""

    __slots__ = ("_arrived", "_finished")

    def __init__(self, arrived: EventFence, finished: EventFence) -> None:
        self._arrived = arrived
        self._finished = finished

    def milliseconds(self) -> float | None:
        if not (self._arrived.done() and self._finished.done()):
            return None
        return max(0.0, self._arrived.event.elapsed_time(self._finished.event))


class EventFence:
    """A recorded event. The event goes back to `events` when nobody asks for it any more."""

    __slots__ = ("_streams", "event")

    def __init__(self, streams: _Streams, stream: torch.Stream) -> None:
        self._streams = streams
        try:
            self.event = streams.events.pop()
        except IndexError:
            self.event = torch.Event(streams.device, enable_timing=True)
        stream.record_event(self.event)

    def __del__(self) -> None:
        # What was made to wait for the event waits for this record of it, whatever is recorded later.
        self._streams.events.append(self.event)

    def done(self) -> bool:
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()

    def order(self) -> _DeviceWait | None:
        if self.event.query():
            return None
        stream = self._streams.current()
        arrived = EventFence(self._streams, stream)
        stream.wait_event(self.event)
        return _DeviceWait(arrived, self)


class _TicketFence:
    """A copy that a worker thread issues once a file has been read: first its ticket, then its event."""

    __slots__ = ("copied", "ticket")

    def __init__(self) -> None:
        self.ticket: WorkerFence
        self.copied: EventFence | None = None

    def done(self) -> bool:
        return self.ticket.done() and (self.copied is None or self.copied.done())

    def wait(self) -> None:
        self.ticket.wait()
        if self.copied is not None:
            self.copied.wait()

    def order(self) -> _DeviceWait | None:
        self.ticket.wait()
        return None if self.copied is None else self.copied.order()


class _Streams:
    """The two lanes of a device, and a pool of events."""

    def __init__(self, device: torch.device, before_copies: Callable[[], None] | None) -> None:
        self.device = device
        self.outbound = torch.Stream(device)
        self.inbound = torch.Stream(device)
        self.before_copies = before_copies
        self.events: list[torch.Event] = []

    def current(self) -> torch.Stream:
        return torch.accelerator.current_stream(self.device)

    @contextlib.contextmanager
    def on(self, lane: torch.Stream, back_to: torch.Stream) -> Iterator[None]:
        torch.accelerator.set_stream(lane)
        try:
            if self.before_copies is not None:
                self.before_copies()
            yield
        finally:
            torch.accelerator.set_stream(back_to)

    def after(self, stream: torch.Stream, lane: torch.Stream) -> None:
        """Make `lane` wait for what was issued on `stream` so far."""
        lane.wait_event(EventFence(self, stream).event)

    def fence(self, lane: torch.Stream) -> EventFence:
        """What was issued on `lane` so far."""
        return EventFence(self, lane)


def _await(lane: torch.Stream, fence: Fence) -> None:
    """Make `lane` come after `fence`, which is that of another lane of some device."""
    if isinstance(fence, EventFence):
        lane.wait_event(fence.event)
    else:
        fence.wait()


class _Shared:
    """One block for all that was evicted together. It is given back when the last of them has been."""

    __slots__ = ("_fences", "_users", "block")

    def __init__(self, block: Block, num_users: int) -> None:
        self.block = block
        self._users = [None] * num_users
        self._fences: list[Fence] = []

    def retire(self, fences: Iterable[Fence]) -> None:
        # Called from finalizers in any thread: each list operation is atomic, and the last pop tells the last user.
        self._fences.extend(fences)
        self._users.pop()
        if not self._users:
            self.block.retire(self._fences)


class _RestedInHost:
    """Bytes in a pinned block."""

    __slots__ = ("_retired", "_shared", "left", "nbytes", "parts")

    def __init__(self, shared: _Shared, lo: int, nbytes: int) -> None:
        self._shared = shared
        self._retired = [False]
        self.nbytes = nbytes
        self.parts = _slice(shared.block.parts, lo, lo + nbytes)
        self.left: Fence = FINISHED

    @property
    def block(self) -> Block:
        return self._shared.block

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        if self._retired:
            self._retired.pop()
            self._shared.retire((self.left, *fences))


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


def _copy_out(parts: tuple[torch.Tensor, ...], data: torch.Tensor) -> None:
    if len(parts) == 1:
        parts[0].copy_(data, non_blocking=True)
        return
    at = 0
    for part in parts:
        part.copy_(data[at : at + part.numel()], non_blocking=True)
        at += part.numel()


def _copy_in(data: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
    if len(parts) == 1:
        data.copy_(parts[0], non_blocking=True)
        return
    at = 0
    for part in parts:
        data[at : at + part.numel()].copy_(part, non_blocking=True)
        at += part.numel()


class _Accelerator:
    """What the transports of an accelerator share: streams, allocation, and the graveyard."""

    alignment = 512

    def __init__(self, device: torch.device, before_copies: Callable[[], None] | None) -> None:
        self.device = device
        self._streams = _Streams(device, before_copies)
        self._buried: collections.deque[tuple[torch.UntypedStorage, Fence]] = collections.deque()
        self._keys: set[int] = set()
        self._raw_stream: Callable[[int], int] | None = (
            torch._C._cuda_getCurrentRawStream if device.type == "cuda" else None
        )

    def stream_key(self) -> int:
        if self._raw_stream is not None:
            key = self._raw_stream(self.device.index)
        else:
            key = self._streams.current().stream_id
        self._keys.add(key)
        return key

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def share(self, storage: torch.UntypedStorage) -> None:
        byte_view(storage, 0, storage.nbytes()).record_stream(self._streams.current())

    def _claim(self, data: torch.Tensor, lane: torch.Stream, current: torch.Stream) -> None:
        # With several streams in play, the one that allocated a tensor is not known: let the allocator keep the memory
        # until both have passed (see Note [Block lifetime across lanes]).
        if len(self._keys) > 1:
            data.record_stream(lane)
            data.record_stream(current)

    def bury(self, storage: torch.UntypedStorage, fence: Fence) -> None:
        if not fence.done():
            self._buried.append((storage, fence))

    def tidy(self) -> None:
        while self._buried:
            try:
                storage, fence = self._buried.popleft()
            except IndexError:  # another thread was faster
                return
            if not fence.done():
                # Nobody wants these bytes any more: rather than wait, leave it to the allocator to watch the lanes.
                self.share_with_lanes(storage)

    def share_with_lanes(self, storage: torch.UntypedStorage) -> None:
        data = byte_view(storage, 0, storage.nbytes())
        data.record_stream(self._streams.outbound)
        data.record_stream(self._streams.inbound)

    def device_bytes(self) -> int | None:
        return int(torch.accelerator.memory_allocated(self.device))


class HostTransport(_Accelerator):
    """Device memory to pinned host memory and back."""

    def __init__(self, device: torch.device, arena: Arena, before_copies: Callable[[], None] | None = None) -> None:
        super().__init__(device, before_copies)
        self._arena = arena

    @property
    def refusal(self) -> str | None:
        return self._arena.refusal

    def evict(self, sources: Sequence[Source]) -> list[Resting | None]:
        placed = self._place([hi - lo for _, lo, hi in sources])
        work = [(one, source) for one, source in zip(placed, sources, strict=True) if one is not None]
        if work:
            streams = self._streams
            lane, current = streams.outbound, streams.current()
            streams.after(current, lane)
            for block in {id(one.block): one.block for one, _ in work}.values():
                for earlier in block.fences:
                    _await(lane, earlier)
            with streams.on(lane, current):
                for one, (storage, lo, hi) in work:
                    data = byte_view(storage, lo, hi)
                    self._claim(data, lane, current)
                    _copy_out(one.parts, data)
                left = streams.fence(lane)
            for one, _ in work:
                one.left = left
        return list(placed)

    def _place(self, sizes: Sequence[int]) -> list[_RestedInHost | None]:
        """Room for ranges that leave together: one block if there is one, or one each."""
        starts = list(itertools.accumulate((round_up(size, _ROOM) for size in sizes), initial=0))
        block = self._arena.acquire(starts[-1]) if len(sizes) > 1 else None
        if block is not None:
            shared = _Shared(block, len(sizes))
            return [_RestedInHost(shared, lo, size) for lo, size in zip(starts, sizes, strict=False)]
        blocks = [self._arena.acquire(size) for size in sizes]
        return [None if one is None else _RestedInHost(_Shared(one, 1), 0, one.nbytes) for one in blocks]

    def restore(self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]]) -> list[Fence]:
        streams = self._streams
        lane, current = streams.inbound, streams.current()
        streams.after(current, lane)
        fences: list[Fence] = []
        waited: Fence | None = None
        with streams.on(lane, current):
            for batch in batches:
                for resting, data in batch:
                    if resting.left is not waited:
                        waited = resting.left
                        _await(lane, waited)
                    self._claim(data, lane, current)
                    _copy_in(data, resting.parts)  # type: ignore[attr-defined]
                fences.append(streams.fence(lane))
        return fences

    def close(self) -> None:
        self._streams.outbound.synchronize()
        self._streams.inbound.synchronize()
        self._buried.clear()


class _RestedOnDisk:
    """Bytes in a file, or on their way there through a pinned block."""

    __slots__ = ("extent", "left", "written")

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.left: Fence = FINISHED
        self.written: Fence = FINISHED

    @property
    def nbytes(self) -> int:
        return self.extent.nbytes

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        self.extent.retire((self.written, *fences))


class DiskTransport(_Accelerator):
    """Device memory to a file and back, through pinned blocks that are held only for the passage."""

    def __init__(
        self,
        device: torch.device,
        passage: Arena,
        store: DiskStore,
        before_copies: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(device, before_copies)
        self._passage = passage
        self._store = store
        self._writer = WorkerLane("lighterage-disk-out")
        self._reader = WorkerLane("lighterage-disk-in")
        self._refusal: str | None = None

    @property
    def refusal(self) -> str | None:
        return self._refusal

    def evict(self, sources: Sequence[Source]) -> list[Resting | None]:
        rested: list[Resting | None] = []
        streams = self._streams
        lane, current = streams.outbound, streams.current()
        streams.after(current, lane)
        for storage, lo, hi in sources:
            extent = self._store.acquire(hi - lo)
            if extent is None:
                self._refusal = self._store.refusal
                rested.append(None)
                continue
            block = self._passage.acquire(hi - lo)
            if block is None:
                self._refusal = f"no pinned memory for the passage to disk: {self._passage.refusal}"
                extent.retire()
                rested.append(None)
                continue
            data = byte_view(storage, lo, hi)
            with streams.on(lane, current):
                self._claim(data, lane, current)
                for earlier in block.fences:
                    _await(lane, earlier)
                _copy_out(block.parts, data)
                left = streams.fence(lane)
            one = _RestedOnDisk(extent)
            one.left = left
            one.written = self._writer.submit(self._write_job(extent, block, left), extent.fences)
            rested.append(one)
        return rested

    def _write_job(self, extent: Extent, block: Block, left: EventFence) -> Callable[[], None]:
        def write() -> None:
            left.wait()
            at = 0
            for part in block.parts:
                self._store.write(extent, part, offset=at)
                at += part.numel()
            # Where the write fails the block is not given back: it still holds the only copy of the bytes.
            block.retire()

        return write

    def restore(self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]]) -> list[Fence]:
        streams = self._streams
        current = streams.current()
        allocated = current.record_event()
        fences: list[Fence] = []
        for batch in batches:
            fence = _TicketFence()
            after = [resting.written for resting, _ in batch]  # type: ignore[attr-defined]
            fence.ticket = self._reader.submit(self._read_job(list(batch), allocated, fence, current), after)
            fences.append(fence)
        return fences

    def _read_job(
        self,
        batch: list[tuple[Resting, torch.Tensor]],
        allocated: torch.Event,
        fence: _TicketFence,
        current: torch.Stream,
    ) -> Callable[[], None]:
        def read() -> None:
            lane = self._streams.inbound
            back_to = self._streams.current()
            lane.wait_event(allocated)
            batch.reverse()
            while batch:
                resting, data = batch.pop()  # in the order of saving: where ranges overlap, the last one is right
                resting.written.wait()  # type: ignore[attr-defined]
                block = self._passage.acquire(resting.nbytes)
                if block is None:  # the passage is full of what is still on its way out: go by ordinary memory
                    parts: tuple[torch.Tensor, ...] = (torch.empty(resting.nbytes, dtype=torch.uint8),)
                else:
                    parts = block.parts
                    for earlier in block.fences:
                        earlier.wait()
                at = 0
                for part in parts:
                    self._store.read(resting.extent, part, offset=at)  # type: ignore[attr-defined]
                    at += part.numel()
                with self._streams.on(lane, back_to):
                    self._claim(data, lane, current)
                    _copy_in(data, parts)
                    copied = self._streams.fence(lane)
                if block is None:
                    copied.wait()
                else:
                    block.retire((copied,))
                fence.copied = copied

        return read

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
        self._streams.outbound.synchronize()
        self._streams.inbound.synchronize()
        self._buried.clear()
