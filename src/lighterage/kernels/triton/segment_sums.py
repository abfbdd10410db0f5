"""Sums over the rows of each split, one launch for all splits: the gradient of a bias for each expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.launch import on_device_of


@triton.jit
def _segment_sums_kernel(x, ends, out, num_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program sums one block of columns of one split, so that the order of the sum never changes."""
    split = tl.program_id(1)
    start = tl.load(ends + split - 1, mask=split > 0, other=0)
    end = tl.load(ends + split)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < num_cols
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        mask = (rows < end)[:, None] & inside[None, :]
        sums += tl.load(x + rows.to(tl.int64)[:, None] * num_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + split.to(tl.int64) * num_cols + cols, tl.sum(sums, 0), mask=inside)


def segment_sums(x_MN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of every split, float32 (E, N), added up in float32; on the current stream, deterministic.

    x_MN: contiguous, any float dtype. ends_E: int64, the rows up to and including each split, read on the device. Rows
    past the last split are ignored.
    """
    num_splits, num_cols = len(ends_E), x_MN.shape[1]
    out = torch.empty(num_splits, num_cols, dtype=torch.float32, device=x_MN.device)
    if out.numel() == 0:
        return out
    # Few splits are long: narrow blocks of columns give the device enough programs.
    block_n = 32 if num_splits < 16 else 128
    with on_device_of(x_MN):
        _segment_sums_kernel[(triton.cdiv(num_cols, block_n), num_splits)](
            x_MN, ends_E, out, num_cols, BLOCK_M=64, BLOCK_N=block_n, num_warps=4
        )
    return out
