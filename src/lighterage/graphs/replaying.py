"""Replays graphs in the order that the caller's streams and autograd ask for."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from .recording import Recording
from .shared_memory import SharedMemory, Ticket

# Note [Streams of a replay]
# The inputs were made on the caller's stream, so the replay's stream waits for it. What the replay writes is read on
# the caller's stream, and the memory of the inputs goes back to that stream's pool: so the caller's stream waits for
# the replay. It waits for an event that is recorded after the replay; the one that the caller gave, if it gave one, so
# that other streams can wait for the same. A graph may record that event in its midst, with `external=True`: then it
# stands for what the graph has done so far, whoever waits for it reads nothing later, and it is not recorded again.
# What comes later still uses the graph's memory: so the next replay there waits for the stream of the last one.


class Launch:
    """On which device and stream to replay, and which event tells that it is through."""

    __slots__ = ("device", "event", "stream")

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
        self.device = device
        self.stream = stream
        self.event = event

    @contextlib.contextmanager
    def order(self, recorded_inside: frozenset[int], memory: SharedMemory) -> Iterator[None]:
        """Issue the block's work on the stream, after the caller's; the caller's stream then waits for it.

        It comes after the last replay of a graph that has the same memory, on whichever stream that was. The caller's
        stream is that of the graph's device, whichever device is the current one.
        """
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device), self.order(recorded_inside, memory):
                yield
            return
        caller = torch.cuda.current_stream()
        stream = caller if self.stream is None else self.stream
        if stream != caller:
            follow(stream, caller)
            torch.cuda.set_stream(stream)
        if memory.stream is not None and memory.stream != stream:
            follow(stream, memory.stream)
        memory.stream = stream
        try:
            yield
        finally:
            torch.cuda.set_stream(caller)
        event = self.event
        if event is not None and event.cuda_event not in recorded_inside:
            record(event, stream)
        if stream != caller:
            if event is None:
                follow(caller, stream)
            else:
                await_event(caller, event)


def follow(stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
    """Make `stream` wait for what was issued on `other` so far."""
    stream.wait_stream(other)


def record(event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """Let `event` stand for what was issued on `stream` so far."""
    event.record(stream)


def await_event(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
    """Make `stream` wait for `event`."""
    stream.wait_event(event)


class _Replay(torch.autograd.Function):
    """Forward and backward of a recording, as one node."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, launch: Launch, *inputs: Tensor) -> tuple[Tensor, ...]:
        ticket: Ticket = recording.begin()
        ctx.recording, ctx.launch, ctx.ticket = recording, launch, ticket
        assert recording.forward is not None
        with launch.order(recording.forward_events, recording.memory):
            for static, given in zip(recording.arguments, inputs, strict=False):
                static.copy_(given)
            recording.forward.replay()
        outputs = tuple(static.detach() for static in recording.outputs)
        ctx.mark_non_differentiable(
            *(y for y, static in zip(outputs, recording.outputs, strict=True) if not static.requires_grad)
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        recording: Recording = ctx.recording
        graph = recording.finish(ctx.ticket)
        with ctx.launch.order(recording.backward_events, recording.memory):
            for static, given in zip(recording.output_grads, grads, strict=True):
                if static is not None:
                    static.copy_(given)
            graph.replay()
        # The static tensors themselves: were they aliases, autograd would make them `.grad` without a copy, and the
        # next replay would overwrite it.
        return (None, None, *recording.input_grads)


class Graphed:
    """A callable whose forward and backward are replays. Made by `make_graphed_callables`; a module's is its `forward`.

    Runs without graphs: under `no_grad`, where a replay would overwrite what a forward before it saved; in eval mode,
    if it was captured in training, or the other way round; and after `reset`.
    """

    def __init__(self, recording: Recording, eager: Callable[..., Any], module: nn.Module | None) -> None:
        self._recording: Recording | None = recording
        self.eager = eager
        """What runs without graphs."""
        self._module = module
        self._device = recording.device
        self._replaced = module is not None and "forward" in module.__dict__
        """Whether `eager` was put in the place of the `forward` of the module's class."""

    def __call__(
        self,
        *args: Any,
        cuda_graph_stream: torch.cuda.Stream | None = None,
        cuda_graph_event: torch.cuda.Event | None = None,
    ) -> Any:
        """Replay on `args`, of the shapes that were captured.

        cuda_graph_stream: where to replay, in forward and in backward; None: the caller's stream.
        cuda_graph_event: recorded after each replay; None: the caller's stream waits for the stream itself.
        See Note [Streams of a replay].

        Raises:
            GraphError: the last replay's backward is still to come, or the module is not what was captured.
            ValueError, TypeError: other arguments than were captured.
        """
        recording = self._recording
        if recording is None or not self._applies(recording):
            result = self.eager(*args)
            if cuda_graph_event is not None:
                record(cuda_graph_event, torch.cuda.current_stream(self._device))
            return result
        inputs = _check(recording, args)
        if cuda_graph_stream is not None and cuda_graph_stream.device != recording.device:
            raise ValueError(
                f"cuda_graph_stream is of {cuda_graph_stream.device}, and {recording.name} was captured on "
                f"{recording.device}. Make the stream there."
            )
        launch = Launch(recording.device, cuda_graph_stream, cuda_graph_event)
        outputs = _Replay.apply(  # type: ignore[no-untyped-call]
            recording, launch, *inputs, *recording.parameters
        )
        return recording.returned(outputs)

    def _applies(self, recording: Recording) -> bool:
        if self._module is not None and self._module.training != recording.training:
            return False
        return recording.backward is None or torch.is_grad_enabled()

    def reset(self) -> None:
        """Destroy the graphs. Memory and host blocks that were theirs are given back; calls run without graphs."""
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.reset()
        if self._module is not None and self._module.__dict__.get("forward") is self:
            del self._module.__dict__["forward"]
            if self._replaced:
                self._module.__dict__["forward"] = self.eager

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        # A copied module has parameters of its own, which the graphs know nothing of.
        if self._module is None or id(self._module) not in memo:
            raise TypeError("a graphed function cannot be copied: its graphs read and write memory of their own.")
        copied: Callable[..., Any] = copy.deepcopy(self.eager, memo)
        return copied

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a graphed callable belongs to its process and cannot be pickled. Save the state dict, or call "
            "module.forward.reset() first and capture again after loading."
        )

    def __repr__(self) -> str:
        recording = self._recording
        return "<graphed callable, reset>" if recording is None else f"<graphed {recording.name}>"


def _check(recording: Recording, args: tuple[Any, ...]) -> list[Tensor]:
    leaves, spec = pytree.tree_flatten(args)
    wants_grad = torch.is_grad_enabled()
    if wants_grad:
        recording.check_gradients()
    if spec != recording.arguments_spec:
        raise TypeError(
            f"{recording.name} was captured with arguments of the form {recording.arguments_spec}, and got {spec}. "
            "Pass the same tensors in the same places as in sample_args."
        )
    for static, given in zip(recording.arguments, leaves, strict=True):
        if given.shape != static.shape or given.dtype != static.dtype or given.device != static.device:
            raise ValueError(
                f"{recording.name} was captured with a tensor {_describe(static)}, and got {_describe(given)} in its "
                "place. A graph takes the shapes it was captured with: pad, or capture one for each shape."
            )
        if wants_grad and given.requires_grad and not static.requires_grad:
            raise ValueError(
                f"{recording.name} was captured with a tensor {_describe(static)} that needed no gradient; this one "
                "does, and would get none. Capture with a sample that requires_grad."
            )
    return leaves


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
