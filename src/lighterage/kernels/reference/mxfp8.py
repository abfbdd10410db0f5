"""MXFP8 in plain torch: FP8 values with one power-of-two (E8M0) scale for each 32 of them.

Shape letters: M rows, K columns of the input; B blocks of 32 along a dimension.
"""

from __future__ import annotations

import torch

from lighterage.kernels.reference.casts import amax, cast_fp8, decode_fp8, divide, fp8_max, pad_to, round_up

BLOCK = 32
_SCALE_OUTER = 128  # the scale matrix is padded to tiles of 128 x 4, the shape that matrix products read
_SCALE_INNER = 4


def encode_e8m0_round_up(values: torch.Tensor) -> torch.Tensor:
    """E8M0 codes, uint8, of non-negative float32 `values`, rounded up to the next power of two.

    NaN gives 255, Inf 254, 0 and everything up to 2^-127 gives 0.

    Source: Transformer Engine common/util/ptx_arch_spec.cuh (float_to_e8m0); the cuBLAS documentation states the same
    rule for block scaling with 32 values. The OCP MX specification rounds down instead.
    """
    bits = values.view(torch.int32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    bump = (mantissa > 0) & (exponent != 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    code = exponent + bump.to(torch.int32)
    code = torch.where(values.isinf(), torch.full_like(code, 254), code)
    code = torch.where(values.isnan(), torch.full_like(code, 255), code)
    return code.to(torch.uint8)


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values 2^(code - 127) of uint8 `codes`; 0 gives the subnormal 2^-127, 255 gives NaN."""
    exponent = codes.to(torch.int32)
    bits = exponent << 23
    bits = torch.where(exponent == 0, torch.full_like(bits, 0x00400000), bits)
    bits = torch.where(exponent == 255, torch.full_like(bits, 0x7FC00000), bits)
    return bits.view(torch.float32)


def _multiplier(codes: torch.Tensor) -> torch.Tensor:
    """Float32 2^(127 - code): what an element is multiplied by before its cast; NaN for code 255."""
    exponent = codes.to(torch.int32)
    bits = (254 - exponent) << 23
    bits = torch.where(exponent == 254, torch.full_like(bits, 0x00400000), bits)
    bits = torch.where(exponent == 255, torch.full_like(bits, 0x7FC00000), bits)
    return bits.view(torch.float32)


@torch.no_grad()
def quantize(
    x: torch.Tensor, *, fp8_dtype: torch.dtype, columnwise: bool, block_2d: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with one scale for each 32 values along K, or along M if `columnwise`, or for each 32x32 block.

    x: (M, K) bf16, fp16 or fp32, both multiples of 32.
    Returns: data uint8 (M, K), in both directions; scale uint8 (ru(M, 128), ru(K/32, 4)), where x[m, k] has the scale
    S[m, k // 32]; columnwise (ru(M/32, 4), ru(K, 128)) and S[m // 32, k]. Padding of the scales is 0. With
    `block_2d` the shapes stay and the one scale of a block is written for each of its 32 rows (columns).

    Source: Transformer Engine common/cast/mxfp8/quantize_mxfp8.cuh.
    """
    num_rows, num_cols = x.shape
    x_f32 = x.float().contiguous()
    limit = fp8_max(fp8_dtype)
    num_row_blocks, num_col_blocks = num_rows // BLOCK, num_cols // BLOCK
    if block_2d:
        amax_BB = amax(x_f32.view(num_row_blocks, BLOCK, num_col_blocks, BLOCK), (1, 3))
        amax_block = amax_BB.repeat_interleave(BLOCK, 1 if columnwise else 0)
    elif columnwise:
        amax_block = amax(x_f32.view(num_row_blocks, BLOCK, num_cols), 1)
    else:
        amax_block = amax(x_f32.view(num_rows, num_col_blocks, BLOCK), 2)
    reciprocal = divide(1.0, torch.full((), limit, dtype=torch.float32, device=x.device))
    codes = encode_e8m0_round_up(amax_block * reciprocal)
    data = cast_fp8(x_f32 * _multiplier(codes).repeat_interleave(BLOCK, 0 if columnwise else 1), fp8_dtype)
    if columnwise:
        return data, pad_to(codes, round_up(num_row_blocks, _SCALE_INNER), round_up(num_cols, _SCALE_OUTER))
    return data, pad_to(codes, round_up(num_rows, _SCALE_OUTER), round_up(num_col_blocks, _SCALE_INNER))


@torch.no_grad()
def dequantize(
    data: torch.Tensor, scale: torch.Tensor, *, fp8_dtype: torch.dtype, columnwise: bool, out_dtype: torch.dtype
) -> torch.Tensor:
    """Undo `quantize`: (M, K) in `out_dtype`; one float32 product an element, then one rounding."""
    num_rows, num_cols = data.shape
    factors = decode_e8m0(scale)
    if columnwise:
        factors_MK = factors[: num_rows // BLOCK, :num_cols].repeat_interleave(BLOCK, 0)
    else:
        factors_MK = factors[:num_rows, : num_cols // BLOCK].repeat_interleave(BLOCK, 1)
    return (decode_fp8(data, fp8_dtype) * factors_MK).to(out_dtype)


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Scales in the order that matrix products on Blackwell read: tiles of 128 x 4, each 512 bytes, interleaved by 32.

    scale: (outer, inner), multiples of 128 and 4; outer counts rows of the product's operand, inner counts blocks along
    its contraction. Pass the transpose of a columnwise MXFP8 scale.
    Returns: 1-D, the same number of elements. Element (i, j) lies at
    ((i // 128) * (inner / 4) + j // 4) * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4.

    Raises: ValueError: if the shape is not one of whole tiles.
    Source: cuBLAS documentation, scaling factors layout for 1D block scaling.
    """
    if scale.ndim != 2 or scale.shape[0] % _SCALE_OUTER or scale.shape[1] % _SCALE_INNER:
        raise ValueError(
            f"a scale matrix to swizzle must be (a multiple of 128, a multiple of 4); got {tuple(scale.shape)}. "
            "Pass the padded scales as the quantizer made them, transposed if they are MXFP8 columnwise."
        )
    tiles = scale.reshape(scale.shape[0] // _SCALE_OUTER, 4, 32, scale.shape[1] // _SCALE_INNER, _SCALE_INNER)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)
