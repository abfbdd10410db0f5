"""The largest magnitude of every split, which NVFP4 needs before it can quantize: one launch.

Note [Partial amax]
The amax launch has a fixed number of programs, each for a run of consecutive rows. Program p writes one partial amax
for each split that it meets, at `p + split`. Walking over the rows either p or the split grows from one partial to the
next, so no two partials share a place, and those of one split lie side by side: the quantizing programs of the split
reduce them, and nothing has to be initialised or kept between calls. The most that a split can have is a constant, so
that what is compiled does not depend on the number of rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import largest_magnitude
from lighterage.kernels.triton.launch import launch
from lighterage.kernels.triton.nvfp4_columns import (
    hadamard_16,
    input_pointers,
    inside_split,
    load_16_rows,
    widen_16,
)
from lighterage.kernels.triton.splits import padded_splits

_PROGRAMS = 1024
_MOST_PARTIALS = tl.constexpr(_PROGRAMS)  # of a split: each program has one of it at most


@triton.jit(do_not_specialize=["num_splits", "num_groups", "groups_per_program", "num_partials"])
def _amax_kernel(
    x,
    ends,
    partials,
    num_splits,
    num_groups,
    groups_per_program,
    num_partials,
    NUM_COLS: tl.constexpr,
    HADAMARD: tl.constexpr,
    SWIGLU: tl.constexpr,
    LANES: tl.constexpr,
    TILE_K: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Partial amax of every split in a run of groups of 16 rows: note [Partial amax].

    partials: fp32, `num_partials` of the plain values, then as many of the transformed ones if HADAMARD.
    """
    program = tl.program_id(0)
    group = program * groups_per_program
    last = tl.minimum(group + groups_per_program, num_groups)
    last = tl.minimum(last, (tl.load(ends + num_splits - 1) // 16).to(tl.int32))
    lane = tl.arange(0, LANES)
    all_ends = tl.load(ends + lane, mask=lane < num_splits, other=0x7FFFFFFF) // 16
    while group < last:
        # Splits that ended before this group: so many come before its own.
        split = tl.sum((all_ends <= group).to(tl.int32), 0)
        until = tl.minimum((tl.load(ends + split) // 16).to(tl.int32), last)
        plain = tl.zeros([1, TILE_K], tl.float32)
        transformed = tl.zeros([1, TILE_K], tl.float32)
        for g in range(group, until):
            for k in range(0, NUM_COLS, TILE_K):
                first_row = tl.zeros([1], tl.int32) + g * 16
                offs_k = k + tl.arange(0, TILE_K)
                MASK_K: tl.constexpr = NUM_COLS % TILE_K != 0
                inside = inside_split(first_row, offs_k, first_row + 1, NUM_COLS, MASK_K)
                pointers = input_pointers(x, first_row, offs_k, NUM_COLS, SWIGLU)
                values = load_16_rows(pointers, inside, SWIGLU, HARDWARE)
                plain = tl.maximum(plain, largest_magnitude(values, HARDWARE))
                if HADAMARD:
                    values = hadamard_16(widen_16(values, HARDWARE), HARDWARE)
                    transformed = tl.maximum(transformed, largest_magnitude(values, HARDWARE))
        tl.store(partials + program + split, tl.max(tl.max(plain, 1), 0))
        if HADAMARD:
            tl.store(partials + num_partials + program + split, tl.max(tl.max(transformed, 1), 0))
        group = until


@triton.jit
def split_amax(partials, split, start, rows, rows_per_program):
    """The amax of a split, from its partials; 0 if it has no rows."""
    first = start // rows_per_program
    count = tl.where(rows > 0, (start + rows - 1) // rows_per_program - first + 1, 0)
    largest = tl.zeros([512], tl.float32)
    pointers = partials + first + split + tl.arange(0, 512)
    for done in range(0, _MOST_PARTIALS, 512):  # note [Pointers that a loop carries]
        largest = tl.maximum(largest, tl.load(pointers, mask=done + tl.arange(0, 512) < count, other=0.0))
        pointers += 512
    return tl.max(largest, 0)


class AmaxWork(NamedTuple):
    """How the amax launch of one shape is cut: note [Partial amax]."""

    num_programs: int
    rows_per_program: int
    num_partials: int
    """Of the plain values; there are as many of the transformed ones, after them, if there are any."""
    numbers: tuple[int, ...]
    constants: dict[str, object]


@lru_cache(maxsize=512)
def amax_work(
    num_rows: int, num_cols: int, num_splits: int, hadamard: bool, swiglu: bool, hardware: bool, tile_k: int
) -> AmaxWork:
    """The work for a matrix to quantize; `tile_k` changes speed alone."""
    num_groups = num_rows // 16
    groups_per_program = max(1, -(-num_groups // _PROGRAMS))
    num_programs = max(1, -(-num_groups // groups_per_program))
    num_partials = num_programs + num_splits
    constants: dict[str, object] = {
        "NUM_COLS": num_cols,
        "HADAMARD": hadamard,
        "SWIGLU": swiglu,
        "LANES": padded_splits(num_splits),
        "TILE_K": min(tile_k, triton.next_power_of_2(num_cols)),
        "HARDWARE": hardware,
    }
    numbers = (num_splits, num_groups, groups_per_program, num_partials)
    return AmaxWork(num_programs, groups_per_program * 16, num_partials, numbers, constants)


def partial_amax(x: torch.Tensor, ends: torch.Tensor, work: AmaxWork, *, num_warps: int) -> torch.Tensor:
    """The partial amax of every split of `x`, fp32, in one launch on the current stream of x's device, the current one.

    x, ends: as of `split_quantize_nvfp4`, which checks them. num_warps: changes speed alone.
    """
    num_partials = work.num_partials * (2 if work.constants["HADAMARD"] else 1)
    partials = torch.empty(num_partials, dtype=torch.float32, device=x.device)
    launch(_amax_kernel, work.num_programs, (x, ends, partials), work.numbers, work.constants, num_warps=num_warps)
    return partials
