"""PyTorch's checkpoint policies that name the CPU are honoured: what they name moves, and is not computed again."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lighterage
from lighterage import selective_checkpoint_contexts

mm = torch.ops.aten.mm.default
WIDTH = 32


class Count(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[Any] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    """Two products, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)
        self.b = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu((x @ self.a).sin() @ self.b)


def policy(moved: CheckpointPolicy, context: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return moved if op is mm else CheckpointPolicy.PREFER_RECOMPUTE


class Model(nn.Module):
    def __init__(self, context_fn: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.context_fn = context_fn

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.context_fn is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=False, context_fn=self.context_fn)
        return x


def run(model: Model, x: Tensor) -> tuple[list[Tensor], int]:
    """Loss and gradients, and how many products were computed."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with Count() as count:
        loss = model(x).square().sum()
        loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters())], count.calls[mm]  # type: ignore[list-item]


def pair(context_fn: Any) -> tuple[Model, Model, Tensor]:
    torch.manual_seed(0)
    plain = Model()
    other = copy.deepcopy(plain)
    other.context_fn = context_fn
    return plain, other, torch.randn(64, WIDTH)


@contextlib.contextmanager
def offloading(given: str, model: Model) -> Iterator[lighterage.Offloader | None]:
    if given == "nothing":
        yield None
        return
    modules = model if given == "model" else model.layers
    with lighterage.offload(modules, keep_last=0, min_bytes=64, tier="host") as offloader:
        yield offloader


@pytest.mark.parametrize("given", ["nothing", "layers", "model"])
@pytest.mark.parametrize("name", ["MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD", "MUST_SAVE", "PREFER_SAVE"])
def test_what_the_policy_names_is_not_computed_again(given: str, name: str) -> None:
    plain, other, x = pair(selective_checkpoint_contexts(functools.partial(policy, CheckpointPolicy[name])))
    expected, num_plain = run(plain, x)
    with offloading(given, other):
        got, num = run(other, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    # Two layers of two products, and two more for each in backward; nothing again.
    assert num_plain == num == 12


@pytest.mark.parametrize("name", ["MUST_RECOMPUTE", "PREFER_RECOMPUTE"])
def test_what_the_policy_has_computed_again_is(name: str) -> None:
    plain, other, x = pair(selective_checkpoint_contexts(functools.partial(policy, CheckpointPolicy[name])))
    expected, _ = run(plain, x)
    got, num = run(other, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert num > 12


def test_pytorch_itself_computes_again_what_is_to_be_offloaded() -> None:
    moved = functools.partial(policy, CheckpointPolicy.MUST_CPU_OFFLOAD)
    _, other, x = pair(functools.partial(create_selective_checkpoint_contexts, moved))
    _, num = run(other, x)
    assert num > 12


def test_what_is_offloaded_moves_through_the_offloader_around_it_and_leaves_nothing_behind() -> None:
    moved = functools.partial(policy, CheckpointPolicy.MUST_CPU_OFFLOAD)
    _, other, x = pair(selective_checkpoint_contexts(moved))
    with lighterage.offload(other, keep_last=0, min_bytes=64, tier="host") as offloader:
        for _ in range(3):
            run(other, x)
            stats = offloader.stats()
            # Four products, and the inputs of the two checkpoints.
            assert stats.bytes_out >= 4 * x.nbytes
            assert stats.host_bytes_in_use == 0
            assert offloader.sections == []


def test_a_second_backward_finds_what_was_put_by() -> None:
    moved = functools.partial(policy, CheckpointPolicy.MUST_CPU_OFFLOAD)
    plain, other, x = pair(selective_checkpoint_contexts(moved))
    grads = []
    for model in (plain, other):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


def test_a_random_operator_that_is_put_by_leaves_the_generator_as_in_forward() -> None:
    def draw(x: Tensor) -> Tensor:
        return torch.bernoulli(torch.full_like(x, 0.5)) * x.sin()

    def block(x: Tensor) -> Tensor:
        return draw(draw(x).cos())

    def once(context_fn: Any) -> Tensor:
        torch.manual_seed(3)
        x = torch.ones(8, 8, requires_grad=True)
        out = block(x) if context_fn is None else checkpoint(block, x, use_reentrant=False, context_fn=context_fn)
        out.sum().backward()
        assert x.grad is not None
        return x.grad

    calls = []

    def first_only(context: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if torch.Tag.nondeterministic_seeded in op.tags:
            calls.append(op)
            if len(calls) == 1:
                return CheckpointPolicy.MUST_CPU_OFFLOAD
        return CheckpointPolicy.MUST_RECOMPUTE

    expected = once(None)
    assert torch.equal(once(selective_checkpoint_contexts(first_only)), expected)
    assert len(calls) == 2


def test_a_tensor_that_was_put_by_and_then_written_to_is_refused() -> None:
    def block(x: Tensor, w: Tensor) -> Tensor:
        h = x @ w
        h.add_(1.0)
        return h.sin()

    moved = functools.partial(policy, CheckpointPolicy.MUST_CPU_OFFLOAD)
    x, w = torch.randn(8, 8), torch.randn(8, 8, requires_grad=True)
    out = checkpoint(block, x, w, use_reentrant=False, context_fn=selective_checkpoint_contexts(moved))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("scoped", [False, True])
def test_what_is_preferred_on_the_host_and_written_over_is_computed_again(scoped: bool) -> None:
    """PyTorch computes all of it again; dropout on a CPU writes to what it draws."""

    def block(x: Tensor, w: Tensor) -> Tensor:
        h = nn.functional.dropout(x @ w, 0.5)
        return h.add_(1.0).sin() * h

    def moved(context: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_CPU_OFFLOAD

    x, start = torch.randn(8, 8), torch.randn(8, 8)
    grads = []
    for context_fn in (None, selective_checkpoint_contexts(moved)):
        w = start.clone().requires_grad_()
        torch.manual_seed(0)
        given = {} if context_fn is None else {"context_fn": context_fn}
        layer = nn.Module()
        layer.forward = functools.partial(checkpoint, block, use_reentrant=False, **given)
        with lighterage.offload([layer], keep_last=0, min_bytes=1) if scoped else contextlib.nullcontext():
            layer(x, w).sum().backward()
        grads.append(w.grad)
    assert torch.equal(*grads)


def test_a_list_of_operators_is_saved() -> None:
    plain, other, x = pair(selective_checkpoint_contexts([mm]))
    expected, _ = run(plain, x)
    got, num = run(other, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert num == 12


def test_something_else_than_a_policy_is_refused() -> None:
    with pytest.raises(TypeError, match="list of operators"):
        selective_checkpoint_contexts(3)  # type: ignore[arg-type]
