"""FP8 with one float32 scale for the whole tensor, from its own amax, in plain torch."""

from __future__ import annotations

import torch

from lighterage.kernels.reference.casts import FP32_MAX, amax, amax_to_scale, cast_fp8, decode_fp8, fp8_max


@torch.no_grad()
def quantize(
    x: torch.Tensor, *, fp8_dtype: torch.dtype, power_of_2: bool, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with one scale (current scaling).

    x: any shape, bf16, fp16 or fp32.
    Returns: data uint8 of x's shape, scale_inv float32 (1,), amax float32 (1,); of an empty tensor 1 and 0.

    Source: Transformer Engine common/recipe/current_scaling.cu.
    """
    amax_1 = amax(x).reshape(1)
    scale, scale_inv = amax_to_scale(
        amax_1, limit=fp8_max(fp8_dtype), power_of_2=power_of_2, epsilon=epsilon, overflow=FP32_MAX
    )
    return cast_fp8(x.float() * scale, fp8_dtype).contiguous(), scale_inv, amax_1


@torch.no_grad()
def dequantize(
    data: torch.Tensor, scale_inv: torch.Tensor, *, fp8_dtype: torch.dtype, out_dtype: torch.dtype
) -> torch.Tensor:
    """Undo `quantize`: data's shape, in `out_dtype`; one float32 product an element, then one rounding."""
    return (decode_fp8(data, fp8_dtype) * scale_inv).to(out_dtype)
