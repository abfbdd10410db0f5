"""Grouped products of FP8 matrices with one scale for a whole tensor (current scaling).

Rows of all experts are one tensor with one scale; so are the stacked weights. What a product contracts lies last in
memory, as Hopper's tensor cores want it: "columnwise" codes are transposed.

Letters: M rows, N output features, K input features, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, cast

import torch

from lighterage.formats.fp8_tensor import Float8CurrentScalingQuantizer, Float8Tensor
from lighterage.formats.splits import Splits
from lighterage.recipes import Float8CurrentScaling, Role

PerTensorBackend = Literal["reference", "torch"]
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaledCodes:
    """FP8 codes with one scale, of rows or of stacked weights."""

    rowwise: torch.Tensor | None
    """(M, K) or (E, N, K)."""
    columnwise: torch.Tensor | None
    """(K, M) or (E, K, N)."""
    scale_inv: torch.Tensor
    """float32 (1,)."""


def choose_per_tensor_backend(name: str, device: torch.device) -> PerTensorBackend:
    """ "torch", the products of PyTorch's FP8 kernels, on CUDA; elsewhere "reference", float32 products of the values.

    Raises: ValueError: for a backend that has no per-tensor products.
    """
    if name not in ("auto", "torch", "reference"):
        raise ValueError(
            f"per-tensor FP8 has the backends 'auto', 'torch' and 'reference'; got {name!r}. Pass backend='auto'."
        )
    if name == "auto":
        return "torch" if device.type == "cuda" else "reference"
    return cast("PerTensorBackend", name)


def quantize_rows(
    x_MK: torch.Tensor, recipe: Float8CurrentScaling, role: Role, *, rowwise: bool, columnwise: bool
) -> ScaledCodes:
    """The codes of rows, in the directions asked for."""
    codes = _quantize(x_MK, recipe, role, rowwise, columnwise)
    return ScaledCodes(rowwise=codes[0], columnwise=codes[1], scale_inv=codes[2])


def without_nobodys_rows(x_MK: torch.Tensor, splits: Splits) -> torch.Tensor:
    """`x_MK` with zeros past the last expert's rows: whatever lies there would take part in the scale of all others.

    The same tensor where the host knows that there are no such rows; it never waits.
    """
    if splits.cover_all_rows:
        return x_MK
    rows = torch.arange(len(x_MK), device=x_MK.device)
    return x_MK.masked_fill((rows >= splits.ends[-1])[:, None], 0)


def quantize_weight(w_ENK: torch.Tensor, recipe: Float8CurrentScaling, *, columnwise: bool) -> ScaledCodes:
    """The codes of stacked weights: rowwise, and transposed by expert if `columnwise`."""
    rows, _, scale_inv = _quantize(w_ENK.flatten(0, 1), recipe, "weight", True, False)
    assert rows is not None
    rows_ENK = rows.view(w_ENK.shape)
    # A transpose of bytes, which every dtype of one byte can be copied as.
    turned = rows_ENK.view(torch.uint8).transpose(1, 2).contiguous().view(rows.dtype) if columnwise else None
    return ScaledCodes(rowwise=rows_ENK, columnwise=turned, scale_inv=scale_inv)


def _quantize(
    x: torch.Tensor, recipe: Float8CurrentScaling, role: Role, rowwise: bool, columnwise: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    quantizer = recipe.quantizer(role, rowwise=rowwise, columnwise=columnwise)
    assert isinstance(quantizer, Float8CurrentScalingQuantizer)
    tensor: Float8Tensor = quantizer(x)
    assert tensor.scale_inv is not None
    data = [
        None if part is None else part.view(tensor.fp8_dtype) for part in (tensor.rowwise_data, tensor.columnwise_data)
    ]
    return data[0], data[1], tensor.scale_inv


def per_tensor_forward(
    x: ScaledCodes,
    w: ScaledCodes,
    splits: Splits,
    *,
    backend: PerTensorBackend,
    out_dtype: torch.dtype,
    bias_EN: torch.Tensor | None,
) -> torch.Tensor:
    """y = x w^T for the rows of each expert, (M, N); zeros past the last expert's rows."""
    assert x.rowwise is not None and w.rowwise is not None
    y_MN = _rows_times_weights(x.rowwise, w.rowwise, x.scale_inv, w.scale_inv, splits, backend, out_dtype)
    return y_MN if bias_EN is None else _add_bias(y_MN, bias_EN, splits)


def per_tensor_dgrad(
    dy: ScaledCodes, w: ScaledCodes, splits: Splits, *, backend: PerTensorBackend, out_dtype: torch.dtype
) -> torch.Tensor:
    """dx = dy w for the rows of each expert, (M, K); zeros past the last expert's rows."""
    assert dy.rowwise is not None and w.columnwise is not None
    return _rows_times_weights(dy.rowwise, w.columnwise, dy.scale_inv, w.scale_inv, splits, backend, out_dtype)


def per_tensor_wgrad(
    dy: ScaledCodes, x: ScaledCodes, splits: Splits, *, backend: PerTensorBackend, out_dtype: torch.dtype
) -> torch.Tensor:
    """dw = dy^T x over the rows of each expert, (E, N, K); zeros for an expert without rows."""
    assert dy.columnwise is not None and x.columnwise is not None
    dy_NM, x_KM = dy.columnwise, x.columnwise
    num_experts, shape = splits.num_splits, (splits.num_splits, dy_NM.shape[0], x_KM.shape[0])
    if _is_grouped(backend, splits, dy_NM, x_KM) and out_dtype == torch.bfloat16:
        scales = dy.scale_inv.expand(num_experts * shape[1]), x.scale_inv.expand(num_experts * shape[2])
        dw_ENK = _scaled_grouped(dy_NM, x_KM.t(), *scales, splits)
        # A group of no rows leaves its memory as it was.
        return dw_ENK.masked_fill_(_is_empty(splits)[:, None, None], 0)
    dw_ENK = torch.zeros(shape, dtype=out_dtype, device=dy_NM.device)
    for expert, (start, end) in enumerate(_bounds(splits)):
        if start < end:
            a, b = dy_NM[:, start:end], x_KM[:, start:end]
            dw_ENK[expert] = _product(a, b, dy.scale_inv, x.scale_inv, backend, out_dtype)
    return dw_ENK


def _rows_times_weights(
    a_MK: torch.Tensor,
    b_ENK: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    splits: Splits,
    backend: PerTensorBackend,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    num_experts, num_cols = b_ENK.shape[:2]
    if _is_grouped(backend, splits, a_MK, b_ENK) and out_dtype == torch.bfloat16:
        scales = a_scale.expand(len(a_MK)), b_scale.expand(num_experts, num_cols)
        out_MN = _scaled_grouped(a_MK, b_ENK.transpose(1, 2), *scales, splits)
        # What lies past the last expert is nobody's, and was not written.
        rows = torch.arange(len(out_MN), device=out_MN.device)
        return out_MN if splits.cover_all_rows else out_MN.masked_fill_((rows >= splits.ends[-1])[:, None], 0)
    out_MN = torch.zeros(len(a_MK), num_cols, dtype=out_dtype, device=a_MK.device)
    for expert, (start, end) in enumerate(_bounds(splits)):
        if start < end:
            out_MN[start:end] = _product(a_MK[start:end], b_ENK[expert], a_scale, b_scale, backend, out_dtype)
    return out_MN


def _product(
    a_MK: torch.Tensor,
    b_NK: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    backend: PerTensorBackend,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """a b^T of one expert."""
    if backend == "torch":
        return torch._scaled_mm(
            a_MK.contiguous(), b_NK.contiguous().t(), scale_a=a_scale, scale_b=b_scale, out_dtype=out_dtype
        )
    # Products of codes are exact in float32, whose order of summation alone is not fixed.
    return ((a_MK.float() @ b_NK.float().t()) * (a_scale * b_scale)).to(out_dtype)


def _is_grouped(backend: PerTensorBackend, splits: Splits, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one grouped launch takes it: PyTorch's has both operands in E4M3, on CUDA."""
    can = backend == "torch" and a.is_cuda and a.dtype == b.dtype == _E4M3
    return can and (splits.num_splits > 1 or splits.host is None)


def _scaled_grouped(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, b_scale: torch.Tensor, splits: Splits
) -> torch.Tensor:
    scales = a_scale.contiguous(), b_scale.contiguous()
    return torch._scaled_grouped_mm(a, b, *scales, offs=splits.ends_int32, out_dtype=torch.bfloat16)


def _bounds(splits: Splits) -> list[tuple[int, int]]:
    """First and last row of every expert, on the host."""
    if splits.host is not None:
        ends = list(accumulate(splits.host))
    elif splits.device.type == "cpu":
        ends = splits.ends.tolist()
    else:
        raise ValueError(
            "per-tensor FP8 with splits on the device needs the grouped kernel, which takes bf16 tensors and E4M3 "
            "codes alone. Use Float8CurrentScaling(fp8_format='e4m3') with bf16 tensors, or pass the splits as a list."
        )
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _is_empty(splits: Splits) -> torch.Tensor:
    return torch.diff(splits.ends, prepend=splits.ends.new_zeros(1)) == 0


def _add_bias(y_MN: torch.Tensor, bias_EN: torch.Tensor, splits: Splits) -> torch.Tensor:
    if splits.num_splits == 1 and splits.cover_all_rows:
        return y_MN.add_(bias_EN[0])
    rows = torch.arange(len(y_MN), device=y_MN.device)
    bias = torch.cat([bias_EN, bias_EN.new_zeros(1, bias_EN.shape[1])])
    return y_MN.add_(bias[torch.searchsorted(splits.ends, rows, right=True)])
