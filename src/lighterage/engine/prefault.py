"""Commits host memory before it is pinned, on several cores, and ahead of its need."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from .units import MIB

# Linux's number; Python's mmap module does not name it, and its madvise holds the interpreter's lock.
MADV_POPULATE_WRITE = 23
_CHUNK = 32 * MIB
_AHEAD_CHUNK = 8 * MIB
"""Smaller in the background: while a chunk is committed, nobody else can map memory, and the first step maps much."""
_MOST_THREADS = 8
_AHEAD_THREADS = 4


def prefault(address: int, nbytes: int) -> None:
    """Commit the pages of [address, address + nbytes), where the kernel knows how; never an error.

    Zeroing fresh pages is most of the cost of pinning: one core does about 6 GiB/s with huge pages, and the driver
    walks them one by one when it has to commit them itself. `address` is page-aligned.
    """
    madvise = _madvise()
    if madvise is None:
        return
    chunks = [(address + at, min(_CHUNK, nbytes - at)) for at in range(0, nbytes, _CHUNK)]
    num_threads = min(_MOST_THREADS, len(chunks), os.cpu_count() or 1)
    if num_threads <= 1:
        madvise(address, nbytes, MADV_POPULATE_WRITE)
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="lighterage-prefault") as pool:
        for _ in pool.map(lambda chunk: madvise(chunk[0], chunk[1], MADV_POPULATE_WRITE), chunks):
            pass


def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


class Frontier:
    """Commits a range of memory from its start on, in the background, while the first step has other things to do."""

    def __init__(self, memory: torch.Tensor) -> None:
        """memory: uint8 (nbytes,), page-aligned; it stays mapped as long as something is under way."""
        self._memory = memory
        self._nbytes = memory.numel()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._chunks: list[Future[object]] = []
        self._pool: ThreadPoolExecutor | None = None

    @property
    def committed_or_under_way(self) -> int:
        """Bytes from the start that are committed or soon will be."""
        return min(len(self._chunks) * _AHEAD_CHUNK, self._nbytes)

    def advance(self, end: int) -> None:
        """Commit the first `end` bytes some time soon. Returns at once."""
        if sys.platform != "linux" or os.getpid() != self._pid:
            return
        with self._lock:
            while (begin := len(self._chunks) * _AHEAD_CHUNK) < min(end, self._nbytes):
                if self._pool is None:
                    num_threads = min(_AHEAD_THREADS, os.cpu_count() or 1)
                    self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lighterage-prefault")
                size = min(_AHEAD_CHUNK, self._nbytes - begin)
                self._chunks.append(self._pool.submit(self._commit, begin, size))

    def _commit(self, begin: int, size: int) -> None:
        madvise = _madvise()
        if madvise is not None:
            madvise(self._memory.data_ptr() + begin, size, MADV_POPULATE_WRITE)

    def reach(self, end: int) -> None:
        """Return when the first `end` bytes are committed, or the kernel has declined."""
        self.advance(end)
        if os.getpid() == self._pid:
            wait(self._chunks[: -(-end // _AHEAD_CHUNK)])

    def stop(self) -> int:
        """End the threads; the bytes from the start that are committed. What comes later is committed when needed."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and os.getpid() == self._pid:
            pool.shutdown(wait=True, cancel_futures=True)
        return self.committed_or_under_way
