"""FP8 block scaling in plain torch: float32 scales over 1x128 tiles or 128x128 blocks.

Shape letters: M rows, K columns of the input; B tiles of 128 along a dimension.
"""

from __future__ import annotations

import torch

from lighterage.kernels.reference.casts import amax, amax_to_scale, cast_fp8, decode_fp8, fp8_max, pad_to, round_up

TILE = 128
_SCALE_PAD = 4  # rows of the scale matrix are padded to 16 bytes


@torch.no_grad()
def quantize_1d(
    x: torch.Tensor, *, fp8_dtype: torch.dtype, power_of_2: bool, epsilon: float, columnwise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with one scale for each 128 values along K, or along M if `columnwise`.

    x: (M, K) bf16, fp16 or fp32; any M and K, a last tile may be short.
    Returns: data uint8 (M, K) and scale_inv float32 (ceil(K/128), ru(M, 4)), where x[m, k] has the scale
    S[k // 128, m]. Columnwise is the same of the transposed input: data (K, M), scale_inv (ceil(M/128), ru(K, 4)).
    Padding of the scales is 0.

    Source: Transformer Engine common/transpose/quantize_transpose_vector_blockwise.cu.
    """
    if columnwise:
        x = x.t()
    num_rows, num_cols = x.shape
    num_tiles = -(-num_cols // TILE)
    tiles_MBT = pad_to(x.float(), num_rows, num_tiles * TILE).view(num_rows, num_tiles, TILE)
    scale_MB, scale_inv_MB = amax_to_scale(
        amax(tiles_MBT, -1),
        limit=fp8_max(fp8_dtype),
        power_of_2=power_of_2,
        epsilon=epsilon,
        overflow=torch.finfo(x.dtype).max,
    )
    data = cast_fp8(tiles_MBT * scale_MB.unsqueeze(-1), fp8_dtype)
    data_MK = data.view(num_rows, num_tiles * TILE)[:, :num_cols].contiguous()
    return data_MK, pad_to(scale_inv_MB.t(), num_tiles, round_up(num_rows, _SCALE_PAD))


@torch.no_grad()
def quantize_2d(
    x: torch.Tensor, *, fp8_dtype: torch.dtype, power_of_2: bool, epsilon: float, columnwise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize with one scale for each 128x128 block.

    x: (M, K) bf16, fp16 or fp32; any M and K.
    Returns: data uint8 (M, K) and scale_inv float32 (ceil(M/128), ru(ceil(K/128), 4)), where x[m, k] has the scale
    S[m // 128, k // 128]. Columnwise is the exact transpose: data (K, M), scale_inv (ceil(K/128), ru(ceil(M/128), 4)).
    Padding of the scales is 0.

    Source: Transformer Engine common/transpose/quantize_transpose_square_blockwise.cu.
    """
    if columnwise:
        x = x.t()
    num_rows, num_cols = x.shape
    num_row_tiles, num_col_tiles = -(-num_rows // TILE), -(-num_cols // TILE)
    padded = pad_to(x.float(), num_row_tiles * TILE, num_col_tiles * TILE)
    blocks = padded.view(num_row_tiles, TILE, num_col_tiles, TILE)
    scale, scale_inv = amax_to_scale(
        amax(blocks, (1, 3)),
        limit=fp8_max(fp8_dtype),
        power_of_2=power_of_2,
        epsilon=epsilon,
        overflow=torch.finfo(x.dtype).max,
    )
    data = cast_fp8(blocks * scale[:, None, :, None], fp8_dtype).view(padded.shape)
    data_MK = data[:num_rows, :num_cols].contiguous()
    return data_MK, pad_to(scale_inv, num_row_tiles, round_up(num_col_tiles, _SCALE_PAD))


@torch.no_grad()
def dequantize(
    data: torch.Tensor,
    scale_inv: torch.Tensor,
    *,
    fp8_dtype: torch.dtype,
    block_2d: bool,
    columnwise: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Undo `quantize_1d` or `quantize_2d`: (M, K) in `out_dtype`, whichever direction `data` and `scale_inv` come from.

    One float32 product an element, then one rounding to `out_dtype`.
    """
    num_rows, num_cols = data.shape
    if block_2d:
        scale = scale_inv[:, : -(-num_cols // TILE)].repeat_interleave(TILE, 0)[:num_rows]
    else:
        scale = scale_inv[:, :num_rows].t()
    scale_MK = scale.repeat_interleave(TILE, 1)[:, :num_cols]
    values = (decode_fp8(data, fp8_dtype) * scale_MK).to(out_dtype)
    return values.t().contiguous() if columnwise else values
