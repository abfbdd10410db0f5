"""The three products of a grouped linear layer, y = x w^T for every expert, through a backend chosen by name.

Letters: M rows of all experts, E experts, N output features, K input features.

| product | x | w | dy | contracts |
| --- | --- | --- | --- | --- |
| `grouped_forward` y (M, N) | rowwise | rowwise | | K |
| `grouped_dgrad` dx (M, K) | | columnwise | rowwise | N |
| `grouped_wgrad` dw (E, N, K) | columnwise | | columnwise | each expert's rows |

An operand is a `SplitTensors` (x and dy split over the experts; w of (E*N, K) split into E times N rows) or a plain
tensor, which is not quantized: (M, K), (M, N) or (E, N, K). Work lands on the current stream. The number of launches
and the time of the host depend on the number of experts only in the backend "torch" with FP8, and on the CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lighterage.ops.gemm_backends import GemmBackend, choose_backend
from lighterage.ops.gemm_operands import Operand

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits

__all__ = ["GemmBackend", "Operand", "choose_backend", "grouped_dgrad", "grouped_forward", "grouped_wgrad"]


def grouped_forward(
    x: Operand,
    w: Operand,
    splits: Splits,
    *,
    backend: GemmBackend,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (M, N) in `out_dtype`: every expert's rows of x times its weight, plus its row of `bias` (E, N).

    Rows past the last expert's are zeros.
    """
    return backend.forward(x, w, splits, out_dtype=out_dtype, bias=bias)


def grouped_dgrad(
    dy: Operand, w: Operand, splits: Splits, *, backend: GemmBackend, out_dtype: torch.dtype
) -> torch.Tensor:
    """dx (M, K) in `out_dtype`: every expert's rows of dy times its weight, not transposed.

    Rows past the last expert's are zeros.
    """
    return backend.dgrad(dy, w, splits, out_dtype=out_dtype)


def grouped_wgrad(
    dy: Operand, x: Operand, splits: Splits, *, backend: GemmBackend, out_dtype: torch.dtype
) -> torch.Tensor:
    """dw (E, N, K) in `out_dtype`: every expert's dy transposed times its x; zeros for an expert without rows."""
    return backend.wgrad(dy, x, splits, out_dtype=out_dtype)
