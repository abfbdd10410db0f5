"""Device memory that bytes of an allocation come back to, or are held in."""

from __future__ import annotations

import torch

from .lanes import FINISHED, Fence, Transport
from .views import ViewSpec, as_bytes

# Reloaded bytes keep their address modulo this, so that kernels choose the same code path (vector width, alignment).
CONGRUENCE = 512


class Buffer:
    """Device memory that ranges were reloaded into, or are held in. Byte 0 of the allocation lies at byte `shift`.

    All saved tensors are rebuilt over the one tensor `memory`, and count what is written to them together.
    """

    __slots__ = ("fence", "hi", "lo", "made_on", "memory", "shared_with", "shift", "spec", "version")

    def __init__(self, lo: int, hi: int, memory: torch.Tensor, shift: int, spec: ViewSpec | None, made_on: int) -> None:
        self.lo = lo
        self.hi = hi
        self.memory = memory
        self.shift = shift
        self.spec = spec
        """The view that `memory` is by itself, where it was allocated for one."""
        self.made_on = made_on
        """The stream whose pool the memory is from."""
        self.fence: Fence = FINISHED
        self.version = memory._version
        self.shared_with: set[int] | None = None
        """Other streams that the allocator knows to use it."""

    def bytes(self, lo: int, hi: int) -> torch.Tensor:
        """Bytes [lo, hi) of the allocation, as a contiguous tensor."""
        memory, shift = self.memory, self.shift
        if lo + shift == 0 and hi - lo == memory.nbytes:
            return memory
        return as_bytes(memory)[lo + shift : hi + shift]


def room_for(transport: Transport, spec: ViewSpec, address: int, lo: int, hi: int, stream: int) -> Buffer:
    """New device memory for bytes [lo, hi) of an allocation that was at `address`, from the pool of `stream`.

    `spec` is the view that it was saved as first: where that is just these bytes, the memory is allocated as it.
    """
    # Note [Same address modulo 512]: an allocator that starts on multiples of 512 needs no more bytes than there
    # are, which lets the buffer fit into the hole that the original left. Memory at odd addresses came from
    # elsewhere; it keeps its offset instead, so that elements stay aligned.
    if address % 16:
        address = 0
    start = (address + lo) % CONGRUENCE
    if transport.alignment % CONGRUENCE == 0:
        if start == 0 and spec.dense and lo == spec.lo and hi == spec.hi:
            # The most usual case: it needs no view at all.
            return Buffer(lo, hi, transport.allocate_as(spec.size, spec.stride, spec.dtype), -lo, spec, stream)
        memory = transport.allocate((hi - lo + start,), torch.uint8)
    else:
        memory = transport.allocate((hi - lo + CONGRUENCE,), torch.uint8)
        start = (address + lo - memory.data_ptr()) % CONGRUENCE if address else lo % CONGRUENCE
    return Buffer(lo, hi, memory, start - lo, None, stream)
