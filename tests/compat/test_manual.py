"""The controller of a schedule by hand: what its calls move and free, in any order, with any number of microbatches."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

import lighterage.compat.transformer_engine as te
from lighterage.engine.allocation import Stage
from tests.compat.stacks import NUM_LAYERS, Runner, assert_nothing_left, batch, compare, get_context, make_layers
from tests.compat.test_offload_context import watched

_CALLS = ["start_offload_layer", "release_activation_forward_gpu_memory", "start_reload_layer"]


def test_a_layer_for_which_nothing_is_called_is_not_moved():
    context, *rest = get_context(manual_synchronization=True)
    Runner(context, *rest).forward(make_layers(), batch(1)).sum().backward()
    assert context.offloader.stats(total=True).bytes_out == 0
    assert_nothing_left(context)


def test_start_copies_release_frees_and_reload_brings_back_that_layer_alone():
    layers = watched()
    context, sync, controller = get_context(manual_synchronization=True)
    loss = Runner(context, sync).forward(layers, batch(1)).sum()
    controller.start_offload_layer(2)
    assert [layer.num_on_device for layer in layers] == [1] * NUM_LAYERS
    controller.release_activation_forward_gpu_memory(2)
    assert [layer.num_on_device for layer in layers] == [1, 1, 0, 1, 1, 1]
    section = context.offloader.sections[2].section
    assert any(allocation.stage is Stage.AWAY for allocation in section.live_allocations())
    controller.start_reload_layer(2)
    assert all(allocation.stage is not Stage.AWAY for allocation in section.live_allocations())
    del section
    loss.backward()
    del loss
    rows = context.offloader.report().sections
    assert [row.bytes_out > 0 for row in rows] == [False, False, True, False, False, False]
    assert [row.bytes_in > 0 for row in rows] == [False, False, True, False, False, False]
    assert_nothing_left(context)


def test_release_alone_copies_first():
    layers = watched()
    context, sync, controller = get_context(manual_synchronization=True)
    loss = Runner(context, sync).forward(layers, batch(1)).sum()
    controller.release_activation_forward_gpu_memory(0)
    assert layers[0].num_on_device == 0
    loss.backward()
    assert context.offloader.stats(total=True).bytes_in == context.offloader.stats(total=True).bytes_out > 0


def test_a_call_inside_the_layer_s_context_is_about_what_was_saved_so_far():
    layers = make_layers()
    context, sync, controller = get_context(manual_synchronization=True)
    h = batch(1)
    for index, layer in enumerate(layers):
        with context:
            h = layer(h)
            controller.start_offload_layer(index)
            running = context.offloader.sections[index].section
            assert any(allocation.left is not None for allocation in running.live_allocations())
        h = sync(h)
    h.sum().backward()
    del h, layer, running
    assert context.offloader.stats(total=True).bytes_out > 0
    assert_nothing_left(context)


@pytest.mark.parametrize("calls", list(itertools.permutations(_CALLS)) + [(name,) for name in _CALLS])
def test_calls_inside_and_outside_of_the_context_give_the_same_bits(calls):
    def program(layers, runner):
        x = batch(1)
        h = x

        def run(layer, index, h):
            h = layer(h).exp()
            if runner.controller is not None:
                for call in calls:
                    getattr(runner.controller, call)(index)
            return h.sin()

        for index, layer in enumerate(layers):
            h = runner.run(lambda h, layer=layer, index=index: run(layer, index, h), h)
        if runner.controller is not None:
            for index in range(NUM_LAYERS):
                runner.controller.release_activation_forward_gpu_memory(index)
            for index in reversed(range(NUM_LAYERS)):
                runner.controller.start_reload_layer(index)
        loss = h.square().mean()
        loss.backward()
        return [loss.detach(), x.grad]

    total = compare(program, manual_synchronization=True)
    assert total.bytes_in == total.bytes_out


def _whole(layers, runner):
    """As they document it: forward and start, release all, reload all, backward."""
    x = batch(1)
    h = x
    for index, layer in enumerate(layers):
        h = runner.run(layer, h)
        if runner.controller is not None:
            runner.controller.start_offload_layer(index)
    if runner.controller is not None:
        for index in range(NUM_LAYERS):
            runner.controller.release_activation_forward_gpu_memory(index)
        for index in reversed(range(NUM_LAYERS)):
            runner.controller.start_reload_layer(index)
    loss = h.square().mean()
    loss.backward()
    return [loss.detach(), x.grad]


def test_their_documented_order_of_calls():
    total = compare(_whole, manual_synchronization=True)
    assert total.bytes_in == total.bytes_out


@pytest.mark.parametrize("calls", list(itertools.permutations(_CALLS)) + [(name, name) for name in _CALLS])
def test_any_order_of_calls_gives_the_same_bits(calls):
    def program(layers, runner):
        x = batch(1)
        loss = runner.forward(layers, x).square().mean()
        if runner.controller is not None:
            for call in calls:
                for index in range(NUM_LAYERS):
                    getattr(runner.controller, call)(index)
        loss.backward()
        return [loss.detach(), x.grad]

    compare(program, manual_synchronization=True, moves=_CALLS[1] in calls)


@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
def test_a_1f1b_loop(num_in_flight):
    """Forwards of several microbatches before the first backward; each call names the layer alone."""

    def program(layers, runner):
        waiting, values = [], []

        def back() -> None:
            x, loss = waiting.pop(0)
            if runner.controller is not None:
                for index in reversed(range(NUM_LAYERS)):
                    runner.controller.start_reload_layer(index)
            loss.backward()
            values.extend([loss.detach(), x.grad])

        for seed in range(6):
            x = batch(seed)
            waiting.append((x, runner.forward(layers, x).square().mean()))
            if runner.controller is not None:
                for call in _CALLS[:2]:
                    for index in range(NUM_LAYERS):
                        getattr(runner.controller, call)(index)
            if len(waiting) > num_in_flight:
                back()
        while waiting:
            back()
        return values

    compare(program, manual_synchronization=True)


@pytest.mark.parametrize("newest", [False, True])
def test_reload_takes_the_oldest_forward_or_the_newest(newest):
    layers = make_layers()
    context, sync, controller = get_context(manual_synchronization=True)
    runner = Runner(context, sync)
    losses = [runner.forward(layers, batch(seed)).sum() for seed in (1, 2)]
    for index in range(NUM_LAYERS):
        controller.release_activation_forward_gpu_memory(index)
    sections = [s for s in context.offloader.sections if s.name == "layer 3"]

    def away() -> list[bool]:
        return [any(a.stage is Stage.AWAY for a in s.section.live_allocations()) for s in sections]

    assert away() == [True, True]
    controller.start_reload_layer(3, newest=newest)
    assert away() == [newest, not newest]
    controller.start_reload_layer(3, newest=newest)
    assert away() == [False, False]
    controller.start_reload_layer(3)
    for loss in losses:
        loss.backward()
    del loss, losses
    assert_nothing_left(context)


def test_a_layer_that_did_not_run_or_is_through_needs_no_care():
    """Layer drop and no_grad under loops over all layers."""
    layers = make_layers()
    context, sync, controller = get_context(manual_synchronization=True)
    runner = Runner(context, sync)
    runner.forward(layers[:2], batch(1)).sum().backward()
    with torch.no_grad():
        runner.forward(layers, batch(1))
    gc.collect()
    for call in _CALLS:
        for index in range(NUM_LAYERS):
            getattr(controller, call)(index)
    assert context.offloader.stats(total=True).bytes_out == 0


@pytest.mark.parametrize("call", _CALLS)
@pytest.mark.parametrize(("layer_id", "error"), [(NUM_LAYERS, ValueError), (-1, ValueError), (None, TypeError)])
def test_no_such_layer_is_an_error(call, layer_id, error):
    _, _, controller = get_context(manual_synchronization=True)
    with pytest.raises(error, match="layer_id"):
        getattr(controller, call)(layer_id)


def test_by_hand_the_opt_in_path_moves_what_is_marked_alone():
    def program(layers, runner):
        def layer_with_mark(layer, h):
            hidden = layer(h).exp()
            te.mark_activation_offload(hidden)
            return hidden.sin()

        x = batch(1)
        h = x
        for layer in layers:
            h = runner.run(lambda h, layer=layer: layer_with_mark(layer, h), h)
        if runner.controller is not None:
            for index in range(NUM_LAYERS):
                runner.controller.start_offload_layer(index)
                runner.controller.release_activation_forward_gpu_memory(index)
        h.sum().backward()
        return [x.grad]

    total = compare(program, manual_synchronization=True, code_path="v1")
    assert total.bytes_out == NUM_LAYERS * batch(1).nbytes
