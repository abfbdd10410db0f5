"""The backend "triton": all experts' FP8 block-scaled products in one launch, the splits read on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from lighterage.formats.split_tensors import SplitTensors
from lighterage.kernels.triton.grouped_gemm import grouped_rows, grouped_wgrad
from lighterage.ops.gemm_operands import (
    Direction,
    bulk_buffer,
    check_aligned,
    check_one_dimensional_scales,
    fp8_dtype_of,
    quantized,
)

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_operands import Operand

ROWS_MULTIPLE = 16
MAX_HOPPER_SPLITS = 1024


@dataclass(frozen=True)
class TritonBackend:
    """One launch a product, whatever the number of experts; the host never waits."""

    name: str = "triton"
    hopper: bool = False
    """Use the kernel that is made for Hopper, which gives the same bits in less than half the time."""
    power_of_2_scales: bool = False
    """The scales of x and dy are powers of two, which spares that kernel a product."""

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        x, w = quantized(x, "x", "rowwise"), quantized(w, "w", "rowwise")
        out_features = w.splits.num_rows // splits.num_splits
        return self._rows(x, w, splits, ("x", "rowwise"), out_features, out_dtype, bias)

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        dy, w = quantized(dy, "dy", "rowwise"), quantized(w, "w", "columnwise")
        return self._rows(dy, w, splits, ("dy", "columnwise"), w.num_cols, out_dtype, None)

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        dy, x = quantized(dy, "dy", "columnwise"), quantized(x, "x", "columnwise")
        check_aligned(splits, ROWS_MULTIPLE, "the grouped FP8 kernel")
        check_one_dimensional_scales(dy, "dy")
        check_one_dimensional_scales(x, "x")
        return grouped_wgrad(
            bulk_buffer(dy, "dy", "columnwise"),
            bulk_buffer(x, "x", "columnwise"),
            splits.ends,
            num_splits=splits.num_splits,
            out_features=dy.num_cols,
            in_features=x.num_cols,
            dy_dtype=fp8_dtype_of(dy),
            x_dtype=fp8_dtype_of(x),
            out_dtype=out_dtype,
        )

    def _rows(
        self,
        x: SplitTensors,
        w: SplitTensors,
        splits: Splits,
        which: tuple[str, Direction],
        out_features: int,
        out_dtype: torch.dtype,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        role, w_direction = which
        check_aligned(splits, ROWS_MULTIPLE, "the grouped FP8 kernel")
        check_one_dimensional_scales(x, role)
        kernel: Callable[..., torch.Tensor] = partial(grouped_rows, w_block_2d=w.block_2d)
        if self.hopper and w.block_2d and splits.num_splits <= MAX_HOPPER_SPLITS:
            from lighterage.kernels.triton import grouped_gemm_hopper_rows

            kernel = partial(grouped_gemm_hopper_rows.grouped_rows, power_of_2=self.power_of_2_scales)
        return kernel(
            bulk_buffer(x, role, "rowwise"),
            bulk_buffer(w, "w", w_direction),
            splits.ends,
            num_rows=splits.num_rows,
            num_splits=splits.num_splits,
            depth=x.num_cols,
            out_features=out_features,
            x_dtype=fp8_dtype_of(x),
            w_dtype=fp8_dtype_of(w),
            out_dtype=out_dtype,
            bias=bias,
        )
