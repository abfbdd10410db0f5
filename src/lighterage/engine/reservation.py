"""Virtual memory that is not committed yet."""

from __future__ import annotations

import mmap
import sys

import torch

from ..errors import OffloadError
from .units import MIB, format_bytes, round_up

HUGE_PAGE = 2 * MIB

# Linux's number; this Python's mmap module does not name it.
_MAP_NORESERVE = 0x4000


def reserve(nbytes: int) -> tuple[mmap.mmap, int, torch.Tensor]:
    """Virtual memory for `nbytes` bytes, or for as much as the system grants; nothing is committed yet.

    Returns the map, the offset of its first huge page, and a uint8 tensor of the memory from there on.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    while True:
        try:
            reserved = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=flags)
            break
        except OSError as error:  # strict overcommit, or a limit on address space
            if nbytes <= HUGE_PAGE:
                raise OffloadError(
                    f"an arena needs virtual memory; the system refused {format_bytes(nbytes)}: {error.strerror}. "
                    "Raise the limit (ulimit -v), or use tier='disk'."
                ) from error
            nbytes = round_up(nbytes // 2, mmap.PAGESIZE)
    with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
        whole = torch.frombuffer(reserved, dtype=torch.uint8)
        skip = -whole.data_ptr() % HUGE_PAGE
        return reserved, skip, whole[skip : skip + nbytes]
