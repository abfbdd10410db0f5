"""What `get_cpu_offload_context` returns, what its arguments do, and how it says that they do nothing."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import lighterage.compat.transformer_engine as te
from lighterage import OffloadError, Policy
from tests.compat.stacks import DEVICE, NUM_LAYERS, SMALL, Runner, assert_nothing_left, batch, get_context, make_layers


class Watched(nn.Module):
    """A layer that remembers the storages of what it saved, without holding them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.saved: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).exp()
        self.saved.append(StorageWeakRef(hidden.untyped_storage()))
        return hidden.sin()

    @property
    def num_on_device(self) -> int:
        return sum(not ref.expired() for ref in self.saved)


def watched(num_layers: int = NUM_LAYERS) -> list[Watched]:
    return [Watched(layer) for layer in make_layers(num_layers)]


def test_the_parameters_are_those_of_transformer_engine():
    names = [
        "enabled",
        "num_layers",
        "model_layers",
        "offload_activations",
        "offload_weights",
        "double_buffering",
        "manual_synchronization",
        "retain_pinned_cpu_buffers",
        "offload_stream",
    ]
    parameters = inspect.signature(te.get_cpu_offload_context).parameters
    assert list(parameters)[: len(names)] == names
    assert [parameters[name].default for name in names] == [False, 1, 1, True, False, False, False, False, None]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[len(names) :])


@pytest.mark.parametrize("code_path", ["v1", "v2"])
def test_not_enabled_nothing_happens(code_path):
    context, sync = te.get_cpu_offload_context(code_path=code_path)
    assert isinstance(context, contextlib.nullcontext)
    x = batch(1)
    assert sync(x) is x
    context, sync, controller = te.get_cpu_offload_context(manual_synchronization=True, code_path=code_path)
    assert controller is None


def test_disabled_it_is_used_like_the_one_that_does():
    context, _ = te.get_cpu_offload_context(enabled=False, num_layers=1, model_layers=3)
    with context, context.layer(2):
        pass
    assert context.offloader is None
    context.close()
    with pytest.raises(ValueError, match="from 0 to 2"), context.layer(3):
        pass


@pytest.mark.parametrize(
    "switch",
    [
        "enabled",
        "offload_activations",
        "offload_weights",
        "double_buffering",
        "manual_synchronization",
        "retain_pinned_cpu_buffers",
    ],
)
def test_a_switch_is_true_or_false(switch):
    with pytest.raises(TypeError, match=f"{switch} is True or False; got 'no'"):
        te.get_cpu_offload_context(**{"enabled": True, "model_layers": 4, switch: "no"})


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("counts", [{"num_layers": -5}, {"num_layers": 99}, {"num_layers": "x"}, {"model_layers": 0}])
def test_counts_are_checked_whatever_else_is_asked_for(enabled, manual, counts):
    given = {"enabled": enabled, "model_layers": 4, "manual_synchronization": manual, **counts}
    with pytest.raises((TypeError, ValueError), match=next(iter(counts))):
        te.get_cpu_offload_context(**given)


def test_leaving_a_context_that_was_not_entered_is_told():
    context, _ = get_context()
    with pytest.raises(OffloadError, match="without having been entered"):
        context.__exit__(None, None, None)


@pytest.mark.parametrize("code_path", ["v1", "v2"])
def test_enabled_it_gives_a_context_a_function_and_by_hand_a_controller(code_path):
    context, sync = get_context(code_path=code_path)
    with context as entered:
        assert entered is context
    assert sync(batch(1)).requires_grad
    _, _, controller = get_context(code_path=code_path, manual_synchronization=True)
    assert isinstance(controller, te.ManualOffloadSynchronizer)


@pytest.mark.parametrize("num_offloaded", [0, 1, 3, 4])
def test_the_first_num_layers_layers_move_and_their_memory_is_freed(num_offloaded):
    layers = watched()
    context, sync = get_context(num_layers=num_offloaded)
    loss = Runner(context, sync).forward(layers, batch(1)).sum()
    on_device = [layer.num_on_device for layer in layers]
    allowed = NUM_LAYERS - num_offloaded
    # As there: the layer that ran last waits with as many before it as may be on the device.
    assert sum(on_device) == allowed
    assert on_device == [0] * num_offloaded + [1] * allowed
    loss.backward()
    del loss
    gc.collect()
    assert [layer.num_on_device for layer in layers] == [0] * NUM_LAYERS
    report = context.offloader.report()
    moved = [row.bytes_out > 0 for row in report.sections]
    assert moved == [True] * num_offloaded + [False] * allowed
    assert_nothing_left(context)


def test_in_forward_no_more_layers_are_on_the_device_than_promised():
    layers = watched(8)
    context, sync = get_context(num_layers=5, model_layers=8)
    counts: list[int] = []

    def run(layer: Watched, h: Tensor) -> Tensor:
        h = layer(h)
        counts.append(sum(layer.num_on_device for layer in layers))  # before this one has ended
        return h

    runner, h = Runner(context, sync), batch(1)
    for layer in layers:
        h = runner.run(lambda h, layer=layer: run(layer, h), h)
    assert counts == [1, 2, 3, 3, 3, 3, 3, 3]
    h.sum().backward()


def test_warnings_name_the_callers_line():
    layer, x = te.Linear(4, 4), torch.randn(2, 4, device=DEVICE)
    calls = [
        lambda: te.get_cpu_offload_context(enabled=True, model_layers=4, double_buffering=True),
        lambda: layer(x, is_first_microbatch=True),
        lambda: te.autocast(enabled=False, calibrating=True),
    ]
    for call in calls:
        with pytest.warns(te.NotHonoured) as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_is_cpu_offload_enabled_tells_whether_this_thread_is_inside():
    context, _ = get_context()
    assert not te.is_cpu_offload_enabled()
    with context:
        assert te.is_cpu_offload_enabled()
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(te.is_cpu_offload_enabled()))
        thread.start()
        thread.join()
        assert answers == [False]
    assert not te.is_cpu_offload_enabled()
    with torch.no_grad(), context:
        assert not te.is_cpu_offload_enabled()
    with pytest.raises(ValueError, match="on purpose"), context:
        raise ValueError("on purpose")
    assert not te.is_cpu_offload_enabled()
    with te.get_cpu_offload_context()[0]:
        assert not te.is_cpu_offload_enabled()


def test_entering_the_context_inside_itself_is_an_error():
    context, _ = get_context()
    with context, pytest.raises(OffloadError, match="inside itself"), context:
        pass
    with context:
        pass


def test_two_contexts_nest_and_the_inner_one_takes_what_is_saved():
    outer, inner = get_context()[0], get_context()[0]
    layers, x = make_layers(2), batch(1)
    plain = copy.deepcopy(layers)
    with outer:
        h = layers[0](x)
        with inner:
            h = layers[1](h)
    h.sum().backward()
    y = batch(1)
    plain[1](plain[0](y)).sum().backward()
    assert torch.equal(x.grad, y.grad)
    del h
    for context in (outer, inner):
        assert context.offloader.stats(total=True).bytes_out > 0
        assert_nothing_left(context)


def test_offload_weights_is_warned_of_and_moves_nothing_alone():
    with pytest.warns(te.NotHonoured, match="weights"):
        context, _ = get_context(offload_weights=True)
    assert isinstance(context, te.CpuOffloadContext)
    with pytest.warns(te.NotHonoured, match="weights"):
        context, _, controller = get_context(
            offload_weights=True, offload_activations=False, manual_synchronization=True
        )
    assert isinstance(context, contextlib.nullcontext) and controller is None
    with pytest.raises(ValueError, match="nothing to offload"):
        get_context(offload_activations=False)


def test_double_buffering_is_warned_of():
    with pytest.warns(te.NotHonoured, match="double_buffering"):
        get_context(double_buffering=True)


def test_a_stream_is_warned_of_by_hand_and_refused_otherwise():
    stream = object()
    with pytest.raises(ValueError, match="manual_synchronization=True"):
        get_context(offload_stream=stream)
    with pytest.warns(te.NotHonoured, match="two streams of its own"):
        get_context(offload_stream=stream, manual_synchronization=True)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_layers": NUM_LAYERS + 1}, ValueError, "num_layers"),
        ({"num_layers": -1}, ValueError, "num_layers"),
        ({"num_layers": None}, TypeError, "num_layers"),
        ({"model_layers": 0, "num_layers": 0}, ValueError, "model_layers"),
        ({"model_layers": 2.0}, TypeError, "model_layers"),
        ({"code_path": "v3"}, ValueError, "code_path"),
        ({"policy": {"min_bytes": 1}}, TypeError, "lighterage.Policy"),
        ({"policy": Policy(keep_last=1)}, ValueError, "num_layers"),
        ({"policy": Policy(select="marked")}, ValueError, "code_path"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(options, error, match):
    with pytest.raises(error, match=match):
        get_context(**options)


@pytest.mark.parametrize("num_layers", [NUM_LAYERS - 1, NUM_LAYERS])
def test_too_many_layers_to_hide_the_copies_of_are_warned_of(num_layers):
    with pytest.warns(UserWarning, match="hide"):
        context, sync = get_context(num_layers=num_layers)
    x = batch(1)
    Runner(context, sync).forward(make_layers(), x).sum().backward()
    assert context.offloader.stats().bytes_in > 0


def test_by_hand_num_layers_may_be_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_context(num_layers=None, manual_synchronization=True)


def test_the_policy_chooses_the_rest():
    context, sync = get_context(policy=Policy(min_bytes=1 << 30))
    Runner(context, sync).forward(make_layers(), batch(1)).sum().backward()
    assert context.offloader.stats().bytes_out == 0
    assert "under min_bytes" in str(context.offloader.report())


def test_a_closed_context_refuses_and_what_was_saved_stays_usable():
    layers, x = make_layers(), batch(1)
    context, sync = get_context()
    loss = Runner(context, sync).forward(layers, x).sum()
    context.close()
    loss.backward()
    assert x.grad is not None
    with pytest.raises(OffloadError, match="close"), context:
        pass
    assert not te.is_cpu_offload_enabled()


def test_a_context_that_is_dropped_closes_and_backward_still_works():
    layers, x, y = make_layers(), batch(1), batch(1)
    loss = layers[5](layers[4](layers[3](layers[2](layers[1](layers[0](y)))))).sum()
    loss.backward()
    context, sync = get_context()
    loss = Runner(context, sync).forward(layers, x).sum()
    offloader = context.offloader
    del context
    gc.collect()
    loss.backward()
    assert torch.equal(x.grad, y.grad)
    del loss
    deadline = time.monotonic() + 5
    while "closed" not in repr(offloader) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert "closed" in repr(offloader)


def test_tensors_that_are_on_the_host_already_stay_there():
    if DEVICE.type == "cpu":
        pytest.skip("there is no accelerator: CPU tensors are what moves")
    context, _ = te.get_cpu_offload_context(enabled=True, num_layers=1, model_layers=4, policy=SMALL)
    weight = torch.randn(64, 64, requires_grad=True)
    with context:
        y = (weight @ weight).exp()
    y.sum().backward()
    assert context.offloader.stats().bytes_out == 0
