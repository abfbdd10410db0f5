"""The parts of the grouped kernel for Hopper: stages of shared memory, products in flight, descriptors.

Note [Roles]
A program stays on its multiprocessor and takes one tile of the result after another. One warp loads: it asks the TMA
for the next slab of both operands as soon as a stage of shared memory is free, across the ends of tiles. Two groups of
four warps multiply, each its 64 rows of the tile. They never wait for each other, only for full stages, so that one
adds to its result, or stores it, while the other keeps the tensor cores busy.

Note [Slabs in flight]
A group has the product of the next slab under way while it adds the last one to its float32 result. The compiler
serializes all products if it must move the registers of one that is under way, and a loop that hands one on makes it:
so a run of slabs is written out, and nothing is under way between two runs. It also moves additions past products that
are started later, and then runs out of registers: waiting "for" the result (`hold`) keeps them in place at no cost.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Names that differ between versions of Triton.
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

TILE_M = gl.constexpr(128)
TILE_N = gl.constexpr(128)
GROUP_ROWS = gl.constexpr(64)  # of one group of warps
NUM_GROUPS = gl.constexpr(2)
STAGE_BYTES = gl.constexpr(256 * 128)


@gluon.jit
def make_stages(a_type: gl.constexpr, b_type: gl.constexpr, STAGES: gl.constexpr):
    """`(codes of a, codes of b, barriers that a stage is full, that it is empty)` in shared memory."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    a_smem = gl.allocate_shared_memory(a_type, [STAGES * NUM_GROUPS, GROUP_ROWS, 128], layout)
    b_smem = gl.allocate_shared_memory(b_type, [STAGES, TILE_N, 128], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=NUM_GROUPS)
    return a_smem, b_smem, full, empty


@gluon.jit
def free_stage(empty, full, count, STAGES: gl.constexpr):
    """Wait until the stage of the `count`th slab is free, and announce what will be loaded into it."""
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), STAGE_BYTES)
    return stage


@gluon.jit
def start_product(group: gl.constexpr, a_smem, b_smem, full, count, zeros, STAGES: gl.constexpr):
    """Start the product of the `count`th slab, from zero."""
    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    a = a_smem.index(stage * NUM_GROUPS + group)
    return warpgroup_mma(a, b_smem.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def finish_product(product, empty, count, PENDING: gl.constexpr, STAGES: gl.constexpr):
    """The product of the `count`th slab, whose stage is given back; `PENDING` later ones may be under way."""
    product = warpgroup_mma_wait(PENDING, deps=(product,))
    mbarrier.arrive(empty.index(count % STAGES), count=1)
    return product


@gluon.jit
def hold(y):
    """`y`, computed before any product that is started after this: note [Slabs in flight]."""
    return warpgroup_mma_wait(1, deps=(y,))


@lru_cache
def num_multiprocessors(device_index: int) -> int:
    """Of a CUDA device: one program runs on each."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def num_stages(out: torch.Tensor) -> int:
    """Stages of two tiles of codes that fit beside a tile of the result."""
    return 6 if out.element_size() == 2 else 5


def described(matrix: torch.Tensor, num_rows: int, num_cols: int, block_rows: int, block_cols: int) -> TensorDescriptor:
    """The TMA's description of blocks of `matrix`, whose memory begins at a multiple of 16 bytes."""
    # Made over the fields of one that was checked: Gluon checks each new one, at 10 microseconds and three a launch.
    described: TensorDescriptor = object.__new__(TensorDescriptor)
    described.__dict__.update(_checked_fields(matrix.dtype, num_rows, num_cols, block_rows, block_cols), base=matrix)
    return described


@lru_cache(maxsize=256)
def _checked_fields(
    dtype: torch.dtype, num_rows: int, num_cols: int, block_rows: int, block_cols: int
) -> dict[str, object]:
    layout = gl.NVMMASharedLayout(128, 8 * dtype.itemsize, 2)
    nowhere = torch.empty(0, dtype=dtype)
    checked = TensorDescriptor(nowhere, [num_rows, num_cols], [num_cols, 1], [block_rows, block_cols], layout)
    return dict(vars(checked))
