"""Sorting rows by expert and summing them back, in plain torch: what the kernels are compared with.

Letters: T tokens, k copies of each, E experts, C rows, H features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def place_copies(
    experts_Tk: Tensor, num_experts: int, alignment: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows for the copies of each token: by expert, among those of one by token, each expert's padded to `alignment`.

    Returns: the row of each copy, int32 (T, k); the token in each row, -1 where there is none, int32 (num_rows,); the
    padded rows of each expert and its copies, int64 (E,) each.
    """
    copies = experts_Tk.reshape(-1)
    order = copies.argsort(stable=True)
    groups = copies[order]
    every = torch.arange(num_experts, device=copies.device, dtype=copies.dtype)
    ends = torch.searchsorted(groups, every, right=True)
    return place_sorted(order, groups, ends, experts_Tk.shape[1], alignment, num_rows)


def place_sorted(
    order: Tensor, groups: Tensor, ends: Tensor, copies_of_each: int, alignment: int, num_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same for copies that are sorted by group: `order` are their places, `groups` theirs, which end at `ends`.

    A group past the last comes behind it.
    """
    sizes = ends.diff(prepend=ends.new_zeros(1))
    padded = (sizes + (alignment - 1)) // alignment * alignment
    more = padded - sizes
    moved_by = torch.cat([more.cumsum(0) - more, more.sum(0, keepdim=True)])
    row_of_sorted = torch.arange(len(order), device=ends.device) + moved_by[groups]
    rows = torch.empty_like(row_of_sorted).scatter_(0, order, row_of_sorted)
    tokens = torch.full((num_rows,), -1, dtype=torch.int32, device=ends.device)
    tokens.scatter_(0, row_of_sorted, (order // copies_of_each).int())
    return rows.int().view(-1, copies_of_each), tokens, padded, sizes


def gather_rows(x_TH: Tensor, tokens_C: Tensor) -> Tensor:
    """The row of each token, zeros for -1: (C, H)."""
    if x_TH.shape[0] == 0:
        return x_TH.new_zeros(tokens_C.shape[0], x_TH.shape[1])
    return x_TH.index_select(0, tokens_C.clamp(min=0)).masked_fill_((tokens_C < 0)[:, None], 0.0)


def sum_rows(x_CH: Tensor, rows_Tk: Tensor) -> Tensor:
    """The sum of k rows for each token, one after another in float32 (float64 of float64), rounded once: (T, H)."""
    first, *others = rows_Tk.unbind(1)
    if not others:
        return x_CH.index_select(0, first)
    wide = torch.float64 if x_CH.dtype == torch.float64 else torch.float32
    sum_TH = x_CH.index_select(0, first).to(wide)
    for rows_T in others:
        sum_TH += x_CH.index_select(0, rows_T)
    return sum_TH.to(x_CH.dtype)
