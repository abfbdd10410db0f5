"""The CPU backend: lanes are worker threads, and tensors in memory rest in a file or in the arena."""

from __future__ import annotations

import contextlib
import copy
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from ..errors import OffloadError
from .lanes import FINISHED, Fence, Resting, Source
from .views import as_bytes, byte_view


class _HostWait:
    """A wait of the host, already over."""

    __slots__ = ("_ms",)

    def __init__(self, ms: float) -> None:
        self._ms = ms

    def milliseconds(self) -> float | None:
        return self._ms


class WorkerFence:
    """Set when a worker has finished a job."""

    __slots__ = ("_error", "_finished", "_pid")

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._pid = os.getpid()

    def finish(self, error: BaseException | None) -> None:
        self._error = error
        self._finished.set()

    def done(self) -> bool:
        return self._finished.is_set()

    def wait(self) -> None:
        if not self._finished.is_set() and os.getpid() != self._pid:
            raise _forked()
        self._finished.wait()
        if self._error is not None:
            # A copy each time: a raised error holds the frames that it passed through, with all that they name.
            raise copy.copy(self._error) from self._error.__cause__

    def order(self) -> _HostWait | None:
        if self._finished.is_set():
            self.wait()
            return None
        start = time.perf_counter()
        self.wait()
        return _HostWait((time.perf_counter() - start) * 1e3)

    def ordered_on(self, stream: int) -> bool:
        return self._finished.is_set() and self._error is None


def _forked() -> OffloadError:
    return OffloadError(
        "this process was forked from the one that saved these tensors, and the copy lanes stayed there. "
        "Run backward in the process that ran forward, or call forward again in this one."
    )


_Job = tuple[Callable[[], None], tuple[Fence, ...], WorkerFence]


def _work(jobs: queue.SimpleQueue[_Job | None], before_each: Callable[[], None] | None) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        run, after, fence = job
        del job
        error: BaseException | None = None
        try:
            for earlier in after:
                # What went wrong with an earlier use of the room is that user's to hear of.
                with contextlib.suppress(Exception):
                    earlier.wait()
            if before_each is not None:
                before_each()
            run()
        except BaseException as caught:  # the error belongs to whoever waits for the fence
            error = caught
            link: BaseException | None = caught
            while link is not None:
                link.__traceback__ = None
                link = link.__cause__ or link.__context__
        # Nothing here may hold the job's tensors once the fence is set: release counts on their being free.
        del run, after
        fence.finish(error)
        del fence, error


class WorkerLane:
    """One worker thread that carries out jobs in order.

    `before_each` is called before every job; tests delay copies with it.
    """

    def __init__(self, name: str, before_each: Callable[[], None] | None = None) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=_work, args=(self._jobs, before_each), name=name, daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[], None], after: Iterable[Fence] = ()) -> WorkerFence:
        """Queue `run`, to be started after the `after` fences."""
        if os.getpid() != self._pid:
            raise _forked()
        fence = WorkerFence()
        self._jobs.put((run, tuple(after), fence))
        return fence

    def close(self) -> None:
        """Finish the queue and end the thread."""
        self._jobs.put(None)
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join()

    def __del__(self) -> None:
        self._jobs.put(None)


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

    def write(self, room: Room, data: torch.Tensor) -> None: ...

    def read(self, room: Room, data: torch.Tensor) -> None: ...


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
    """Moves CPU tensors to a store and back on two worker threads."""

    alignment = 64

    def __init__(self, store: Store, before_each: Callable[[], None] | None = None) -> None:
        self._store = store
        self._out = WorkerLane("lighterage-out", before_each)
        self._in = WorkerLane("lighterage-in", before_each)

    @property
    def refusal(self) -> str | None:
        return self._store.refusal

    def stream_key(self) -> int:
        return 0

    def capture(self) -> int:
        return 0

    def evict(self, sources: Sequence[Source]) -> list[Resting | None]:
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
            store = self._store

            def leave() -> None:
                while work:
                    room, data = work.pop()
                    store.write(room, data)

            fence = self._out.submit(leave, [f for room, _ in work for f in room.fences])
            for one in placed:
                one.left = fence
        return rested

    def allocate(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cpu")

    def allocate_as(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cpu")

    def restore(self, batches: Sequence[Sequence[tuple[Resting, torch.Tensor]]]) -> list[Fence]:
        fences: list[Fence] = []
        for batch in batches:
            # The job holds the rooms, not who owns them: they may be given back before it has run, with its fence.
            # Popped from the end: what was copied out last is read last, since it is newer where ranges overlap.
            work = [(resting.left, resting.room, data) for resting, data in reversed(batch)]  # type: ignore[attr-defined]

            def come_back(work: list[tuple[Fence, Room, torch.Tensor]] = work) -> None:
                while work:
                    left, room, data = work.pop()
                    left.wait()  # raises what went wrong on the way out: there is nothing to read then
                    self._store.read(room, as_bytes(data.data))

            fence = self._in.submit(come_back)
            for resting, _ in batch:
                resting.reads = (*resting.reads, fence)  # type: ignore[attr-defined]
            fences.append(fence)
        return fences

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
