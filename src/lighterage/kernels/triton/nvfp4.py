"""Split and quantize to NVFP4, one E4M3 scale for each 16 values and one amax for each split: two launches.

The first launch finds the amax of every split (`nvfp4_amax`), the second quantizes. Columnwise blocks run along M, and
may be Hadamard-transformed first (`nvfp4_columns`).
"""

# Triton's tuples grow by `+` alone, and mypy takes them for Python's.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import (
    e2m1_code,
    e2m1_code_stochastic,
    laid_out_as,
    largest_magnitude,
    magnitude,
    nvfp4_block_scale,
    nvfp4_global_scale,
    without_nan,
)
from lighterage.kernels.triton.launch import check_group, either, has_fp8_casts, launch, on_device_of, quantized_shape
from lighterage.kernels.triton.nvfp4_amax import amax_work, partial_amax, split_amax
from lighterage.kernels.triton.nvfp4_columns import (
    advanced,
    hadamard_16,
    input_pointers,
    inside_split,
    load_16_rows,
    rows_of_16,
    widen_16,
)
from lighterage.kernels.triton.splits import (
    data_offset,
    find_split,
    num_slots,
    padded_splits,
    units_before,
)


@triton.jit
def _random_bytes(seed, column, group, DIRECTION: tl.constexpr):
    """16 int32 tensors of random bytes, for the 16 rows of every column and group, each from one Philox block."""
    column = column.to(tl.uint32)
    words = tl.philox(seed, column, group.to(tl.uint32), column * 0 + DIRECTION, column * 0)
    result = ()
    for r in tl.static_range(16):
        result = result + (((words[r // 4] >> (8 * (r % 4))) & 0xFF).to(tl.int32),)
    return result


@triton.jit
def _pack_16(codes):
    """16 uint32 tensors of codes to one uint64 tensor, the first in the lowest nibble."""
    low = codes[0]
    high = codes[8]
    for r in tl.static_range(1, 8):
        low = low + (codes[r] << (4 * r))
        high = high + (codes[r + 8] << (4 * r))
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def _join_16(values):
    """16 tensors [G, B] to one [G, B, 16]."""
    for DISTANCE in tl.static_range(3, -1, -1):
        joined = ()
        for r in tl.static_range(1 << DISTANCE):
            joined = joined + (tl.join(values[r], values[r + (1 << DISTANCE)]),)
        values = joined
    whole = values[0]
    return tl.reshape(whole, [whole.shape[0], whole.shape[1], 16])


@triton.jit
def _codes_16(values, factors, random, STOCHASTIC: tl.constexpr, HARDWARE: tl.constexpr):
    """The codes of 16 tensors times their factors; `random` is read if STOCHASTIC."""
    codes = ()
    for r in tl.static_range(16):
        if STOCHASTIC:
            codes = codes + (e2m1_code_stochastic(values[r] * factors[r], random[r], HARDWARE),)
        else:
            codes = codes + (e2m1_code(values[r] * factors[r], HARDWARE),)
    return codes


@triton.jit
def _spread(block_values, G: tl.constexpr, C: tl.constexpr):
    """[G, C / 16] to [G, C]: each value for its block's 16 columns."""
    return tl.reshape(tl.broadcast_to(block_values[:, :, None], [G, C // 16, 16]), [G, C])


@triton.jit
def _quantize_tile(
    input_rows,
    data_rows,
    row_scales,
    col_data,
    col_scales,
    row_multiplier,
    row_decode,
    col_multiplier,
    col_decode,
    seed,
    k_tile,
    tile,
    start,
    rows,
    NUM_COLS: tl.constexpr,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SWIGLU: tl.constexpr,
    C: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """128 rows of a split, as 8 groups of 16, by `C` columns. Zeros from outside give scale code 0, the pad's value.

    input_rows, data_rows: pointers to the tile's inputs and rowwise codes, a tensor for each row of a group.
    """
    G: tl.constexpr = 8
    MASK_K: tl.constexpr = NUM_COLS % C != 0
    K_BLOCKS_PADDED: tl.constexpr = (NUM_COLS + 63) // 64 * 4
    group = tile * G + tl.arange(0, G)
    offs_k = k_tile * C + tl.arange(0, C)
    first_row = group * 16
    inside = inside_split(first_row, offs_k, rows, NUM_COLS, MASK_K)
    values = widen_16(load_16_rows(input_rows, inside, SWIGLU, HARDWARE), HARDWARE)
    row_random = values
    col_random = values
    if STOCHASTIC:
        # Else the random numbers pass through shared memory, row by row, to where the values are.
        column = laid_out_as(tl.broadcast_to(offs_k[None, :], [G, C]), values[0], HARDWARE)
        place = tl.broadcast_to((start // 16 + group)[:, None], [G, C])
        row_random = _random_bytes(seed, column, place, 0)
        if COLUMNWISE and not BLOCK_2D:
            col_random = _random_bytes(seed, column, place, 1)

    block_code = tl.zeros([G, C // 16], tl.int32)
    codes = values
    if BLOCK_2D:
        amax = tl.max(tl.reshape(largest_magnitude(values, HARDWARE), [G, C // 16, 16]), 2)
        block_code, factor = nvfp4_block_scale(without_nan(amax), row_multiplier, row_decode, HARDWARE)
        factor = _spread(factor, G, C)
        factors = (factor,) * 16
        codes = _codes_16(values, factors, row_random, STOCHASTIC, HARDWARE)

    if ROWWISE:
        block = k_tile * (C // 16) + tl.arange(0, C // 16)
        byte = k_tile * (C // 2) + tl.arange(0, C // 2)
        data_mask = (first_row < rows)[:, None]
        if MASK_K:
            data_mask = data_mask & (byte < NUM_COLS // 2)[None, :]
        # The pad reaches to the next multiple of 128 rows, which is where the tile ends.
        row = tile * 128 + tl.arange(0, 128)
        scale_mask = tl.broadcast_to((block < K_BLOCKS_PADDED)[None, :], [G * 16, C // 16])
        scale_pointers = row_scales + row.to(tl.int64)[:, None] * K_BLOCKS_PADDED + block[None, :]
        block_codes = ()
        for r in tl.static_range(16):
            if BLOCK_2D:
                code = codes[r]
            else:
                amax = tl.max(tl.reshape(magnitude(values[r], HARDWARE), [G, C // 16, 16]), 2)
                block_code, factor = nvfp4_block_scale(without_nan(amax), row_multiplier, row_decode, HARDWARE)
                scaled = values[r] * _spread(factor, G, C)
                if STOCHASTIC:
                    code = e2m1_code_stochastic(scaled, row_random[r], HARDWARE)
                else:
                    code = e2m1_code(scaled, HARDWARE)
            low, high = tl.split(tl.reshape(code, [G, C // 2, 2]))
            tl.store(data_rows[r], (low + (high << 4)).to(tl.uint8), mask=data_mask)
            block_codes = block_codes + (block_code.to(tl.uint8),)
        # All 16 rows' scales at once: a store of each by itself would cost a trip through shared memory.
        tl.store(
            scale_pointers, tl.reshape(tl.permute(_join_16(block_codes), (0, 2, 1)), [G * 16, C // 16]), mask=scale_mask
        )

    if COLUMNWISE:
        if BLOCK_2D:
            col_code = _spread(block_code, G, C)
        else:
            if HADAMARD:
                values = hadamard_16(values, HARDWARE)
            amax = without_nan(largest_magnitude(values, HARDWARE))
            col_code, factor = nvfp4_block_scale(amax, col_multiplier, col_decode, HARDWARE)
            factors = (factor,) * 16
            codes = _codes_16(values, factors, col_random, STOCHASTIC, HARDWARE)
        groups = rows // 16
        mask = (offs_k < NUM_COLS)[:, None] & (group < groups)[None, :]
        pointers = col_data.to(tl.pointer_type(tl.uint64)) + offs_k.to(tl.int64)[:, None] * groups + group[None, :]
        tl.store(pointers, tl.trans(_pack_16(codes)), mask=mask)
        groups_padded = (groups + 3) // 4 * 4
        mask = (offs_k < (NUM_COLS + 127) // 128 * 128)[:, None] & (group < groups_padded)[None, :]
        pointers = col_scales + offs_k.to(tl.int64)[:, None] * groups_padded + group[None, :]
        tl.store(pointers, tl.trans(col_code.to(tl.uint8)), mask=mask)


@triton.jit(do_not_specialize=["num_splits", "rows_per_program", "num_partials", "seed"])
def _split_quantize_kernel(
    x,
    ends,
    partials,
    row_buffer,
    col_buffer,
    num_splits,
    rows_per_program,
    num_partials,
    seed,
    NUM_COLS: tl.constexpr,
    ROWWISE: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    HADAMARD: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SWIGLU: tl.constexpr,
    LANES: tl.constexpr,
    C: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program quantizes `TILES_PER_PROGRAM` neighbouring tiles of 128 rows of one split."""
    K_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 128
    K_BLOCKS_PADDED: tl.constexpr = (NUM_COLS + 63) // 64 * 4
    K_TILES: tl.constexpr = (K_PADDED + C - 1) // C
    K_PROGRAMS: tl.constexpr = (K_TILES + TILES_PER_PROGRAM - 1) // TILES_PER_PROGRAM
    program = tl.program_id(0)
    split, start, rows, tile = find_split(ends, program // K_PROGRAMS, num_splits, 128, LANES)
    writes_amax = (tile == 0) & (program % K_PROGRAMS == 0)
    if (tile * 128 >= rows) & (writes_amax == 0):
        return
    offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS // 2, 16, LANES)
    row_amax = split_amax(partials, split, start, rows, rows_per_program)
    col_amax = row_amax
    if HADAMARD:
        col_amax = split_amax(partials + num_partials, split, start, rows, rows_per_program)
    if writes_amax:
        all_128, all_64 = units_before(ends, num_splits, 128, 64, LANES)
        if ROWWISE:
            place = scales_start + all_128.to(tl.int64) * (128 * K_BLOCKS_PADDED)
            tl.store((row_buffer + (place + split * 16)).to(tl.pointer_type(tl.float32)), row_amax)
        if COLUMNWISE:
            place = scales_start + all_64.to(tl.int64) * (4 * K_PADDED)
            tl.store((col_buffer + (place + split * 16)).to(tl.pointer_type(tl.float32)), col_amax)
    row_multiplier, row_decode = nvfp4_global_scale(row_amax)
    col_multiplier, col_decode = nvfp4_global_scale(col_amax)
    units_128, units_64 = units_before(ends, split, 128, 64, LANES)
    row_scales = scales_start + units_128.to(tl.int64) * (128 * K_BLOCKS_PADDED)
    col_scales = scales_start + units_64.to(tl.int64) * (4 * K_PADDED)
    x += start.to(tl.int64) * (2 * NUM_COLS if SWIGLU else NUM_COLS)
    first = (program % K_PROGRAMS) * TILES_PER_PROGRAM
    last = tl.where(rows > 0, tl.minimum(first + TILES_PER_PROGRAM, K_TILES), first)  # an empty split has no tile
    # Note [Pointers that a loop carries]
    first_row = (tile * 8 + tl.arange(0, 8)) * 16
    byte = first * (C // 2) + tl.arange(0, C // 2)
    codes = row_buffer + offset + first_row.to(tl.int64)[:, None] * (NUM_COLS // 2) + byte[None, :]
    data_rows = rows_of_16(codes, NUM_COLS // 2)
    input_rows = input_pointers(x, first_row, first * C + tl.arange(0, C), NUM_COLS, SWIGLU)
    for k_tile in range(first, last):
        _quantize_tile(
            input_rows,
            data_rows,
            row_buffer + row_scales,
            col_buffer + offset,
            col_buffer + col_scales,
            row_multiplier,
            row_decode,
            col_multiplier,
            col_decode,
            seed,
            k_tile,
            tile,
            start,
            rows,
            NUM_COLS,
            ROWWISE,
            COLUMNWISE,
            HADAMARD,
            BLOCK_2D,
            STOCHASTIC,
            SWIGLU,
            C,
            HARDWARE,
        )
        input_rows = advanced(input_rows, C)
        data_rows = advanced(data_rows, C // 2)


def split_quantize_nvfp4(
    x: torch.Tensor,
    ends: torch.Tensor,
    rowwise_buffer: torch.Tensor | None,
    columnwise_buffer: torch.Tensor | None,
    *,
    num_splits: int,
    hadamard: bool,
    block_2d: bool,
    stochastic_rounding: bool,
    seed: int,
    swiglu: bool = False,
    tile_k: int = 128,
    tiles_per_program: int = 4,
    num_warps: int = 8,
    max_registers: int | None = 128,
    amax_tile_k: int = 1024,
    amax_warps: int = 8,
) -> None:
    """Quantize every split of `x` into the bulk buffers, in two launches on the current stream.

    Args:
        x: (M, K) contiguous bf16, fp16 or fp32, K a multiple of 16. Rows past the last split are ignored.
        ends: int64 (num_splits,): the rows up to and including each split, read on the device. Multiples of 16.
        rowwise_buffer: uint8 bulk buffer of the rowwise direction, or None.
        columnwise_buffer: uint8 bulk buffer of the columnwise (transposed) direction, or None.
        num_splits: how many splits there are.
        hadamard: transform the columnwise direction's blocks first; x must be bf16.
        block_2d: one scale for 16x16 values; the columnwise direction is the rowwise one transposed.
        stochastic_rounding: round at random, so that the mean is x; `seed` fixes the outcome.
        seed: of the random numbers; read if stochastic_rounding.
        swiglu: x is (M, 2K), K gates before K ups, and what is quantized is `kernels.triton.swiglu.swiglu(x)`.
        tile_k, tiles_per_program, num_warps, max_registers, amax_tile_k, amax_warps: how the work is cut. They change
            speed alone.

    Raises: ValueError: on arguments that the kernels would misread.

    Source: Transformer Engine 2.20, common/transpose/quantize_transpose_vector_blockwise_fp4.cu and
        common/hadamard_transform; docs/formats.md has the layout.
    """
    check_group(x, ends, num_splits, rowwise_buffer, columnwise_buffer)
    num_rows, num_cols = quantized_shape(x, swiglu)
    if hadamard and (block_2d or x.dtype != torch.bfloat16):
        raise ValueError(
            f"The Hadamard transform takes bf16 and 1x16 blocks; got {x.dtype}, block_2d={block_2d}. "
            "Cast x to bf16, or switch one of them off."
        )
    if tile_k < 128:
        raise ValueError(
            f"tile_k is 128 or more; got {tile_k}. Compiled for sm_90 by Triton 3.6, a tile of 64 columns gave wrong "
            "block scales, which the interpreter does not show."
        )
    if num_cols == 0 or num_splits == 0:
        return
    rowwise, columnwise = rowwise_buffer is not None, columnwise_buffer is not None
    row_buffer, col_buffer = either(rowwise_buffer, columnwise_buffer), either(columnwise_buffer, rowwise_buffer)
    hadamard = hadamard and columnwise
    hardware = has_fp8_casts(x.device.index)
    amax = amax_work(num_rows, num_cols, num_splits, hadamard, swiglu, hardware, amax_tile_k)
    switches = rowwise, columnwise, hadamard, block_2d, stochastic_rounding, swiglu, hardware
    grid, constants = _work(num_rows, num_cols, num_splits, switches, tile_k, tiles_per_program)
    with on_device_of(x):
        partials = partial_amax(x, ends, amax, num_warps=amax_warps)
        pointers = (x, ends, partials, row_buffer, col_buffer)
        numbers = (num_splits, amax.rows_per_program, amax.num_partials, seed)
        launch(_split_quantize_kernel, grid, pointers, numbers, constants, num_warps=num_warps, maxnreg=max_registers)


@lru_cache(maxsize=512)
def _work(
    num_rows: int, num_cols: int, num_splits: int, switches: tuple[bool, ...], tile_k: int, tiles_per_program: int
) -> tuple[int, dict[str, object]]:
    """The programs and the constants of the second launch, for a matrix to quantize."""
    rowwise, columnwise, hadamard, block_2d, stochastic_rounding, swiglu, hardware = switches
    k_tiles = -(-num_cols // tile_k)
    return num_slots(num_rows, num_splits, 128) * -(-k_tiles // tiles_per_program), {
        "NUM_COLS": num_cols,
        "ROWWISE": rowwise,
        "COLUMNWISE": columnwise,
        "HADAMARD": hadamard,
        "BLOCK_2D": block_2d,
        "STOCHASTIC": stochastic_rounding,
        "SWIGLU": swiglu,
        "LANES": padded_splits(num_splits),
        "C": tile_k,
        "TILES_PER_PROGRAM": tiles_per_program,
        "HARDWARE": hardware,
    }
