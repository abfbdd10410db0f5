"""Split and quantize to FP8 with one scale for each 1x128 tile or 128x128 block: both directions, one launch.

Note [A block is read twice]
A program reads its 128x128 block once along the rows, and again, from the first-level cache, along the columns. The
first time eight lanes hold a row, 16 columns each; the second time eight lanes hold a column, 16 rows each. Either way
the lanes of one warp find the amax of a tile, every thread packs 16 neighbouring codes by itself, and a warp stores
whole lines of 128 bytes. Nothing passes through shared memory and no warp waits for another, which on an H200 costs
more than the second reading.

Note [Shapes that place values on threads]
Triton gives a thread up to 16 bytes along the dimension that is contiguous in memory, and deals out the lanes of a
warp and then the warps along the other dimensions from the first one. So the shapes of the tensors decide who holds
what: [4, WARPS, 32 / WARPS, 128] is a block of rows of which a lane has 16 columns of 32 / WARPS neighbouring rows, and
[8, 4, WARPS, 32 / WARPS] is a row of each group of 16, of which a lane has 32 / WARPS neighbouring columns. Other
layouts would be slower and give the same bytes.
"""

# Triton's tuples grow by `+` alone, and mypy takes them for Python's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import (
    fp8_block_scale,
    fp8_code,
    fp8_codes_packed,
    largest_magnitude,
    magnitude,
    widen,
)
from lighterage.kernels.triton.launch import (
    check_group,
    either,
    has_fp8_casts,
    input_max,
    launch,
    on_device_of,
    quantized_shape,
)
from lighterage.kernels.triton.splits import data_offset, find_split, num_slots, padded_splits, units_before
from lighterage.kernels.triton.swiglu import load_input


@triton.jit
def _load_block(
    x, tile, k_block, rows, NUM_COLS: tl.constexpr, SWIGLU: tl.constexpr, WARPS: tl.constexpr, HARDWARE: tl.constexpr
):
    """`(fp32 [4, WARPS, 32 / WARPS, 128] values, their places in the data, which of them exist, their rows)`."""
    ROWS: tl.constexpr = 32 // WARPS
    row = tl.arange(0, 4)[:, None, None] * ROWS + tl.arange(0, WARPS)[None, :, None] * (4 * ROWS)
    row = row + tl.arange(0, ROWS)[None, None, :]
    col = k_block * 128 + tl.arange(0, 128)[None, None, None, :]
    mask = (tile * 128 + row < rows)[:, :, :, None]
    if NUM_COLS % 128 != 0:
        mask = mask & (col < NUM_COLS)
    STRIDE: tl.constexpr = 2 * NUM_COLS if SWIGLU else NUM_COLS
    first_row = tile.to(tl.int64) * 128
    pointers = x + first_row * STRIDE + (row[:, :, :, None] * STRIDE + col)
    values = widen(load_input(pointers, mask, NUM_COLS, SWIGLU, HARDWARE), HARDWARE)
    return values, first_row * NUM_COLS + (row[:, :, :, None] * NUM_COLS + col), mask, tile * 128 + row


@triton.jit
def _store_row_scales(scales, scale_inv, row, rows, WARPS: tl.constexpr):
    """fp32 [4, WARPS, 32 / WARPS]. All eight lanes of a row have its scale: one of them stores it."""
    lane = tl.arange(0, 8)[:, None, None, None]
    row = row[None, :, :, :] + lane * 0
    scale_inv = tl.broadcast_to(scale_inv[None, :, :, :], [8, 4, WARPS, 32 // WARPS])
    mask = (lane == 0) & (row < (rows + 3) // 4 * 4)
    tl.store(scales + row, tl.where(row < rows, scale_inv, 0.0), mask=mask)


@triton.jit
def _store_block_scale(
    row_scales,
    col_scales,
    scale_inv,
    tile,
    k_block,
    rows,
    NUM_COLS: tl.constexpr,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
):
    """The one scale of a 128x128 block in either direction; the last block of a row also clears the row's pad."""
    K_BLOCKS: tl.constexpr = (NUM_COLS + 127) // 128
    K_BLOCKS_PADDED: tl.constexpr = (K_BLOCKS + 3) // 4 * 4
    offs = tl.arange(0, 4)
    values = tl.where(offs == 0, scale_inv, 0.0)
    if ROWWISE:
        until = tl.where(k_block == K_BLOCKS - 1, K_BLOCKS_PADDED, k_block + 1)
        pointers = row_scales + tile.to(tl.int64) * K_BLOCKS_PADDED + k_block + offs
        tl.store(pointers, values, mask=k_block + offs < until)
    if COLUMNWISE:
        row_blocks = (rows + 127) // 128
        row_blocks_padded = (row_blocks + 3) // 4 * 4
        until = tl.where(tile == row_blocks - 1, row_blocks_padded, tile + 1)
        pointers = col_scales + row_blocks_padded.to(tl.int64) * k_block + tile + offs
        tl.store(pointers, values, mask=tile + offs < until)


@triton.jit
def _store_aligned(data, words, col, first_row, rows, mask):
    """int32 [8, 4, WARPS, 32 / WARPS, 4] of 4 codes each as (K, rows) bytes; `rows` is a multiple of 16.

    data: where the block's first column begins. col, first_row: of every 16 codes, in the block.
    """
    word = first_row[:, :, :, :, None] // 4 + tl.arange(0, 4)[None, None, None, None, :]
    pointers = data.to(tl.pointer_type(tl.int32)) + col.to(tl.int64)[:, :, :, :, None] * (rows // 16 * 4) + word
    tl.store(pointers, words, mask=mask[:, :, :, :, None])


@triton.jit
def _store_unaligned(data, words, num_bytes, rows, offs_k, NUM_COLS: tl.constexpr):
    """int32 [128, 32] of 4 codes each as (K, rows) bytes, where rows of the result begin at any byte.

    data: where the block's first column begins, which has `num_bytes` bytes to store, as the others have.
    Each row's bytes are moved up to the next word boundary, so that all but the bytes before the first and after the
    last boundary are stored as words. Those bytes, at most 3 at each end, share a word with a neighbouring tile.
    """
    words = words.to(tl.uint32, bitcast=True)
    begin = tl.arange(0, 128) * rows
    shift = (data.to(tl.int64).to(tl.int32) + begin) & 3
    bits = (shift * 8)[:, None]
    word = tl.arange(0, 32)[None, :]
    before = tl.gather(words, tl.broadcast_to(tl.maximum(word - 1, 0), [128, 32]), 1)
    moved = (words << bits) | ((before >> 8) >> (24 - bits))
    last = (num_bytes + shift) // 4
    column = offs_k < NUM_COLS
    whole = ((word > 0) | (shift == 0)[:, None]) & (word < last[:, None])
    pointers = (data + (begin - shift)[:, None]).to(tl.pointer_type(tl.uint32)) + word
    tl.store(pointers, moved, mask=whole & column[:, None])

    # Of every row the word before the first boundary, as it was, and the one after the last, moved.
    byte = tl.arange(0, 4)[None, :]
    head = tl.sum(tl.where(word == 0, words, 0).to(tl.int32, bitcast=True), 1).to(tl.uint32, bitcast=True)
    mask = (shift > 0)[:, None] & (byte < tl.minimum(4 - shift, num_bytes)[:, None]) & column[:, None]
    tl.store(data + begin[:, None] + byte, (head[:, None] >> (byte * 8)).to(tl.uint8), mask=mask)
    high = tl.where(word == last[:, None], words, 0)
    low = tl.where(word == last[:, None] - 1, words, 0)
    tail = (high << bits) | ((low >> 8) >> (24 - bits))
    tail = tl.sum(tail.to(tl.int32, bitcast=True), 1).to(tl.uint32, bitcast=True)
    mask = ((last > 0) | (shift == 0))[:, None] & (byte < ((num_bytes + shift) & 3)[:, None]) & column[:, None]
    pointers = data + (begin - shift + last * 4)[:, None] + byte
    tl.store(pointers, (tail[:, None] >> (byte * 8)).to(tl.uint8), mask=mask)


@triton.jit
def _quantize_columns(
    x,
    data,
    scales,
    block_scale,
    epsilon,
    k_block,
    tile,
    rows,
    NUM_COLS: tl.constexpr,
    E5M2: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    INPUT_MAX: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    SWIGLU: tl.constexpr,
    WARPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """The columnwise direction of one block: 16 tensors [8, 4, WARPS, 32 / WARPS], each a row of every 16."""
    COLS: tl.constexpr = 32 // WARPS
    K_PADDED: tl.constexpr = (NUM_COLS + 3) // 4 * 4
    STRIDE: tl.constexpr = 2 * NUM_COLS if SWIGLU else NUM_COLS
    first_row = tl.arange(0, 8)[:, None, None, None] * 16
    col = tl.arange(0, 4)[None, :, None, None] * COLS + tl.arange(0, WARPS)[None, None, :, None] * (4 * COLS)
    col = col + tl.arange(0, COLS)[None, None, None, :]
    offs_k = k_block * 128 + col
    rows_left = rows - tile * 128 - first_row
    pointers = x + tile.to(tl.int64) * (128 * STRIDE) + (first_row * STRIDE + offs_k)
    values = ()
    for r in tl.static_range(16):
        mask = r < rows_left
        if NUM_COLS % 128 != 0:
            mask = mask & (offs_k < NUM_COLS)
        values = values + (load_input(pointers + r * STRIDE, mask, NUM_COLS, SWIGLU, HARDWARE),)
    if BLOCK_2D:
        scale = block_scale
    else:
        amax = tl.max(largest_magnitude(values, HARDWARE), 0)
        scale, scale_inv = fp8_block_scale(amax, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
        scale = scale[None, :, :, :]
        # All eight lanes of a column have its scale: one of them stores it.
        offs_4d = offs_k + first_row * 0
        scale_inv = tl.broadcast_to(scale_inv[None, :, :, :], [8, 4, WARPS, COLS])
        if NUM_COLS % 128 != 0:
            scale_inv = tl.where(offs_4d < NUM_COLS, scale_inv, 0.0)
        mask = first_row + col * 0 == 0
        if NUM_COLS % 128 != 0:
            mask = mask & (offs_4d < K_PADDED)
        tl.store(scales + tile.to(tl.int64) * K_PADDED + offs_4d, scale_inv, mask=mask)
    packed = ()
    for r in tl.static_range(0, 16, 4):
        x0 = widen(values[r], HARDWARE) * scale
        x1 = widen(values[r + 1], HARDWARE) * scale
        x2 = widen(values[r + 2], HARDWARE) * scale
        x3 = widen(values[r + 3], HARDWARE) * scale
        packed = packed + (fp8_codes_packed(x0, x1, x2, x3, E5M2, HARDWARE),)
    words = tl.join(tl.join(packed[0], packed[2]), tl.join(packed[1], packed[3]))
    words = tl.reshape(words, [8, 4, WARPS, COLS, 4])
    mask_16 = rows_left > 0
    if NUM_COLS % 128 != 0:
        mask_16 = mask_16 & (offs_k < NUM_COLS)
    data += k_block.to(tl.int64) * 128 * rows + tile * 128
    if rows % 16 == 0:
        _store_aligned(data, words, col, first_row, rows, mask_16)
    else:
        words_128x32 = tl.reshape(tl.permute(words, (2, 1, 3, 0, 4)), [128, 32])
        num_bytes = tl.minimum(rows - tile * 128, 128)
        _store_unaligned(data, words_128x32, num_bytes, rows, k_block * 128 + tl.arange(0, 128), NUM_COLS)


@triton.jit(do_not_specialize=["num_splits"])
def _split_quantize_kernel(
    x,
    ends,
    row_buffer,
    col_buffer,
    epsilon,
    num_splits,
    NUM_COLS: tl.constexpr,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    E5M2: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    INPUT_MAX: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    SWIGLU: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program quantizes one 128x128 block: note [A block is read twice]."""
    K_BLOCKS: tl.constexpr = (NUM_COLS + 127) // 128
    program = tl.program_id(0)
    k_block = program % K_BLOCKS
    split, start, rows, tile = find_split(ends, program // K_BLOCKS, num_splits, 128, LANES)
    if tile * 128 >= rows:
        return
    # 1x128 tiles: rows of 4 scales, then one row for each block. 128x128 blocks: a row for each, then fours of them.
    UNIT_A: tl.constexpr = 128 if BLOCK_2D else 4
    UNIT_B: tl.constexpr = 512 if BLOCK_2D else 128
    units_a, units_b = units_before(ends, split, UNIT_A, UNIT_B, LANES)
    offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS, 1, LANES)
    if BLOCK_2D:
        row_scale_bytes = units_a.to(tl.int64) * ((K_BLOCKS + 3) // 4 * 16)
        col_scale_bytes = units_b.to(tl.int64) * (K_BLOCKS * 16)
    else:
        row_scale_bytes = units_a.to(tl.int64) * (K_BLOCKS * 16)
        col_scale_bytes = units_b.to(tl.int64) * ((NUM_COLS + 3) // 4 * 16)
    x += start.to(tl.int64) * (2 * NUM_COLS if SWIGLU else NUM_COLS)
    row_scales = (row_buffer + (scales_start + row_scale_bytes)).to(tl.pointer_type(tl.float32))
    col_scales = (col_buffer + (scales_start + col_scale_bytes)).to(tl.pointer_type(tl.float32))
    block_scale = 1.0
    if ROWWISE or BLOCK_2D:
        values, places, mask, row = _load_block(x, tile, k_block, rows, NUM_COLS, SWIGLU, WARPS, HARDWARE)
        if BLOCK_2D:
            amax = tl.max(magnitude(values, HARDWARE))
            block_scale, scale_inv = fp8_block_scale(amax, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
            _store_block_scale(row_scales, col_scales, scale_inv, tile, k_block, rows, NUM_COLS, ROWWISE, COLUMNWISE)
            scaled = values * block_scale
        else:
            amax = tl.max(magnitude(values, HARDWARE), 3)
            scale, scale_inv = fp8_block_scale(amax, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
            _store_row_scales(row_scales + ((rows + 3) // 4 * 4).to(tl.int64) * k_block, scale_inv, row, rows, WARPS)
            scaled = values * scale[:, :, :, None]
        if ROWWISE:
            tl.store(row_buffer + offset + places, fp8_code(scaled, E5M2, HARDWARE), mask=mask)
    if COLUMNWISE:
        _quantize_columns(
            x,
            col_buffer + offset,
            col_scales,
            block_scale,
            epsilon,
            k_block,
            tile,
            rows,
            NUM_COLS,
            E5M2,
            POWER_OF_2,
            INPUT_MAX,
            BLOCK_2D,
            SWIGLU,
            WARPS,
            HARDWARE,
        )


def split_quantize_fp8_block(
    x: torch.Tensor,
    ends: torch.Tensor,
    rowwise_buffer: torch.Tensor | None,
    columnwise_buffer: torch.Tensor | None,
    *,
    num_splits: int,
    fp8_dtype: torch.dtype,
    power_of_2: bool,
    epsilon: float,
    block_2d: bool,
    swiglu: bool = False,
    num_warps: int = 8,
    max_registers: int | None = None,
) -> None:
    """Quantize every split of `x` into the bulk buffers, in one launch on the current stream.

    Args:
        x: (M, K) contiguous bf16, fp16 or fp32, M below 2^24. Rows past the last split are ignored.
        ends: int64 (num_splits,): the rows up to and including each split, read on the device.
        rowwise_buffer: uint8 bulk buffer of the rowwise direction, or None.
        columnwise_buffer: uint8 bulk buffer of the columnwise (transposed) direction, or None.
        num_splits: how many splits there are.
        fp8_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        power_of_2: round scales down to powers of two.
        epsilon: the least amax of a block.
        block_2d: 128x128 blocks instead of 1x128 tiles.
        swiglu: x is (M, 2K), K gates before K ups, and what is quantized is `kernels.triton.swiglu.swiglu(x)`.
        num_warps: 4, 8 or 16. max_registers: of a thread; None for what is fastest. They change speed alone.

    Raises: ValueError: on arguments that the kernel would misread.

    Source: Transformer Engine 2.20, common/transpose/quantize_transpose_vector_blockwise.cu and
        quantize_transpose_square_blockwise.cu; docs/formats.md has the layout.
    """
    check_group(x, ends, num_splits, rowwise_buffer, columnwise_buffer)
    num_rows, num_cols = quantized_shape(x, swiglu)
    if num_rows == 0 or num_cols == 0 or num_splits == 0:
        return
    if num_rows >= 1 << 24:
        raise ValueError(
            f"The FP8 block kernel takes fewer than 2^24 rows; got {num_rows}. Quantize them in two groups."
        )
    if max_registers is None:  # as few as the values leave room for, so that more programs fit on a multiprocessor
        max_registers = 128 if x.element_size() == 4 else 80 if swiglu or block_2d else 64
    grid = num_slots(num_rows, num_splits, 128) * -(-num_cols // 128)
    rowwise, columnwise = rowwise_buffer is not None, columnwise_buffer is not None
    row_buffer, col_buffer = either(rowwise_buffer, columnwise_buffer), either(columnwise_buffer, rowwise_buffer)
    constants = {
        "NUM_COLS": num_cols,
        "ROWWISE": rowwise,
        "COLUMNWISE": columnwise,
        "E5M2": fp8_dtype == torch.float8_e5m2,
        "POWER_OF_2": power_of_2,
        "INPUT_MAX": input_max(x.dtype),
        "BLOCK_2D": block_2d,
        "SWIGLU": swiglu,
        "LANES": padded_splits(num_splits),
        "WARPS": num_warps,
        "HARDWARE": has_fp8_casts(x.device.index),
    }
    pointers = (x, ends, row_buffer, col_buffer)
    numbers = (float(epsilon), num_splits)
    with on_device_of(x):
        launch(_split_quantize_kernel, grid, pointers, numbers, constants, num_warps=num_warps, maxnreg=max_registers)
