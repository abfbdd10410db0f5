"""What the transports of an accelerator share: streams, device memory, and the graveyard."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence

import torch

from .lanes import Fence, chunks_of
from .streams import Streams, await_on
from .views import byte_view

# Note [Block lifetime across lanes]
# A host block is written by the outbound lane and read by the inbound lane. Whoever writes it next must come after
# both: the block carries the fences of its earlier users, and the outbound lane waits for them before it copies.
# A device range is read by the outbound lane: its memory goes back to the allocator only after the stream that frees it
# waits for the copy (`order` at release); where a finalizer drops it while it is copied, it is buried, and the
# allocator is told of the lane. A reloaded range is written by the inbound
# lane: it is allocated on the stream that asks for it, the lane waits for that stream first (the allocator may have
# handed out memory that earlier work still uses), and each stream that reads it waits for the copy. The lane of urgent
# reloads is an inbound lane in all of this: what it reads and writes carries its fences, not those of the other one.


# A device with this part of its memory free has room.
_ROOMY = 4
# For so long its answer is not asked for again.
_LOOK_AGAIN_S = 0.005


class Accelerator:
    """What the transports of an accelerator share: streams, allocation, and the graveyard."""

    alignment = 512

    def __init__(self, device: torch.device, before_copies: Callable[[], None] | None) -> None:
        self.device = device
        self._streams = Streams(device, before_copies)
        self._buried: collections.deque[tuple[torch.UntypedStorage, Fence]] = collections.deque()
        self._keys: set[int] = set()
        self._last_key: int | None = None
        self.must_leave = False
        """Whether nothing may stay on the device merely because there is room."""
        self._goes_first: dict[int, Fence] = {}
        """By lane, the urgent copies that come before what it is given next."""
        self._has_room = False
        self._look_again_at = 0.0

    def stream_key(self) -> int:
        key = self._streams.key()
        if self._streams.capturing():
            capture = self._streams.capture()
            if capture is not None:
                capture.streams.add(key)
        elif key != self._last_key:
            self._last_key = key
            self._keys.add(key)
        return key

    def point(self) -> torch.Event | None:
        if not self._streams.capturing():
            return None
        event = torch.Event(self.device)
        self._streams.current().record_event(event)
        return event

    def capture(self) -> int:
        if not self._streams.capturing():
            return 0
        capture = self._streams.capture()
        return -1 if capture is None else capture.number

    def allocate(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def allocate_as(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        # It costs the host half of what torch.empty does.
        return torch.empty_strided(size, stride, dtype=dtype, device=self.device)

    def share(self, storage: torch.UntypedStorage) -> None:
        byte_view(storage, 0, storage.nbytes()).record_stream(self._streams.current())

    @property
    def _several_streams(self) -> bool:
        # What a capture allocates comes from its graph's own pool: only the streams of that capture count.
        capture = self._streams.capture()
        return len(self._keys if capture is None else capture.streams) > 1

    def _claim(self, data: torch.Tensor, lane: torch.Stream, current: torch.Stream) -> None:
        # With several streams in play, the one that allocated a tensor is not known: let the allocator keep the memory
        # until both have passed (see Note [Block lifetime across lanes]).
        if self._several_streams:
            data.record_stream(lane)
            data.record_stream(current)

    def bury(self, storage: torch.UntypedStorage, fence: Fence) -> None:
        if fence.done():
            return
        if self._streams.capturing() and fence.ordered_on(self._streams.key()) and not self._several_streams:
            return  # the graph's pool gives it out again to this stream, which waits for the copy
        self._buried.append((storage, fence))

    def tidy(self) -> None:
        if self._streams.capturing():
            return  # the allocator could not watch the lanes; and what a graph has buried waits for its end
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
        for lane in self._streams.lanes:
            data.record_stream(lane)

    def _go_first(self, fence: Fence) -> None:
        """Let what the other lanes are given from now on come after the urgent copies before `fence`."""
        for lane in (self._streams.outbound, self._streams.inbound):
            self._goes_first[id(lane)] = fence

    def _give_way(self, lane: torch.Stream) -> None:
        """Make `lane` come after the last urgent copies. Not for captures: no graph can depend on what is outside."""
        fence = self._goes_first.pop(id(lane), None)
        if fence is not None:
            await_on(lane, fence)

    def _synchronize_lanes(self) -> None:
        for lane in self._streams.lanes:
            lane.synchronize()

    def has_room(self) -> bool:
        """Whether so much of the device is free that what could leave it may as well stay for a while."""
        if self.must_leave or self._streams.capturing():
            return False  # what a graph does it does at each replay: rather wait once
        now = time.monotonic()
        if now >= self._look_again_at:
            free, total = torch.accelerator.get_memory_info(self.device)
            self._has_room = free >= total // _ROOMY
            self._look_again_at = now + _LOOK_AGAIN_S
        return self._has_room

    def device_bytes(self) -> int | None:
        return int(torch.accelerator.memory_allocated(self.device))


def copy_out(parts: tuple[torch.Tensor, ...], data: torch.Tensor) -> None:
    if len(parts) == 1:
        parts[0].copy_(data, non_blocking=True)
        return
    at = 0
    for part in parts:
        part.copy_(data[at : at + part.numel()], non_blocking=True)
        at += part.numel()


def copy_in(data: torch.Tensor, parts: tuple[torch.Tensor, ...]) -> None:
    """In chunks: see Note [Urgent reloads]."""
    for at, chunk in chunks_of(parts):
        size = chunk.numel()
        (data if size == data.numel() else data[at : at + size]).copy_(chunk, non_blocking=True)
