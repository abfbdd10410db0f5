"""A kernel that writes past its tensor, to see that compute-sanitizer tells: part of `benchmarks/sanitize.sh`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _planted_kernel(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), 1.0)


if __name__ == "__main__":
    _planted_kernel[(1,)](torch.zeros(1000, device="cuda"), BLOCK=1024)
    torch.cuda.synchronize()
