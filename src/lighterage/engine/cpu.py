"""The CPU backend: lanes are worker threads, and tensors in memory rest in a file or in the arena."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from .lanes import FINISHED, Fence, Resting, Source, chunks_of
from .views import as_bytes, byte_view
from .workers import RightOfWay, WorkerLane


class Room(Protocol):
    """A stretch of a store."""

    @property
    def nbytes(self) -> int: ...

    @property
    def fences(self) -> tuple[Fence, ...]: ...

    def retire(self, fences: Iterable[Fence] = ()) -> None: ...


class Store(Protocol):
    """Where a CPU transport's bytes rest: a file or the arena."""

    @property
    def refusal(self) -> str | None: ...

    def acquire(self, nbytes: int) -> Room | None: ...

    def write(self, room: Room, data: torch.Tensor, offset: int = 0) -> None: ...

    def read(self, room: Room, data: torch.Tensor, offset: int = 0) -> None: ...


class _Rested:
    """Bytes in a room of a store."""

    __slots__ = ("left", "reads", "room")

    def __init__(self, room: Room) -> None:
        self.room = room
        self.left: Fence = FINISHED
        self.reads: Sequence[Fence] = ()

    @property
    def nbytes(self) -> int:
        return self.room.nbytes

    def retire(self, fences: Iterable[Fence] = ()) -> None:
        self.room.retire((self.left, *self.reads, *fences))

    def __del__(self) -> None:
        self.retire()


class CpuTransport:
    """Moves CPU tensors to a store and back on two worker threads, and on a third what is urgent.

    `before_each` is called before every job, and between chunks; tests delay copies with it.
    """

    alignment = 64

    def __init__(self, store: Store, before_each: Callable[[], None] | None = None) -> None:
        self._store = store
        self._before_each = before_each
        self._way = RightOfWay()
        self._out = WorkerLane("lighterage-out", before_each)
        self._in = WorkerLane("lighterage-in", before_each)
        self._urgent: WorkerLane | None = None

    @property
    def refusal(self) -> str | None:
        return self._store.refusal

    def stream_key(self) -> int:
        return 0

    def capture(self) -> int:
        return 0

    def point(self) -> torch.Event | None:
        return None

    def evict(self, sources: Sequence[Source], *, since: torch.Event | None = None) -> list[Resting | None]:
        rested: list[Resting | None] = []
        work: list[tuple[Room, torch.Tensor]] = []
        placed: list[_Rested] = []
        for storage, lo, hi in sources:
            room = self._store.acquire(hi - lo)
            if room is None:
                rested.append(None)
                continue
            work.append((room, byte_view(storage, lo, hi)))
            placed.append(_Rested(room))
            rested.append(placed[-1])
        if work:

            def leave() -> None:
                while work:
                    room, data = work.pop()
                    self._copy(self._store.write, room, data, urgent=False)

            fence = self._out.submit(leave, [f for room, _ in work for f in room.fences])
            for one in placed:
                one.left = fence
        return rested

    def allocate(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cpu")

    def allocate_as(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cpu")

    def _copy(
        self, copy: Callable[[Room, torch.Tensor, int], None], room: Room, data: torch.Tensor, *, urgent: bool
    ) -> None:
        """Write or read, and give way between chunks where it is not urgent itself."""
        for at, chunk in chunks_of((data,)):
            if at and self._before_each is not None:
                self._before_each()
            if not urgent:
                self._way.give()
            copy(room, chunk, at)

    def _urgent_lane(self) -> WorkerLane:
        if self._urgent is None:
            self._in.check_process()
            self._urgent = WorkerLane("lighterage-urgent", self._before_each)
        return self._urgent

    def restore(
        self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]], *, urgent: bool = False
    ) -> list[Fence]:
        lane = self._urgent_lane() if urgent else self._in
        fences: list[Fence] = []
        for batch in batches:
            # The job holds the rooms, not who owns them: they may be given back before it has run, with its fence.
            # Popped from the end: what was copied out last is read last, since it is newer where ranges overlap.
            work = [(resting.left, resting.room, data) for resting, data in reversed(batch)]  # type: ignore[attr-defined]

            def come_back(work: list[tuple[Fence, Room, torch.Tensor]] = work) -> None:
                if not urgent:
                    self._read(work, urgent=False)
                    return
                # Before it holds up the outbound lane, which may have to bring these very bytes first.
                for left, _, _ in work:
                    left.wait()
                with self._way.taken():
                    self._read(work, urgent=True)

            fence = lane.submit(come_back)
            for resting, _ in batch:
                resting.reads = (*resting.reads, fence)  # type: ignore[attr-defined]
            fences.append(fence)
        return fences

    def _read(self, work: list[tuple[Fence, Room, torch.Tensor]], *, urgent: bool) -> None:
        while work:
            left, room, data = work.pop()
            left.wait()  # raises what went wrong on the way out: there is nothing to read then
            self._copy(self._store.read, room, as_bytes(data.data), urgent=urgent)

    def share(self, storage: torch.UntypedStorage) -> None:
        pass

    def share_with_lanes(self, storage: torch.UntypedStorage) -> None:
        pass

    def bury(self, storage: torch.UntypedStorage, fence: Fence) -> None:
        pass  # the job holds the memory until it has finished

    def tidy(self) -> None:
        pass

    def device_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        self._out.close()
        self._in.close()
        if self._urgent is not None:
            self._urgent.close()
