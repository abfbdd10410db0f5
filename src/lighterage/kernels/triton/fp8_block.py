"""Split and quantize to FP8 with one scale for each 1x128 tile or 128x128 block: both directions, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import fp8_block_scale, fp8_code, fp8_codes_packed, magnitude, widen, without_nan
from lighterage.kernels.triton.launch import check_group, has_fp8_casts, input_max, on_device_of
from lighterage.kernels.triton.splits import data_offset, find_split, num_slots, padded_splits, rows_of_splits


@triton.jit
def _load_rows(x, row, offs_k, rows, NUM_COLS: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 [32, 128]; zero outside the split's `rows` and the matrix's columns."""
    mask = (row < rows)[:, None]
    if NUM_COLS % 128 != 0:
        mask = mask & (offs_k < NUM_COLS)[None, :]
    pointers = x + row.to(tl.int64)[:, None] * NUM_COLS + offs_k[None, :]
    return widen(tl.load(pointers, mask=mask, other=0.0), HARDWARE)


@triton.jit
def _store_rowwise(
    data,
    scales,
    x,
    scale,
    scale_inv,
    row,
    offs_k,
    rows,
    NUM_COLS: tl.constexpr,
    E5M2: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One tensor of rows: its codes, and for 1x128 tiles its scales with their pad. `scales`: of this block of K."""
    mask = (row < rows)[:, None]
    if NUM_COLS % 128 != 0:
        mask = mask & (offs_k < NUM_COLS)[None, :]
    if BLOCK_2D:
        codes = fp8_code(x * scale, E5M2, HARDWARE)
    else:
        codes = fp8_code(x * scale[:, None], E5M2, HARDWARE)
        tl.store(scales + row, tl.where(row < rows, scale_inv, 0.0), mask=row < (rows + 3) // 4 * 4)
    tl.store(data + row.to(tl.int64)[:, None] * NUM_COLS + offs_k[None, :], codes, mask=mask)


@triton.jit
def _store_words(data, words, row_0, offs_k, rows, NUM_COLS: tl.constexpr):
    """int32 [128, 32] of 4 codes each as (K, rows) bytes, 16 bytes at a time: `rows` is a multiple of 16."""
    row_words = rows // 16 * 4
    offs_word = row_0 // 4 + tl.arange(0, 32)
    mask = (offs_word < row_words)[None, :]
    if NUM_COLS % 128 != 0:
        mask = mask & (offs_k < NUM_COLS)[:, None]
    pointers = data.to(tl.pointer_type(tl.int32)) + offs_k.to(tl.int64)[:, None] * row_words + offs_word[None, :]
    tl.store(pointers, words, mask=mask)


@triton.jit
def _store_unaligned(data, words, row_0, offs_k, rows, NUM_COLS: tl.constexpr):
    """uint32 [128, 32] of 4 codes each as (K, rows) bytes, where rows of the result begin at any byte.

    Each row's bytes are moved up to the next word boundary, so that all but the bytes before the first and after the
    last boundary are stored as words. Those bytes, at most 3 at each end, share a word with a neighbouring tile.
    """
    num_bytes = tl.minimum(rows - row_0, 128)
    begin = offs_k.to(tl.int64) * rows + row_0
    shift = (begin & 3).to(tl.int32)
    bits = (shift * 8)[:, None]
    word = tl.arange(0, 32)
    before = tl.gather(words, tl.broadcast_to(tl.maximum(word - 1, 0)[None, :], [128, 32]), 1)
    moved = (words << bits) | ((before >> 8) >> (24 - bits))
    column = offs_k < NUM_COLS
    last = (num_bytes + shift) // 4
    whole = (word[None, :] > 0) | (shift == 0)[:, None]
    pointers = data.to(tl.pointer_type(tl.uint32)) + (begin >> 2)[:, None] + word[None, :]
    tl.store(pointers, moved, mask=whole & (word[None, :] < last[:, None]) & column[:, None])

    byte = tl.arange(0, 4)[None, :]
    head = tl.sum(tl.where(word[None, :] == 0, words, 0), 1)
    mask = (shift > 0)[:, None] & (byte < tl.minimum(4 - shift, num_bytes)[:, None]) & column[:, None]
    tl.store(data + begin[:, None] + byte, (head[:, None] >> (byte * 8)).to(tl.uint8), mask=mask)
    low = tl.sum(tl.where(word[None, :] == last[:, None] - 1, words, 0), 1)
    high = tl.sum(tl.where(word[None, :] == last[:, None], words, 0), 1)
    tail = (high[:, None] << bits) | ((low[:, None] >> 8) >> (24 - bits))
    mask = ((last > 0) | (shift == 0))[:, None] & (byte < ((num_bytes + shift) & 3)[:, None]) & column[:, None]
    pointers = data + (begin - shift + last * 4)[:, None] + byte
    tl.store(pointers, (tail >> (byte * 8)).to(tl.uint8), mask=mask)


@triton.jit
def _quantize_block(
    x,
    row_data,
    row_scales,
    col_data,
    col_scales,
    epsilon,
    k_block,
    tile,
    rows,
    NUM_COLS: tl.constexpr,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    E5M2: tl.constexpr,
    POWER_OF_2: tl.constexpr,
    INPUT_MAX: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One 128x128 block. A thread holds 4 consecutive rows of a column, so that it packs their codes by itself."""
    K_BLOCKS: tl.constexpr = (NUM_COLS + 127) // 128
    K_BLOCKS_PADDED: tl.constexpr = (K_BLOCKS + 3) // 4 * 4
    K_PADDED: tl.constexpr = (NUM_COLS + 3) // 4 * 4
    offs_k = k_block * 128 + tl.arange(0, 128)
    row_0 = tile * 128
    row = row_0 + tl.arange(0, 32) * 4
    x0 = _load_rows(x, row, offs_k, rows, NUM_COLS, HARDWARE)
    x1 = _load_rows(x, row + 1, offs_k, rows, NUM_COLS, HARDWARE)
    x2 = _load_rows(x, row + 2, offs_k, rows, NUM_COLS, HARDWARE)
    x3 = _load_rows(x, row + 3, offs_k, rows, NUM_COLS, HARDWARE)
    largest = tl.maximum(
        tl.maximum(magnitude(x0, HARDWARE), magnitude(x1, HARDWARE)),
        tl.maximum(magnitude(x2, HARDWARE), magnitude(x3, HARDWARE)),
    )

    if BLOCK_2D:
        amax = without_nan(tl.max(tl.max(largest, 0), 0))
        scale, scale_inv = fp8_block_scale(amax, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
        row_blocks = (rows + 127) // 128
        if ROWWISE:
            tl.store(row_scales + tile.to(tl.int64) * K_BLOCKS_PADDED + k_block, scale_inv)
            if K_BLOCKS_PADDED > K_BLOCKS:
                if k_block == K_BLOCKS - 1:
                    pad = K_BLOCKS + tl.arange(0, 4)
                    pointers = row_scales + tile.to(tl.int64) * K_BLOCKS_PADDED + pad
                    tl.store(pointers, tl.zeros([4], tl.float32), mask=pad < K_BLOCKS_PADDED)
        if COLUMNWISE:
            offs_block = tile + tl.arange(0, 4)
            # Our block, and after the last one the pad.
            until = tl.where(tile == row_blocks - 1, (row_blocks + 3) // 4 * 4, tile + 1)
            mask = offs_block < until
            pointers = col_scales + ((row_blocks + 3) // 4 * 4).to(tl.int64) * k_block + offs_block
            tl.store(pointers, tl.where(offs_block == tile, scale_inv, 0.0), mask=mask)
        s0, s1, s2, s3 = scale, scale, scale, scale
        i0, i1, i2, i3 = scale_inv, scale_inv, scale_inv, scale_inv
        scales = row_scales
        col_scale = scale
    else:
        if ROWWISE:
            a0 = without_nan(tl.max(magnitude(x0, HARDWARE), 1))
            a1 = without_nan(tl.max(magnitude(x1, HARDWARE), 1))
            a2 = without_nan(tl.max(magnitude(x2, HARDWARE), 1))
            a3 = without_nan(tl.max(magnitude(x3, HARDWARE), 1))
            s0, i0 = fp8_block_scale(a0, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
            s1, i1 = fp8_block_scale(a1, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
            s2, i2 = fp8_block_scale(a2, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
            s3, i3 = fp8_block_scale(a3, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
            scales = row_scales + ((rows + 3) // 4 * 4).to(tl.int64) * k_block
        if COLUMNWISE:
            amax = without_nan(tl.max(largest, 0))
            scale, scale_inv = fp8_block_scale(amax, epsilon, E5M2, POWER_OF_2, INPUT_MAX)
            scale_inv = tl.where(offs_k < NUM_COLS, scale_inv, 0.0)
            tl.store(col_scales + tile.to(tl.int64) * K_PADDED + offs_k, scale_inv, mask=offs_k < K_PADDED)
            col_scale = scale[None, :]

    if ROWWISE:
        _store_rowwise(row_data, scales, x0, s0, i0, row, offs_k, rows, NUM_COLS, E5M2, BLOCK_2D, HARDWARE)
        _store_rowwise(row_data, scales, x1, s1, i1, row + 1, offs_k, rows, NUM_COLS, E5M2, BLOCK_2D, HARDWARE)
        _store_rowwise(row_data, scales, x2, s2, i2, row + 2, offs_k, rows, NUM_COLS, E5M2, BLOCK_2D, HARDWARE)
        _store_rowwise(row_data, scales, x3, s3, i3, row + 3, offs_k, rows, NUM_COLS, E5M2, BLOCK_2D, HARDWARE)
    if COLUMNWISE:
        words = fp8_codes_packed(x0 * col_scale, x1 * col_scale, x2 * col_scale, x3 * col_scale, E5M2, HARDWARE)
        if rows % 16 == 0:
            _store_words(col_data, tl.trans(words), row_0, offs_k, rows, NUM_COLS)
        else:
            _store_unaligned(col_data, tl.trans(words).to(tl.uint32, bitcast=True), row_0, offs_k, rows, NUM_COLS)


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
    LANES: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program quantizes `BLOCKS_PER_PROGRAM` neighbouring 128x128 blocks of 128 rows of one split."""
    K_BLOCKS: tl.constexpr = (NUM_COLS + 127) // 128
    K_PROGRAMS: tl.constexpr = (K_BLOCKS + BLOCKS_PER_PROGRAM - 1) // BLOCKS_PER_PROGRAM
    program = tl.program_id(0)
    split, start, rows, tile = find_split(ends, program // K_PROGRAMS, num_splits, 128, LANES)
    if tile * 128 >= rows:
        return
    offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS, 1, LANES)
    before = tl.where(tl.arange(0, LANES) < split, rows_of_splits(ends, num_splits, LANES), 0)
    blocks_before = (before + 127) // 128
    if BLOCK_2D:
        row_scale_bytes = tl.sum(blocks_before, 0).to(tl.int64) * ((K_BLOCKS + 3) // 4 * 16)
        col_scale_bytes = tl.sum((blocks_before + 3) // 4 * 16, 0).to(tl.int64) * K_BLOCKS
    else:
        row_scale_bytes = tl.sum((before + 3) // 4, 0).to(tl.int64) * (K_BLOCKS * 16)
        col_scale_bytes = tl.sum(blocks_before, 0).to(tl.int64) * ((NUM_COLS + 3) // 4 * 16)
    x += start.to(tl.int64) * NUM_COLS
    row_scales = (row_buffer + (scales_start + row_scale_bytes)).to(tl.pointer_type(tl.float32))
    col_scales = (col_buffer + (scales_start + col_scale_bytes)).to(tl.pointer_type(tl.float32))
    first = (program % K_PROGRAMS) * BLOCKS_PER_PROGRAM
    for k_block in tl.range(first, min(first + BLOCKS_PER_PROGRAM, K_BLOCKS), num_stages=STAGES):
        _quantize_block(
            x,
            row_buffer + offset,
            row_scales,
            col_buffer + offset,
            col_scales,
            epsilon,
            k_block,
            tile,
            rows,
            NUM_COLS,
            ROWWISE,
            COLUMNWISE,
            E5M2,
            POWER_OF_2,
            INPUT_MAX,
            BLOCK_2D,
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
    blocks_per_program: int = 1,
    num_warps: int = 8,
    num_stages: int = 1,
    max_registers: int | None = 128,
) -> None:
    """Quantize every split of `x` into the bulk buffers, in one launch on the current stream.

    Args:
        x: (M, K) contiguous bf16, fp16 or fp32. Rows past the last split are ignored.
        ends: int64 (num_splits,): the rows up to and including each split, read on the device.
        rowwise_buffer: uint8 bulk buffer of the rowwise direction, or None.
        columnwise_buffer: uint8 bulk buffer of the columnwise (transposed) direction, or None.
        num_splits: how many splits there are.
        fp8_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        power_of_2: round scales down to powers of two.
        epsilon: the least amax of a block.
        block_2d: 128x128 blocks instead of 1x128 tiles.
        blocks_per_program, num_warps, num_stages, max_registers: how the work is cut; they change speed alone.

    Source: Transformer Engine 2.20, common/transpose/quantize_transpose_vector_blockwise.cu and
        quantize_transpose_square_blockwise.cu; docs/formats.md has the layout.
    """
    num_rows, num_cols = x.shape
    check_group(x, ends, num_splits, rowwise_buffer, columnwise_buffer)
    if num_rows == 0 or num_cols == 0 or num_splits == 0:
        return
    k_blocks = -(-num_cols // 128)
    grid = (num_slots(num_rows, num_splits, 128) * -(-k_blocks // blocks_per_program),)
    rowwise, columnwise = rowwise_buffer is not None, columnwise_buffer is not None
    with on_device_of(x):
        _split_quantize_kernel[grid](
            x,
            ends,
            rowwise_buffer if rowwise else columnwise_buffer,
            columnwise_buffer if columnwise else rowwise_buffer,
            epsilon,
            num_splits,
            NUM_COLS=num_cols,
            ROWWISE=rowwise,
            COLUMNWISE=columnwise,
            E5M2=fp8_dtype == torch.float8_e5m2,
            POWER_OF_2=power_of_2,
            INPUT_MAX=input_max(x.dtype),
            BLOCK_2D=block_2d,
            LANES=padded_splits(num_splits),
            BLOCKS_PER_PROGRAM=blocks_per_program,
            STAGES=num_stages,
            HARDWARE=has_fp8_casts(x.device.index),
            num_warps=num_warps,
            maxnreg=max_registers,
            enable_fp_fusion=False,
        )
