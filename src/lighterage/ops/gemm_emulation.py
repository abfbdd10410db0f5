"""The backend "emulation": dequantized to bf16, then multiplied by `torch._grouped_mm`.

For hardware without tensor cores for MXFP8 and NVFP4. The operands lose nothing (MXFP8: but for the extreme scales):
NVFP4 is dequantized without the factors of its tensors, which are multiplied into the bf16 result, and that rounds it a
second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lighterage.formats.split_tensors import SplitTensors
from lighterage.ops.gemm_operands import Direction, bulk_buffer, fp8_dtype_of, quantized
from lighterage.ops.gemm_torch import grouped_mm_rows, grouped_mm_wgrad

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_operands import Operand


@dataclass(frozen=True)
class EmulationBackend:
    """A few launches a product, whatever the number of experts; the host never waits."""

    name: str = "emulation"

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        x, w = quantized(x, "x", "rowwise"), quantized(w, "w", "rowwise")
        x_MK, w_ENK = _values(x, splits, "x", "rowwise"), _weight(w, splits, "rowwise")
        alpha_E = _alphas((x, splits, "x", "rowwise"), (w, w.splits, "w", "rowwise"))
        return grouped_mm_rows(x_MK, w_ENK.transpose(1, 2), splits, out_dtype, bias, alpha_E)

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        dy, w = quantized(dy, "dy", "rowwise"), quantized(w, "w", "columnwise")
        dy_MN, w_ENK = _values(dy, splits, "dy", "rowwise"), _weight(w, splits, "columnwise")
        alpha_E = _alphas((dy, splits, "dy", "rowwise"), (w, w.splits, "w", "columnwise"))
        return grouped_mm_rows(dy_MN, w_ENK, splits, out_dtype, None, alpha_E)

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        dy, x = quantized(dy, "dy", "columnwise"), quantized(x, "x", "columnwise")
        dy_MN, x_MK = _values(dy, splits, "dy", "columnwise"), _values(x, splits, "x", "columnwise")
        alpha_E = _alphas((dy, splits, "dy", "columnwise"), (x, splits, "x", "columnwise"))
        return grouped_mm_wgrad(dy_MN, x_MK, splits, out_dtype, alpha_E)


def _values(operand: SplitTensors, splits: Splits, role: str, direction: Direction) -> torch.Tensor:
    """bf16 (rows, columns) of what was quantized, NVFP4 without its tensors' factors."""
    from lighterage.kernels.triton.dequantize import dequantize_rows

    is_nvfp4 = operand.format_name == "nvfp4"
    assert operand.format_name is not None
    return dequantize_rows(
        bulk_buffer(operand, role, direction),
        splits.ends,
        format_name=operand.format_name,
        num_rows=splits.num_rows,
        num_cols=operand.num_cols,
        num_splits=splits.num_splits,
        columnwise=direction == "columnwise",
        block_2d=operand.block_2d,
        out_dtype=torch.bfloat16,
        fp8_dtype=torch.float8_e4m3fn if is_nvfp4 else fp8_dtype_of(operand),
        with_amax=not is_nvfp4,
    )


def _weight(w: SplitTensors, splits: Splits, direction: Direction) -> torch.Tensor:
    """bf16 (E, N, K)."""
    return _values(w, w.splits, "w", direction).view(splits.num_splits, -1, w.num_cols)


def _alphas(
    a: tuple[SplitTensors, Splits, str, Direction], b: tuple[SplitTensors, Splits, str, Direction]
) -> torch.Tensor | None:
    """What every expert's product is still to be multiplied by, float32 (E,)."""
    if a[0].format_name != "nvfp4":
        return None
    from lighterage.kernels.triton.grouped_gemm_alpha import nvfp4_alphas

    (a_buffer, b_buffer) = (bulk_buffer(operand, role, direction) for operand, _, role, direction in (a, b))
    return nvfp4_alphas(
        (a_buffer, a[1].ends, a[0].num_cols, a[3] == "columnwise"),
        (b_buffer, b[1].ends, b[0].num_cols, b[3] == "columnwise"),
        a[1].num_splits,
    )
