"""The backend "torch": PyTorch's own products, grouped for plain tensors, expert by expert for FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from lighterage.formats.fp8_block import Float8BlockTensor
from lighterage.ops.gemm_operands import Direction, check_aligned, codes_of, field_of, plain, quantized, spans

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits
    from lighterage.ops.gemm_backends import Operand

_Scaled: TypeAlias = tuple[torch.Tensor, torch.Tensor, int]
"""Codes with the contracted dimension last, their scales as `scaled_mm` takes them, the recipe."""
_TILE_1x128, _BLOCK_128x128 = 4, 5  # of torch.nn.functional.ScalingType


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


@dataclass(frozen=True)
class ScaledMMBackend:
    """`torch.nn.functional.scaled_mm` for each expert, whose rows the host must know."""

    name: str = "torch"

    def forward(
        self, x: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `grouped_forward`."""
        return _rows(x, w, splits, ("x", "rowwise"), out_dtype, bias)

    def dgrad(self, dy: Operand, w: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_dgrad`."""
        return _rows(dy, w, splits, ("dy", "columnwise"), out_dtype, None)

    def wgrad(self, dy: Operand, x: Operand, splits: Splits, *, out_dtype: torch.dtype) -> torch.Tensor:
        """See `grouped_wgrad`."""
        dy, x = quantized(dy, "dy", "columnwise"), quantized(x, "x", "columnwise")
        check_aligned(splits, 16, "scaled_mm")
        shape = (splits.num_splits, dy[0].shape[-1], x[0].shape[-1])
        out = torch.empty(shape, dtype=out_dtype, device=splits.device)
        for expert, (first, end) in enumerate(spans(splits)):
            if first == end:
                out[expert].zero_()
            else:
                _multiply(dy[expert], x[expert], ("columnwise", "columnwise"), out[expert])
        return out


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
    host_knows_all = splits.host is not None
    if host_knows_all and bias is None and alpha_E is None:
        return y.to(out_dtype)
    row = torch.arange(splits.num_rows, device=y.device)
    expert = torch.searchsorted(splits.ends, row, right=True)
    known = expert.clamp(max=splits.num_splits - 1)
    if alpha_E is not None:
        y.mul_(alpha_E[known, None])
    y = y.to(out_dtype)
    if bias is not None:
        y.add_(bias[known])
    if not host_knows_all:  # rows of no expert hold whatever was in memory, NaN too
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


def _rows(
    x: Operand,
    w: Operand,
    splits: Splits,
    which: tuple[str, Direction],
    out_dtype: torch.dtype,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    role, w_direction = which
    x, w = quantized(x, role, "rowwise"), quantized(w, "w", w_direction)
    check_aligned(splits, 16, "scaled_mm")
    out_features = w[0].shape[0] if w_direction == "rowwise" else w[0].shape[1]
    out = torch.empty(splits.num_rows, out_features, dtype=out_dtype, device=splits.device)
    end = 0
    for expert, (first, end) in enumerate(spans(splits)):
        if first != end:
            rows = out[first:end]
            if bias is None:
                _multiply(x[expert], w[expert], ("rowwise", w_direction), rows)
            else:
                y = torch.empty_like(rows, dtype=torch.float32)
                _multiply(x[expert], w[expert], ("rowwise", w_direction), y)
                rows.copy_(y + bias[expert].float())
    out[end:].zero_()
    return out


def _multiply(a: torch.Tensor, b: torch.Tensor, directions: tuple[Direction, Direction], out: torch.Tensor) -> None:
    """`out` = a @ b.T. The operator with an `out` is called, because the public function has none."""
    a_codes, a_scale, a_recipe = _scaled(a, directions[0])
    b_codes, b_scale, b_recipe = _scaled(b, directions[1])
    torch.ops.aten._scaled_mm_v2.out(
        a_codes, b_codes.t(), [a_scale], [a_recipe], [], [b_scale], [b_recipe], [], None, out.dtype, out=out
    )


def _scaled(tensor: torch.Tensor, direction: Direction) -> _Scaled:
    assert isinstance(tensor, Float8BlockTensor)
    codes = codes_of(tensor, direction).view(tensor.fp8_dtype)
    if tensor.fp8_dtype != torch.float8_e4m3fn:
        raise ValueError(
            "scaled_mm multiplies block-scaled operands in E4M3 only; got E5M2. Pass backend='triton', or quantize "
            "with fp8_dtype=torch.float8_e4m3fn."
        )
    scale = field_of(tensor, direction, "scale_inv")
    if tensor.block_scaling_dim == 2:
        return codes, scale.t(), _BLOCK_128x128
    return codes, scale[:, : codes.shape[0]].t(), _TILE_1x128
