"""The formulas again, one block at a time in numpy with ml_dtypes' casts: an oracle that shares no code with torch.

Source: Transformer Engine's quantization kernels, as cited in lighterage.kernels.reference.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

F32 = np.float32
FP32_MAX = np.finfo(F32).max
ELEMENT = {torch.float8_e4m3fn: (ml_dtypes.float8_e4m3fn, 448.0), torch.float8_e5m2: (ml_dtypes.float8_e5m2, 57344.0)}


def bits(values: torch.Tensor) -> list[str]:
    """Float32 values as hexadecimal bit patterns."""
    return [f"0x{word & 0xFFFFFFFF:08x}" for word in values.float().reshape(-1).view(torch.int32).tolist()]


def codes_of(data: torch.Tensor) -> str:
    """Bytes as hexadecimal text."""
    return bytes(data.reshape(-1).tolist()).hex(" ")


def cast_fp8(x: np.ndarray, fp8_dtype: torch.dtype) -> np.ndarray:
    """float32 to codes: clamp, nearest even; NaN is 0x7F."""
    element, limit = ELEMENT[fp8_dtype]
    codes = np.clip(x, -limit, limit).astype(element).view(np.uint8)
    return np.where(np.isnan(x), np.uint8(0x7F), codes)


def amax(block: np.ndarray) -> np.float32:
    """Largest magnitude, NaN ignored."""
    return F32(np.max(np.where(np.isnan(block), 0, np.abs(block)), initial=0))


def block_scale(a: np.float32, limit: float, power_of_2: bool, epsilon: float, overflow: float) -> np.float32:
    """The scale of one FP8 block."""
    if a < F32(epsilon):
        a = F32(epsilon)
    if a == 0 or np.isinf(a):
        return F32(1)
    with np.errstate(over="ignore"):
        scale = F32(limit) / a
    if np.isinf(scale):
        scale = F32(overflow)
    if power_of_2:
        _, exponent = np.frexp(scale)
        scale = F32(np.ldexp(0.5, exponent))
    return scale


def fp8_block(
    x: torch.Tensor, *, fp8_dtype: torch.dtype, power_of_2: bool, epsilon: float, columnwise: bool, block_2d: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (M, K) or (K, M), and the scales with their padding."""
    overflow = torch.finfo(x.dtype).max
    values = x.float().numpy()
    values = values.T if columnwise else values
    num_rows, num_cols = values.shape
    tiles = -(-num_cols // 128)
    step = 128 if block_2d else 1
    data = np.zeros(values.shape, np.uint8)
    shape = (-(-num_rows // 128), -(-tiles // 4) * 4) if block_2d else (tiles, -(-num_rows // 4) * 4)
    scales = np.zeros(shape, F32)
    for row in range(0, num_rows, step):
        for tile in range(tiles):
            where = np.s_[row : row + step, tile * 128 : tile * 128 + 128]
            scale = block_scale(amax(values[where]), ELEMENT[fp8_dtype][1], power_of_2, epsilon, overflow)
            with np.errstate(over="ignore"):
                data[where] = cast_fp8(values[where] * scale, fp8_dtype)
            scales[(row // 128, tile) if block_2d else (tile, row)] = F32(1) / scale
    return data, scales


def nvfp4(x: np.ndarray, global_amax: np.float32, block_2d: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes (R, C), one a byte, and the scale codes (R, C/16) of float32 `x`, quantized along its rows."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        encode_all = min(F32(2688) / F32(global_amax), FP32_MAX)
        if global_amax == 0 or encode_all == 0:
            encode_all = F32(1)
        multiplier = F32(encode_all * (F32(1) / F32(6)))
        decode_all = F32(1) / encode_all
        codes = np.zeros(x.shape, np.uint8)
        scales = np.zeros((x.shape[0], x.shape[1] // 16), np.uint8)
        for row in range(x.shape[0]):
            for block in range(x.shape[1] // 16):
                columns = np.s_[block * 16 : block * 16 + 16]
                rows = np.s_[row // 16 * 16 : row // 16 * 16 + 16] if block_2d else np.s_[row : row + 1]
                scaled = min(amax(x[rows, columns]) * multiplier, FP32_MAX)
                code = cast_fp8(np.array([scaled], F32), torch.float8_e4m3fn)
                scales[row, block] = code[0]
                factor = min(F32(1) / (code.view(ml_dtypes.float8_e4m3fn).astype(F32)[0] * decode_all), FP32_MAX)
                product = x[row, columns] * F32(factor)
                nearest = np.clip(product, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
                codes[row, columns] = np.where(np.isnan(product), 7, nearest)
    return codes, scales
