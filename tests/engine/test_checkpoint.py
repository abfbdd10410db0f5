"""Claims about torch.utils.checkpoint: it still recomputes, its inputs move, the bits are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import lighterage
from tests.engine.twin import Block, Model, batch, compare, identity, layers_of, loss_of, stood_aside, train_step

both_kinds = pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class CheckpointedModel(Model):
    """Checkpoints around every layer: what most training scripts do."""

    use_reentrant = False
    options: ClassVar[dict[str, Any]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.use_reentrant, **self.options)
        return self.head(x).log_softmax(-1)


class ReentrantModel(CheckpointedModel):
    use_reentrant = True


class InnerBlock(Block):
    """Checkpoints a part of itself."""

    use_reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + checkpoint(super().forward, x.sin() * x.cos(), use_reentrant=self.use_reentrant)


class InnerReentrantBlock(InnerBlock):
    use_reentrant = True


class GradientCheckpointingLayer(nn.Module):
    """As in Hugging Face transformers: the layer's own __call__ checkpoints its forward."""

    gradient_checkpointing = True
    use_reentrant = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            call = partial(super().__call__, **kwargs)
            return checkpoint(call, *args, use_reentrant=self.use_reentrant)
        return super().__call__(*args, **kwargs)


class SelfCheckpointingBlock(GradientCheckpointingLayer, Block):
    pass


class SelfReentrantBlock(SelfCheckpointingBlock):
    use_reentrant = True


class NoisyBlock(nn.Module):
    """BatchNorm statistics and dropout: recomputation must see the same random numbers."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.fc = nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.fc(self.norm(x)).tanh())


def forwards(model: nn.Module) -> list[int]:
    return [layer.num_forwards for layer in model.layers]


def whole(model: nn.Module) -> nn.Module:
    return model


@both_kinds
@pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])
def test_a_checkpoint_around_a_section_still_recomputes(use_reentrant: bool, given: Callable[..., Any]) -> None:
    make = ReentrantModel if use_reentrant else CheckpointedModel
    run = compare(make, given=given, steps=3, moves=given is whole, keep_last=0)
    assert forwards(run.plain) == forwards(run.offloaded) == [6, 6, 6, 6]


def test_saved_inputs_of_checkpointed_layers_move_when_the_whole_model_is_given() -> None:
    run = compare(CheckpointedModel, given=whole, keep_last=0)
    input_bytes = batch(0).shape[0] * 5 * 16 * 4
    after_layers = [s for s in run.report.sections if "after layers" in s.name]
    assert sum(s.bytes_out for s in after_layers) >= 3 * input_bytes
    assert stood_aside(run.report, "checkpoint") >= 4


def test_the_report_says_that_sections_stood_aside_inside_a_checkpoint() -> None:
    run = compare(CheckpointedModel, given=layers_of, moves=False, keep_last=0)
    assert stood_aside(run.report, "checkpoint") + stood_aside(run.report, "backward") >= 3 * 4
    assert run.total.bytes_out == 0
    assert "checkpoint" in str(run.report)


@pytest.mark.parametrize("block", [InnerBlock, InnerReentrantBlock], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])
def test_a_checkpoint_inside_a_section_recomputes_and_its_inputs_move(
    block: type[Block], given: Callable[..., Any]
) -> None:
    run = compare(lambda: Model(block=block), given=given, steps=3, keep_last=0)
    assert forwards(run.plain) == forwards(run.offloaded) == [6, 6, 6, 6]
    layers = [s for s in run.report.sections if s.name.startswith(("layers.", "InnerBlock.", "InnerReentrantBlock."))]
    assert len(layers) == 4
    assert all(s.bytes_out > 0 for s in layers)


@pytest.mark.parametrize("block", [SelfCheckpointingBlock, SelfReentrantBlock], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])
def test_a_layer_that_checkpoints_itself_recomputes_and_its_inputs_move(
    block: type[Block], given: Callable[..., Any]
) -> None:
    run = compare(lambda: Model(block=block), given=given, steps=3, keep_last=0)
    assert forwards(run.plain) == forwards(run.offloaded) == [6, 6, 6, 6]


@both_kinds
def test_a_checkpoint_around_many_sections_recomputes_each(use_reentrant: bool) -> None:
    class Grouped(Model):
        def pair(self, x: torch.Tensor, first: int) -> torch.Tensor:
            return self.layers[first + 1](self.layers[first](x))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            for first in (0, 2):
                x = checkpoint(self.pair, x, first, use_reentrant=use_reentrant)
            return self.head(x).log_softmax(-1)

    run = compare(Grouped, given=whole, keep_last=0)
    assert forwards(run.plain) == forwards(run.offloaded) == [6, 6, 6, 6]


@both_kinds
def test_checkpoint_sequential_recomputes_around_sections(use_reentrant: bool) -> None:
    class Chunked(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = checkpoint_sequential(self.layers, 2, x, use_reentrant=use_reentrant)
            return self.head(x).log_softmax(-1)

    def make() -> nn.Module:
        model = Chunked()
        model.layers = nn.Sequential(*model.layers)
        return model

    run = compare(make, given=whole, keep_last=0)
    # The last chunk is not checkpointed.
    assert forwards(run.plain) == forwards(run.offloaded) == [6, 6, 3, 3]


def test_nested_checkpoints_recompute_as_often_as_without_offload() -> None:
    class Nested(CheckpointedModel):
        def __init__(self) -> None:
            super().__init__(block=InnerBlock)

    run = compare(Nested, given=whole, keep_last=0)
    assert forwards(run.plain) == forwards(run.offloaded)
    assert min(forwards(run.plain)) > 3


@both_kinds
@pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])
def test_dropout_sees_the_same_random_numbers_when_recomputed(use_reentrant: bool, given: Callable[..., Any]) -> None:
    make = ReentrantModel if use_reentrant else CheckpointedModel
    compare(lambda: make(dropout=0.5), given=given, moves=given is whole, keep_last=0)


@both_kinds
def test_batch_norm_statistics_and_dropout_are_those_of_the_run_without_offload(use_reentrant: bool) -> None:
    make = ReentrantModel if use_reentrant else CheckpointedModel
    run = compare(lambda: make(block=NoisyBlock), given=whole, keep_last=0)
    assert run.offloaded.layers[0].norm.num_batches_tracked == 6


def must_save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("inside", [False, True], ids=["around a section", "inside a section"])
def test_selective_checkpointing_recomputes_what_it_would_without_offload(inside: bool) -> None:
    contexts = partial(create_selective_checkpoint_contexts, must_save_products)

    class Selective(CheckpointedModel):
        options: ClassVar[dict[str, Any]] = {"context_fn": contexts}

    class SelectiveBlock(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + checkpoint(super().forward, x.sin() * x.cos(), use_reentrant=False, context_fn=contexts)

    make = partial(Model, block=SelectiveBlock) if inside else Selective
    products: list[int] = []

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        with CountProducts() as counted:
            loss = train_step(model, seed)
        products.append(counted.num)
        return loss

    run = compare(make, given=whole, step=step, keep_last=0)
    assert products[:3] == products[3:]
    assert forwards(run.plain) == forwards(run.offloaded) == [6, 6, 6, 6]


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_a_checkpointed_region_that_is_a_named_section_recomputes() -> None:
    plain = Model()
    offloaded = Model()
    offloaded.load_state_dict(plain.state_dict())
    plain_loss = loss_of(plain, 0)
    plain_loss.backward()
    with lighterage.offload([offloaded.stem], min_bytes=64, keep_last=0) as offloader:
        with offloader.section("trunk"):
            x = offloaded.stem(batch(0)).relu()
            for layer in offloaded.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            out = offloaded.head(x).log_softmax(-1)
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        loss.backward()
        assert offloader.stats().bytes_out > 0
    assert torch.equal(loss, plain_loss)
    for a, b in zip(plain.parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert forwards(offloaded) == [2, 2, 2, 2]


@both_kinds
def test_an_exception_in_a_recomputation_leaves_the_next_step_right(use_reentrant: bool) -> None:
    class Fails(ReentrantModel if use_reentrant else CheckpointedModel):  # type: ignore[misc]
        pass

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        if seed == 1:
            loss = loss_of(model, seed)
            handle = model.layers[1].register_forward_pre_hook(_fail)
            with pytest.raises(ArithmeticError, match="on purpose"):
                loss.backward()
            handle.remove()
            del loss
            model.zero_grad()
        return train_step(model, seed)

    compare(Fails, given=whole, step=step, keep_last=0, before=identity)


def _fail(module: nn.Module, args: Any) -> None:
    raise ArithmeticError("on purpose")


def test_early_stop_switched_off_changes_nothing() -> None:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            return train_step(model, seed)

    compare(CheckpointedModel, given=whole, step=step, keep_last=0)


def test_a_second_backward_through_checkpointed_layers_gives_the_same_gradients() -> None:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        loss = loss_of(model, seed)
        loss.backward(retain_graph=True)
        loss.backward()
        return loss.detach()

    compare(CheckpointedModel, given=whole, step=step, keep_last=0)
