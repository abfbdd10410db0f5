"""SwiGLU with a factor for each row, and its gradients, one launch each. `swiglu.py` has it without factors.

Letters: M rows, F features; the input has 2F of them, the gate's before the other half's.

A program takes whole rows, block of columns after block, so that what is summed over a row is summed in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.launch import on_device_of


@triton.jit
def _swiglu_rows_kernel(h, probs, y, num_features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < num_features
    gate = tl.load(h + row * 2 * num_features + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + (row * 2 + 1) * num_features + cols, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up * tl.load(probs + row).to(tl.float32)
    tl.store(y + row * num_features + cols, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_rows_backward_kernel(dy, h, probs, dh, dprobs, num_features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    prob = tl.load(probs + row).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_features, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        inside = cols < num_features
        gate = tl.load(h + row * 2 * num_features + cols, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + (row * 2 + 1) * num_features + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * num_features + cols, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        sums += grad * silu * up
        grad = grad * prob
        dgate = grad * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        tl.store(dh + row * 2 * num_features + cols, dgate.to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + (row * 2 + 1) * num_features + cols, (grad * silu).to(dh.dtype.element_ty), mask=inside)
    tl.store(dprobs + row, tl.sum(sums, 0))


def swiglu_rows(h: torch.Tensor, probs_M: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up * prob, (M, F) of h's dtype, of h (M, 2F) = [gate, up]; on the current stream.

    h: contiguous bf16, fp16 or fp32. probs_M: contiguous, any float dtype.
    """
    num_rows, num_features = h.shape[0], h.shape[1] // 2
    y = torch.empty(num_rows, num_features, dtype=h.dtype, device=h.device)
    if y.numel():
        block = min(1024, triton.next_power_of_2(num_features))
        with on_device_of(h):
            _swiglu_rows_kernel[(num_rows, triton.cdiv(num_features, block))](h, probs_M, y, num_features, BLOCK=block)
    return y


def swiglu_rows_backward(
    dy_MF: torch.Tensor, h: torch.Tensor, probs_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(dh (M, 2F) of h's dtype, the gradient of probs_M in float32)`; on the current stream, deterministic.

    dy_MF, h, probs_M: contiguous.
    """
    num_rows, num_features = h.shape[0], h.shape[1] // 2
    dh = torch.empty_like(h)
    dprobs_M = torch.zeros(num_rows, dtype=torch.float32, device=h.device)
    if h.numel():
        block = min(1024, triton.next_power_of_2(num_features))
        with on_device_of(h):
            _swiglu_rows_backward_kernel[(num_rows,)](dy_MF, h, probs_M, dh, dprobs_M, num_features, BLOCK=block)
    return dh, dprobs_M
