"""Sums over the rows of each split, in plain torch."""

from __future__ import annotations

import torch


@torch.no_grad()
def segment_sums(x_MN: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The sum of the rows of every split, float32 (E, N), added up in float32 in the order of the rows.

    x_MN: any float dtype. ends_E: int64, the rows up to and including each split. Rows past the last split are ignored.
    """
    num_splits = len(ends_E)
    split_of_row = torch.searchsorted(ends_E, torch.arange(len(x_MN), device=x_MN.device), right=True)
    sums = torch.zeros(num_splits + 1, x_MN.shape[1], dtype=torch.float32, device=x_MN.device)
    return sums.index_add_(0, split_of_row, x_MN.float())[:num_splits]
