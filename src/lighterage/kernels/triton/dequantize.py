"""Decode one direction of a whole group of splits into one matrix: one launch, the splits read on the device.

Every format's formula is that of its plain-torch `dequantize`, step by step, so that the bits are the same. Rows past
the last split become zeros: they are a further split, which ends with the matrix and has no codes.

Note [Transposed codes]
FP8 block and NVFP4 store the columnwise direction of a split of m rows as (K, m). A thread loads the 4 (FP8) or 16
(FP4) codes of neighbouring rows of one column as one word, and what it decodes is transposed on its way to the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import e4m3_value, narrow
from lighterage.kernels.triton.launch import has_fp8_casts, launch, on_device_of
from lighterage.kernels.triton.splits import data_offset, num_slots, padded_splits, rows_of_splits

_FORMATS = ("fp8_block", "mxfp8", "nvfp4")
_INVERSE_2688_BITS = tl.constexpr(0x39C30C31)  # fl(1 / 2688)


@triton.jit
def _find_split_or_rest(ends, slot, num_splits, num_rows, TILE: tl.constexpr, LANES: tl.constexpr):
    """`(split, its first row, its rows, our tile's number in it)`, as `find_split`; split `num_splits` is the rest."""
    lane = tl.arange(0, LANES)
    start = tl.load(ends + lane - 1, mask=(lane > 0) & (lane <= num_splits), other=0).to(tl.int32)
    begun = (lane <= num_splits) & (start // TILE + lane <= slot)
    split = tl.sum(begun.to(tl.int32), 0) - 1
    start = tl.load(ends + split - 1, mask=split > 0, other=0).to(tl.int32)
    end = tl.load(ends + split, mask=split < num_splits, other=num_rows).to(tl.int32)
    return split, start, end - start, slot - (start // TILE + split)


@triton.jit
def _fp8_value(code, E5M2: tl.constexpr, HARDWARE: tl.constexpr):
    """uint8 codes to fp32."""
    if E5M2:  # the upper half of an fp16
        return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif HARDWARE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = code.to(tl.int32)
        value = e4m3_value(bits & 0x7F)
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
        return tl.where(bits >= 0x80, -value, value)


@triton.jit
def _e8m0_value(code):
    """uint8 codes to the fp32 powers of two; 0 is the subnormal 2^-127, 255 is NaN."""
    bits = code.to(tl.int32)
    return ((bits << 23) | tl.where((bits == 0) | (bits == 255), 0x400000, 0)).to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_value(code):
    """int32 codes, of which the last 4 bits count, to fp32. The exponent's bias is mended by an exact product."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def _store(out, row, rows, offs_k, values, NUM_COLS: tl.constexpr, HARDWARE: tl.constexpr):
    """fp32 [rows, columns] into the split's rows `row` of the matrix."""
    mask = (row < rows)[:, None] & (offs_k < NUM_COLS)[None, :]
    pointers = out + row.to(tl.int64)[:, None] * NUM_COLS + offs_k[None, :]
    tl.store(pointers, narrow(values, out.dtype.element_ty, HARDWARE), mask=mask)


@triton.jit
def _row_scales(
    scales,
    tile,
    k_tile,
    row,
    offs_k,
    rows,
    FORMAT: tl.constexpr,
    NUM_COLS: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """fp32 factors of an FP8 tile, [TILE_M, TILE_K] or 1 where they are the same. fp8_block has `TILE_K` 128."""
    if FORMAT == "mxfp8":
        if COLUMNWISE:
            block = tile * (TILE_M // 32) + tl.arange(0, TILE_M // 32)
            mask = (block * 32 < rows)[:, None] & (offs_k < NUM_COLS)[None, :]
            pointers = scales + block.to(tl.int64)[:, None] * ((NUM_COLS + 127) // 128 * 128) + offs_k[None, :]
            factor = _e8m0_value(tl.load(pointers, mask=mask, other=0))
            factor = tl.broadcast_to(factor[:, None, :], [TILE_M // 32, 32, TILE_K])
        else:
            block = k_tile * (TILE_K // 32) + tl.arange(0, TILE_K // 32)
            mask = (row < rows)[:, None] & (block * 32 < NUM_COLS)[None, :]
            pointers = scales + row.to(tl.int64)[:, None] * ((NUM_COLS + 127) // 128 * 4) + block[None, :]
            factor = _e8m0_value(tl.load(pointers, mask=mask, other=0))
            factor = tl.broadcast_to(factor[:, :, None], [TILE_M, TILE_K // 32, 32])
        return tl.reshape(factor, [TILE_M, TILE_K])
    elif BLOCK_2D:
        row_block = (tile * TILE_M // 128).to(tl.int64)
        if COLUMNWISE:
            factor = tl.load(scales + ((rows + 127) // 128 + 3) // 4 * 4 * k_tile.to(tl.int64) + row_block)
        else:
            factor = tl.load(scales + row_block * (((NUM_COLS + 127) // 128 + 3) // 4 * 4) + k_tile)
        return tl.zeros([1, 1], tl.float32) + factor
    elif COLUMNWISE:
        row_block = (tile * TILE_M // 128).to(tl.int64)
        pointers = scales + row_block * ((NUM_COLS + 3) // 4 * 4) + offs_k
        return tl.load(pointers, mask=offs_k < NUM_COLS, other=0.0)[None, :]
    else:
        pointers = scales + ((rows + 3) // 4 * 4).to(tl.int64) * k_tile + row
        return tl.load(pointers, mask=row < rows, other=0.0)[:, None]


@triton.jit
def _fp8_tile(
    data,
    factor,
    out,
    row,
    offs_k,
    rows,
    NUM_COLS: tl.constexpr,
    E5M2: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes that lie as the matrix does."""
    mask = (row < rows)[:, None] & (offs_k < NUM_COLS)[None, :]
    code = tl.load(data + row.to(tl.int64)[:, None] * NUM_COLS + offs_k[None, :], mask=mask, other=0)
    _store(out, row, rows, offs_k, _fp8_value(code, E5M2, HARDWARE) * factor, NUM_COLS, HARDWARE)


@triton.jit
def _fp8_words_tile(
    data,
    factor,
    out,
    row_0,
    offs_k,
    rows,
    NUM_COLS: tl.constexpr,
    E5M2: tl.constexpr,
    TILE_M: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes (K, rows), where rows are a multiple of 16, by words of 4 rows."""
    row_words = rows // 16 * 4
    offs_word = row_0 // 4 + tl.arange(0, TILE_M // 4)
    mask = (offs_k < NUM_COLS)[:, None] & (offs_word < row_words)[None, :]
    pointers = data.to(tl.pointer_type(tl.uint32)) + offs_k.to(tl.int64)[:, None] * row_words + offs_word[None, :]
    words = tl.trans(tl.load(pointers, mask=mask, other=0))
    for r in tl.static_range(4):
        values = _fp8_value(((words >> (8 * r)) & 0xFF).to(tl.uint8), E5M2, HARDWARE)
        _store(out, offs_word * 4 + r, rows, offs_k, values * factor, NUM_COLS, HARDWARE)


@triton.jit
def _fp8_transposed_tile(
    data,
    factor,
    out,
    row,
    offs_k,
    rows,
    NUM_COLS: tl.constexpr,
    E5M2: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes (K, rows), where rows of the codes begin at any byte, one by one."""
    pointers = data + offs_k.to(tl.int64)[:, None] * rows + row[None, :]
    code = tl.trans(tl.load(pointers, mask=(offs_k < NUM_COLS)[:, None] & (row < rows)[None, :], other=0))
    _store(out, row, rows, offs_k, _fp8_value(code, E5M2, HARDWARE) * factor, NUM_COLS, HARDWARE)


@triton.jit
def _fp4_factor(code, amax, WITH_AMAX: tl.constexpr):
    """uint8 block scales to what their values are multiplied by."""
    factor = e4m3_value(code.to(tl.int32))
    if WITH_AMAX:
        factor = factor * amax * tl.full([], _INVERSE_2688_BITS, tl.int32).to(tl.float32, bitcast=True)
    return factor


@triton.jit
def _fp4_tile(
    data,
    scales,
    amax,
    out,
    row,
    k_tile,
    offs_k,
    rows,
    NUM_COLS: tl.constexpr,
    WITH_AMAX: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes (rows, K / 2), two a byte."""
    inside = (row < rows)[:, None]
    byte = k_tile * (TILE_K // 2) + tl.arange(0, TILE_K // 2)
    pointers = data + row.to(tl.int64)[:, None] * (NUM_COLS // 2) + byte[None, :]
    pair = tl.load(pointers, mask=inside & (byte < NUM_COLS // 2)[None, :], other=0).to(tl.int32)
    block = k_tile * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
    pointers = scales + row.to(tl.int64)[:, None] * ((NUM_COLS + 63) // 64 * 4) + block[None, :]
    factor = _fp4_factor(tl.load(pointers, mask=inside & (block * 16 < NUM_COLS)[None, :], other=0), amax, WITH_AMAX)
    factor = tl.reshape(tl.broadcast_to(factor[:, :, None], [TILE_M, TILE_K // 16, 16]), [TILE_M, TILE_K])
    values = tl.reshape(tl.join(_e2m1_value(pair), _e2m1_value(pair >> 4)), [TILE_M, TILE_K])
    _store(out, row, rows, offs_k, values * factor, NUM_COLS, HARDWARE)


@triton.jit
def _fp4_transposed_tile(
    data,
    scales,
    amax,
    out,
    row_0,
    offs_k,
    rows,
    NUM_COLS: tl.constexpr,
    WITH_AMAX: tl.constexpr,
    TILE_M: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes (K, rows / 2), two a byte: by words of the 16 rows of a block."""
    groups = rows // 16
    group = row_0 // 16 + tl.arange(0, TILE_M // 16)
    mask = (offs_k < NUM_COLS)[:, None] & (group < groups)[None, :]
    pointers = data.to(tl.pointer_type(tl.uint64)) + offs_k.to(tl.int64)[:, None] * groups + group[None, :]
    words = tl.trans(tl.load(pointers, mask=mask, other=0))
    pointers = scales + offs_k.to(tl.int64)[:, None] * ((groups + 3) // 4 * 4) + group[None, :]
    factor = _fp4_factor(tl.trans(tl.load(pointers, mask=mask, other=0)), amax, WITH_AMAX)
    low = (words & 0xFFFFFFFF).to(tl.int32)
    high = (words >> 32).to(tl.int32)
    for r in tl.static_range(16):
        half = low if r < 8 else high
        values = _e2m1_value(half >> (4 * (r % 8)))
        _store(out, group * 16 + r, rows, offs_k, values * factor, NUM_COLS, HARDWARE)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _dequantize_kernel(
    buffer,
    ends,
    out,
    num_splits,
    num_rows,
    FORMAT: tl.constexpr,
    NUM_COLS: tl.constexpr,
    COLUMNWISE: tl.constexpr,
    BLOCK_2D: tl.constexpr,
    E5M2: tl.constexpr,
    WITH_AMAX: tl.constexpr,
    LANES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_K: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program decodes one tile of one split."""
    K_TILES: tl.constexpr = (NUM_COLS + TILE_K - 1) // TILE_K
    FP4: tl.constexpr = FORMAT == "nvfp4"
    K_PADDED: tl.constexpr = (NUM_COLS + 127) // 128 * 128
    K_BLOCKS: tl.constexpr = (NUM_COLS + 127) // 128
    slot = tl.program_id(0) // K_TILES
    k_tile = tl.program_id(0) % K_TILES
    split, start, rows, tile = _find_split_or_rest(ends, slot, num_splits, num_rows, TILE_M, LANES)
    if tile * TILE_M >= rows:
        return
    row_0 = tile * TILE_M
    row = row_0 + tl.arange(0, TILE_M)
    offs_k = k_tile * TILE_K + tl.arange(0, TILE_K)
    out += start.to(tl.int64) * NUM_COLS
    if split == num_splits:
        _store(out, row, rows, offs_k, tl.zeros([TILE_M, TILE_K], tl.float32), NUM_COLS, HARDWARE)
        return

    all_rows = rows_of_splits(ends, num_splits, LANES)
    before = tl.where(tl.arange(0, LANES) < split, all_rows, 0)
    if FP4:
        offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS // 2, 16, LANES)
        if COLUMNWISE:
            scales_before = tl.sum((before + 63) // 64, 0).to(tl.int64) * (K_PADDED * 4)
            all_scales = tl.sum((all_rows + 63) // 64, 0).to(tl.int64) * (K_PADDED * 4)
        else:
            scales_before = tl.sum((before + 127) // 128, 0).to(tl.int64) * ((NUM_COLS + 63) // 64 * 512)
            all_scales = tl.sum((all_rows + 127) // 128, 0).to(tl.int64) * ((NUM_COLS + 63) // 64 * 512)
        amax = 0.0
        if WITH_AMAX:
            amax = tl.load((buffer + (scales_start + all_scales + split * 16)).to(tl.pointer_type(tl.float32)))
        scales = buffer + (scales_start + scales_before)
        if COLUMNWISE:
            _fp4_transposed_tile(
                buffer + offset, scales, amax, out, row_0, offs_k, rows, NUM_COLS, WITH_AMAX, TILE_M, HARDWARE
            )
        else:
            _fp4_tile(
                buffer + offset,
                scales,
                amax,
                out,
                row,
                k_tile,
                offs_k,
                rows,
                NUM_COLS,
                WITH_AMAX,
                TILE_M,
                TILE_K,
                HARDWARE,
            )
    else:
        blocks_before = tl.sum((before + 127) // 128, 0).to(tl.int64)
        if FORMAT == "mxfp8":
            offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS, 32, LANES)
            scales = buffer + (scales_start + blocks_before * (K_PADDED * 4))
        else:
            offset, scales_start = data_offset(ends, split, start, num_splits, NUM_COLS, 1, LANES)
            if BLOCK_2D and COLUMNWISE:
                scales_before = tl.sum(((before + 127) // 128 + 3) // 4, 0).to(tl.int64) * (K_BLOCKS * 16)
            elif BLOCK_2D:
                scales_before = blocks_before * ((K_BLOCKS + 3) // 4 * 16)
            elif COLUMNWISE:
                scales_before = blocks_before * ((NUM_COLS + 3) // 4 * 16)
            else:
                scales_before = tl.sum((before + 3) // 4, 0).to(tl.int64) * (K_BLOCKS * 16)
            scales = (buffer + (scales_start + scales_before)).to(tl.pointer_type(tl.float32))
        factor = _row_scales(
            scales, tile, k_tile, row, offs_k, rows, FORMAT, NUM_COLS, COLUMNWISE, BLOCK_2D, TILE_M, TILE_K
        )
        if COLUMNWISE and FORMAT == "fp8_block":
            if rows % 16 == 0:
                _fp8_words_tile(buffer + offset, factor, out, row_0, offs_k, rows, NUM_COLS, E5M2, TILE_M, HARDWARE)
            else:
                _fp8_transposed_tile(buffer + offset, factor, out, row, offs_k, rows, NUM_COLS, E5M2, HARDWARE)
        else:
            _fp8_tile(buffer + offset, factor, out, row, offs_k, rows, NUM_COLS, E5M2, HARDWARE)


def dequantize_rows(
    buffer: torch.Tensor,
    ends: torch.Tensor,
    *,
    format_name: str,
    num_rows: int,
    num_cols: int,
    num_splits: int,
    columnwise: bool,
    block_2d: bool,
    out_dtype: torch.dtype,
    fp8_dtype: torch.dtype = torch.float8_e4m3fn,
    with_amax: bool = True,
    tile_m: int | None = None,
    tile_k: int | None = None,
    num_warps: int | None = None,
) -> torch.Tensor:
    """The values of all splits, decoded from one bulk buffer, in one launch on the current stream.

    Args:
        buffer: uint8 bulk buffer of one direction, laid out as `bulk_layout` says of the splits.
        ends: int64 (num_splits,): the rows up to and including each split, read on the device.
        format_name: "fp8_block", "mxfp8" or "nvfp4".
        num_rows, num_cols: the shape of what was quantized. Rows past the last split become zeros.
        num_splits: how many splits there are.
        columnwise: the buffer's direction. The result is not transposed; NVFP4 that went through the Hadamard
            transform stays transformed.
        block_2d: whether FP8 block scales are those of 128x128 blocks.
        out_dtype: bf16, fp16 or fp32.
        fp8_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`, of the FP8 formats.
        with_amax: False leaves out NVFP4's factor amax / 2688 of each split: the result is exact in bf16 and fp16.
        tile_m, tile_k, num_warps: how the work is cut. They change speed alone.

    Returns: (num_rows, num_cols) `out_dtype`: one fp32 product an element (NVFP4: with fl(fl(scale * amax) * fl(1 /
        2688))), then one rounding, as the plain-torch formats have it.
    Raises: ValueError: on arguments that the kernel would misread.
    Source: docs/formats.md has the layout.
    """
    out = torch.empty(num_rows, num_cols, dtype=out_dtype, device=buffer.device)
    _check(buffer, ends, format_name, num_splits, num_cols, out_dtype)
    if out.numel() == 0:
        return out
    by_words = columnwise and format_name != "mxfp8"
    tile_m = tile_m or (128 if by_words else 32)
    tile_k = tile_k or (128 if by_words or format_name == "fp8_block" else 256)
    grid = num_slots(num_rows, num_splits + 1, tile_m) * -(-num_cols // tile_k)
    constants = {
        "FORMAT": format_name,
        "NUM_COLS": num_cols,
        "COLUMNWISE": columnwise,
        "BLOCK_2D": block_2d and format_name == "fp8_block",
        "E5M2": fp8_dtype == torch.float8_e5m2,
        "WITH_AMAX": with_amax,
        "LANES": padded_splits(num_splits + 1),
        "TILE_M": tile_m,
        "TILE_K": tile_k,
        "HARDWARE": has_fp8_casts(buffer.device.index),
    }
    with on_device_of(buffer):
        pointers, numbers = (buffer, ends, out), (num_splits, num_rows)
        launch(_dequantize_kernel, grid, pointers, numbers, constants, num_warps=num_warps or (8 if by_words else 4))
    return out


def _check(
    buffer: torch.Tensor, ends: torch.Tensor, format_name: str, num_splits: int, num_cols: int, out_dtype: torch.dtype
) -> None:
    if format_name not in _FORMATS:
        raise ValueError(f"there is no kernel to decode {format_name!r}. Pass one of {_FORMATS}.")
    if out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"out_dtype must be bf16, fp16 or fp32; got {out_dtype}. Pass one of them and cast the result."
        )
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous() or buffer.data_ptr() % 16:
        raise ValueError(
            f"a bulk buffer is uint8, 1-D, and begins at a multiple of 16 bytes; got {buffer.dtype} "
            f"{tuple(buffer.shape)}, {buffer.data_ptr() % 16} past one. Pass the buffer that split_quantize returned."
        )
    if ends.dtype != torch.int64 or ends.shape != (num_splits,) or ends.device != buffer.device:
        raise ValueError(
            f"ends needs {num_splits} int64 row counts on {buffer.device}; got {tuple(ends.shape)} {ends.dtype} on "
            f"{ends.device}. Pass the inclusive prefix sums of the splits."
        )
