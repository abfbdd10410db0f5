"""SwiGLU on the device is torch's in fp32, rounded once; its backward is autograd's."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, DTYPES

pytest.importorskip("triton")

from lighterage.kernels.triton.swiglu import swiglu, swiglu_backward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: NaN and Inf are meant

SHAPES = [(3, 8), (5, 1030), (1, 2), (0, 16), (4, 0)]


def _input(num_rows: int, num_cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Values of magnitudes from 2^-12 to 2^5, and a NaN and an Inf where there is room."""
    x = torch.randn(num_rows, num_cols) * torch.exp2(torch.randint(-12, 5, (num_rows, num_cols)).float())
    if num_rows > 1 and num_cols > 8:
        x[1, 3], x[0, num_cols - 2] = float("nan"), float("inf")
    return x.to(dtype).to(DEVICE)


def _reference(h: torch.Tensor) -> torch.Tensor:
    """fp32, not yet rounded."""
    gate, up = h.float().chunk(2, dim=1)
    return gate / (1 + torch.exp(-gate)) * up


def _assert_rounded_once(got: torch.Tensor, h: torch.Tensor) -> None:
    """`got` is the formula rounded to its dtype. The argument of exp is rounded too: as many units of its result."""
    exact = _reference(h)
    assert torch.equal(got.isnan(), exact.isnan())
    finite = exact.isfinite() & got.isfinite()
    fp32_units = 4 + h.float()[:, : h.shape[1] // 2].abs()
    step = torch.finfo(got.dtype).eps / 2 + fp32_units * torch.finfo(torch.float32).eps
    bound = exact.abs() * step + torch.finfo(got.dtype).smallest_normal
    assert ((got.float() - exact).abs() <= bound)[finite].all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_activation_is_the_formula_in_fp32_rounded_once(dtype, shape) -> None:
    h = _input(shape[0], 2 * shape[1], dtype)
    y = swiglu(h)
    assert y.shape == shape and y.dtype == dtype
    _assert_rounded_once(y, h)


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_is_that_of_autograd(dtype, with_probs) -> None:
    h = torch.randn(6, 2 * 70, device=DEVICE).mul(3).to(dtype)
    dy = torch.randn(6, 70, device=DEVICE).to(dtype)
    probs = torch.rand(6, device=DEVICE) if with_probs else None
    leaf = h.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    y = torch.nn.functional.silu(gate) * up
    (y if probs is None else y * probs[:, None]).backward(dy.double())
    dh = swiglu_backward(h, dy, probs=probs)
    assert dh.shape == h.shape and dh.dtype == dtype
    # Where a factor of the gate's derivative cancels, fp32 leaves an absolute error.
    torch.testing.assert_close(dh.double(), leaf.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_gates_far_from_zero_saturate_and_do_not_overflow() -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 0.0]])
    h = torch.cat([gate, torch.full_like(gate, 2.0)], dim=1).to(DEVICE)
    assert torch.allclose(swiglu(h).cpu(), torch.tensor([[0.0, 0.0, 0.0, 180.0, 400.0, 0.0]]), atol=1e-30)
    dh = swiglu_backward(h, torch.ones(1, 6, device=DEVICE)).cpu()
    assert torch.equal(dh[0, :6], torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 1.0]))
    assert torch.allclose(dh[0, 6:], torch.tensor([0.0, 0.0, 0.0, 90.0, 200.0, 0.0]), atol=1e-30)


def test_misuse_is_refused() -> None:
    h = torch.randn(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="gates before ups"):
        swiglu(h[:, :7])
    with pytest.raises(ValueError, match="gates before ups"):
        swiglu(h.t())
    with pytest.raises(ValueError, match="dy must be contiguous"):
        swiglu_backward(h, h)
    with pytest.raises(ValueError, match="one factor for each of 4 rows"):
        swiglu_backward(h, h[:, :4].contiguous(), probs=h[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_activations_equal_the_formula(dtype) -> None:
    h = _input(2048, 2 * 3072, dtype)
    _assert_rounded_once(swiglu(h), h)
    dy = torch.randn(2048, 3072, device=DEVICE).to(dtype)
    leaf = h.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    (torch.nn.functional.silu(gate) * up).backward(dy.double())
    got, expected = swiglu_backward(h, dy).double(), leaf.grad
    finite = expected.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
