"""SwiGLU with factors: Triton and plain torch against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from lighterage.kernels.reference import swiglu_rows as reference
from tests.kernels.triton_cases import DEVICE


def _backends(with_probs: bool) -> list[object]:
    from lighterage.kernels.triton import swiglu_rows as triton

    return [reference, triton] if with_probs else [reference]


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("shape", [(5, 12), (3, 1026), (0, 8)])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, int], with_probs: bool) -> None:
    rows, features = shape
    h = torch.randn(rows, 2 * features, device=DEVICE)
    dy = torch.randn(rows, features, device=DEVICE)
    probs = torch.rand(rows, device=DEVICE) if with_probs else None
    exact_h = h.double().requires_grad_()
    exact_probs = None if probs is None else probs.double().requires_grad_()
    gate, up = exact_h.chunk(2, 1)
    wanted = torch.nn.functional.silu(gate) * up
    wanted = wanted if exact_probs is None else wanted * exact_probs[:, None]
    wanted.backward(dy.double())
    for backend in _backends(with_probs):
        y = backend.swiglu_rows(h, probs)  # type: ignore[attr-defined]
        dh, dprobs = backend.swiglu_rows_backward(dy, h, probs)  # type: ignore[attr-defined]
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dh.double(), exact_h.grad, rtol=1e-5, atol=1e-5)
        if exact_probs is None:
            assert dprobs is None
        else:
            torch.testing.assert_close(dprobs.double(), exact_probs.grad, rtol=1e-4, atol=1e-4)


def test_results_have_the_dtype_of_the_input() -> None:
    h, probs = torch.randn(4, 16, device=DEVICE).to(torch.bfloat16), torch.ones(4, device=DEVICE)
    for backend in _backends(with_probs=True):
        assert backend.swiglu_rows(h, probs).dtype == torch.bfloat16  # type: ignore[attr-defined]
        dh, dprobs = backend.swiglu_rows_backward(h[:, :8].contiguous(), h, probs)  # type: ignore[attr-defined]
        assert dh.dtype == torch.bfloat16 and dprobs.dtype == torch.float32
