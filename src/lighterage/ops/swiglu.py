"""SwiGLU and its gradients, by the kernels of the device that the tensors are on."""

from __future__ import annotations

import torch

from lighterage.kernels.reference import swiglu_rows as reference


def swiglu_activation(h: torch.Tensor, probs_M: torch.Tensor | None = None) -> torch.Tensor:
    """y = silu(gate) * up * prob, (M, F), of h (M, 2F) = [gate, up]; one launch on CUDA."""
    if not h.is_cuda:
        return reference.swiglu_rows(h, probs_M)
    from lighterage.kernels.triton import swiglu, swiglu_rows

    return swiglu.swiglu(h) if probs_M is None else swiglu_rows.swiglu_rows(h, probs_M)


def swiglu_gradients(
    dy_MF: torch.Tensor, h: torch.Tensor, probs_M: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(dh (M, 2F), the gradient of probs_M in float32 or None)`; one launch on CUDA."""
    if not h.is_cuda:
        return reference.swiglu_rows_backward(dy_MF, h, probs_M)
    from lighterage.kernels.triton import swiglu, swiglu_rows

    if probs_M is None:
        return swiglu.swiglu_backward(h, dy_MF), None
    return swiglu_rows.swiglu_rows_backward(dy_MF, h, probs_M)
