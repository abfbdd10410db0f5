"""Device memory to a file and back, through pinned memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence

import torch

from ..errors import OffloadError
from .accelerator import Accelerator, copy_in, copy_out
from .arena import Arena, Block
from .captures import CapturedFence
from .disk import DiskStore, Extent
from .lanes import FINISHED, Fence, Resting, Source, chunks_of
from .streams import DeviceWait, EventFence, await_on
from .views import as_bytes, byte_view
from .workers import RightOfWay, WorkerFence, WorkerLane


class _TicketFence:
    """A copy that a worker thread issues once a file has been read: first its ticket, then its event."""

    __slots__ = ("copied", "ticket")

    def __init__(self) -> None:
        self.ticket: WorkerFence
        self.copied: EventFence | CapturedFence | None = None

    def done(self) -> bool:
        return self.ticket.done() and (self.copied is None or self.copied.done())

    def wait(self) -> None:
        self.ticket.wait()
        if self.copied is not None:
            self.copied.wait()

    def order(self) -> DeviceWait | None:
        self.ticket.wait()
        return None if self.copied is None else self.copied.order()

    def ordered_on(self, stream: int) -> bool:
        return self.ticket.done() and self.copied is not None and self.copied.ordered_on(stream)


class _RestedOnDisk:
    """Bytes in a file, or on their way there through a pinned block."""

    __slots__ = ("extent", "left", "reads", "written")

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.left: Fence = FINISHED
        self.written: Fence = FINISHED
        self.reads: Sequence[Fence] = ()

    @property
    def nbytes(self) -> int:
        return self.extent.nbytes

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        self.extent.retire((self.written, *self.reads, *fences))

    def __del__(self) -> None:
        self.retire()


_NO_DISK = "a graph is captured, and its replays could not write to disk"


class DiskTransport(Accelerator):
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
        self._writer = self._worker("lighterage-disk-out")
        self._reader = self._worker("lighterage-disk-in")
        self._urgent_reader: WorkerLane | None = None
        self._way = RightOfWay()
        self._refusal: str | None = None

    @property
    def refusal(self) -> str | None:
        return self._refusal

    def evict(self, sources: Sequence[Source], *, since: torch.Event | None = None) -> list[Resting | None]:
        rested: list[Resting | None] = []
        streams = self._streams
        if streams.capturing():
            self._refusal = _NO_DISK
            return [None] * len(sources)
        lane, current = streams.outbound, streams.current()
        streams.after(current, lane)
        self._give_way(lane)
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
                    await_on(lane, earlier)
                copy_out(block.parts, data)
                left = streams.fence(lane)
            one = _RestedOnDisk(extent)
            one.left = left
            one.written = self._writer.submit(self._write_job(extent, block, left), extent.fences)
            rested.append(one)
        return rested

    def _write_job(self, extent: Extent, block: Block, left: Fence) -> Callable[[], None]:
        def write() -> None:
            left.wait()
            for at, chunk in chunks_of(block.parts):
                self._way.give()
                self._store.write(extent, chunk, offset=at)
            # Where the write fails the block is not given back: it still holds the only copy of the bytes.
            block.retire()

        return write

    def restore(
        self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]], *, urgent: bool = False
    ) -> list[Fence]:
        streams = self._streams
        if streams.capturing():
            raise OffloadError(
                "a graph is captured whose backward needs what was saved outside of it and rests on disk; its replays "
                "could not read a disk. Capture the forward pass too, or use tier='host'."
            )
        reader, lane = (self._urgent_lane(), streams.urgent) if urgent else (self._reader, streams.inbound)
        current = streams.current()
        allocated = current.record_event()
        fences: list[Fence] = []
        for batch in batches:
            fence = _TicketFence()
            # The job holds the extents, not who owns them: they may be given back before it has run, with its fence.
            work = [(resting.written, resting.extent, data) for resting, data in batch]  # type: ignore[attr-defined]
            after = [written for written, _, _ in work]
            fence.ticket = reader.submit(self._read_job(work, allocated, fence, current, lane), after)
            for resting, _ in batch:
                resting.reads = (*resting.reads, fence)  # type: ignore[attr-defined]
            fences.append(fence)
        return fences

    def _read_job(
        self,
        batch: list[tuple[Fence, Extent, torch.Tensor]],
        allocated: torch.Event,
        fence: _TicketFence,
        current: torch.Stream,
        lane: torch.Stream,
    ) -> Callable[[], None]:
        urgent = lane is not self._streams.inbound

        def read() -> None:
            back_to = self._streams.current()
            lane.wait_event(allocated)
            batch.reverse()
            while batch:
                written, extent, data = batch.pop()  # in the order of saving: where ranges overlap, the last is right
                written.wait()
                block = self._passage.acquire(extent.nbytes)
                if block is None:  # the passage is full of what is still on its way out: go by ordinary memory
                    parts: tuple[torch.Tensor, ...] = (torch.empty(extent.nbytes, dtype=torch.uint8),)
                else:
                    parts = block.parts
                    for earlier in block.fences:
                        earlier.wait()
                # From here to the end of the file's reading it waits for no lane: see `RightOfWay`.
                with self._way.taken() if urgent else contextlib.nullcontext():
                    for at, chunk in chunks_of(parts):
                        if not urgent:
                            self._way.give()
                        self._store.read(extent, chunk, offset=at)
                if not urgent:
                    self._give_way(lane)
                with self._streams.on(lane, back_to):
                    self._claim(data, lane, current)
                    copy_in(as_bytes(data.data), parts)
                    copied = self._streams.fence(lane)
                if urgent:
                    self._go_first(copied)
                if block is None:
                    copied.wait()
                else:
                    block.retire((copied,))
                fence.copied = copied

        return read

    def _urgent_lane(self) -> WorkerLane:
        if self._urgent_reader is None:
            self._reader.check_process()
            self._urgent_reader = self._worker("lighterage-disk-urgent")
        return self._urgent_reader

    def _worker(self, name: str) -> WorkerLane:
        worker = WorkerLane(name)
        if self.device.index is not None:
            # A thread begins with the first device as its current one, where waiting for an event makes a context,
            # though this process may have nothing there.
            worker.submit(functools.partial(torch.accelerator.set_device_index, self.device.index))
        return worker

    def close(self) -> None:
        self._writer.close()
        self._reader.close()
        if self._urgent_reader is not None:
            self._urgent_reader.close()
        self._synchronize_lanes()
        self._buried.clear()
