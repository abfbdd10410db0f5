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
from lighterage.kernels.triton.swiglu import swiglu_of

_HADAMARD_SIGNS = tl.constexpr(0xD7E8)  # bit i: element i is negated


@triton.jit
def rows_of_16(first, STRIDE: tl.constexpr):
    """16 tensors of pointers: `first`, and 15 more that are `STRIDE` values apart."""
    pointers = ()
    for r in tl.static_range(16):
        pointers = pointers + (first + r * STRIDE,)
    return pointers


@triton.jit
def advanced(pointers, by):
    """A tuple of tensors of pointers, each moved on by `by` values."""
    moved = ()
    for i in tl.static_range(len(pointers)):
        moved = moved + (pointers[i] + by,)
    return moved


@triton.jit
def input_pointers(x, first_row, offs_k, NUM_COLS: tl.constexpr, SWIGLU: tl.constexpr):
    """16 tensors [G, C]: tensor r points to rows `first_row + r`; with SWIGLU to the gates, and 16 more to the ups.

    first_row: [G].
    """
    STRIDE: tl.constexpr = 2 * NUM_COLS if SWIGLU else NUM_COLS
    pointers = rows_of_16(x + first_row.to(tl.int64)[:, None] * STRIDE + offs_k[None, :], STRIDE)
    if SWIGLU:
        pointers = pointers + advanced(pointers, NUM_COLS)
    return pointers


@triton.jit
def load_16_rows(pointers, inside, SWIGLU: tl.constexpr, HARDWARE: tl.constexpr):
    """16 tensors [G, C] of what is quantized, from its `input_pointers`. Zero where `inside` is false."""
    values = ()
    for r in tl.static_range(16):
        value = tl.load(pointers[r], mask=inside, other=0.0)
        if SWIGLU:
            value = swiglu_of(value, tl.load(pointers[r + 16], mask=inside, other=0.0), HARDWARE)
        values = values + (value,)
    return values


@triton.jit
def inside_split(first_row, offs_k, rows, NUM_COLS: tl.constexpr, MASK_K: tl.constexpr):
    """Which of 16 rows and a column are the split's, [G, C], or [G, 1] unless MASK_K."""
    inside = (first_row < rows)[:, None]
    if MASK_K:
        inside = inside & (offs_k < NUM_COLS)[None, :]
    return inside


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
