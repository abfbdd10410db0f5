"""Grouped products of FP8 matrices with block scales, over a whole group of experts in one launch.

Both kernels read the bulk buffers as `bulk_layout` lays them out, and find the experts' rows from `ends` on the device.
They need no particular hardware beyond a `tl.dot` that takes FP8; the interpreter runs them too.

Note [Promotion]
Tensor cores sum FP8 products with fewer bits than float32 has. So each slab of 128 is summed by itself, starting at
zero, and then added to the float32 result: `y = fma(round(P * scale_a), scale_b, y)`, slab after slab. That is what
cuBLAS does, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.launch import launch, on_device_of
from lighterage.kernels.triton.splits import find_split, num_slots, padded_splits, rows_of_splits

SLAB = 128


@triton.jit
def _load_tile(pointers, offs_k, depth, WHOLE_SLABS: tl.constexpr):
    if WHOLE_SLABS:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(offs_k < depth)[None, :], other=0.0)


@triton.jit
def _slab_products(
    a,
    b,
    a_scales,
    b_scales,
    row,
    col,
    num_rows,
    num_cols,
    depth,
    a_scale_stride,
    b_scale_stride,
    B_BLOCK_2D: tl.constexpr,
    WHOLE_SLABS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """fp32 [TILE_M, TILE_N] of `a @ b.T`: rows `row` of a and `col` of b; those past the last one repeat it.

    a, b: FP8, (num_rows, depth) and (num_cols, depth). a_scales: (slabs, a_scale_stride). b_scales: likewise, or
    (blocks of columns, b_scale_stride) if `B_BLOCK_2D`.
    """
    row = tl.minimum(row, num_rows - 1)
    col = tl.minimum(col, num_cols - 1)
    offs_k = tl.arange(0, 128)
    a_pointers = a + row.to(tl.int64)[:, None] * depth + offs_k[None, :]
    b_pointers = b + col.to(tl.int64)[:, None] * depth + offs_k[None, :]
    y = tl.zeros([TILE_M, TILE_N], tl.float32)
    for slab in tl.range(0, (depth + 127) // 128, num_stages=STAGES):
        first = slab * 128
        a_tile = _load_tile(a_pointers + first, offs_k + first, depth, WHOLE_SLABS)
        b_tile = _load_tile(b_pointers + first, offs_k + first, depth, WHOLE_SLABS)
        a_scale = tl.load(a_scales + slab * a_scale_stride + row)
        if B_BLOCK_2D:
            b_scale = tl.load(b_scales + (col // 128) * b_scale_stride + slab)
        else:
            b_scale = tl.load(b_scales + slab * b_scale_stride + col)
        product = tl.dot(a_tile, tl.trans(b_tile))
        y = tl.fma(product * a_scale[:, None], tl.broadcast_to(b_scale[None, :], [TILE_M, TILE_N]), y)
    return y


@triton.jit
def _rasterise(tile, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """`(row tile, column tile)`: down `GROUP` rows, then the next column, so that tiles at work share operands."""
    in_group = GROUP * num_col_tiles
    first = tile // in_group * GROUP
    height = min(num_row_tiles - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def _grouped_rows_kernel(
    x_buffer,
    w_buffer,
    ends,
    bias,
    out,
    num_splits,
    num_rows,
    OUT_FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    X_DTYPE: tl.constexpr,
    W_DTYPE: tl.constexpr,
    W_BLOCK_2D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LANES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of rows of one expert times its weight, or zeros for rows that belong to none."""
    SLABS: tl.constexpr = (DEPTH + 127) // 128
    COL_TILES: tl.constexpr = (OUT_FEATURES + TILE_N - 1) // TILE_N
    slot, col_tile = _rasterise(tl.program_id(0), num_rows // TILE_M + num_splits, COL_TILES, GROUP)
    split, start, rows, tile = find_split(ends, slot, num_splits, TILE_M, LANES)
    last = split == num_splits - 1
    rows_to_store = tl.where(last, num_rows - start, rows)
    if tile * TILE_M >= rows_to_store:
        return
    row = tile * TILE_M + tl.arange(0, TILE_M)
    col = col_tile * TILE_N + tl.arange(0, TILE_N)
    y = tl.zeros([TILE_M, TILE_N], tl.float32)
    if tile * TILE_M < rows:
        x_bytes = tl.load(ends + num_splits - 1) * DEPTH
        x_scales = (x_buffer + x_bytes).to(tl.pointer_type(tl.float32)) + start.to(tl.int64) * SLABS
        w_bytes = num_splits.to(tl.int64) * (OUT_FEATURES * DEPTH)
        W_SCALE_STRIDE: tl.constexpr = (SLABS + 3) // 4 * 4 if W_BLOCK_2D else OUT_FEATURES
        W_SCALES: tl.constexpr = W_SCALE_STRIDE * ((OUT_FEATURES + 127) // 128 if W_BLOCK_2D else SLABS)
        w_scales = (w_buffer + w_bytes).to(tl.pointer_type(tl.float32)) + split.to(tl.int64) * W_SCALES
        y = _slab_products(
            (x_buffer + start.to(tl.int64) * DEPTH).to(tl.pointer_type(X_DTYPE)),
            (w_buffer + split.to(tl.int64) * (OUT_FEATURES * DEPTH)).to(tl.pointer_type(W_DTYPE)),
            x_scales,
            w_scales,
            row,
            col,
            rows,
            OUT_FEATURES,
            DEPTH,
            rows,
            W_SCALE_STRIDE,
            W_BLOCK_2D,
            DEPTH % 128 == 0,
            TILE_M,
            TILE_N,
            STAGES,
        )
        if HAS_BIAS:
            pointers = bias + split.to(tl.int64) * OUT_FEATURES + col
            y += tl.load(pointers, mask=col < OUT_FEATURES, other=0.0).to(tl.float32)[None, :]
        y = tl.where((row < rows)[:, None], y, 0.0)
    pointers = out + (start + row).to(tl.int64)[:, None] * OUT_FEATURES + col[None, :]
    mask = (row < rows_to_store)[:, None] & (col < OUT_FEATURES)[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def _grouped_wgrad_kernel(
    dy_buffer,
    x_buffer,
    ends,
    out,
    num_splits,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    DY_DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of one expert's weight gradient: the expert's rows are contracted; no rows give zeros."""
    ROW_TILES: tl.constexpr = (OUT_FEATURES + TILE_M - 1) // TILE_M
    COL_TILES: tl.constexpr = (IN_FEATURES + TILE_N - 1) // TILE_N
    program = tl.program_id(0)
    split = program // (ROW_TILES * COL_TILES)
    row_tile, col_tile = _rasterise(program % (ROW_TILES * COL_TILES), ROW_TILES, COL_TILES, GROUP)
    start = tl.load(ends + split - 1, mask=split > 0, other=0)
    # Every split is a multiple of 16 rows: so are its bytes, and 16 of them are loaded at a time.
    rows = tl.multiple_of((tl.load(ends + split) - start).to(tl.int32), 16)
    start = tl.multiple_of(start, 16)
    total = tl.multiple_of(tl.load(ends + num_splits - 1), 16)
    before = tl.where(tl.arange(0, LANES) < split, rows_of_splits(ends, num_splits, LANES), 0)
    slabs_before = tl.sum((before + 127) // 128, 0).to(tl.int64)
    row = row_tile * TILE_M + tl.arange(0, TILE_M)
    col = col_tile * TILE_N + tl.arange(0, TILE_N)
    y = _slab_products(
        (dy_buffer + start * OUT_FEATURES).to(tl.pointer_type(DY_DTYPE)),
        (x_buffer + start * IN_FEATURES).to(tl.pointer_type(X_DTYPE)),
        (dy_buffer + total * OUT_FEATURES).to(tl.pointer_type(tl.float32)) + slabs_before * OUT_FEATURES,
        (x_buffer + total * IN_FEATURES).to(tl.pointer_type(tl.float32)) + slabs_before * IN_FEATURES,
        row,
        col,
        OUT_FEATURES,
        IN_FEATURES,
        rows,
        OUT_FEATURES,
        IN_FEATURES,
        False,
        False,
        TILE_M,
        TILE_N,
        STAGES,
    )
    pointers = out + (split.to(tl.int64) * OUT_FEATURES + row)[:, None] * IN_FEATURES + col[None, :]
    mask = (row < OUT_FEATURES)[:, None] & (col < IN_FEATURES)[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=mask)


_TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def grouped_rows(
    x_buffer: torch.Tensor,
    w_buffer: torch.Tensor,
    ends: torch.Tensor,
    *,
    num_rows: int,
    num_splits: int,
    depth: int,
    out_features: int,
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    w_block_2d: bool,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    tile_m: int = 128,
    tile_n: int = 128,
    group: int = 8,
    num_warps: int = 8,
    num_stages: int = 4,
) -> torch.Tensor:
    """Every expert's rows times its weight, contracted along `depth`, in one launch on the current stream.

    Args:
        x_buffer: uint8 rowwise bulk buffer of the (num_rows, depth) rows, with 1x128 scales.
        w_buffer: uint8 bulk buffer of (num_splits, out_features, depth): the rowwise one of a weight of that shape, or
            the columnwise one of a weight (num_splits, depth, out_features).
        ends: int64 (num_splits,): the rows up to and including each expert's, read on the device.
        num_rows: rows of the result. Those past the last expert's are zeros.
        num_splits: how many experts there are.
        depth, out_features: multiples of 16, as are the experts' rows.
        x_dtype, w_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        w_block_2d: the weight has a scale for each 128x128 block, otherwise for each 1x128 tile.
        out_dtype: of the result.
        bias: (num_splits, out_features), added in float32.
        tile_m, tile_n, group, num_warps, num_stages: how the work is cut; they change speed alone.

    Returns: (num_rows, out_features) in `out_dtype`.
    """
    check_operands(x_buffer, w_buffer, ends, num_splits, depth, out_features)
    out = torch.empty(num_rows, out_features, dtype=out_dtype, device=x_buffer.device)
    if num_rows == 0 or num_splits == 0 or out_features == 0 or depth == 0:
        return out.zero_()
    grid = num_slots(num_rows, num_splits, tile_m) * -(-out_features // tile_n)
    pointers = (x_buffer, w_buffer, ends, out if bias is None else bias, out)
    constants = {
        "OUT_FEATURES": out_features,
        "DEPTH": depth,
        "X_DTYPE": _TYPES[x_dtype],
        "W_DTYPE": _TYPES[w_dtype],
        "W_BLOCK_2D": w_block_2d,
        "HAS_BIAS": bias is not None,
        "LANES": padded_splits(num_splits),
        "TILE_M": tile_m,
        "TILE_N": tile_n,
        "GROUP": group,
        "STAGES": num_stages,
    }
    with on_device_of(x_buffer):
        launch(_grouped_rows_kernel, grid, pointers, (num_splits, num_rows), constants, num_warps=num_warps)
    return out


def grouped_wgrad(
    dy_buffer: torch.Tensor,
    x_buffer: torch.Tensor,
    ends: torch.Tensor,
    *,
    num_splits: int,
    out_features: int,
    in_features: int,
    dy_dtype: torch.dtype,
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    tile_m: int = 64,
    tile_n: int = 128,
    group: int = 8,
    num_warps: int = 4,
    num_stages: int = 3,
) -> torch.Tensor:
    """Every expert's weight gradient, contracted along its rows, in one launch on the current stream.

    Args:
        dy_buffer: uint8 columnwise bulk buffer of the (M, out_features) gradient, with 1x128 scales.
        x_buffer: uint8 columnwise bulk buffer of the (M, in_features) input, with 1x128 scales.
        ends: int64 (num_splits,): the rows up to and including each expert's, read on the device.
        num_splits: how many experts there are.
        out_features, in_features: multiples of 16, as are the experts' rows.
        dy_dtype, x_dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        out_dtype: of the result.
        tile_m, tile_n, group, num_warps, num_stages: how the work is cut; they change speed alone.

    Returns: (num_splits, out_features, in_features) in `out_dtype`; zeros for an expert without rows.
    """
    check_operands(dy_buffer, x_buffer, ends, num_splits, in_features, out_features)
    out = torch.empty(num_splits, out_features, in_features, dtype=out_dtype, device=x_buffer.device)
    if out.numel() == 0:
        return out
    grid = num_splits * -(-out_features // tile_m) * -(-in_features // tile_n)
    pointers = (dy_buffer, x_buffer, ends, out)
    constants = {
        "OUT_FEATURES": out_features,
        "IN_FEATURES": in_features,
        "DY_DTYPE": _TYPES[dy_dtype],
        "X_DTYPE": _TYPES[x_dtype],
        "LANES": padded_splits(num_splits),
        "TILE_M": tile_m,
        "TILE_N": tile_n,
        "GROUP": group,
        "STAGES": num_stages,
    }
    with on_device_of(x_buffer):
        launch(_grouped_wgrad_kernel, grid, pointers, (num_splits,), constants, num_warps=num_warps)
    return out


def check_operands(
    a_buffer: torch.Tensor, b_buffer: torch.Tensor, ends: torch.Tensor, num_splits: int, *features: int
) -> None:
    """Refuse what a kernel would silently misread.

    Raises: ValueError.
    """
    if any(size % 16 for size in features):
        raise ValueError(
            f"the grouped FP8 kernels need features in multiples of 16; got {' and '.join(map(str, features))}. "
            "Pad the weight."
        )
    if ends.dtype != torch.int64 or ends.dim() != 1 or ends.shape[0] < num_splits:
        raise ValueError(
            f"ends needs {num_splits} int64 row counts on {a_buffer.device}; got {tuple(ends.shape)} {ends.dtype}. "
            "Pass the inclusive prefix sums of the splits."
        )
    for buffer in (a_buffer, b_buffer):
        if buffer.dtype != torch.uint8 or buffer.data_ptr() % 16:
            raise ValueError(
                f"a bulk buffer is uint8 and begins at a multiple of 16 bytes; got {buffer.dtype} at "
                f"{buffer.data_ptr() % 16} past one. Pass the buffer that split_quantize returned."
            )
