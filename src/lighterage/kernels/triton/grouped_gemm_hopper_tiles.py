"""Which tile of a grouped result a program of a Gluon kernel works on: read from the experts' ends on the device."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lighterage.kernels.triton.grouped_gemm_hopper import TILE_M


@gluon.jit
def _rasterise(tile, num_row_tiles, NUM_COL_TILES: gl.constexpr, GROUP: gl.constexpr):
    """`(row tile, column tile)`: down `GROUP` rows, then the next column, so that tiles at work share operands."""
    in_group = GROUP * NUM_COL_TILES
    group = tile // in_group
    height = gl.minimum(num_row_tiles - group * GROUP, GROUP)
    rest = tile - group * in_group
    col_tile = rest // height
    return group * GROUP + rest - col_tile * height, col_tile


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def plan_of_tiles(ends, num_splits, num_rows, LANES: gl.constexpr, WARPS: gl.constexpr):
    """`(row tiles up to and including each split, its end)`, a lane for each split; the last one has all rows left."""
    layout: gl.constexpr = gl.BlockedLayout([LANES // 32], [32], [WARPS], [0])
    lane = gl.arange(0, LANES, layout=layout)
    end = gl.load(ends + lane, mask=lane < num_splits, other=0).to(gl.int32)
    start = gl.load(ends + lane - 1, mask=(lane > 0) & (lane < num_splits), other=0).to(gl.int32)
    stop = gl.where(lane == num_splits - 1, num_rows, end)
    tiles = gl.where(lane < num_splits, (stop - start + TILE_M - 1) // TILE_M, 0)
    return gl.associative_scan(tiles, 0, _sum), gl.where(lane < num_splits, end, 0x7FFFFFFF)


@gluon.jit
def locate(plan_tiles, plan_ends, tile, NUM_COL_TILES: gl.constexpr, GROUP: gl.constexpr):
    """`(expert, its first row, its rows, row tile in it, column tile)` of one tile of the whole result."""
    passed = plan_tiles <= tile // NUM_COL_TILES
    expert = gl.sum(passed.to(gl.int32), 0)
    first_tile = gl.max(gl.where(passed, plan_tiles, 0), 0)
    next_tile = gl.min(gl.where(passed, 0x7FFFFFFF, plan_tiles), 0)
    start = gl.max(gl.where(passed, plan_ends, 0), 0)
    end = gl.min(gl.where(passed, 0x7FFFFFFF, plan_ends), 0)
    inner = tile - first_tile * NUM_COL_TILES
    row_tile, col_tile = _rasterise(inner, next_tile - first_tile, NUM_COL_TILES, GROUP)
    return expert, start, end - start, row_tile, col_tile
