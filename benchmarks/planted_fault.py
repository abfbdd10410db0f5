"""Faults for compute-sanitizer to find, so that its silence says something: part of `benchmarks/sanitize.sh`.

`python benchmarks/planted_fault.py bounds` writes past a tensor, `race` writes and reads shared memory from two groups
of warps that wait for nothing (Hopper and later).
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.jit
def _out_of_bounds_kernel(out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), 1)


@gluon.jit
def _write(shared, out, value, layout: gl.constexpr):
    shared.store(gl.full([128], 1, gl.int64, layout=layout) * value)


@gluon.jit
def _read(shared, out, value, layout: gl.constexpr):
    gl.store(out + gl.arange(0, 128, layout=layout), shared.load(layout))


@gluon.jit
def _race_kernel(out, value):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    shared = gl.allocate_shared_memory(gl.int64, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize([(_write, (shared, out, value, layout)), (_read, (shared, out, value, layout))], [4], [24])


if __name__ == "__main__":
    out = torch.zeros(128, dtype=torch.int64, device="cuda")
    if sys.argv[1] == "race":
        _race_kernel[(1,)](out, 3, num_warps=4)
    else:
        _out_of_bounds_kernel[(1,)](out, BLOCK=256)
    torch.cuda.synchronize()
