"""Sums over the rows of each expert, by the kernels of the device that they are on."""

from __future__ import annotations

import torch

from lighterage.formats.splits import Splits
from lighterage.kernels.reference import segment_sums as reference


def segment_sums(x_MN: torch.Tensor, splits: Splits) -> torch.Tensor:
    """The sum of each expert's rows, float32 (E, N); deterministic. One launch on CUDA, and the host never waits."""
    if splits.num_splits == 1 and splits.cover_all_rows:
        return x_MN.sum(0, keepdim=True, dtype=torch.float32)
    if not x_MN.is_cuda:
        return reference.segment_sums(x_MN, splits.ends)
    from lighterage.kernels.triton import segment_sums as triton

    return triton.segment_sums(x_MN, splits.ends)
