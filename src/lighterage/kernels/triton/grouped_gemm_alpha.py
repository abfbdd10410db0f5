"""What the products of NVFP4 values are multiplied by, for every expert: read from two bulk buffers in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.launch import on_device_of
from lighterage.kernels.triton.splits import data_offset, padded_splits, rows_of_splits

_INVERSE_BITS = tl.constexpr(0x34149B93)  # fl(1 / (36 * 448 * 448))


@triton.jit
def _amax_of_splits(buffer, ends, num_splits, NUM_COLS: tl.constexpr, COLUMNWISE: tl.constexpr, LANES: tl.constexpr):
    """fp32 [LANES]: they lie after all data and all scales, each at a multiple of 16 bytes."""
    rows = rows_of_splits(ends, num_splits, LANES)
    _, scales_start = data_offset(ends, 0, tl.load(ends) * 0, num_splits, NUM_COLS // 2, 16, LANES)
    if COLUMNWISE:
        scale_bytes = tl.sum((rows + 63) // 64, 0).to(tl.int64) * ((NUM_COLS + 127) // 128 * 512)
    else:
        scale_bytes = tl.sum((rows + 127) // 128, 0).to(tl.int64) * ((NUM_COLS + 63) // 64 * 512)
    lane = tl.arange(0, LANES)
    pointers = (buffer + (scales_start + scale_bytes)).to(tl.pointer_type(tl.float32)) + lane * 4
    return tl.load(pointers, mask=lane < num_splits, other=0.0)


@triton.jit(do_not_specialize=["num_splits"])
def _alpha_kernel(
    a_buffer,
    a_ends,
    b_buffer,
    b_ends,
    out,
    num_splits,
    A_COLS: tl.constexpr,
    B_COLS: tl.constexpr,
    A_COLUMNWISE: tl.constexpr,
    B_COLUMNWISE: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program for all experts."""
    a = _amax_of_splits(a_buffer, a_ends, num_splits, A_COLS, A_COLUMNWISE, LANES)
    b = _amax_of_splits(b_buffer, b_ends, num_splits, B_COLS, B_COLUMNWISE, LANES)
    lane = tl.arange(0, LANES)
    inverse = tl.full([], _INVERSE_BITS, tl.int32).to(tl.float32, bitcast=True)
    tl.store(out + lane, (a * b) * inverse, mask=lane < num_splits)


def nvfp4_alphas(
    a: tuple[torch.Tensor, torch.Tensor, int, bool], b: tuple[torch.Tensor, torch.Tensor, int, bool], num_splits: int
) -> torch.Tensor:
    """`amax_a * amax_b / (36 * 448 * 448)` of every expert, float32 (num_splits,), on the current stream.

    a, b: of each operand its uint8 bulk buffer, int64 ends, number of columns, and whether the buffer is columnwise.

    Source: Transformer Engine common/recipe/nvfp4.cu.
    """
    (a_buffer, a_ends, a_cols, a_columnwise), (b_buffer, b_ends, b_cols, b_columnwise) = a, b
    out = torch.empty(num_splits, dtype=torch.float32, device=a_buffer.device)
    if num_splits:
        with on_device_of(a_buffer):
            _alpha_kernel[(1,)](
                a_buffer,
                a_ends,
                b_buffer,
                b_ends,
                out,
                num_splits,
                A_COLS=a_cols,
                B_COLS=b_cols,
                A_COLUMNWISE=a_columnwise,
                B_COLUMNWISE=b_columnwise,
                LANES=padded_splits(num_splits),
                enable_fp_fusion=False,
            )
    return out
