"""Sixteen consecutive rows of a column inside one thread: how NVFP4's kernels load them, and their Hadamard transform.

One row lies in each of 16 tensors, so that the transform, a block's amax and the packing of codes stay inside a thread.

Note [Hadamard order on the device]
The 16 bf16 values are summed in fp32 in a fixed order: signs, then butterflies `(a + b, a - b)` of elements 1, 2, 4
and 8 apart, then times 0.25, then one rounding to bf16. The reference does the same, so the two agree bitwise.
"""

# Triton's tuples grow by `+` alone, and mypy takes them for Python's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from lighterage.kernels.triton.casts import round_pair_to_bf16, widen
from lighterage.kernels.triton.swiglu import load_input

_HADAMARD_SIGNS = tl.constexpr(0xD7E8)  # bit i: element i is negated


@triton.jit
def load_16_rows(
    x,
    first_row,
    offs_k,
    rows,
    NUM_COLS: tl.constexpr,
    MASK_K: tl.constexpr,
    SWIGLU: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """16 tensors [G, C]: tensor r holds rows `first_row + r`. `first_row`: [G]. Zero outside the split."""
    STRIDE: tl.constexpr = 2 * NUM_COLS if SWIGLU else NUM_COLS
    mask = (first_row < rows)[:, None]
    if MASK_K:
        mask = mask & (offs_k < NUM_COLS)[None, :]
    pointers = x + first_row.to(tl.int64)[:, None] * STRIDE + offs_k[None, :]
    values = ()
    for r in tl.static_range(16):
        values = values + (load_input(pointers + r * STRIDE, mask, NUM_COLS, SWIGLU, HARDWARE),)
    return values


@triton.jit
def widen_16(values, HARDWARE: tl.constexpr):
    """16 tensors as fp32."""
    wide = ()
    for r in tl.static_range(16):
        wide = wide + (widen(values[r], HARDWARE),)
    return wide


@triton.jit
def _butterfly(values, DISTANCE: tl.constexpr):
    """One stage: elements `DISTANCE` apart become their sum and their difference."""
    result = ()
    for r in tl.static_range(16):
        if r & DISTANCE == 0:
            result = result + (values[r] + values[r + DISTANCE],)
        else:
            result = result + (values[r - DISTANCE] - values[r],)
    return result


@triton.jit
def hadamard_16(values, HARDWARE: tl.constexpr):
    """The random Hadamard transform of 16 elements, bf16 values kept as fp32: note [Hadamard order on the device]."""
    signed = ()
    for r in tl.static_range(16):
        if (_HADAMARD_SIGNS >> r) & 1:
            signed = signed + (-values[r],)
        else:
            signed = signed + (values[r],)
    sums = _butterfly(_butterfly(_butterfly(_butterfly(signed, 1), 2), 4), 8)
    result = ()
    for r in tl.static_range(0, 16, 2):
        result = result + round_pair_to_bf16(sums[r] * 0.25, sums[r + 1] * 0.25, HARDWARE)
    return result
