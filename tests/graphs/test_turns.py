"""Replays take turns: what forward saved is neither overwritten before backward nor used twice. Graphs are Python."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lighterage import GraphError
from lighterage.graphs import Graphed, replaying
from lighterage.graphs.recording import Recording
from lighterage.graphs.shared_memory import SharedMemory, memory_of


class PythonGraph:
    """What a CUDA graph does, on the host."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@pytest.fixture(autouse=True)
def _no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying.Launch, "order", lambda self, *_: contextlib.nullcontext())


def graphed(
    module: Scale,
    memory: SharedMemory | None = None,
    places: tuple[int, int] = (1, 2),
    saved_outputs: tuple[int, ...] = (),
) -> Scale:
    """`module` with graphs that read and write static memory; the rest: see `Recording`."""
    x, weight = torch.zeros(2, requires_grad=True), module.weight
    y, grad_y, grad_x, grad_weight = torch.zeros(2, requires_grad=True), *(torch.zeros(2) for _ in range(3))
    saved = torch.zeros(2)

    def forward() -> None:
        saved.copy_(x.detach())
        y.data.copy_(weight * x)  # as a replay, which no version counter sees

    def backward() -> None:
        grad_x.copy_(grad_y * weight)
        grad_weight.copy_(grad_y * saved)

    with torch.no_grad():
        recording = Recording(
            name="Scale",
            function=module,
            arguments=[x],
            arguments_spec=pytree.tree_flatten((x,))[1],
            parameters=(weight,),
            module=module,
            training=True,
            forward=PythonGraph(forward),  # type: ignore[arg-type]
            outputs=(y,),
            outputs_spec=pytree.tree_flatten(y)[1],
            backward=PythonGraph(backward),  # type: ignore[arg-type]
            output_grads=(grad_y,),
            input_grads=(grad_x, grad_weight),
            memory=memory or SharedMemory(),
            places=places,
            saved_outputs=saved_outputs,
        )
    module.forward = Graphed(recording, module.forward, module)  # type: ignore[method-assign]
    return module


def values(*numbers: float) -> Tensor:
    return torch.tensor([float(number) for number in numbers], requires_grad=True)


def test_replays_give_what_the_module_gives() -> None:
    plain, replayed = Scale(), graphed(Scale())
    for numbers in ((1.0, 2.0), (3.0, 4.0), (5.0, 6.0)):
        got, wanted = values(*numbers), values(*numbers)
        y, z = replayed(got), plain(wanted)
        assert torch.equal(y, z)
        y.pow(2).sum().backward()
        z.pow(2).sum().backward()
        assert got.grad is not None and wanted.grad is not None and torch.equal(got.grad, wanted.grad)
        # Over three replays it adds up: the first one did not become the graph's own memory.
        assert replayed.weight.grad is not None and plain.weight.grad is not None
        assert torch.equal(replayed.weight.grad, plain.weight.grad)


def test_a_second_forward_is_refused_until_backward_came_or_nobody_can_run_it() -> None:
    module = graphed(Scale())
    first = module(values(1, 2))
    with pytest.raises(GraphError, match="its backward is still to come"):
        module(values(3, 4))
    first.sum().backward()
    second = module(values(3, 4))
    del second
    gc.collect()
    module(values(5, 6)).sum().backward()


def test_a_graph_that_another_thread_is_about_to_let_go_of_is_waited_for() -> None:
    """As after a backward that raised: a thread of autograd's holds its nodes a moment longer than the caller."""
    module = graphed(Scale())
    held = [module(values(1, 2))]
    begun = threading.Event()

    def let_go() -> None:
        begun.set()
        time.sleep(0.05)
        held.clear()

    thread = threading.Thread(target=let_go)
    thread.start()
    begun.wait()
    module(values(5, 6)).sum().backward()
    thread.join()


def test_a_second_backward_is_refused() -> None:
    module = graphed(Scale())
    y = module(values(1, 2)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(GraphError, match="for the second time, or after another forward"):
        y.backward(retain_graph=True)
    module(values(3, 4)).sum().backward()
    with pytest.raises(GraphError, match="for the second time, or after another forward"):
        y.backward()


@pytest.mark.parametrize("saved_outputs", [(), (0,)])
def test_an_output_that_backward_reads_may_not_be_written_to(saved_outputs: tuple[int, ...]) -> None:
    module = graphed(Scale(), saved_outputs=saved_outputs)
    for changes in (False, True, False):
        y = module(values(1, 2))
        z = y.sum()
        if changes:
            y.detach().add_(1)
        if changes and saved_outputs:
            with pytest.raises(RuntimeError, match=r"modified by an inplace operation: output 0 of Scale, \(2,\)"):
                z.backward()
            del y, z
        else:
            z.backward()


def test_a_moved_parameter_is_refused() -> None:
    module = graphed(Scale())
    module.weight.data = module.weight.data.clone()
    with pytest.raises(GraphError, match=r"the parameter 'weight' of Scale, \(2,\).*capture again"):
        module(values(1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "weight", nn.Parameter(torch.ones(2))), "the parameter 'weight' of Scale"),
        (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), "the parameter 'weight' of Scale"),
        (lambda m: setattr(m.inner, "running_mean", torch.ones(2)), "the buffer 'running_mean' of Scale"),
        (lambda m: m.inner.running_mean.set_(torch.ones(2)), "the buffer 'running_mean' of Scale"),
        (lambda m: setattr(m, "inner", nn.BatchNorm1d(2)), "the module 'inner' of Scale, a BatchNorm1d, was replaced"),
    ],
)
def test_what_was_replaced_is_refused(change: Callable[[Any], object], message: str) -> None:
    """The graph would go on with the old memory, and give no gradient to the new parameter."""
    module = Scale()
    module.inner = nn.BatchNorm1d(2)
    module.register_buffer("edges", torch.eye(2).to_sparse())
    graphed(module)
    module(values(1, 2)).sum().backward()
    module.inner.running_mean.add_(1)
    module(values(1, 2)).sum().backward()
    change(module)
    with pytest.raises(GraphError, match=message):
        module(values(1, 2))


def test_a_parameter_that_was_frozen_when_captured_is_refused_when_it_needs_a_gradient() -> None:
    module = Scale()
    module.weight.requires_grad_(False)
    graphed(module)
    module(values(1, 2)).sum().backward()
    module.weight.requires_grad_(True)
    with pytest.raises(GraphError, match=r"\(2,\).*needs a gradient.*Capture again"):
        module(values(1, 2))
    module.weight.requires_grad_(False)
    module(values(1, 2)).sum().backward()


def test_other_arguments_are_refused() -> None:
    module = graphed(Scale())
    with pytest.raises(ValueError, match=r"with a tensor \(2,\) float32 on cpu, and got \(3,\) float32 on cpu"):
        module(values(1, 2, 3))
    with pytest.raises(ValueError, match="float64"):
        module(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="the same tensors in the same places"):
        module([values(1, 2)])


def test_it_runs_without_graphs_where_a_replay_would_be_wrong() -> None:
    module = graphed(Scale())
    y = module(values(1, 2))
    with torch.no_grad():
        assert torch.equal(module(values(3, 4)), torch.tensor([6.0, 12.0]))
    module.eval()
    x = values(5, 6)
    module(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, module.weight)
    module.train()
    x = values(1, 2)
    y.sum().backward()
    assert module.weight.grad is not None and torch.equal(module.weight.grad, torch.tensor([6.0, 8.0]))


def test_reset_puts_the_module_back() -> None:
    module = graphed(Scale())
    y = module(values(1, 2)).sum()
    replay: Any = module.forward
    replay.reset()
    assert "forward" not in module.__dict__ and repr(replay) == "<graphed callable, reset>"
    assert torch.equal(module(values(3, 4)), torch.tensor([6.0, 12.0]))
    with pytest.raises(GraphError, match="was reset"):
        y.backward()
    replay.reset()


def test_a_copy_has_no_graphs_and_a_pickle_is_refused() -> None:
    module = graphed(Scale())
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.fill_(1)
    assert torch.equal(other(values(3, 4)), torch.tensor([3.0, 4.0]))
    assert torch.equal(module(values(3, 4)), torch.tensor([6.0, 12.0]))
    with pytest.raises(TypeError, match=r"forward\.reset\(\)"):
        pickle.dumps(module)


def test_a_forward_of_one_s_own_is_put_back_and_copied() -> None:
    """One that is bound to the module, as programs patch it, is not that of its class."""
    module = Scale()
    module.forward = types.MethodType(lambda self, x: self.weight * x + 1, module)  # type: ignore[method-assign]
    graphed(module)
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.fill_(1)
    assert torch.equal(other(values(3, 4)), torch.tensor([4.0, 5.0]))
    module.forward.reset()
    assert torch.equal(module(values(3, 4)), torch.tensor([7.0, 13.0]))


# --- memory that graphs share ----------------------------------------------------------------------------------------


def _two_of_one_call() -> tuple[Scale, Scale]:
    memory = SharedMemory()
    return graphed(Scale(), memory, (1, 4)), graphed(Scale(), memory, (2, 3))


def test_graphs_of_one_call_run_in_the_order_of_their_capture() -> None:
    first, second = _two_of_one_call()
    for _ in range(2):
        second(first(values(1, 2))).sum().backward()
    y, z = first(values(1, 2)), second(values(3, 4))
    z.sum().backward()
    y.sum().backward()
    first(values(1, 2)).sum().backward()  # a layer is left out
    second(values(1, 2)).sum().backward()


def test_a_backward_out_of_turn_spoils_what_a_later_graph_saved() -> None:
    first, second = _two_of_one_call()
    y, z = first(values(1, 2)), second(values(3, 4))
    y.sum().backward()
    with pytest.raises(GraphError, match=r"shares memory with it.*in the order of their capture"):
        z.sum().backward()
    z = second(first(values(1, 2))).sum()
    z.backward()


def test_a_forward_out_of_turn_spoils_what_a_later_graph_saved() -> None:
    first, second = _two_of_one_call()
    z = second(values(3, 4))
    y = first(values(1, 2))
    with pytest.raises(GraphError, match="shares memory with it"):
        z.sum().backward()
    y.sum().backward()


def test_graphs_of_two_calls_and_one_pool_take_turns() -> None:
    memory = SharedMemory()
    first, second = graphed(Scale(), memory, (1, 2)), graphed(Scale(), memory, (3, 4))
    for module in (first, second, first):
        module(values(1, 2)).sum().backward()
    y, z = first(values(1, 2)), second(values(3, 4))
    z.sum().backward()
    with pytest.raises(GraphError, match="shares memory with it"):
        y.sum().backward()
    apart = graphed(Scale(), SharedMemory(), (1, 2)), graphed(Scale(), SharedMemory(), (1, 2))
    y, z = (module(values(1, 2)) for module in apart)
    y.sum().backward()
    z.sum().backward()


def test_a_pool_is_known_as_long_as_somebody_has_graphs_of_it() -> None:
    memory = memory_of((0, -7))
    assert memory_of((0, -7)) is memory and memory_of((0, -8)) is not memory
    assert (memory.captured(), memory_of((0, -7)).captured()) == (1, 2)
    del memory
    assert memory_of((0, -7)).captured() == 1


# --- what is captured ------------------------------------------------------------------------------------------------


def test_none_may_be_returned() -> None:
    recording = _recording_of(lambda x: (x * 2, None, {"y": [None, x * 3]}))
    assert len(recording.outputs) == 2
    again = recording.returned((torch.ones(1), torch.zeros(1)))
    assert again == (torch.ones(1), None, {"y": [None, torch.zeros(1)]})
    with pytest.raises(TypeError, match="returned a int"):
        _recording_of(lambda x: (x, 3))


def test_a_tensor_that_would_get_no_gradient_is_refused() -> None:
    hidden = torch.ones(2, requires_grad=True)
    recording = _recording_of(lambda x: x * hidden)
    with pytest.raises(ValueError, match=r"uses a tensor \(2,\) torch.float32.*make an nn.Module"):
        recording._check_leaves()
    _recording_of(lambda x: (x * hidden.detach()).exp() * x)._check_leaves()
    with pytest.raises(ValueError, match=r"uses a tensor \(2,\) torch.float32.*make an nn.Module"):
        _recording_of(lambda x: (x * 2, hidden))._check_leaves()


class Named(torch.autograd.Function):
    """Has something of its own by a name that PyTorch's nodes of leaves have too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = 3
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_what_a_function_calls_its_own_is_not_taken_for_a_leaf() -> None:
    _recording_of(lambda x: Named.apply(x))._check_leaves()


def _recording_of(function: Callable[[Tensor], Tensor]) -> Recording:
    x = torch.zeros(2, requires_grad=True)
    recording = Recording(
        name="function",
        function=function,
        arguments=[x],
        arguments_spec=pytree.tree_flatten((x,))[1],
        parameters=(),
        module=None,
        training=None,
    )
    recording.outputs = recording.run()
    return recording
