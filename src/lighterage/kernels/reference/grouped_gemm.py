"""Products of block-scaled FP8 matrices, slab by slab: the oracle of the grouped kernels.

Letters: M, N rows of the two operands, K the contracted dimension, last in both; B = ceil(K/128) slabs of it.

Note [One rounding a slab]
The product of one slab is summed in float64, where 128 products of FP8 values are exact, and rounded to float32 once.
So the result depends on no order of summation, no number of threads and no library. Tensor cores sum with fewer bits:
they come close to this, but equal it only where the sums are short. The steps from one slab to the next are those of
cuBLAS, which can be met bit for bit: `y = fma(round(P * scale_a), scale_b, y)`.
"""

from __future__ import annotations

import torch

from lighterage.kernels.reference.casts import decode_fp8

SLAB = 128


@torch.no_grad()
def block_scaled_product(
    a_MK: torch.Tensor,
    a_scale: torch.Tensor,
    b_NK: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    a_dtype: torch.dtype,
    b_dtype: torch.dtype,
    b_block_2d: bool,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`a @ b.T` of the values that the codes stand for, (M, N) in `out_dtype`.

    a_MK: uint8 codes of `a_dtype`. a_scale: float32 (B, at least M), one scale for each 1x128 tile.
    b_NK: uint8 codes of `b_dtype`. b_scale: float32 (B, at least N), or (ceil(N/128), at least B) if `b_block_2d`.
    bias: (N,), added in float32 before the one conversion to `out_dtype`.

    Source: cuBLAS documentation, 128-element scaling; Transformer Engine's blockwise_fp8_gemm_reference.
    """
    num_rows, depth = a_MK.shape
    num_cols = b_NK.shape[0]
    y = a_scale.new_zeros(num_rows, num_cols)
    for slab, first in enumerate(range(0, depth, SLAB)):
        columns = slice(first, first + SLAB)
        a = decode_fp8(a_MK[:, columns], a_dtype).double()
        b = decode_fp8(b_NK[:, columns], b_dtype).double()
        if b_block_2d:
            scale_N = b_scale[:, slab].repeat_interleave(SLAB)[:num_cols]
        else:
            scale_N = b_scale[slab, :num_cols]
        scaled = (a @ b.t()).float() * a_scale[slab, :num_rows, None]
        y = fused_multiply_add(scaled, scale_N, y)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """`a * b + c` of float32 tensors, rounded once: the product is exact in float64."""
    return torch.addcmul(c.double(), a.double(), b.double()).float()
