"""The backend "torch" for plain tensors: PyTorch's own grouped products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lighterage.ops.gemm_operands import plain

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_operands import Operand


@dataclass(frozen=True)
class TorchGroupedBackend:
    """`torch._grouped_mm` over plain tensors on CUDA: the number of launches does not depend on the experts."""

    name: str = "torch"

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        return grouped_mm_rows(plain(x, "x"), plain(w, "w").transpose(1, 2), splits, out_dtype, bias)

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        return grouped_mm_rows(plain(dy, "dy"), plain(w, "w"), splits, out_dtype, None)

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        return grouped_mm_wgrad(plain(dy, "dy"), plain(x, "x"), splits, out_dtype)


def grouped_mm_rows(
    x: torch.Tensor,
    w_EKN: torch.Tensor,
    splits: Splits,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
    alpha_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every expert's rows of x (M, K) times w[expert] (K, N) and alpha[expert], with zeros past the last expert's."""
    y = torch._grouped_mm(x, w_EKN, offs=splits.ends_int32)
    if splits.cover_all_rows and bias is None and alpha_E is None:
        return y.to(out_dtype)
    row = torch.arange(splits.num_rows, device=y.device)
    expert = torch.searchsorted(splits.ends, row, right=True)
    known = expert.clamp(max=splits.num_splits - 1)
    if alpha_E is not None:
        y.mul_(alpha_E[known, None])
    y = y.to(out_dtype)
    if bias is not None:
        y.add_(bias[known])
    if not splits.cover_all_rows:  # rows of no expert hold whatever was in memory, NaN too
        y.masked_fill_((expert == splits.num_splits)[:, None], 0.0)
    return y


def grouped_mm_wgrad(
    dy: torch.Tensor, x: torch.Tensor, splits: Splits, out_dtype: torch.dtype, alpha_E: torch.Tensor | None = None
) -> torch.Tensor:
    """Every expert's dy (M, N) transposed times its x (M, K) and alpha[expert]: (E, N, K)."""
    dw = torch._grouped_mm(dy.t(), x, offs=splits.ends_int32)
    if alpha_E is not None:
        dw.mul_(alpha_E[:, None, None])
    return dw.to(out_dtype)
