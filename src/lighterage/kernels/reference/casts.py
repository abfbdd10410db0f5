"""Element casts and scale arithmetic that the reference quantizers share.

Every step is one float32 operation, rounded to nearest even, in the order that the formulas give: with scales that are
not powers of two another order gives other bits.

Note [Division by tensors]
    `number / tensor` is computed by torch as `reciprocal(tensor) * number`, and `tensor / number` on CUDA as a product
    with the inverse: both round twice. Only tensor / tensor on one device is the IEEE quotient, so `divide` makes one.
"""

from __future__ import annotations

import torch

FP32_MAX = 3.4028234663852886e38
FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
_FP8_NAN = 0x7F
_EXPONENT_AND_SIGN = -0x800000  # 0xFF800000 as a signed 32-bit number


def fp8_max(fp8_dtype: torch.dtype) -> float:
    """The largest finite value of `fp8_dtype`.

    Raises: ValueError: if it is neither E4M3 nor E5M2.
    """
    if fp8_dtype not in FP8_MAX:
        raise ValueError(
            f"fp8_dtype must be torch.float8_e4m3fn or torch.float8_e5m2; got {fp8_dtype}. Pass one of those two."
        )
    return FP8_MAX[fp8_dtype]


def divide(numerator: torch.Tensor | float, denominator: torch.Tensor) -> torch.Tensor:
    """The IEEE float32 quotient; see Note [Division by tensors]. `denominator`: float32 tensor of any shape."""
    if not isinstance(numerator, torch.Tensor):
        numerator = torch.full_like(denominator, numerator)
    return numerator / denominator


def amax(x: torch.Tensor, dim: int | tuple[int, ...] | None = None) -> torch.Tensor:
    """Largest magnitude along `dim` (everything if None), float32; NaN is ignored, Inf counts, nothing gives 0."""
    magnitude = x.float().abs().nan_to_num(nan=0.0, posinf=float("inf"))
    if dim is None:
        dim = tuple(range(magnitude.ndim))
    if magnitude.numel() == 0:
        reduced = {dim % magnitude.ndim} if isinstance(dim, int) else {d % magnitude.ndim for d in dim}
        return magnitude.new_zeros([size for d, size in enumerate(magnitude.shape) if d not in reduced])
    return magnitude.amax(dim)


def cast_fp8(x: torch.Tensor, fp8_dtype: torch.dtype) -> torch.Tensor:
    """Codes of float32 `x` in `fp8_dtype`, uint8: nearest even, saturating (Inf too), NaN as 0x7F whatever its sign.

    The clamp is explicit because eager casts differ between torch versions in what they do beyond the largest value.
    """
    limit = fp8_max(fp8_dtype)
    codes = x.clamp(-limit, limit).to(fp8_dtype).view(torch.uint8)
    return torch.where(x.isnan(), torch.full_like(codes, _FP8_NAN), codes)


def decode_fp8(codes: torch.Tensor, fp8_dtype: torch.dtype) -> torch.Tensor:
    """Float32 values of uint8 `codes`; any shape, strides kept."""
    return codes.view(fp8_dtype).float()


def amax_to_scale(
    amax_f32: torch.Tensor, *, limit: float, power_of_2: bool, epsilon: float, overflow: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale that brings `amax_f32` to `limit`, and its inverse, which is what gets stored.

    amax_f32: float32, any shape, never NaN. limit: largest value of the target. epsilon: smaller amax are raised to it.
    overflow: the scale where limit / amax is beyond float32.
    Returns: (scale, scale_inv), float32. Both are 1 where amax is 0 or Inf. With `power_of_2` the scale is rounded
    down to a power of two.

    Source: Transformer Engine common/recipe/recipe_common.cuh (compute_scale_from_amax).
    """
    floor = torch.full_like(amax_f32, epsilon)
    amax_f32 = torch.where(amax_f32 < floor, floor, amax_f32)
    scale = divide(limit, amax_f32)
    scale = torch.where(scale.isinf(), torch.full_like(scale, overflow), scale)
    if power_of_2:
        scale = (scale.view(torch.int32) & _EXPONENT_AND_SIGN).view(torch.float32)
    unscaled = (amax_f32 == 0) | amax_f32.isinf()
    scale = torch.where(unscaled, torch.ones_like(scale), scale)
    return scale, divide(1.0, scale)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def pad_to(matrix: torch.Tensor, num_rows: int, num_cols: int) -> torch.Tensor:
    """`matrix` (R, C) in the corner of a (num_rows, num_cols) matrix of zeros; itself if it has that size already."""
    if matrix.shape == (num_rows, num_cols):
        return matrix.contiguous()
    padded = matrix.new_zeros(num_rows, num_cols)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
