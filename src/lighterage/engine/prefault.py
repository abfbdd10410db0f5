"""Commits host memory before it is pinned, on several cores."""

from __future__ import annotations

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from .units import MIB

# Linux's number; Python's mmap module does not name it, and its madvise holds the interpreter's lock.
MADV_POPULATE_WRITE = 23
_CHUNK = 32 * MIB
_MOST_THREADS = 8


def prefault(address: int, nbytes: int) -> None:
    """Commit the pages of [address, address + nbytes), where the kernel knows how; never an error.

    Zeroing fresh pages is most of the cost of pinning: one core does about 6 GiB/s with huge pages, and the driver
    walks them one by one when it has to commit them itself. `address` is page-aligned.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    chunks = [(address + at, min(_CHUNK, nbytes - at)) for at in range(0, nbytes, _CHUNK)]
    num_threads = min(_MOST_THREADS, len(chunks), os.cpu_count() or 1)
    if num_threads <= 1:
        madvise(address, nbytes, MADV_POPULATE_WRITE)
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="lighterage-prefault") as pool:
        for _ in pool.map(lambda chunk: madvise(*chunk, MADV_POPULATE_WRITE), chunks):
            pass
