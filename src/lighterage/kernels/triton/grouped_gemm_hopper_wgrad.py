"""Every expert's weight gradient on Hopper: the fast form of `grouped_gemm.grouped_wgrad`.

Note [Descriptors of ragged matrices]
An expert's columnwise codes are a matrix whose rows are as long as the expert has rows, so every expert needs its own
descriptors. The loading warp makes them on the device when it comes to the expert, in memory that the launch allocates,
and waits for what it has asked for with the last ones before it writes over them.
Codes past the expert's rows read as zeros: the last slab may be short.
"""

from __future__ import annotations

import contextvars

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from lighterage.kernels.triton.grouped_gemm import check_operands
from lighterage.kernels.triton.grouped_gemm_hopper import (
    GROUP_ROWS,
    NUM_GROUPS,
    TILE_M,
    TILE_N,
    finish_product,
    free_stage,
    hold,
    make_stages,
    num_multiprocessors,
    num_stages,
    rasterise,
    start_product,
    thread_barrier,
    tma_load,
    tma_store,
)
from lighterage.kernels.triton.launch import on_device_of

_TYPES = {torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}


@gluon.jit
def _first_of_next_expert(tile, TILES: gl.constexpr):
    """Our first tile of the next expert, counted from that expert's first, given ours of this one."""
    programs = gl.num_programs(0)
    steps = (gl.maximum(TILES - tile, 0) + programs - 1) // programs
    return tile + steps * programs - TILES


@gluon.jit
def _load(
    dy_buffer,
    x_buffer,
    a_smem,
    b_smem,
    full,
    empty,
    ends,
    num_splits,
    DY_TYPE: gl.constexpr,
    X_TYPE: gl.constexpr,
    OUT_FEATURES: gl.constexpr,
    IN_FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The loading warp: note [Descriptors of ragged matrices]."""
    ROW_TILES: gl.constexpr = (OUT_FEATURES + TILE_M - 1) // TILE_M
    COL_TILES: gl.constexpr = (IN_FEATURES + TILE_N - 1) // TILE_N
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    count = 0
    first = gl.program_id(0)
    start = gl.to_tensor(0).to(gl.int64)
    for expert in range(num_splits):
        end = gl.load(ends + expert)
        rows = (end - start).to(gl.int32)
        if (rows > 0) & (first < ROW_TILES * COL_TILES):
            dy = (dy_buffer + start * OUT_FEATURES).to(gl.pointer_type(DY_TYPE))
            x = (x_buffer + start * IN_FEATURES).to(gl.pointer_type(X_TYPE))
            stride = rows.to(gl.int64)
            for back in gl.static_range(1, STAGES + 1):  # the last expert's descriptors must not change under a copy
                if count >= back:
                    mbarrier.wait(full.index((count - back) % STAGES), (count - back) // STAGES & 1)
            dy_desc = tma.make_tensor_descriptor(dy, [OUT_FEATURES, rows], [stride, 1], [GROUP_ROWS, 128], layout)
            x_desc = tma.make_tensor_descriptor(x, [IN_FEATURES, rows], [stride, 1], [TILE_N, 128], layout)
            for tile in range(first, ROW_TILES * COL_TILES, gl.num_programs(0)):
                row_tile, col_tile = rasterise(tile, ROW_TILES, COL_TILES, GROUP)
                for slab in range((rows + 127) // 128):
                    stage = free_stage(empty, full, count, STAGES)
                    for group in gl.static_range(NUM_GROUPS):
                        tma_load(
                            dy_desc,
                            [row_tile * TILE_M + group * GROUP_ROWS, slab * 128],
                            full.index(stage),
                            a_smem.index(stage * NUM_GROUPS + group),
                        )
                    tma_load(x_desc, [col_tile * TILE_N, slab * 128], full.index(stage), b_smem.index(stage))
                    count += 1
        first = _first_of_next_expert(first, ROW_TILES * COL_TILES)
        start = end


@gluon.jit
def _scales_of_columns(pointers, inside, WHOLE_TILES: gl.constexpr):
    if WHOLE_TILES:
        return gl.load(pointers)
    else:
        return gl.load(pointers, mask=inside, other=0.0)


@gluon.jit
def _promote(product, dy_scale, x_scale, y):
    """One slab into the result: note [Promotion] of `grouped_gemm`."""
    scaled = product * gl.expand_dims(dy_scale, 1)
    return gl.fma(scaled, gl.expand_dims(x_scale, 0).broadcast_to(y.shape[0], y.shape[1]), y)


@gluon.jit
def _multiply(
    group: gl.constexpr,
    out_desc,
    out,
    dy_scales,
    x_scales,
    a_smem,
    b_smem,
    out_smem,
    full,
    empty,
    ends,
    num_splits,
    OUT_FEATURES: gl.constexpr,
    IN_FEATURES: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """One of the multiplying groups: its rows of every tile, to the end in memory."""
    ROW_TILES: gl.constexpr = (OUT_FEATURES + TILE_M - 1) // TILE_M
    COL_TILES: gl.constexpr = (IN_FEATURES + TILE_N - 1) // TILE_N
    WHOLE: gl.constexpr = IN_FEATURES % TILE_N == 0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    offs_m = group * GROUP_ROWS + gl.arange(0, GROUP_ROWS, layout=gl.SliceLayout(1, layout))
    offs_n = gl.arange(0, TILE_N, layout=gl.SliceLayout(0, layout))
    zeros = gl.zeros([GROUP_ROWS, TILE_N], gl.float32, layout=layout)
    count = 0
    first = gl.program_id(0)
    start = gl.to_tensor(0).to(gl.int64)
    slabs_before = gl.to_tensor(0).to(gl.int64)
    for expert in range(num_splits):
        end = gl.load(ends + expert)
        slabs = ((end - start).to(gl.int32) + 127) // 128
        for tile in range(first, ROW_TILES * COL_TILES, gl.num_programs(0)):
            row_tile, col_tile = rasterise(tile, ROW_TILES, COL_TILES, GROUP)
            row = row_tile * TILE_M + offs_m
            col = col_tile * TILE_N + offs_n
            inside = col < IN_FEATURES
            row_scales = dy_scales + slabs_before * OUT_FEATURES + gl.minimum(row, OUT_FEATURES - 1)
            col_scales = x_scales + slabs_before * IN_FEATURES + col
            y = zeros
            for _ in range(slabs // 2):
                product_0 = start_product(group, a_smem, b_smem, full, count, zeros, STAGES)
                product_1 = start_product(group, a_smem, b_smem, full, count + 1, zeros, STAGES)
                row_scale_0 = gl.load(row_scales)
                row_scale_1 = gl.load(row_scales + OUT_FEATURES)
                col_scale = _scales_of_columns(col_scales, inside, WHOLE)
                product_0 = finish_product(product_0, empty, count, 1, STAGES)
                y = hold(_promote(product_0, row_scale_0, col_scale, y))
                col_scale = _scales_of_columns(col_scales + IN_FEATURES, inside, WHOLE)
                product_1 = finish_product(product_1, empty, count + 1, 0, STAGES)
                y = _promote(product_1, row_scale_1, col_scale, y)
                row_scales += 2 * OUT_FEATURES
                col_scales += 2 * IN_FEATURES
                count += 2
            if slabs % 2 == 1:
                product = start_product(group, a_smem, b_smem, full, count, zeros, STAGES)
                row_scale = gl.load(row_scales)
                col_scale = _scales_of_columns(col_scales, inside, WHOLE)
                y = _promote(finish_product(product, empty, count, 0, STAGES), row_scale, col_scale, y)
                count += 1
            first_row = row_tile * TILE_M + group * GROUP_ROWS
            if OUT_FEATURES % TILE_M == 0:
                tma.store_wait(0)  # the last tile has left
                thread_barrier()
                out_smem.index(group).store(y.to(out.dtype.element_ty))
                fence_async_shared()
                thread_barrier()
                coordinates = [expert * OUT_FEATURES + first_row, col_tile * TILE_N]
                tma_store(out_desc, coordinates, out_smem.index(group))
            else:
                rows_before = gl.to_tensor(expert).to(gl.int64) * OUT_FEATURES
                pointers = out + gl.expand_dims((rows_before + row) * IN_FEATURES, 1) + gl.expand_dims(col, 0)
                mask = gl.expand_dims(row < OUT_FEATURES, 1) & gl.expand_dims(inside, 0)
                gl.store(pointers, y.to(out.dtype.element_ty), mask=mask)
        first = _first_of_next_expert(first, ROW_TILES * COL_TILES)
        slabs_before += slabs
        start = end
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_splits"])
def _grouped_wgrad_kernel(
    out_desc,
    out,
    dy_buffer,
    x_buffer,
    ends,
    num_splits,
    OUT_FEATURES: gl.constexpr,
    IN_FEATURES: gl.constexpr,
    DY_TYPE: gl.constexpr,
    X_TYPE: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """Two groups of warps that multiply, one warp that loads: note [Roles] of `grouped_gemm_hopper`."""
    a_smem, b_smem, full, empty = make_stages(DY_TYPE, X_TYPE, STAGES)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [NUM_GROUPS, GROUP_ROWS, TILE_N], out_desc.layout)
    fence_async_shared()
    total = gl.load(ends + num_splits - 1)
    dy_scales = (dy_buffer + total * OUT_FEATURES).to(gl.pointer_type(gl.float32))
    x_scales = (x_buffer + total * IN_FEATURES).to(gl.pointer_type(gl.float32))
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    out_desc,
                    out,
                    dy_scales,
                    x_scales,
                    a_smem,
                    b_smem,
                    out_smem,
                    full,
                    empty,
                    ends,
                    num_splits,
                    OUT_FEATURES,
                    IN_FEATURES,
                    STAGES,
                    GROUP,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    out_desc,
                    out,
                    dy_scales,
                    x_scales,
                    a_smem,
                    b_smem,
                    out_smem,
                    full,
                    empty,
                    ends,
                    num_splits,
                    OUT_FEATURES,
                    IN_FEATURES,
                    STAGES,
                    GROUP,
                ),
            ),
            (
                _load,
                (
                    dy_buffer,
                    x_buffer,
                    a_smem,
                    b_smem,
                    full,
                    empty,
                    ends,
                    num_splits,
                    DY_TYPE,
                    X_TYPE,
                    OUT_FEATURES,
                    IN_FEATURES,
                    STAGES,
                    GROUP,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )


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
    group: int = 8,
) -> torch.Tensor:
    """`grouped_gemm.grouped_wgrad`. `group`: how the work is cut; it changes speed alone."""
    check_operands(dy_buffer, x_buffer, ends, num_splits, in_features, out_features)
    out = torch.empty(num_splits, out_features, in_features, dtype=out_dtype, device=x_buffer.device)
    if out.numel() == 0:
        return out
    layout = gl.NVMMASharedLayout(128, 8 * out.element_size(), 2)
    num_tiles = num_splits * -(-out_features // TILE_M.value) * -(-in_features // TILE_N.value)
    grid = (min(num_multiprocessors(x_buffer.device.index), num_tiles),)

    def launch() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=out.device))
        _grouped_wgrad_kernel[grid](
            TensorDescriptor(
                out,
                [num_splits * out_features, in_features],
                [in_features, 1],
                [GROUP_ROWS.value, TILE_N.value],
                layout,
            ),
            out,
            dy_buffer,
            x_buffer,
            ends,
            num_splits,
            OUT_FEATURES=out_features,
            IN_FEATURES=in_features,
            DY_TYPE=_TYPES[dy_dtype],
            X_TYPE=_TYPES[x_dtype],
            STAGES=num_stages(out),
            GROUP=group,
            num_warps=4,
        )

    with on_device_of(x_buffer):
        contextvars.copy_context().run(launch)  # the caller keeps the allocator that it has set, if any
    return out
