"""Claims about torch.func: its transforms are left alone, and training around them goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import lighterage
from tests.engine.twin import (
    Block,
    Model,
    assert_nothing_left,
    assert_same,
    batch,
    layers_of,
    same_bits,
    stood_aside,
    train,
    train_step,
)

Transform = Callable[[nn.Module], Any]


def whole(model: nn.Module) -> nn.Module:
    return model


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def functional_loss(model: nn.Module, x: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    return lambda params: functional_call(model, params, (x,)).square().mean()


def by_grad(model: nn.Module) -> Any:
    return grad(functional_loss(model, batch(0)))(parameters_of(model))


def by_grad_and_value(model: nn.Module) -> Any:
    return grad_and_value(functional_loss(model, batch(0)))(parameters_of(model))


def by_vjp(model: nn.Module) -> Any:
    out, pull = vjp(model, batch(0))
    return out, pull(torch.ones_like(out))


def by_jvp(model: nn.Module) -> Any:
    return jvp(model, (batch(0),), (batch(1),))


def by_vmap(model: nn.Module) -> Any:
    with torch.no_grad():
        return vmap(model)(batch(0))


def by_vmap_with_gradients_outside(model: nn.Module) -> Any:
    vmap(model)(batch(0)).square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


def by_per_sample_gradients(model: nn.Module) -> Any:
    def one(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return functional_loss(model, x)(params)

    return vmap(grad(one), in_dims=(None, 0))(parameters_of(model), batch(0))


def by_jacrev(model: nn.Module) -> Any:
    return jacrev(lambda x: model(x).mean(0))(batch(0, rows=2))


def by_grad_of_grad(model: nn.Module) -> Any:
    return grad(lambda x: grad(lambda y: model(y).square().mean())(x).square().sum())(batch(0, rows=2))


def by_hessian(model: nn.Module) -> Any:
    return hessian(lambda x: model(x).square().mean())(batch(0, rows=1)[:, :2])


TRANSFORMS: list[Transform] = [
    by_grad,
    by_grad_and_value,
    by_vjp,
    by_jvp,
    by_vmap,
    by_vmap_with_gradients_outside,
    by_per_sample_gradients,
    by_jacrev,
    by_grad_of_grad,
    by_hessian,
]


def leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        for item in value:
            yield from leaves(item)


class TanhBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).tanh())


def twins(block: type[nn.Module] = Block) -> tuple[nn.Module, nn.Module]:
    plain, offloaded = Model(block=block), Model(block=block)
    offloaded.load_state_dict(plain.state_dict())
    return plain, offloaded


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])
def test_a_transform_over_an_offloaded_model_is_left_alone_between_training_steps(
    given: Callable[[nn.Module], nn.Module], transform: Transform
) -> None:
    plain, model = twins()
    expected = transform(plain)
    trained = train(plain, train_step, plain, 2)
    with lighterage.offload(given(model), min_bytes=64, keep_last=0) as offloader:
        got = transform(model)
        for a, b in zip(leaves(expected), leaves(got), strict=True):
            assert same_bits(a.detach(), b.detach())
        assert offloader.stats(total=True).bytes_out == 0
        assert stood_aside(offloader.report(), "torch.func") >= 4
        assert_nothing_left(offloader)
        assert_same(trained, train(model, train_step, model, 2))
        assert offloader.stats(total=True).bytes_out > 0
        assert_nothing_left(offloader)


def test_the_report_names_the_section_that_stood_aside_for_a_transform() -> None:
    _, model = twins()
    with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
        by_grad(model)
        report = offloader.report()
        named = {name for name, reason, _ in report.stood_aside if "torch.func" in reason}
        assert {"layers.0", "layers.1", "layers.2", "layers.3"} <= named
        assert "torch.func" in str(report)


@pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])
def test_functional_call_outside_a_transform_is_offloaded(given: Callable[[nn.Module], nn.Module]) -> None:
    plain, model = twins()

    def gradients(of: nn.Module) -> list[torch.Tensor]:
        params = {name: (2 * p.detach()).requires_grad_() for name, p in of.named_parameters()}
        loss = functional_loss(of, batch(0))(params)
        return [loss.detach(), *torch.autograd.grad(loss, list(params.values()))]

    expected = gradients(plain)
    with lighterage.offload(given(model), min_bytes=64, keep_last=0) as offloader:
        for a, b in zip(expected, gradients(model), strict=True):
            assert same_bits(a, b)
        assert offloader.stats().bytes_out > 0
        assert_nothing_left(offloader)


def test_a_transform_between_forward_and_backward_leaves_both_right() -> None:
    plain, model = twins()

    def interleaved(of: nn.Module) -> list[torch.Tensor]:
        loss = of(batch(0)).square().mean()
        inner = list(leaves(by_grad(of)))
        loss.backward()
        return [loss.detach(), *inner, *(p.grad for p in of.parameters() if p.grad is not None)]

    expected = interleaved(plain)
    with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
        for a, b in zip(expected, interleaved(model), strict=True):
            assert same_bits(a, b)
        assert offloader.stats(total=True).bytes_out > 0
        assert_nothing_left(offloader)


def test_an_ensemble_through_vmap_of_stacked_states_is_left_alone() -> None:
    # Stacked before offload: stack_module_state wants models of one class, and a section's class is its own.
    models = [Model() for _ in range(3)]
    params, buffers = stack_module_state(models)

    def outputs() -> torch.Tensor:
        for p in params.values():
            p.grad = None

        def call(p: dict[str, torch.Tensor], b: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return functional_call(models[0], (p, b), (x,))

        out = vmap(call, in_dims=(0, 0, None))(params, buffers, batch(0))
        out.square().mean().backward()
        return torch.cat([out.flatten(), *(p.grad.flatten() for p in params.values())]).detach()

    expected = outputs()
    with lighterage.offload(models[0], min_bytes=64, keep_last=0) as offloader:
        assert same_bits(outputs(), expected)
        assert stood_aside(offloader.report(), "torch.func") >= 4
        assert_nothing_left(offloader)


def test_torch_autograd_functional_is_offloaded_and_right() -> None:
    plain, model = twins()

    def jacobian(of: nn.Module) -> torch.Tensor:
        return torch.autograd.functional.jacobian(lambda x: of(x).mean((0, 1)), batch(0, rows=2))

    expected = jacobian(plain)
    with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
        assert same_bits(jacobian(model), expected)
        assert offloader.stats(total=True).bytes_out > 0
        assert_nothing_left(offloader)


def test_forward_mode_derivatives_are_right_through_an_offloaded_model() -> None:
    plain, model = twins()

    def tangent(of: nn.Module) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(batch(0), batch(1))
            out = torch.autograd.forward_ad.unpack_dual(of(dual))
            return torch.cat([out.primal.flatten(), out.tangent.flatten()]).detach()

    expected = tangent(plain)
    with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
        assert same_bits(tangent(model), expected)
        assert_nothing_left(offloader)


def test_forward_over_reverse_derivatives_are_right_through_an_offloaded_model() -> None:
    # silu has no forward-mode derivative of its backward.
    plain, model = twins(TanhBlock)

    def product_with_hessian(of: nn.Module) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(batch(0).requires_grad_(), batch(1))
            (slope,) = torch.autograd.grad(of(dual).square().mean(), dual)
            return torch.autograd.forward_ad.unpack_dual(slope).tangent.detach()

    expected = product_with_hessian(plain)
    with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
        assert same_bits(product_with_hessian(model), expected)
        assert offloader.stats(total=True).bytes_out > 0
        assert_nothing_left(offloader)
