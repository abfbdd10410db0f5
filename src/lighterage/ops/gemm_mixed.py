"""The backend "mixed": rows of all experts in one launch, weight gradients expert by expert.

For few large experts on Hopper each is the faster: the grouped kernel's rows are as fast as `scaled_mm` and cost the
host one call, and its weight gradient is slower than a loop that the host can keep ahead of. Where both take a product
they give the same bits. Measured in benchmarks/results.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lighterage.ops.gemm_scaled_mm import ScaledMMBackend
from lighterage.ops.gemm_triton import TritonBackend

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_operands import Operand


@dataclass(frozen=True)
class MixedBackend:
    """Forward and input gradient by `rows`, the weight gradient by `weights`."""

    rows: TritonBackend
    weights: ScaledMMBackend = field(default_factory=ScaledMMBackend)
    name: str = "mixed"

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        return self.rows.forward(x, w, splits, out_dtype=out_dtype, bias=bias)

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        return self.rows.dgrad(dy, w, splits, out_dtype=out_dtype)

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        return self.weights.wgrad(dy, x, splits, out_dtype=out_dtype)
