"""A kernel that keeps a chosen number of multiprocessors busy for a chosen time, and touches next to no memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _fill_kernel(out_ptr, num_loops, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    value = lane.to(tl.float32)
    for _ in range(num_loops):
        value = value * 0.999 + 1.0
    tl.store(out_ptr + tl.program_id(0) * BLOCK + lane, value)


_OUT: dict[int, torch.Tensor] = {}


def fill(num_loops: int, num_programs: int) -> None:
    """Run on the current stream: `num_programs` programs, so at most as many multiprocessors are in use."""
    if num_programs not in _OUT:
        _OUT[num_programs] = torch.empty(num_programs * 1024, device="cuda")
    _fill_kernel[(num_programs,)](_OUT[num_programs], num_loops, BLOCK=1024, num_warps=8)
