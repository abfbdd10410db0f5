"""Every expert's rows times its weight on Hopper: the fast form of `grouped_gemm.grouped_rows`.

Note [Scales that are powers of two]
With such a scale of a's the product of both scales is exact, and so is a slab's product times a's. Then
`fma(P, scale_a * scale_b, y)` has the bits of `fma(round(P * scale_a), scale_b, y)` at half the cost, as long as the
product of the scales and every slab's product lie within float32's range.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from lighterage.kernels.triton.grouped_gemm import check_operands
from lighterage.kernels.triton.grouped_gemm_hopper import (
    GROUP_ROWS,
    NUM_GROUPS,
    TILE_M,
    TILE_N,
    described,
    finish_product,
    free_stage,
    hold,
    make_stages,
    num_multiprocessors,
    num_stages,
    start_product,
    thread_barrier,
    tma_load,
    tma_store,
)
from lighterage.kernels.triton.grouped_gemm_hopper_tiles import locate, plan_of_tiles
from lighterage.kernels.triton.launch import launch, on_device_of
from lighterage.kernels.triton.splits import padded_splits

MAX_SPLITS = 1024


@gluon.jit
def _load(
    x_desc,
    w_desc,
    a_smem,
    b_smem,
    full,
    empty,
    ends,
    num_splits,
    num_rows,
    OUT_FEATURES: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    LANES: gl.constexpr,
):
    """The loading warp. Rows of the next expert in a tile do no harm; what is past the matrices reads as zeros."""
    COL_TILES: gl.constexpr = (OUT_FEATURES + TILE_N - 1) // TILE_N
    plan_tiles, plan_ends = plan_of_tiles(ends, num_splits, num_rows, LANES, 1)
    count = 0
    for tile in range(gl.program_id(0), gl.max(plan_tiles, 0) * COL_TILES, gl.num_programs(0)):
        expert, start, rows, row_tile, col_tile = locate(plan_tiles, plan_ends, tile, COL_TILES, GROUP)
        if row_tile * TILE_M < rows:
            row = start + row_tile * TILE_M
            col = expert * OUT_FEATURES + col_tile * TILE_N
            for slab in range((DEPTH + 127) // 128):
                stage = free_stage(empty, full, count, STAGES)
                for group in gl.static_range(NUM_GROUPS):
                    tma_load(
                        x_desc,
                        [row + group * GROUP_ROWS, slab * 128],
                        full.index(stage),
                        a_smem.index(stage * NUM_GROUPS + group),
                    )
                tma_load(w_desc, [col, slab * 128], full.index(stage), b_smem.index(stage))
                count += 1


@gluon.jit
def _promote(product, x_scale, w_scale, y, POWER_OF_2: gl.constexpr):
    """One slab into the result: note [Promotion] of `grouped_gemm`, note [Scales that are powers of two]."""
    if POWER_OF_2:
        scale = gl.expand_dims(x_scale * w_scale, 1)
        return gl.fma(product, scale.broadcast_to(y.shape[0], y.shape[1]), y)
    else:
        return gl.fma(product * gl.expand_dims(x_scale, 1), gl.full_like(product, w_scale), y)


@gluon.jit
def _add_slabs(
    y,
    count,
    first,
    group: gl.constexpr,
    x_scales,
    w_scales,
    rows,
    a_smem,
    b_smem,
    full,
    empty,
    zeros,
    SLABS: gl.constexpr,
    STAGES: gl.constexpr,
    POWER_OF_2: gl.constexpr,
):
    """`SLABS` slabs, of which the first is number `first`, into `y`: note [Slabs in flight]."""
    product = start_product(group, a_smem, b_smem, full, count, zeros, STAGES)
    x_scale = gl.load(x_scales + first * rows)
    w_scale = gl.load(w_scales + first)
    for i in gl.static_range(SLABS):
        if i + 1 < SLABS:
            if i > 0:
                y = hold(y)
            next_product = start_product(group, a_smem, b_smem, full, count + i + 1, zeros, STAGES)
            next_x_scale = gl.load(x_scales + (first + i + 1) * rows)
            next_w_scale = gl.load(w_scales + first + i + 1)
            done = finish_product(product, empty, count + i, 1, STAGES)
        else:
            done = finish_product(product, empty, count + i, 0, STAGES)
        y = _promote(done, x_scale, w_scale, y, POWER_OF_2)
        if i + 1 < SLABS:
            product = next_product
            x_scale = next_x_scale
            w_scale = next_w_scale
    return y


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out_desc,
    out,
    bias,
    x_scales,
    w_scales,
    a_smem,
    b_smem,
    out_smem,
    full,
    empty,
    ends,
    num_splits,
    num_rows,
    OUT_FEATURES: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    GROUP: gl.constexpr,
    LANES: gl.constexpr,
    POWER_OF_2: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """One of the multiplying groups: its rows of every tile, to the end in memory."""
    COL_TILES: gl.constexpr = (OUT_FEATURES + TILE_N - 1) // TILE_N
    SLABS: gl.constexpr = (DEPTH + 127) // 128
    SLABS_PADDED: gl.constexpr = (SLABS + 3) // 4 * 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    offs_m = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, TILE_N, layout=gl.SliceLayout(0, layout))
    zeros = gl.zeros([GROUP_ROWS, TILE_N], gl.float32, layout=layout)
    plan_tiles, plan_ends = plan_of_tiles(ends, num_splits, num_rows, LANES, 4)
    count = 0
    for tile in range(gl.program_id(0), gl.max(plan_tiles, 0) * COL_TILES, gl.num_programs(0)):
        expert, start, rows, row_tile, col_tile = locate(plan_tiles, plan_ends, tile, COL_TILES, GROUP)
        row = row_tile * TILE_M + offs_m
        col = col_tile * TILE_N + offs_n
        y = zeros
        if row_tile * TILE_M < rows:
            tile_x_scales = x_scales + start.to(gl.int64) * SLABS + gl.minimum(row, rows - 1)
            tile_w_scales = w_scales + (expert * COL_TILES + col_tile).to(gl.int64) * SLABS_PADDED
            for run in range(SLABS // UNROLL):
                y = _add_slabs(
                    y,
                    count,
                    run * UNROLL,
                    group,
                    tile_x_scales,
                    tile_w_scales,
                    rows,
                    a_smem,
                    b_smem,
                    full,
                    empty,
                    zeros,
                    UNROLL,
                    STAGES,
                    POWER_OF_2,
                )
                count += UNROLL
            if SLABS % UNROLL > 0:
                y = _add_slabs(
                    y,
                    count,
                    SLABS // UNROLL * UNROLL,
                    group,
                    tile_x_scales,
                    tile_w_scales,
                    rows,
                    a_smem,
                    b_smem,
                    full,
                    empty,
                    zeros,
                    SLABS % UNROLL,
                    STAGES,
                    POWER_OF_2,
                )
                count += SLABS % UNROLL
        if HAS_BIAS:
            biases = bias + expert.to(gl.int64) * OUT_FEATURES + col
            y = y + gl.expand_dims(gl.load(biases, mask=col < OUT_FEATURES, other=0.0).to(gl.float32), 0)
        first_row = row_tile * TILE_M + group * GROUP_ROWS
        if first_row + GROUP_ROWS <= rows:
            tma.store_wait(0)  # the last tile has left
            thread_barrier()
            out_smem.index(group).store(y.to(out.dtype.element_ty))
            fence_async_shared()
            thread_barrier()
            tma_store(out_desc, [start + first_row, col_tile * TILE_N], out_smem.index(group))
        else:
            rows_to_store = gl.where(expert == num_splits - 1, num_rows - start, rows)
            y = gl.where(gl.expand_dims(row < rows, 1), y, 0.0)
            pointers = out + gl.expand_dims((start + row).to(gl.int64) * OUT_FEATURES, 1) + gl.expand_dims(col, 0)
            mask = gl.expand_dims(row < rows_to_store, 1) & gl.expand_dims(col < OUT_FEATURES, 0)
            gl.store(pointers, y.to(out.dtype.element_ty), mask=mask)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_splits", "num_rows"])
def _grouped_rows_kernel(
    x_desc,
    w_desc,
    out_desc,
    out,
    bias,
    x_buffer,
    w_buffer,
    ends,
    num_splits,
    num_rows,
    OUT_FEATURES: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    UNROLL: gl.constexpr,
    GROUP: gl.constexpr,
    LANES: gl.constexpr,
    POWER_OF_2: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Two groups of warps that multiply, one warp that loads: note [Roles]."""
    a_smem, b_smem, full, empty = make_stages(x_desc.dtype, w_desc.dtype, STAGES)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [NUM_GROUPS, GROUP_ROWS, TILE_N], out_desc.layout)
    fence_async_shared()
    x_scales = (x_buffer + gl.load(ends + num_splits - 1) * DEPTH).to(gl.pointer_type(gl.float32))
    w_scales = (w_buffer + num_splits.to(gl.int64) * (OUT_FEATURES * DEPTH)).to(gl.pointer_type(gl.float32))
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    out_desc,
                    out,
                    bias,
                    x_scales,
                    w_scales,
                    a_smem,
                    b_smem,
                    out_smem,
                    full,
                    empty,
                    ends,
                    num_splits,
                    num_rows,
                    OUT_FEATURES,
                    DEPTH,
                    STAGES,
                    UNROLL,
                    GROUP,
                    LANES,
                    POWER_OF_2,
                    HAS_BIAS,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    out_desc,
                    out,
                    bias,
                    x_scales,
                    w_scales,
                    a_smem,
                    b_smem,
                    out_smem,
                    full,
                    empty,
                    ends,
                    num_splits,
                    num_rows,
                    OUT_FEATURES,
                    DEPTH,
                    STAGES,
                    UNROLL,
                    GROUP,
                    LANES,
                    POWER_OF_2,
                    HAS_BIAS,
                ),
            ),
            (
                _load,
                (
                    x_desc,
                    w_desc,
                    a_smem,
                    b_smem,
                    full,
                    empty,
                    ends,
                    num_splits,
                    num_rows,
                    OUT_FEATURES,
                    DEPTH,
                    STAGES,
                    GROUP,
                    LANES,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


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
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    power_of_2: bool = False,
    unroll: int = 4,
    group: int = 8,
) -> torch.Tensor:
    """`grouped_gemm.grouped_rows` of a weight with 128x128 scales, for up to `MAX_SPLITS` experts.

    Args beside those: power_of_2: x's scales are powers of two: note [Scales that are powers of two].
        unroll, group: how the work is cut; they change speed alone.
    """
    check_operands(x_buffer, w_buffer, ends, num_splits, depth, out_features)
    assert num_splits <= MAX_SPLITS
    out = torch.empty(num_rows, out_features, dtype=out_dtype, device=x_buffer.device)
    if num_rows == 0 or num_splits == 0 or out_features == 0 or depth == 0:
        return out.zero_()
    w_rows = num_splits * out_features
    x = x_buffer[: num_rows * depth].view(x_dtype)
    w = w_buffer[: w_rows * depth].view(w_dtype)
    row_tiles = num_rows // TILE_M.value + num_splits
    num_tiles = row_tiles * -(-out_features // TILE_N.value)
    descriptors = (
        described(x, num_rows, depth, GROUP_ROWS.value, 128),
        described(w, w_rows, depth, TILE_N.value, 128),
        described(out, num_rows, out_features, GROUP_ROWS.value, TILE_N.value),
    )
    constants = {
        "OUT_FEATURES": out_features,
        "DEPTH": depth,
        "STAGES": num_stages(out),
        "UNROLL": unroll,
        "GROUP": group,
        "LANES": padded_splits(num_splits),
        "POWER_OF_2": power_of_2,
        "HAS_BIAS": bias is not None,
    }
    grid = min(num_multiprocessors(x_buffer.get_device()), num_tiles)
    pointers = (out, out if bias is None else bias, x_buffer, w_buffer, ends)
    with on_device_of(x_buffer):
        launch(
            _grouped_rows_kernel,
            grid,
            pointers,
            (num_splits, num_rows),
            constants,
            num_warps=4,
            descriptors=descriptors,
        )
    return out
