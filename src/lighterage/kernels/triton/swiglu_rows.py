"""SwiGLU with a factor for each row, and its gradients, one launch each.

Letters: M rows, F features; the input has 2F of them, the gate's before the other half's.

A program takes whole rows, block of columns after block, so that what is summed over a row is summed in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.launch import on_device_of


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _swiglu_rows_kernel(h, probs, y, num_features, HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < num_features
    gate = tl.load(h + row * 2 * num_features + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + (row * 2 + 1) * num_features + cols, mask=inside, other=0.0).to(tl.float32)
    value = gate * _sigmoid(gate) * up
    if HAS_PROBS:
        value = value * tl.load(probs + row).to(tl.float32)
    tl.store(y + row * num_features + cols, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_rows_backward_kernel(dy, h, probs, dh, dprobs, num_features, HAS_PROBS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    prob = 1.0
    if HAS_PROBS:
        prob = tl.load(probs + row).to(tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_features, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        inside = cols < num_features
        gate = tl.load(h + row * 2 * num_features + cols, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + (row * 2 + 1) * num_features + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * num_features + cols, mask=inside, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        if HAS_PROBS:
            sums += grad * silu * up
            grad = grad * prob
        dgate = grad * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        tl.store(dh + row * 2 * num_features + cols, dgate.to(dh.dtype.element_ty), mask=inside)
        tl.store(dh + (row * 2 + 1) * num_features + cols, (grad * silu).to(dh.dtype.element_ty), mask=inside)
    if HAS_PROBS:
        tl.store(dprobs + row, tl.sum(sums, 0))


def swiglu_rows(h: torch.Tensor, probs_M: torch.Tensor | None = None) -> torch.Tensor:
    """y = silu(gate) * up * prob, (M, F) of h's dtype, of h (M, 2F) = [gate, up]; on the current stream.

    h: contiguous bf16, fp16 or fp32. probs_M: contiguous, a factor for each row, or None for 1.
    """
    num_rows, num_features = h.shape[0], h.shape[1] // 2
    y = torch.empty(num_rows, num_features, dtype=h.dtype, device=h.device)
    if y.numel():
        block = min(1024, triton.next_power_of_2(num_features))
        with on_device_of(h):
            _swiglu_rows_kernel[(num_rows, triton.cdiv(num_features, block))](
                h, h if probs_M is None else probs_M, y, num_features, HAS_PROBS=probs_M is not None, BLOCK=block
            )
    return y


def swiglu_rows_backward(
    dy_MF: torch.Tensor, h: torch.Tensor, probs_M: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(dh (M, 2F) of h's dtype, the gradient of probs_M in float32, or None)`; on the current stream, deterministic.

    dy_MF, h, probs_M: contiguous.
    """
    num_rows, num_features = h.shape[0], h.shape[1] // 2
    dh = torch.empty_like(h)
    dprobs_M = None if probs_M is None else torch.zeros(num_rows, dtype=torch.float32, device=h.device)
    if h.numel():
        block = min(1024, triton.next_power_of_2(num_features))
        with on_device_of(h):
            _swiglu_rows_backward_kernel[(num_rows,)](
                dy_MF,
                h,
                h if probs_M is None else probs_M,
                dh,
                h if dprobs_M is None else dprobs_M,
                num_features,
                HAS_PROBS=probs_M is not None,
                BLOCK=block,
            )
    return dh, dprobs_M
