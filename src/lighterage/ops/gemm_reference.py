"""The backend "reference": expert by expert in float32 or float64, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lighterage.formats.fp8_block import Float8BlockTensor
from lighterage.formats.mxfp8 import MXFP8Tensor
from lighterage.formats.nvfp4 import NVFP4Tensor
from lighterage.kernels.reference import mxfp8
from lighterage.kernels.reference.casts import decode_fp8, divide
from lighterage.kernels.reference.grouped_gemm import block_scaled_product
from lighterage.kernels.reference.nvfp4 import BLOCK, decode_e2m1, unpack
from lighterage.ops.gemm_operands import Direction, codes_of, field_of, spans

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_operands import Operand

_NVFP4_ALPHA = 36.0 * 448.0 * 448.0
_Product = Callable[[torch.Tensor, torch.Tensor, torch.dtype, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class ReferenceBackend:
    """Every expert's product by itself; the host waits for splits that only the device knows."""

    name: str = "reference"

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        return _rows(x, w, splits, out_dtype, bias, "rowwise")

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        return _rows(dy, w, splits, out_dtype, None, "columnwise")

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        out = [
            product(_part(dy, expert, span), _part(x, expert, span), ("columnwise", "columnwise"), out_dtype, None)
            for expert, span in enumerate(spans(splits))
        ]
        return torch.stack(out)


def _rows(
    x: Operand,
    w: Operand,
    splits: Splits,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
    w_direction: Direction,
) -> torch.Tensor:
    out = []
    for expert, (first, end) in enumerate(spans(splits)):
        bias_N = None if bias is None else bias[expert]
        x_part = _part(x, expert, (first, end))
        out.append(product(x_part, w[expert], ("rowwise", w_direction), out_dtype, bias_N))
    y = torch.cat(out)
    missing = splits.num_rows - y.shape[0]
    return torch.cat([y, y.new_zeros(missing, y.shape[1])]) if missing else y


def _part(operand: Operand, expert: int, span: tuple[int, int]) -> torch.Tensor:
    return operand[slice(*span)] if isinstance(operand, torch.Tensor) else operand[expert]


@torch.no_grad()
def product(
    a: torch.Tensor,
    b: torch.Tensor,
    directions: tuple[Direction, Direction],
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`a @ b.T` of two tensors of one format, each read so that the contracted dimension comes last."""
    if isinstance(a, Float8BlockTensor) and isinstance(b, Float8BlockTensor):
        return _fp8_block_product(a, b, directions, out_dtype, bias)
    (a_MK, a_amax), (b_NK, b_amax) = _values(a, directions[0]), _values(b, directions[1])
    if a_MK.dtype == out_dtype and a_amax is None and bias is None:
        return a_MK @ b_NK.t()
    y = a_MK.float() @ b_NK.float().t()
    if a_amax is not None and b_amax is not None:
        y = y * ((a_amax * b_amax) * divide(1.0, torch.full_like(a_amax, _NVFP4_ALPHA)))
    return (y if bias is None else y + bias.float()).to(out_dtype)


def _fp8_block_product(
    a: Float8BlockTensor,
    b: Float8BlockTensor,
    directions: tuple[Direction, Direction],
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if a.block_scaling_dim != 1:
        raise ValueError(
            "the first operand of a block-scaled product, x or dy, needs 1x128 scales; it has 128x128 ones. Quantize "
            "it with block_scaling_dim=1."
        )
    a_data, a_scale = codes_of(a, directions[0]), field_of(a, directions[0], "scale_inv")
    b_data, b_scale = codes_of(b, directions[1]), field_of(b, directions[1], "scale_inv")
    return block_scaled_product(
        a_data,
        a_scale,
        b_data,
        b_scale,
        a_dtype=a.fp8_dtype,
        b_dtype=b.fp8_dtype,
        b_block_2d=b.block_scaling_dim == 2,
        out_dtype=out_dtype,
        bias=bias,
    )


def _values(tensor: torch.Tensor, direction: Direction) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(values with the contracted dimension last, amax that they still have to be scaled by)`."""
    if isinstance(tensor, NVFP4Tensor):
        data = codes_of(tensor, direction)
        num_rows, num_blocks = data.shape[0], data.shape[1] * 2 // BLOCK
        scale = field_of(tensor, direction, "scale_inv")[:num_rows, :num_blocks].contiguous()
        block_scale = decode_fp8(scale, torch.float8_e4m3fn).repeat_interleave(BLOCK, 1)
        return decode_e2m1(unpack(data)) * block_scale, field_of(tensor, direction, "amax")
    if isinstance(tensor, MXFP8Tensor):
        columnwise = direction == "columnwise"
        values = mxfp8.dequantize(
            field_of(tensor, direction, "data").view(-1, tensor.shape[-1]),
            field_of(tensor, direction, "scale_inv"),
            fp8_dtype=tensor.fp8_dtype,
            columnwise=columnwise,
            out_dtype=torch.float32,
        )
        return (values.t() if columnwise else values), None
    return (tensor.t() if direction == "columnwise" else tensor), None
