"""What was captured of one callable: its graphs, and the memory that they read and write."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GraphError
from .capturing import capturing
from .parts import Parts
from .saved_outputs import saved_outputs
from .shared_memory import SharedMemory, Ticket, memory_of

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool  # what `torch.cuda.graph_pool_handle()` returns

_OF_A_LEAF = "torch::autograd::AccumulateGrad"
"""The autograd node of a tensor that needs a gradient and was not computed."""
_PATIENCE = 0.25
"""Seconds that a replay waits for the last one's graph to go, where its backward is still to come. A backward that
raised is let go of by a thread of autograd's, a moment after its caller has the error."""


@dataclasses.dataclass(eq=False)
class Recording:
    """The graphs of one callable, and their static memory."""

    name: str
    function: Callable[..., Any]
    arguments: list[Tensor]
    """Leaves of the arguments: each replay's are copied into them."""
    arguments_spec: pytree.TreeSpec
    parameters: tuple[Tensor, ...]
    """Read where they are."""
    module: nn.Module | None
    """What it was captured of; None for a function."""
    training: bool | None
    """Of the module when it was captured; None for a function."""
    forward: torch.cuda.CUDAGraph | None = None
    forward_events: frozenset[int] = frozenset()
    """Handles of the events that a replay records in its midst."""
    outputs: tuple[Tensor, ...] = ()
    outputs_spec: pytree.TreeSpec | None = None
    none_at: frozenset[int] = frozenset()
    """Which leaves of what is returned are None."""
    backward: torch.cuda.CUDAGraph | None = None
    backward_events: frozenset[int] = frozenset()
    output_grads: tuple[Tensor | None, ...] = ()
    input_grads: tuple[Tensor | None, ...] = ()
    """Of arguments and parameters."""
    saved_outputs: tuple[int, ...] = ()
    """Places of the outputs that backward reads: see Note [Outputs that backward reads]."""
    memory: SharedMemory = dataclasses.field(default_factory=SharedMemory)
    """Of the pool."""
    places: tuple[int, int] = (0, 0)
    """Of the forward and the backward graph in the order in which those of the pool were captured."""

    def __post_init__(self) -> None:
        self.note_parts()
        self._without_gradient = [parameter for parameter in self.parameters if not parameter.requires_grad]
        self._turn = 0
        self._open: weakref.ref[Ticket] | None = None

    def note_parts(self) -> None:
        """What the module is made of now, and where, is what the graphs know."""
        self._parts = Parts(self.name, self.module)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (*self.arguments, *self.parameters)

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    # --- capture --------------------------------------------------------------------------------------------------

    def run(self) -> tuple[Tensor, ...]:
        """Call the function on the static arguments; the tensors that it returns.

        Raises:
            TypeError: something else than tensors and None is returned.
        """
        returned = self.function(*pytree.tree_unflatten(self.arguments, self.arguments_spec))
        leaves, self.outputs_spec = pytree.tree_flatten(returned)
        self.none_at = frozenset(index for index, leaf in enumerate(leaves) if leaf is None)
        for leaf in leaves:
            if leaf is not None and not isinstance(leaf, Tensor):
                raise TypeError(
                    f"a graphed callable returns tensors and None, in tuples, lists or dicts; {self.name} returned a "
                    f"{type(leaf).__name__}, which no replay would renew. Leave it out."
                )
        return tuple(leaf for leaf in leaves if leaf is not None)

    def returned(self, outputs: tuple[Tensor, ...]) -> Any:
        """What the function returned, with `outputs` for its tensors."""
        assert self.outputs_spec is not None
        tensors = iter(outputs)
        leaves = [None if index in self.none_at else next(tensors) for index in range(self.outputs_spec.num_leaves)]
        return pytree.tree_unflatten(leaves, self.outputs_spec)

    def gradients(
        self, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], allow_unused: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, None where there is none."""
        wanted = [x for x in self.inputs if x.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y in outputs if y.requires_grad],
                wanted,
                [g for g in grads if g is not None],
                allow_unused=allow_unused,
            )
        )
        return tuple(next(found) if x.requires_grad else None for x in self.inputs)

    def differentiable(self, outputs: tuple[Tensor, ...]) -> bool:
        """Whether there is a backward pass."""
        return any(y.requires_grad for y in outputs) and any(x.requires_grad for x in self.inputs)

    def capture_forward(self, pool: Pool, stream: torch.cuda.Stream) -> None:
        """Capture the forward pass on `stream`."""
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, pool, stream) as events:
            self.outputs = self.run()
        self._check_leaves()
        self.saved_outputs = saved_outputs(self.outputs)
        self.forward, self.forward_events = graph, frozenset(events)
        self.memory = memory_of(pool)
        self.places = (self.memory.captured(), 0)

    def _check_leaves(self) -> None:
        """Refuse what would silently get no gradient."""
        known = {id(x) for x in self.inputs}
        nodes = [torch.autograd.graph.get_gradient_edge(y).node for y in self.outputs if y.requires_grad]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            leaf: Any = getattr(node, "variable", None) if node.name() == _OF_A_LEAF else None
            if leaf is not None and id(leaf) not in known:
                raise ValueError(
                    f"{self.name} uses a tensor {tuple(leaf.shape)} {leaf.dtype} that needs a gradient and is neither "
                    "an argument nor a parameter of the module: a graph would give it none. Pass it as an argument, "
                    "or make an nn.Module that has it."
                )
            following = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= following
            nodes.extend(following)

    def capture_backward(self, pool: Pool, stream: torch.cuda.Stream, allow_unused: bool) -> None:
        """Capture the backward pass on `stream`, if there is one. What the forward pass saved is then given up."""
        if self.differentiable(self.outputs):
            self.output_grads = tuple(torch.empty_like(y) if y.requires_grad else None for y in self.outputs)
            graph = torch.cuda.CUDAGraph()
            with capturing(graph, pool, stream) as events:
                self.input_grads = self.gradients(self.outputs, self.output_grads, allow_unused)
            self.backward, self.backward_events = graph, frozenset(events)
            self.places = (self.places[0], self.memory.captured())
        self.outputs = tuple(y.detach().requires_grad_(y.requires_grad) for y in self.outputs)

    def reset(self) -> None:
        """Destroy the graphs and let go of their memory."""
        self.forward = self.backward = None
        self.outputs = self.output_grads = self.input_grads = ()

    # --- turns ----------------------------------------------------------------------------------------------------

    def begin(self) -> Ticket:
        """A forward replay begins.

        Raises:
            GraphError: the last one's backward is still to come, or the module is not what was captured.
        """
        if self._awaits_backward():
            raise GraphError(
                f"the graph of {self.name} was replayed, and its backward is still to come: a second replay would "
                "overwrite what the first one saved. Run backward first, drop the first result, or capture one graph "
                "for each microbatch in flight: wrap the module in an nn.Sequential of its own for each, and call "
                "make_graphed_callables for each, so that they share no memory."
            )
        self._parts.check()
        self._turn += 1
        ticket = Ticket(self._turn, self._versions())
        self._open = weakref.ref(ticket)
        self.memory.replays(self.places[0])
        if self.backward is not None:
            self.memory.waits(ticket, *self.places)
        return ticket

    def _awaits_backward(self) -> bool:
        """Whether somebody can still run the last replay's backward."""
        until = 0.0
        while self.backward is not None and self._open is not None:
            last = self._open()
            if last is None or last.spent or last.spoilt:
                return False
            del last
            until = until or time.monotonic() + _PATIENCE
            if time.monotonic() > until:
                return True
            time.sleep(0.001)
        return False

    def _versions(self) -> tuple[int, ...]:
        return tuple([self.outputs[place]._version for place in self.saved_outputs])

    def check_gradients(self) -> None:
        """Refuse a call that would leave a parameter without the gradient that it asks for.

        Raises:
            GraphError: a parameter needs a gradient, and did not when the graph was captured.
        """
        for parameter in self._without_gradient:
            if parameter.requires_grad:
                raise GraphError(
                    f"a parameter of {self.name}, {tuple(parameter.shape)} {parameter.dtype}, needs a gradient, and "
                    "needed none when the graph was captured, which would give it none. Capture again."
                )

    def finish(self, ticket: Ticket) -> torch.cuda.CUDAGraph:
        """A backward replay begins: the graph to replay.

        Raises:
            GraphError: what it would read was overwritten or used up.
        """
        if self.backward is None:
            raise GraphError(f"the graph of {self.name} was reset, and its backward came after that.")
        if ticket.turn != self._turn or ticket.spent:
            raise GraphError(
                f"backward came for the second time, or after another forward replay, to the graph of {self.name}: "
                "what forward saved is used up by the first backward and overwritten by the next forward. Run each "
                "backward once, before the next forward, or run this part without a graph."
            )
        if ticket.spoilt:
            raise GraphError(
                f"since {self.name} ran forward, a graph was replayed that shares memory with it and was not captured "
                "between its forward and its backward: it has written over what forward saved. Run graphs of one call, "
                "or of one pool, in the order of their capture: the last forward's backward first; or capture each in "
                "a call and a pool of its own."
            )
        for place, version in zip(self.saved_outputs, ticket.versions, strict=True):
            output = self.outputs[place]
            if output._version != version:
                raise GraphError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"output {place} of {self.name}, {tuple(output.shape)} {output.dtype}, is at version "
                    f"{output._version}, and was at {version} when its graph was replayed, whose backward reads it. "
                    "Clone the output, or write out of place."
                )
        ticket.spent = True
        self.memory.replays(self.places[1])
        return self.backward
