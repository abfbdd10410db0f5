"""NVFP4 in plain torch: E2M1 values, one E4M3 scale for each 16 of them, one float32 amax for the tensor.

Shape letters: M rows, K columns of the input; B blocks of 16 along a dimension.

Note [Hadamard order]
    The transform sums 16 bf16 values in float32, and float32 sums depend on their order. It is fixed here, so that
    every kernel can give the same bits: signs first, then four butterfly stages that pair elements at distance 1, 2,
    4, 8 as (a + b, a - b), then the factor 0.25, then one rounding to bf16. A negated element is 0 - x, so that zeros
    of either sign become +0: this too decides bits, the sign of a result that is zero.
"""

from __future__ import annotations

import torch

from lighterage.kernels.reference.casts import FP32_MAX, amax, cast_fp8, decode_fp8, divide, pad_to, round_up

BLOCK = 16
_SCALE_OUTER = 128
_SCALE_INNER = 4
_E4M3 = torch.float8_e4m3fn
_GLOBAL = 2688.0  # 448 * 6: the largest block scale times the largest value
_HADAMARD_SIGNS = 0xD7E8  # bit i is set where element i is negated
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_e2m1(values: torch.Tensor, rounding_bits: torch.Tensor | None = None) -> torch.Tensor:
    """E2M1 codes (0..15, uint8) of float32 `values`; saturating, -0 is code 8, NaN is code 7.

    rounding_bits: None rounds to nearest even. Otherwise uint8 of the same shape: the fraction bits/256 of a step is
    added before rounding toward zero, which is stochastic rounding if the bits are uniform.

    Source: Transformer Engine common/util/ptx.cuh, its software model of the stochastic conversion.
    """
    magnitude = values.abs()
    if rounding_bits is not None:
        step = torch.where(magnitude >= 4, 2.0, torch.where(magnitude >= 2, 1.0, 0.5))
        pushed = magnitude + (rounding_bits.float() * 2.0**-8) * step
        magnitude = (torch.floor(pushed / step) * step).clamp(max=6.0)
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for threshold in (0.75, 1.75, 3.5):  # ties that go up, to the even code
        code += magnitude >= threshold
    for threshold in (0.25, 1.25, 2.5, 5.0):  # ties that stay down
        code += magnitude > threshold
    code += values.signbit().to(torch.uint8) << 3
    return torch.where(values.isnan(), torch.full_like(code, 7), code)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of E2M1 `codes` (0..15)."""
    table = torch.tensor(_E2M1_VALUES + tuple(-v for v in _E2M1_VALUES), device=codes.device)
    return table[codes.long()]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte along the last dimension, the even element in the low nibble: (..., C) -> (..., C/2) uint8."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(data: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`: (..., C/2) -> (..., C) uint8 codes."""
    return torch.stack((data & 0xF, data >> 4), -1).flatten(-2)


def _signs(device: torch.device) -> torch.Tensor:
    return torch.tensor([-1.0 if _HADAMARD_SIGNS >> i & 1 else 1.0 for i in range(BLOCK)], device=device)


def _butterfly(v: torch.Tensor) -> torch.Tensor:
    """The unnormalised Walsh-Hadamard transform of the last dimension (16), see Note [Hadamard order]."""
    for distance in (1, 2, 4, 8):
        pairs = v.unflatten(-1, (-1, 2, distance))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        v = torch.stack((a + b, a - b), -2).flatten(-3)
    return v


@torch.no_grad()
def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The random Hadamard transform of each run of 16 values along the last dimension: v @ R.

    x: (..., C) bf16, C a multiple of 16. Returns: the same shape, bf16.
    R[r, c] = 0.25 * s_r * (-1)^popcount(r & c), orthonormal, with fixed signs s. Order: Note [Hadamard order].

    Source: Transformer Engine pytorch/tensor/nvfp4_tensor.py (sign mask), common/hadamard_transform (arithmetic).
    """
    runs = x.float().unflatten(-1, (-1, BLOCK))
    runs = torch.where(_signs(x.device) < 0, 0.0 - runs, runs)
    return (_butterfly(runs) * 0.25).flatten(-2).to(torch.bfloat16)


@torch.no_grad()
def inverse_hadamard(y: torch.Tensor) -> torch.Tensor:
    """Undo the transform in float32: (..., C) -> (..., C) float32, C a multiple of 16; y @ R^T."""
    runs = y.float().unflatten(-1, (-1, BLOCK))
    return (_butterfly(runs) * 0.25 * _signs(y.device)).flatten(-2)


def global_scale(amax_f32: torch.Tensor) -> torch.Tensor:
    """What the whole tensor is scaled by, 2688 / amax, at most the largest float32; 1 where amax is 0 or Inf."""
    scale = divide(_GLOBAL, amax_f32).clamp(max=FP32_MAX)
    return torch.where((amax_f32 == 0) | (scale == 0), torch.ones_like(scale), scale)


@torch.no_grad()
def quantize(
    x: torch.Tensor,
    *,
    columnwise: bool,
    block_2d: bool = False,
    hadamard: bool = False,
    rounding_bits: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize with one scale for each 16 values along K, or along M of the transposed input if `columnwise`.

    x: (M, K) bf16, fp16 or fp32, both multiples of 16; bf16 if `hadamard`.
    block_2d: one scale for each 16x16 block, written for each of its 16 rows.
    hadamard: transform runs of 16 along the quantized dimension first; the amax is that of the transformed values.
    rounding_bits: uint8 of the shape that is quantized, (M, K) or (K, M) if columnwise: stochastic rounding.
    amax: float32 (1,), to use in place of the tensor's own.
    Returns: data uint8 (M, K/2), scale uint8 (ru(M, 128), ru(K/16, 4)) of E4M3 codes, amax float32 (1,). Columnwise:
    data (K, M/2), scale (ru(K, 128), ru(M/16, 4)). Padding of the scales is 0.

    Source: Transformer Engine common/cast/nvfp4/core_nvfp4.cuh,
    common/transpose/quantize_transpose_vector_blockwise_fp4.cu.
    """
    if columnwise:
        x = x.t()
    if hadamard:
        x = _transform(x)
    num_rows, num_cols = x.shape
    num_blocks = num_cols // BLOCK
    x_MBT = x.float().reshape(num_rows, num_blocks, BLOCK)
    amax_1 = _amax(x_MBT).reshape(1) if amax is None else amax.reshape(1).float()
    if block_2d:
        amax_BB = _amax(x_MBT.view(num_rows // BLOCK, BLOCK, num_blocks, BLOCK), (1, 3))
        amax_MB = amax_BB.repeat_interleave(BLOCK, 0)
    else:
        amax_MB = _amax(x_MBT, -1)

    scale_1 = global_scale(amax_1)
    sixth = divide(1.0, torch.full_like(scale_1, 6.0))
    scale_MB = cast_fp8((amax_MB * (scale_1 * sixth)).clamp(max=FP32_MAX), _E4M3)
    decode_MB = decode_fp8(scale_MB, _E4M3) * divide(1.0, scale_1)
    encode_MB = divide(1.0, decode_MB).clamp(max=FP32_MAX)
    bits_MBT = None if rounding_bits is None else rounding_bits.reshape(x_MBT.shape)
    codes = encode_e2m1(x_MBT * encode_MB.unsqueeze(-1), bits_MBT)
    data = pack(codes.view(num_rows, num_cols))
    return data, pad_to(scale_MB, round_up(num_rows, _SCALE_OUTER), round_up(num_blocks, _SCALE_INNER)), amax_1


@torch.no_grad()
def dequantize(
    data: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor | None,
    *,
    columnwise: bool,
    hadamard: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Undo `quantize`: (M, K) in `out_dtype`.

    The float32 steps are (scale * amax) * (1/2688), then the product with the value. Without `amax` the scale alone is
    the factor. With `hadamard` the inverse transform follows, in float32.

    Source: Transformer Engine common/cast/nvfp4/dequantize_nvfp4.cuh.
    """
    num_rows, num_cols = data.shape[0], data.shape[1] * 2
    factor = decode_fp8(scale[:num_rows, : num_cols // BLOCK].contiguous(), _E4M3)
    if amax is not None:
        amax_1 = amax.reshape(1)
        factor = (factor * amax_1) * divide(1.0, torch.full_like(amax_1, _GLOBAL))
    values = decode_e2m1(unpack(data)) * factor.repeat_interleave(BLOCK, 1)
    if hadamard:
        values = inverse_hadamard(values)
    return values.t().to(out_dtype).contiguous() if columnwise else values.to(out_dtype)


@torch.no_grad()
def transpose_2d(data: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The other direction of a tensor quantized with 16x16 blocks: data (R, C/2) and its scale to (C, R/2) and its."""
    codes = unpack(data)
    num_rows, num_cols = codes.shape
    block_scale = scale[:num_rows:BLOCK, : num_cols // BLOCK].t().repeat_interleave(BLOCK, 0)
    padded = pad_to(block_scale, round_up(num_cols, _SCALE_OUTER), round_up(num_rows // BLOCK, _SCALE_INNER))
    return pack(codes.t().contiguous()), padded


_transform = hadamard  # `quantize` has parameters of these names
_amax = amax
