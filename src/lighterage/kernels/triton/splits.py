"""Which split a program works on, and where that split lies in its buffer: read from the splits' ends on the device.

Note [Tiles of ragged splits]
The host knows neither the splits nor how many tiles they have. Split i, which begins at row `start`, owns the slots
from `start // TILE + i` on. A split of m rows needs `ceil(m / TILE)` slots and the next split begins at least that many
later, and at least one later: slots never overlap, even an empty split has one, and `num_rows // TILE + num_splits`
slots are enough for any splits of `num_rows` rows. A slot past its split's rows has nothing to do.

    TILE 128, splits of 256, 0 and 96 rows: first slots 0, 3, 4; slot 2 is idle; slot 3 is the empty split's.

Note [Offsets in the buffer]
Data begin at multiples of 256 bytes, scales at multiples of 16, each split's after the one before it, and all scales
after all data. Sums over the splits before ours give the offset. They cost one load of the ends, which stay in cache,
and one reduction. Where the sizes keep the alignment by themselves the data's offset needs no sum.

Note [Sums inside one warp]
A sum over more than 32 lanes passes through shared memory, and its barriers make a program's warps wait for each other
before any of them can load its first value. The ends are therefore read 32 at a time and added up lane by lane; every
warp then sums its own 32 lanes, all of them the same.

Note [Pointers that a loop carries]
For every load and store whose pointers an operation computes, Triton's pass that coalesces memory accesses walks the
whole kernel, once from each operation in it: half of the time that the NVFP4 kernels took to compile. Pointers that a
loop carries from one iteration to the next are not computed by an operation, and spare the walk. So these loops are
loops for Triton, not `tl.static_range`, and move their pointers on. LLVM unrolls them as it did before, or carries one
pointer and adds the constants between the others: the same instructions, but for a few that compute addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl


def num_slots(num_rows: int, num_splits: int, tile_rows: int) -> int:
    """Slots that any `num_splits` splits of at most `num_rows` rows need: note [Tiles of ragged splits]."""
    return num_rows // tile_rows + num_splits


def padded_splits(num_splits: int) -> int:
    """Lanes that hold all splits: a power of two, at least 64 so that few kernels are compiled."""
    return max(64, 1 << (num_splits - 1).bit_length())


@triton.jit
def find_split(ends, slot, num_splits, TILE: tl.constexpr, LANES: tl.constexpr):
    """`(split, its first row, its rows, our tile's number in it)`: note [Tiles of ragged splits]."""
    split_32 = tl.zeros([32], tl.int32)
    pointers = ends + tl.arange(0, 32)
    for first in range(0, LANES, 32):  # notes [Sums inside one warp], [Pointers that a loop carries]
        lane = first + tl.arange(0, 32)
        # Unsigned: dividing is then a shift alone.
        end = tl.load(pointers, mask=lane + 1 < num_splits, other=0xFFFFFFFF).to(tl.uint32)
        pointers += 32
        # The next split's first slot is not after ours.
        split_32 += (end // TILE + lane.to(tl.uint32) < slot.to(tl.uint32)).to(tl.int32)
    split = tl.sum(split_32, 0)
    start = tl.load(ends + split - 1, mask=split > 0, other=0).to(tl.int32)
    end = tl.load(ends + split).to(tl.int32)
    return split, start, end - start, slot - (start // TILE + split)


@triton.jit
def units_before(ends, split, UNIT_A: tl.constexpr, UNIT_B: tl.constexpr, LANES: tl.constexpr):
    """How many units of `UNIT_A` and of `UNIT_B` rows the splits before ours fill; a last unit may be partly filled."""
    units_a_32 = tl.zeros([32], tl.int32)
    units_b_32 = tl.zeros([32], tl.int32)
    starts = ends + tl.arange(0, 32) - 1
    pointers = ends + tl.arange(0, 32)
    for first in range(0, LANES, 32):  # notes [Sums inside one warp], [Pointers that a loop carries]
        lane = first + tl.arange(0, 32)
        start = tl.load(starts, mask=(lane > 0) & (lane < split), other=0).to(tl.uint32)
        end = tl.load(pointers, mask=lane < split, other=0).to(tl.uint32)
        starts += 32
        pointers += 32
        rows = end - start
        units_a_32 += ((rows + (UNIT_A - 1)) // UNIT_A).to(tl.int32)
        units_b_32 += ((rows + (UNIT_B - 1)) // UNIT_B).to(tl.int32)
    return tl.sum(units_a_32, 0), tl.sum(units_b_32, 0)


@triton.jit
def rows_of_splits(ends, num_splits, LANES: tl.constexpr):
    """int32 [LANES]: the rows of every split, 0 in the lanes past the last one."""
    lane = tl.arange(0, LANES)
    start = tl.load(ends + lane - 1, mask=(lane > 0) & (lane < num_splits), other=0)
    end = tl.load(ends + lane, mask=lane < num_splits, other=0)
    return tl.where(lane < num_splits, end - start, 0).to(tl.int32)


@triton.jit
def data_offset(ends, split, start, num_splits, ROW_BYTES: tl.constexpr, ROWS_UNIT: tl.constexpr, LANES: tl.constexpr):
    """`(offset of the split's data, end of all data rounded up to 16)` in bytes, int64.

    A row of the input makes `ROW_BYTES` of data in either direction; every split is a multiple of `ROWS_UNIT` rows.
    """
    if (ROW_BYTES * ROWS_UNIT) % 256 == 0:
        total = tl.load(ends + num_splits - 1)
        offset = start.to(tl.int64) * ROW_BYTES
        end = total * ROW_BYTES
    else:
        before_32 = tl.zeros([32], tl.int64)
        all_32 = tl.zeros([32], tl.int64)
        starts = ends + tl.arange(0, 32) - 1
        pointers = ends + tl.arange(0, 32)
        for first in range(0, LANES, 32):  # as above
            lane = first + tl.arange(0, 32)
            begin = tl.load(starts, mask=(lane > 0) & (lane < num_splits), other=0)
            until = tl.load(pointers, mask=lane < num_splits, other=0)
            starts += 32
            pointers += 32
            size = tl.where(lane < num_splits, until - begin, 0) * ROW_BYTES
            rounded = (size + 255) // 256 * 256
            before_32 += tl.where(lane < split, rounded, 0)
            all_32 += tl.where(lane < num_splits - 1, rounded, size)
        offset = tl.sum(before_32, 0)
        end = tl.sum(all_32, 0)
    return offset // 256 * 256, (end + 15) // 16 * 16
