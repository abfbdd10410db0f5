"""Programs that give errors or wrong gradients under Transformer Engine's offload: here the same bits as without."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lighterage.compat.transformer_engine as te
from tests.compat.stacks import (
    NUM_LAYERS,
    Runner,
    assert_nothing_left,
    batch,
    compare,
    get_context,
    gradients,
    make_layers,
)

_PATHS: list[dict[str, Any]] = [
    {},
    {"num_layers": NUM_LAYERS - 2},
    {"manual_synchronization": True},
    {"retain_pinned_cpu_buffers": True},
]
every_mode = pytest.mark.parametrize("mode", _PATHS, ids=["default", "four layers", "manual", "retained"])


def _steps(layers: nn.ModuleList, runner: Runner) -> list[Tensor]:
    values = []
    for seed in range(3):
        x = batch(seed)
        loss = runner.forward(layers, x).square().mean()
        loss.backward()
        values += [loss.detach(), x.grad]
    return values


def _moves(mode: dict[str, Any]) -> bool:
    return "manual_synchronization" not in mode


@every_mode
def test_plain_steps_are_bitwise_equal(mode):
    compare(_steps, moves=_moves(mode), **mode)


@every_mode
@pytest.mark.parametrize("order", ["first in first out", "last in first out"])
def test_two_microbatches_in_flight(mode, order):
    def program(layers, runner):
        inputs = [batch(seed) for seed in (1, 2)]
        losses = [runner.forward(layers, x).square().mean() for x in inputs]
        values = [loss.detach() for loss in losses]
        while losses:
            losses.pop(0 if order.startswith("first") else -1).backward()
        return [*values, *(x.grad for x in inputs)]

    compare(program, moves=_moves(mode), **mode)


@every_mode
def test_retain_graph(mode):
    def program(layers, runner):
        x = batch(1)
        loss = runner.forward(layers, x).square().mean()
        loss.backward(retain_graph=True)
        once = x.grad.clone()
        loss.backward()
        return [loss.detach(), once, x.grad]

    compare(program, moves=_moves(mode), **mode)


@every_mode
def test_no_grad_between_steps(mode):
    def program(layers, runner):
        values = _steps(layers, runner)
        with torch.no_grad():
            values.append(runner.forward(layers, batch(7)))
            values.append(runner.forward(layers[:2], batch(8)))
        return [*values, *_steps(layers, runner)]

    compare(program, moves=_moves(mode), **mode)


@every_mode
@pytest.mark.parametrize("where", ["in a layer", "between layers", "in backward"])
def test_an_exception_and_then_going_on(mode, where):
    def fail(x: Tensor) -> Tensor:
        raise KeyError("on purpose")

    def broken(layers: nn.ModuleList, runner: Runner) -> None:
        h = runner.forward(layers[:3], batch(1))
        if where == "in a layer":
            runner.run(fail, h)
        if where == "in backward":
            h.register_hook(fail)
            h.sum().backward()
        raise KeyError

    def program(layers, runner):
        with pytest.raises(KeyError):
            broken(layers, runner)
        layers.zero_grad()
        return _steps(layers, runner)

    compare(program, moves=_moves(mode), **mode)


@every_mode
def test_skip_connections(mode):
    def program(layers, runner):
        x = batch(1)
        outs = [x]
        for index, layer in enumerate(layers):
            early = outs[max(0, index - 3)]
            outs.append(runner.run(lambda h, layer=layer, early=early: layer(h) * early.sigmoid(), outs[-1]))
        loss = (outs[-1] * outs[2]).square().mean()
        loss.backward()
        return [loss.detach(), x.grad]

    compare(program, moves=_moves(mode), **mode)


@every_mode
def test_layer_drop(mode):
    def program(layers, runner):
        values = []
        for kept in ([0, 2, 3, 5], [1], [0, 1, 2, 3, 4, 5], [4, 5]):
            x = batch(len(kept))
            loss = runner.forward([layers[index] for index in kept], x).square().mean()
            loss.backward()
            values += [loss.detach(), x.grad]
        return values

    compare(program, moves=_moves(mode), **mode)


@every_mode
def test_changing_shapes(mode):
    """There, retained buffers have the shapes of the first step."""

    def program(layers, runner):
        values = []
        for rows in (6, 9, 2, 12, 6):
            x = batch(rows, rows)
            loss = runner.forward(layers, x).square().mean()
            loss.backward()
            values += [loss.detach(), x.grad]
        return values

    compare(program, moves=_moves(mode), **mode)


class _Views(torch.autograd.Function):
    """Saves what is not contiguous, and logs the strides that backward gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[Any]) -> Tensor:
        ctx.save_for_backward(x.transpose(0, 2), x[..., ::2], x.flip(0).permute(2, 0, 1), x[:1].expand(4, -1, -1))
        ctx.log = log
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        transposed, *others = ctx.saved_tensors
        ctx.log += [torch.tensor([*saved.shape, *saved.stride()]) for saved in (transposed, *others)]
        ctx.log += [saved.clone() for saved in others]
        return grad * transposed.transpose(0, 2), None


@every_mode
def test_non_contiguous_saves_come_back_with_their_strides(mode):
    def program(layers, runner):
        log: list[Tensor] = []
        x = batch(1)
        h = x
        for layer in layers:
            h = runner.run(lambda h, layer=layer: _Views.apply(layer(h), log), h)
        h.square().mean().backward()
        return [*log, x.grad]

    compare(program, moves=_moves(mode), **mode)


@every_mode
@pytest.mark.parametrize("declared", [1, 2, 4])
def test_more_layers_run_than_declared(mode, declared, recwarn):
    options = mode | {"model_layers": declared, "num_layers": min(declared, 1)}
    compare(_steps, moves=_moves(mode), **options)


def test_fewer_layers_run_than_declared():
    compare(_steps, model_layers=8, num_layers=5)


def test_double_backward():
    def program(layers, runner):
        x = batch(1)
        (grad,) = torch.autograd.grad(runner.forward(layers, x).sin().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return [grad.detach(), x.grad]

    compare(program)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("context", ["around", "inside"])
def test_checkpointed_layers(use_reentrant, context):
    def program(layers, runner):
        x = batch(1)
        h = x
        for layer in layers:
            if context == "around":
                h = runner.run(lambda h, layer=layer: checkpoint(layer, h, use_reentrant=use_reentrant), h)
            else:
                h = checkpoint(lambda h, layer=layer: runner.run(layer, h), h, use_reentrant=use_reentrant)
        loss = h.square().mean()
        loss.backward()
        assert [layer.num_forwards for layer in layers] == [2] * len(layers)
        return [loss.detach(), x.grad]

    compare(program, moves=context == "around")


def test_the_context_serves_as_a_decorator():
    context, _ = get_context()
    layers = make_layers(2)

    @context
    def run(x: Tensor) -> Tensor:
        assert te.is_cpu_offload_enabled()
        return layers[0](x)

    x = batch(1)
    y = run(x)
    (section,) = context.offloader.sections
    assert section.name == "layer 0"
    y.sum().backward()
    del y
    assert context.offloader.stats().bytes_out > 0
    assert_nothing_left(context)


@pytest.mark.parametrize("random", range(6))
def test_any_program_of_these_gives_the_same_bits(random):
    """Forwards of some layers, evaluations, failures and backwards, in any order."""

    def program(layers, runner):
        generator = torch.Generator().manual_seed(random)
        draw = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
        waiting, values = [], []
        for seed in range(14):
            what = draw(6)
            if what == 0:
                with torch.no_grad():
                    runner.forward(layers, batch(seed))
            elif what == 1:
                with pytest.raises(RuntimeError):
                    runner.run(lambda h: h @ h, runner.forward(layers[: draw(5)], batch(seed)))
            elif what == 2 and waiting:
                loss = waiting.pop(draw(len(waiting)))
                loss.backward(retain_graph=bool(draw(2)))
                values.append(loss.detach())
            else:
                chosen = [layer for layer in layers if draw(4)]
                waiting.append(runner.forward(chosen, batch(seed, 2 + draw(5))).square().mean())
            if runner.controller is not None:
                call = ["start_offload_layer", "release_activation_forward_gpu_memory", "start_reload_layer"][draw(3)]
                getattr(runner.controller, call)(draw(NUM_LAYERS))
            else:
                draw(3), draw(NUM_LAYERS)
        for loss in waiting:
            loss.backward()
        return [*values, *gradients(layers)]

    for mode in _PATHS:
        compare(program, moves=_moves(mode), **mode)


def test_layers_are_numbered_as_they_run():
    """An exception, an evaluation and a short forward each leave the next forward to begin with layer 0."""
    layers = make_layers()
    context, sync = get_context()
    runner = Runner(context, sync)

    def names() -> list[str]:
        loss = runner.forward(layers, batch(1)).sum()
        found = [section.name for section in context.offloader.sections]
        loss.backward()
        return found

    expected = [f"layer {index}" for index in range(NUM_LAYERS)]
    assert names() == expected
    runner.forward(layers[:2], batch(1)).sum().backward()
    assert names() == expected
    with torch.no_grad():
        runner.forward(layers[:4], batch(1))
    assert names() == expected
    with pytest.raises(RuntimeError):
        runner.run(lambda h: h @ h, runner.forward(layers[:3], batch(1)))
    assert names() == expected
    with pytest.raises(RuntimeError):
        runner.run(lambda h: h @ h, batch(1))  # in the first layer: nothing was saved that could be seen to go
    assert names() == expected
    held = [runner.forward(layers, batch(seed)) for seed in range(3)]
    assert [s.name for s in context.offloader.sections] == expected * 3
    del held
    assert names() == expected


def test_a_layer_can_be_numbered_where_counting_cannot_know():
    layers = make_layers()
    context, _ = get_context(manual_synchronization=True)[:2]
    waiting = []
    for dropped in (1, 4):
        h = batch(dropped)
        for index, layer in enumerate(layers):
            if index != dropped:
                with context.layer(index):
                    h = layer(h)
        waiting.append(h)
    names = [section.name for section in context.offloader.sections]
    assert names == [f"layer {i}" for dropped, i in itertools.product((1, 4), range(NUM_LAYERS)) if i != dropped]
    for index, error in ((NUM_LAYERS, ValueError), (-1, ValueError), ("1", TypeError)):
        with pytest.raises(error, match="layer_id"), context.layer(index):
            pass
    torch.stack(waiting).sum().backward()
    del waiting, h
    assert_nothing_left(context)
