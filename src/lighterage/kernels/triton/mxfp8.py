"""Split and quantize to MXFP8, one E8M0 scale for each 32 values along K and along M: both directions, one launch.

Note [A warp alone]
A warp owns 32 rows of 128 columns: whole blocks in both directions, so that it finds their amax by itself, nothing
passes through shared memory and no warp waits for another. The rows come as 8 tensors [4, WARPS, 128], tensor r with
row r of each 8. Triton gives a thread 16 of the 128 columns, deals the lanes of a warp out along them and then along
the 4, and the warps along the last dimension left. Other layouts would be slower and give the same bytes.
"""

# Triton's tuples grow by `+` alone, and mypy takes them for Python's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import e8m0_scale, fp8_code, largest_magnitude, magnitude, widen, without_nan
from lighterage.kernels.triton.launch import check_group, either, has_fp8_casts, launch, on_device_of, quantized_shape
from lighterage.kernels.triton.splits import data_offset, find_split, num_slots, padded_splits, units_before
from lighterage.kernels.triton.swiglu import load_input


@triton.jit
def _clear(scales, row, until, MOST_ROWS: tl.constexpr, first_col, ROW_BYTES: tl.constexpr, MOST_COLS: tl.constexpr):
    """Zeros in the rows from `row` until `until` of a matrix of scales, in at most `MOST_COLS` columns of it."""
    offs_row = row + tl.arange(0, MOST_ROWS)[:, None]
    offs_col = first_col + tl.arange(0, MOST_COLS)[None, :]
    pointers = scales + (offs_row.to(tl.int64) * ROW_BYTES + offs_col)
    mask = (offs_row < until) & (offs_col < ROW_BYTES)
    tl.store(pointers, tl.zeros([MOST_ROWS, MOST_COLS], tl.uint8), mask=mask)


@triton.jit
def _quantize_rows(
    values,
    data,
    scales,
    offsets,
    inside,
    first_block,
    tile,
    rows,
    NUM_COLS: tl.constexpr,
    E5M2: tl.constexpr,
    WARPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The rowwise direction of one tile; its last one also clears the scales of the rows up to a multiple of 128."""
    K_BLOCKS_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 4
    lane = tl.arange(0, 8)[:, None, None]
    words = tl.zeros([8, 4, WARPS], tl.int32)
    for r in tl.static_range(8):
        blocks = tl.reshape(values[r], [4, WARPS, 4, 32])
        code, inverse = e8m0_scale(without_nan(tl.max(magnitude(blocks, HARDWARE), 3)), E5M2)
        codes = tl.reshape(fp8_code(blocks * inverse[:, :, :, None], E5M2, HARDWARE), [4, WARPS, 128])
        tl.store(data + (offsets + r * NUM_COLS), codes, mask=inside)
        # The eight lanes of a row all get its four scale codes as one word, and lane r keeps those of row r.
        word = tl.sum(code << (tl.arange(0, 4) * 8)[None, None, :], 2)
        words = tl.where(lane == r, word[None, :, :], words)
    row = tile * 32 + tl.arange(0, 4)[None, :, None] * 8 + lane
    block = first_block + tl.arange(0, WARPS)[None, None, :] * 4
    pointers = scales + (row.to(tl.int64) * K_BLOCKS_PADDED + block)
    tl.store(pointers.to(tl.pointer_type(tl.int32)), words, mask=block + row * 0 < K_BLOCKS_PADDED)
    if (tile + 1) * 32 >= rows:
        _clear(scales, rows, (rows + 127) // 128 * 128, 128, first_block, K_BLOCKS_PADDED, 4 * WARPS)


@triton.jit
def _quantize_columns(
    values,
    data,
    scales,
    offsets,
    inside,
    first_col,
    tile,
    rows,
    NUM_COLS: tl.constexpr,
    E5M2: tl.constexpr,
    WARPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The columnwise direction of one tile; its last one also clears the scales of the blocks up to a multiple of 4."""
    K_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 128
    code, inverse = e8m0_scale(without_nan(tl.max(largest_magnitude(values, HARDWARE), 0)), E5M2)
    for r in tl.static_range(8):
        codes = fp8_code(values[r] * inverse[None, :, :], E5M2, HARDWARE)
        tl.store(data + (offsets + r * NUM_COLS), codes, mask=inside)
    # All four lanes of a column have its scale: one of them stores it.
    lane = tl.arange(0, 4)[:, None, None]
    offs_k = first_col + tl.arange(0, WARPS)[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    pointers = scales + tile.to(tl.int64) * K_PADDED + (offs_k + lane * 0)
    code = tl.broadcast_to(code.to(tl.uint8)[None, :, :], [4, WARPS, 128])
    tl.store(pointers, code, mask=(lane == 0) & (offs_k < K_PADDED))
    if (tile + 1) * 32 >= rows:
        _clear(scales, rows // 32, (rows + 127) // 128 * 4, 4, first_col, K_PADDED, 128 * WARPS)


@triton.jit(do_not_specialize=["num_splits"])
def _split_quantize_kernel(
    x,
    ends,
    row_buffer,
    col_buffer,
    num_splits,
    NUM_COLS: tl.constexpr,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    E5M2: tl.constexpr,
    SWIGLU: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program quantizes a tile of 32 rows and 128 columns for each of its warps.

    What lies outside the matrix is loaded as zeros, whose scale code is 0: the pad's value.
    """
    K_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 128
    K_TILES: tl.constexpr = (K_PADDED + 128 * WARPS - 1) // (128 * WARPS)
    program = tl.program_id(0)
    split, start, rows, tile = find_split(ends, program // K_TILES, num_splits, 32, LANES)
    if tile * 32 >= rows:
        return
    offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS, 32, LANES)
    units, _ = units_before(ends, split, 128, 128, LANES)
    # ru(M, 128) * ru(K / 32, 4) and ru(M / 32, 4) * ru(K, 128) are the same number of bytes.
    scales = scales_start + units.to(tl.int64) * (K_PADDED * 4)
    first_col = (program % K_TILES) * (128 * WARPS)
    row = tl.arange(0, 4)[:, None, None] * 8
    col = first_col + tl.arange(0, WARPS)[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    inside = col + row * 0 < NUM_COLS
    STRIDE: tl.constexpr = 2 * NUM_COLS if SWIGLU else NUM_COLS
    pointers = x + (start.to(tl.int64) + tile * 32) * STRIDE + (row * STRIDE + col)
    values = ()
    for r in tl.static_range(8):
        values = values + (widen(load_input(pointers + r * STRIDE, inside, NUM_COLS, SWIGLU, HARDWARE), HARDWARE),)
    offsets = row * NUM_COLS + col
    offset += tile.to(tl.int64) * (32 * NUM_COLS)
    if ROWWISE:
        _quantize_rows(
            values,
            row_buffer + offset,
            row_buffer + scales,
            offsets,
            inside,
            first_col // 32,
            tile,
            rows,
            NUM_COLS,
            E5M2,
            WARPS,
            HARDWARE,
        )
    if COLUMNWISE:
        _quantize_columns(
            values,
            col_buffer + offset,
            col_buffer + scales,
            offsets,
            inside,
            first_col,
            tile,
            rows,
            NUM_COLS,
            E5M2,
            WARPS,
            HARDWARE,
        )


def split_quantize_mxfp8(
    x: torch.Tensor,
    ends: torch.Tensor,
    rowwise_buffer: torch.Tensor | None,
    columnwise_buffer: torch.Tensor | None,
    *,
    num_splits: int,
    fp8_dtype: torch.dtype,
    swiglu: bool = False,
    num_warps: int = 4,
) -> None:
    """Quantize every split of `x` into the bulk buffers, in one launch on the current stream.

    Args:
        x: (M, K) contiguous bf16, fp16 or fp32, K a multiple of 32. Rows past the last split are ignored.
        ends: int64 (num_splits,): the rows up to and including each split, read on the device. Multiples of 32.
        rowwise_buffer: uint8 bulk buffer of the rowwise direction, or None.
        columnwise_buffer: uint8 bulk buffer of the columnwise direction (blocks along M, data not transposed), or None.
        num_splits: how many splits there are.
        fp8_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        swiglu: x is (M, 2K), K gates before K ups, and what is quantized is `kernels.triton.swiglu.swiglu(x)`.
        num_warps: of a program, a power of 2. It changes speed alone.

    Source: Transformer Engine 2.20, common/cast/mxfp8/quantize_mxfp8.cuh; cuBLAS 3.1.4.4.1 (the scale's rounding);
        docs/formats.md has the layout.
    """
    check_group(x, ends, num_splits, rowwise_buffer, columnwise_buffer)
    num_rows, num_cols = quantized_shape(x, swiglu)
    if num_rows == 0 or num_cols == 0 or num_splits == 0:
        return
    grid = num_slots(num_rows, num_splits, 32) * -(-num_cols // (128 * num_warps))
    rowwise, columnwise = rowwise_buffer is not None, columnwise_buffer is not None
    row_buffer, col_buffer = either(rowwise_buffer, columnwise_buffer), either(columnwise_buffer, rowwise_buffer)
    constants = {
        "NUM_COLS": num_cols,
        "ROWWISE": rowwise,
        "COLUMNWISE": columnwise,
        "E5M2": fp8_dtype == torch.float8_e5m2,
        "SWIGLU": swiglu,
        "LANES": padded_splits(num_splits),
        "WARPS": num_warps,
        "HARDWARE": has_fp8_casts(x.device.index),
    }
    pointers = (x, ends, row_buffer, col_buffer)
    numbers = (num_splits,)
    with on_device_of(x):
        launch(_split_quantize_kernel, grid, pointers, numbers, constants, num_warps=num_warps)
