"""SwiGLU, `silu(gate) * up`, and its backward; the quantization kernels compute the same values as they load.

Note [One rounding of SwiGLU]
Gate and up are widened to fp32, everything is computed there, and the product is rounded once to the input's dtype.
`swiglu_of` is the one place that does it, so that a kernel which quantizes the activation as it loads gives the same
bytes as this file's `swiglu` followed by a kernel which quantizes its result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lighterage.kernels.triton.casts import narrow, widen
from lighterage.kernels.triton.launch import has_fp8_casts, launch, on_device_of

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK = 1024


@triton.jit
def swiglu_of(gate, up, HARDWARE: tl.constexpr):
    """`silu(gate) * up` in the dtype of both: note [One rounding of SwiGLU]."""
    gate_f32 = widen(gate, HARDWARE)
    if HARDWARE:  # 5 instructions where the compiler's exp and quotient take 20, to guard results that become 0 anyway
        silu = tl.inline_asm_elementwise(
            """{ .reg .f32 t;
            mul.rn.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.rn.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.rn.f32 $0, $1, t; }""",
            "=f,f",
            [gate_f32],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        silu = gate_f32 / (1.0 + tl.exp(-gate_f32))
    return narrow(silu * widen(up, HARDWARE), gate.dtype, HARDWARE)


@triton.jit
def load_input(pointers, mask, NUM_COLS: tl.constexpr, SWIGLU: tl.constexpr, HARDWARE: tl.constexpr):
    """What a quantization kernel quantizes, in the input's dtype: as it is stored, or the SwiGLU of the two halves.

    pointers: to the values, or to the gates, with `NUM_COLS` gates before the ups of a row. 0 where the mask is false.
    """
    x = tl.load(pointers, mask=mask, other=0.0)
    if SWIGLU:
        x = swiglu_of(x, tl.load(pointers + NUM_COLS, mask=mask, other=0.0), HARDWARE)
    return x


@triton.jit
def _swiglu_kernel(h, y, NUM_COLS: tl.constexpr, BLOCK: tl.constexpr, HARDWARE: tl.constexpr):
    """A program makes `BLOCK` values of one row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < NUM_COLS
    tl.store(y + row * NUM_COLS + col, load_input(h + row * (2 * NUM_COLS) + col, mask, NUM_COLS, True, HARDWARE), mask)


@triton.jit
def _swiglu_backward_kernel(
    h,
    dy,
    probs,
    dh,
    NUM_COLS: tl.constexpr,
    HAS_PROBS: tl.constexpr,
    BLOCK: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A program makes the gradients of `BLOCK` gates of one row, and of their ups."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < NUM_COLS
    halves = row * (2 * NUM_COLS) + col
    gate = widen(tl.load(h + halves, mask=mask, other=0.0), HARDWARE)
    up = widen(tl.load(h + halves + NUM_COLS, mask=mask, other=0.0), HARDWARE)
    grad = widen(tl.load(dy + row * NUM_COLS + col, mask=mask, other=0.0), HARDWARE)
    if HAS_PROBS:
        grad *= tl.load(probs + row).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    d_gate = grad * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    d_up = grad * (gate * sigmoid)
    tl.store(dh + halves, narrow(d_gate, dh.dtype.element_ty, HARDWARE), mask=mask)
    tl.store(dh + halves + NUM_COLS, narrow(d_up, dh.dtype.element_ty, HARDWARE), mask=mask)


def _check(h: torch.Tensor) -> None:
    if h.dim() != 2 or h.shape[1] % 2 or not h.is_contiguous() or h.dtype not in _DTYPES:
        raise ValueError(
            f"SwiGLU takes a contiguous (M, 2F) matrix of bf16, fp16 or fp32, gates before ups; got {tuple(h.shape)} "
            f"{h.dtype} with strides {h.stride()}. Call .reshape(-1, 2F).contiguous() first."
        )


def swiglu(h: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of a matrix whose rows are F gates followed by F ups, on the current stream.

    h: (M, 2F) contiguous bf16, fp16 or fp32. Returns: (M, F) of the same dtype, rounded once.

    Raises: ValueError: if `h` is anything else.
    """
    _check(h)
    num_rows, num_cols = h.shape[0], h.shape[1] // 2
    y = torch.empty(num_rows, num_cols, dtype=h.dtype, device=h.device)
    if y.numel():
        with on_device_of(h):
            constants = {"NUM_COLS": num_cols, "BLOCK": _BLOCK, "HARDWARE": has_fp8_casts(h.device.index)}
            launch(_swiglu_kernel, (num_rows, triton.cdiv(num_cols, _BLOCK)), (h, y), (), constants, num_warps=4)
    return y


def swiglu_backward(h: torch.Tensor, dy: torch.Tensor, *, probs: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of `swiglu`, on the current stream: computed in fp32 and rounded once.

    h: (M, 2F) contiguous bf16, fp16 or fp32, as given to `swiglu`. dy: (M, F) contiguous, the gradient of its result.
    probs: (M,) of any float dtype, factors that the result's rows were multiplied by; dy is then the gradient of that
    product.
    Returns: (M, 2F) of the dtype of `h`: the gates' gradients before the ups'.

    Raises: ValueError: if a shape, dtype or stride is another.
    """
    _check(h)
    num_rows, num_cols = h.shape[0], h.shape[1] // 2
    if dy.shape != (num_rows, num_cols) or not dy.is_contiguous() or dy.dtype not in _DTYPES:
        raise ValueError(
            f"dy must be contiguous {(num_rows, num_cols)} of bf16, fp16 or fp32 beside h {tuple(h.shape)}; got "
            f"{tuple(dy.shape)} {dy.dtype} with strides {dy.stride()}. Pass the gradient of what swiglu returned."
        )
    if probs is not None and (probs.shape != (num_rows,) or not probs.is_contiguous()):
        raise ValueError(
            f"probs must hold one factor for each of {num_rows} rows, contiguous; got {tuple(probs.shape)} with "
            f"strides {probs.stride()}. Pass a ({num_rows},) tensor."
        )
    dh = torch.empty_like(h)
    if dh.numel():
        with on_device_of(h):
            constants = {
                "NUM_COLS": num_cols,
                "HAS_PROBS": probs is not None,
                "BLOCK": _BLOCK,
                "HARDWARE": has_fp8_casts(h.device.index),
            }
            grid = (num_rows, triton.cdiv(num_cols, _BLOCK))
            pointers = (h, dy, h if probs is None else probs, dh)
            launch(_swiglu_backward_kernel, grid, pointers, (), constants, num_warps=4)
    return dh
