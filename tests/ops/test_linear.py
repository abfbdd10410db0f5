"""`linear`: the grouped layer with one expert, and PyTorch's own without a recipe."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from lighterage.nn import Linear
from lighterage.ops import grouped_linear, linear
from tests.ops import recipe_cases as cases
from tests.ops.recipe_cases import QUANTIZED, RECIPES, check_offload, same_bits

K, N = 64, 96
EVERY_QUANTIZED = pytest.mark.parametrize("name", QUANTIZED)


def _inputs(*leading: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*leading, K, generator=generator)
    w, b = torch.randn(N, K, generator=generator) / K**0.5, torch.randn(N, generator=generator)
    return [value.to(dtype).requires_grad_() for value in (x, w, b)]


def _backward(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype))
    return [y.detach(), *cases.gradients(leaves)]


@pytest.mark.parametrize("name", RECIPES)
def test_values_and_gradients_are_near_those_of_float64(name: str) -> None:
    leaves = _inputs(3, 32)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    right = _backward(nn.functional.linear(*exact), exact)
    got = _backward(linear(*leaves, recipe=RECIPES[name]), leaves)
    for value, exact_value in zip(got, right, strict=True):
        assert value.dtype == torch.bfloat16 and cases.error(value, exact_value) < cases.ERRORS[name]


@EVERY_QUANTIZED
def test_it_is_the_grouped_layer_with_one_expert(name: str) -> None:
    x, w, b = _inputs(96)
    torch.manual_seed(0)
    wanted = _backward(grouped_linear(x, w[None], [96], bias=b[None], recipe=RECIPES[name]), [x, w, b])
    torch.manual_seed(0)
    got = _backward(linear(x, w, b, recipe=RECIPES[name]), [x, w, b])
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_without_a_recipe_it_is_torchs() -> None:
    leaves = _inputs(3, 7)
    wanted = _backward(nn.functional.linear(*leaves), leaves)
    assert all(same_bits(a, b) for a, b in zip(_backward(linear(*leaves), leaves), wanted, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@EVERY_QUANTIZED
def test_one_copy_a_layer_and_the_same_bits(name: str, bias: bool) -> None:
    layers = nn.ModuleList(Linear(K, K, bias=bias, recipe=RECIPES[name], dtype=torch.bfloat16) for _ in range(2))
    x = _inputs(2, 64)[0]

    def run(layers: nn.ModuleList) -> torch.Tensor:
        y = x.clone()
        for layer in layers:
            y = layer(y)
        return y.float().square().mean()

    stats = check_offload(layers, partial(run, layers), [x, *layers.parameters()], copies=2)
    assert stats.bytes_out < 2 * x.nbytes * 0.7


@EVERY_QUANTIZED
def test_the_transposed_codes_are_what_is_saved(name: str) -> None:
    x, w, b = _inputs(128)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        linear(x, w, b, recipe=RECIPES[name])
    assert len(packed) == 1
    if name == "fp8_tensor":
        assert packed[0].shape == (K, 128) and packed[0].dtype == torch.float8_e4m3fn


@EVERY_QUANTIZED
def test_frozen_parts(name: str) -> None:
    x, w, b = _inputs(64)
    y = linear(x.detach(), w.detach(), b, recipe=RECIPES[name])
    y.sum().backward()
    assert x.grad is None and w.grad is None and b.grad is not None
    assert torch.equal(b.grad, torch.full_like(b, 64))


@EVERY_QUANTIZED
@pytest.mark.parametrize("leading", [(1,), (20,), (3, 5)])
def test_any_number_of_rows_gives_what_rows_filled_up_with_zeros_give(name: str, leading: tuple[int, ...]) -> None:
    x, w, b = _inputs(64)
    num_rows = math.prod(leading)
    few = x.detach()[:num_rows].reshape(*leading, -1).clone().requires_grad_()
    filled = torch.zeros_like(x.detach())
    filled[:num_rows] = few.detach().view(num_rows, -1)
    filled.requires_grad_()
    torch.manual_seed(1)  # stochastic rounding draws its seed here
    y = linear(few, w, b, recipe=RECIPES[name])
    assert y.shape == (*leading, w.shape[0])
    y.square().sum().backward()
    got = [y.detach().flatten(0, -2), few.grad.flatten(0, -2), b.grad]
    b.grad = None
    torch.manual_seed(1)
    wanted = linear(filled, w, b, recipe=RECIPES[name])
    wanted[:num_rows].square().sum().backward()
    assert torch.equal(got[0], wanted[:num_rows]) and torch.equal(got[2], b.grad)
    if "nvfp4" not in name:  # its random draws depend on the number of rows
        assert torch.equal(got[1], filled.grad[:num_rows])


def test_wrong_use_is_told() -> None:
    x, w, b = _inputs(32)
    fp8 = QUANTIZED["fp8_block"]
    with pytest.raises(ValueError, match=r"\(N, K\)"):
        linear(x, w[None], b, recipe=fp8)
    with pytest.raises(TypeError, match="recipe"):
        linear(x, w, b, recipe="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bias"):
        linear(x, w, b[:3], recipe=fp8)
    with pytest.raises(ValueError, match="'triton'"):
        linear(x, w, b, recipe=QUANTIZED["fp8_tensor"], backend="triton")


@pytest.mark.parametrize("backend", ["triton", "reference", "emulation", "foo"])
def test_without_a_recipe_another_backend_than_pytorchs_own_is_refused(backend):
    with pytest.raises(ValueError, match=f"'auto' or 'torch'; got '{backend}'"):
        linear(torch.randn(4, 64), torch.randn(8, 64), backend=backend)
