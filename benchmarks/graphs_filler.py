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


# Note [Pairs of multiprocessors]
# Hopper's multiprocessors come in pairs, and a kernel that is launched in clusters of two blocks, as cuBLAS launches
# most of its products, needs both of one. A kernel of 66 single blocks is dealt out one to a pair: it takes half of an
# H100's multiprocessors and leaves no pair free, so that no such product begins before it ends. The same kernel in
# clusters of two takes 33 pairs whole and leaves 33.

_OUT: dict[int, torch.Tensor] = {}


def fill(num_loops: int, num_multiprocessors: int, *, in_pairs: bool) -> None:
    """Run on the current stream, on so many multiprocessors: see Note [Pairs of multiprocessors]."""
    if num_multiprocessors not in _OUT:
        _OUT[num_multiprocessors] = torch.empty(num_multiprocessors * 1024, device="cuda")
    blocks = 2 if in_pairs else 1
    _fill_kernel[(num_multiprocessors // blocks,)](
        _OUT[num_multiprocessors], num_loops, BLOCK=1024, num_warps=8, num_ctas=blocks
    )
