"""Claims about other people's saved-tensor hooks, around sections and inside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.autograd.graph import (
    allow_mutation_on_saved_tensors,
    disable_saved_tensors_hooks,
    save_on_cpu,
    saved_tensors_hooks,
)

import lighterage
from tests.engine.twin import Block, Model, compare, layers_of, loss_of, stood_aside, train_step

Context = Callable[[], contextlib.AbstractContextManager[object]]


def whole(model: nn.Module) -> nn.Module:
    return model


class Negating:
    """A user's hooks that change what is stored, and count."""

    def __init__(self) -> None:
        self.num_packs = 0

    def __call__(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.num_packs += 1
        return -tensor.detach()

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        return -packed


NESTING = [
    pytest.param(save_on_cpu, "torch.autograd.graph", id="save_on_cpu"),
    pytest.param(Negating(), "test_foreign_hooks", id="user's hooks"),
]
nesting = pytest.mark.parametrize(("context", "reason"), NESTING)
every_context = pytest.mark.parametrize(
    ("context", "reason"),
    [
        *NESTING,
        pytest.param(lambda: disable_saved_tensors_hooks("not here"), "disabled", id="disable_saved_tensors_hooks"),
        pytest.param(allow_mutation_on_saved_tensors, "torch.autograd.graph", id="allow_mutation_on_saved_tensors"),
    ],
)
both_given = pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])


@both_given
@every_context
def test_sections_stand_aside_under_hooks_pushed_around_the_model(
    context: Context, reason: str, given: Callable[[nn.Module], nn.Module]
) -> None:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        with context():
            loss = loss_of(model, seed)
            loss.backward()
        return loss.detach()

    run = compare(Model, given=given, step=step, moves=False, keep_last=0)
    assert run.total.bytes_out == 0
    assert stood_aside(run.report, reason) >= 4 * 3
    assert reason in str(run.report)


@both_given
@nesting
def test_sections_stand_aside_only_where_hooks_are_pushed_around_them(
    context: Context, reason: str, given: Callable[[nn.Module], nn.Module]
) -> None:
    class Mixed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            for index, layer in enumerate(self.layers):
                with context() if index == 1 else contextlib.nullcontext():
                    x = layer(x)
            return self.head(x).log_softmax(-1)

    run = compare(Mixed, given=given, keep_last=0)
    assert stood_aside(run.report, reason) == 3


@both_given
@nesting
def test_hooks_pushed_inside_a_section_give_the_same_bits(
    context: Context, reason: str, given: Callable[[nn.Module], nn.Module]
) -> None:
    class Inside(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.sin() * x.cos()
            with context():
                y = super().forward(y)
            return y.exp()

    run = compare(lambda: Model(block=Inside), given=given, keep_last=0)
    assert stood_aside(run.report, reason) == 0


def test_hooks_pushed_inside_a_section_see_what_they_would_without_offload() -> None:
    hooks = Negating()
    seen: list[int] = []

    class Inside(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin() * x.cos()
            with hooks():
                return super().forward(x)

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        hooks.num_packs = 0
        loss = train_step(model, seed)
        seen.append(hooks.num_packs)
        return loss

    compare(lambda: Model(block=Inside), step=step, keep_last=0)
    assert seen[0] > 0
    assert len(set(seen)) == 1


def test_hooks_around_a_named_section_are_respected() -> None:
    model = Model()
    hooks = Negating()
    with lighterage.offload(model.layers, min_bytes=64, keep_last=0) as offloader:
        with hooks(), offloader.section("mine") as section:
            assert section is None
            loss_of(model, 0).backward()
        assert hooks.num_packs > 0
        assert stood_aside(offloader.report(), "hooks") == 1 + 4
        train_step(model, 1)
        assert offloader.stats().bytes_out > 0


def test_an_exception_under_foreign_hooks_leaves_the_stack_as_it_was() -> None:
    @contextlib.contextmanager
    def failing() -> Iterator[None]:
        with pytest.raises(ArithmeticError, match="on purpose"):
            yield

    class Fails(Block):
        fails = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with save_on_cpu():
                y = super().forward(x)
                if self.fails:
                    raise ArithmeticError("on purpose")
            return y.tanh()

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        model.layers[1].fails = True
        with failing():
            loss_of(model, seed)
        model.layers[1].fails = False
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        return train_step(model, seed)

    compare(lambda: Model(block=Fails), given=whole, step=step, keep_last=0)


def test_the_graph_context_managers_that_only_watch_are_left_alone() -> None:
    seen: list[int] = []

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        params = list(model.parameters())
        calls: list[int] = []
        handle = torch.autograd.graph.register_multi_grad_hook(params, lambda grads: calls.append(len(grads)))
        with torch.autograd.set_detect_anomaly(True):
            loss = train_step(model, seed)
        handle.remove()
        seen.extend(calls)
        return loss

    compare(Model, given=whole, step=step, keep_last=0)
    assert len(seen) == 6


def test_switching_hooks_off_inside_a_section_fails_as_pytorch_has_it_and_leaves_nothing() -> None:
    class Disables(Block):
        disables = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with disable_saved_tensors_hooks("not here") if self.disables else contextlib.nullcontext():
                return super().forward(x)

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        if type(model.layers[2]) is not Disables:
            model.layers[2].disables = True
            with pytest.raises(RuntimeError, match="not here"):
                loss_of(model, seed)
            model.layers[2].disables = False
            for layer in model.layers:
                layer.num_forwards = 0
        return train_step(model, seed)

    compare(lambda: Model(block=Disables), given=whole, step=step, keep_last=0)


def test_hooks_are_enabled_again_after_a_section_under_disabled_hooks() -> None:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        if seed % 2:
            with disable_saved_tensors_hooks("not here"):
                return train_step(model, seed)
        return train_step(model, seed)

    run = compare(Model, given=whole, step=step, steps=4, keep_last=0)
    assert stood_aside(run.report, "disabled") >= 2 * 4
