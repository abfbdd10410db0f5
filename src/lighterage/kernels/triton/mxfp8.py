"""Split and quantize to MXFP8, one E8M0 scale for each 32 values along K and along M: both directions, one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import e8m0_scale, fp8_code, magnitude, widen, without_nan
from lighterage.kernels.triton.launch import check_group, has_fp8_casts, on_device_of
from lighterage.kernels.triton.splits import data_offset, find_split, num_slots, padded_splits, rows_of_splits


@triton.jit
def _quantize_tile(
    x,
    row_data,
    row_scales,
    col_data,
    col_scales,
    k_tile,
    tile,
    rows,
    NUM_COLS: tl.constexpr,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    E5M2: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One tile of a split. What lies outside the matrix is loaded as zeros, whose scale code is 0: the pad's value."""
    K_BLOCKS_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 4
    K_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 128
    offs_m = tile * TILE_M + tl.arange(0, TILE_M)
    offs_k = k_tile * TILE_K + tl.arange(0, TILE_K)
    inside = (offs_m < rows)[:, None]
    if NUM_COLS % TILE_K != 0:
        inside = inside & (offs_k < NUM_COLS)[None, :]
    offsets = offs_m.to(tl.int64)[:, None] * NUM_COLS + offs_k[None, :]
    values = widen(tl.load(x + offsets, mask=inside, other=0.0), HARDWARE)
    if ROWWISE:
        blocks = tl.reshape(values, [TILE_M, TILE_K // 32, 32])
        code, inverse = e8m0_scale(without_nan(tl.max(magnitude(blocks, HARDWARE), 2)), E5M2)
        data = tl.reshape(fp8_code(blocks * inverse[:, :, None], E5M2, HARDWARE), [TILE_M, TILE_K])
        tl.store(row_data + offsets, data, mask=inside)
        block = k_tile * (TILE_K // 32) + tl.arange(0, TILE_K // 32)
        pointers = row_scales + offs_m.to(tl.int64)[:, None] * K_BLOCKS_PADDED + block[None, :]
        mask = (offs_m < (rows + 127) // 128 * 128)[:, None] & (block < K_BLOCKS_PADDED)[None, :]
        tl.store(pointers, code.to(tl.uint8), mask=mask)
        if TILE_M < 128:
            # The split's last tile also clears the rows up to the next multiple of 128.
            if (tile + 1) * TILE_M >= rows:
                pad = (tile + 1) * TILE_M + tl.arange(0, 128)
                cleared = row_scales + pad.to(tl.int64)[:, None] * K_BLOCKS_PADDED + block[None, :]
                is_pad = (pad < (rows + 127) // 128 * 128)[:, None] & (block < K_BLOCKS_PADDED)[None, :]
                tl.store(cleared, tl.zeros([128, TILE_K // 32], tl.uint8), mask=is_pad)
    if COLUMNWISE:
        blocks = tl.reshape(values, [TILE_M // 32, 32, TILE_K])
        code, inverse = e8m0_scale(without_nan(tl.max(magnitude(blocks, HARDWARE), 1)), E5M2)
        data = tl.reshape(fp8_code(blocks * inverse[:, None, :], E5M2, HARDWARE), [TILE_M, TILE_K])
        tl.store(col_data + offsets, data, mask=inside)
        block = tile * (TILE_M // 32) + tl.arange(0, TILE_M // 32)
        blocks_padded = (rows // 32 + 3) // 4 * 4
        pointers = col_scales + block.to(tl.int64)[:, None] * K_PADDED + offs_k[None, :]
        mask = (block < blocks_padded)[:, None] & (offs_k < K_PADDED)[None, :]
        tl.store(pointers, code.to(tl.uint8), mask=mask)
        if TILE_M < 128:
            if (tile + 1) * TILE_M >= rows:
                pad = (tile + 1) * (TILE_M // 32) + tl.arange(0, 4)
                cleared = col_scales + pad.to(tl.int64)[:, None] * K_PADDED + offs_k[None, :]
                is_pad = (pad < blocks_padded)[:, None] & (offs_k < K_PADDED)[None, :]
                tl.store(cleared, tl.zeros([4, TILE_K], tl.uint8), mask=is_pad)


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
    LANES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    STAGES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program quantizes `TILES_PER_PROGRAM` neighbouring tiles of the same rows of one split."""
    K_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 128
    K_TILES: tl.constexpr = (K_PADDED + TILE_K - 1) // TILE_K
    K_PROGRAMS: tl.constexpr = (K_TILES + TILES_PER_PROGRAM - 1) // TILES_PER_PROGRAM
    program = tl.program_id(0)
    split, start, rows, tile = find_split(ends, program // K_PROGRAMS, num_splits, TILE_M, LANES)
    if tile * TILE_M >= rows:
        return
    offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS, 32, LANES)
    before = tl.where(tl.arange(0, LANES) < split, rows_of_splits(ends, num_splits, LANES), 0)
    # ru(M, 128) * ru(K / 32, 4) and ru(M / 32, 4) * ru(K, 128) are the same number of bytes.
    scales = scales_start + tl.sum((before + 127) // 128, 0).to(tl.int64) * (K_PADDED * 4)
    x += start.to(tl.int64) * NUM_COLS
    first = (program % K_PROGRAMS) * TILES_PER_PROGRAM
    for k_tile in tl.range(first, min(first + TILES_PER_PROGRAM, K_TILES), num_stages=STAGES):
        _quantize_tile(
            x,
            row_buffer + offset,
            row_buffer + scales,
            col_buffer + offset,
            col_buffer + scales,
            k_tile,
            tile,
            rows,
            NUM_COLS,
            ROWWISE,
            COLUMNWISE,
            E5M2,
            TILE_M,
            TILE_K,
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
    tile_m: int = 32,
    tile_k: int = 256,
    tiles_per_program: int = 1,
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> None:
    """Quantize every split of `x` into the bulk buffers, in one launch on the current stream.

    Args:
        x: (M, K) contiguous bf16, fp16 or fp32, K a multiple of 32. Rows past the last split are ignored.
        ends: int64 (num_splits,): the rows up to and including each split, read on the device. Multiples of 32.
        rowwise_buffer: uint8 bulk buffer of the rowwise direction, or None.
        columnwise_buffer: uint8 bulk buffer of the columnwise direction (blocks along M, data not transposed), or None.
        num_splits: how many splits there are.
        fp8_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        tile_m, tile_k: a tile, multiples of 32 and 128. tiles_per_program, num_warps, num_stages, max_registers: how
            the work is cut. They change speed alone.

    Source: Transformer Engine 2.20, common/cast/mxfp8/quantize_mxfp8.cuh; cuBLAS 3.1.4.4.1 (the scale's rounding);
        docs/formats.md has the layout.
    """
    num_rows, num_cols = x.shape
    check_group(x, ends, num_splits, rowwise_buffer, columnwise_buffer)
    if num_rows == 0 or num_cols == 0 or num_splits == 0:
        return
    k_tiles = -(-num_cols // tile_k)
    grid = (num_slots(num_rows, num_splits, tile_m) * -(-k_tiles // tiles_per_program),)
    rowwise, columnwise = rowwise_buffer is not None, columnwise_buffer is not None
    with on_device_of(x):
        _split_quantize_kernel[grid](
            x,
            ends,
            rowwise_buffer if rowwise else columnwise_buffer,
            columnwise_buffer if columnwise else rowwise_buffer,
            num_splits,
            NUM_COLS=num_cols,
            ROWWISE=rowwise,
            COLUMNWISE=columnwise,
            E5M2=fp8_dtype == torch.float8_e5m2,
            LANES=padded_splits(num_splits),
            TILE_M=tile_m,
            TILE_K=tile_k,
            TILES_PER_PROGRAM=tiles_per_program,
            STAGES=num_stages,
            HARDWARE=has_fp8_casts(x.device.index),
            num_warps=num_warps,
            maxnreg=max_registers,
            enable_fp_fusion=False,
        )
