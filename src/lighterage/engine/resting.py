"""Runs a section of which nothing is to leave: without hooks on what it saves.

Note [Sections at rest]
A Python hook costs the host 4 us a save at the least, and ours more; a layer of experts saves some sixty tensors, and
where the host is what a step waits for, that is several percent of it. Under a plan most sections keep all that they
save. So they push no hooks: autograd saves as it does without an offloader. What is left to know is when backward comes
to them, for releases and reloads of others are due then: a hook tells on the nodes that computed what they returned.

A section does not rest where its saves have to be seen: it is not called as a module, or inside a compiled program;
other sections run inside it, or it inside of another; something that leaves was saved in another section and is read in
its backward too, so that it has to be recognised; or the step is recorded save by save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..unseen import unseen
from .sections import LiveSection, Section

Call = Callable[..., Any]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
"""What holds no tensor."""


class _Visit:
    """Tells a section, once, that backward has come to it. It lives until then, as by a handle on what it saved."""

    __slots__ = ("_handles", "_section")

    def __init__(self, section: Section, nodes: list[Node]) -> None:
        self._section: Section | None = section
        self._handles: list[RemovableHandle] = [node.register_prehook(self) for node in nodes]

    @unseen
    def __call__(self, grads: object) -> None:
        section, self._section = self._section, None
        handles, self._handles = self._handles, []
        for handle in handles:  # a node may live longer: that of an input which is returned
            handle.remove()
        if section is not None and not section.visited:
            section.visit()


def run_at_rest(
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    live: LiveSection,
    begin: Callable[[Section], None],
    hidden: Callable[[Section], None],
) -> Any:
    """Call `call`, and let backward tell the section when it comes to what was returned.

    The section begins when it is known that there is a backward to come: a forward in which nothing needs a gradient
    saves nothing. No frame of the call holds it, or a traceback that is kept would.

    Args:
        begin: gives the section its place in the step.
        hidden: told of a section that returned what cannot be looked into, and no tensor beside.
    """
    result = call(*args, **kwargs)
    _follow(result, live, begin, hidden)
    return result


@unseen
def _follow(
    result: Any, live: LiveSection, begin: Callable[[Section], None], hidden: Callable[[Section], None]
) -> None:
    section = live.section
    if section is None:
        return
    try:
        leaves = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
    except RecursionError:  # it contains itself
        leaves = [result]
    nodes: list[Node] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            for tensor in (leaf, leaf._base):
                node = _node_of(tensor)
                if node is not None and node not in nodes:
                    nodes.append(node)
    if nodes:
        if section.index is None:
            begin(section)
        _Visit(section, nodes)
    elif not all(isinstance(leaf, (*_PLAIN, torch.Tensor)) for leaf in leaves):
        hidden(section)


def _node_of(tensor: torch.Tensor | None) -> Node | None:
    """The node that computed `tensor`. Of a view also its base's is asked for: written to in place, it has another."""
    if tensor is None:
        return None
    try:
        return tensor.grad_fn
    except RuntimeError:  # a view whose base was written to where no gradient was recorded
        return None
