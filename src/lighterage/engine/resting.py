"""Runs a section of which nothing is to leave: without hooks on what it saves.

Note [Sections at rest]
A Python hook costs the host 4 us a save at the least, and ours more; a layer of experts saves some sixty tensors, and
where the host is what a step waits for, that is several percent of it. Under a plan most sections keep all that they
save. So they push no hooks: autograd saves as it does without an offloader. What is left to know is when backward comes
to them, for releases and reloads of others are due then: a hook tells on the nodes that computed what they returned.

A section does not rest where its saves have to be seen: it is not called as a module, or inside a compiled program;
something that leaves was saved in another section and is read in its backward too, so that it has to be recognised; or
the step is recorded save by save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .sections import Section

Call = Callable[..., Any]


class _Visit:
    """Tells a section, once, that backward has come to it. It lives until then, as by a handle on what it saved."""

    __slots__ = ("_section",)

    def __init__(self, section: Section) -> None:
        self._section: Section | None = section

    def __call__(self, grads: object) -> None:
        section, self._section = self._section, None
        if section is not None and not section.visited:
            section.visit()


def run_at_rest(
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    section: Section,
    begin: Callable[[Section], None],
    unseen: Callable[[Section], None],
) -> Any:
    """Call `call`, and let backward tell `section` when it comes to what was returned.

    Args:
        begin: gives the section its place in the step.
        unseen: told of a section that returned nothing backward could be seen by.
    """
    begin(section)
    result = call(*args, **kwargs)
    leaves = [result] if isinstance(result, torch.Tensor) else tree_leaves(result)
    visit, nodes = _Visit(section), set[torch.autograd.graph.Node]()
    for leaf in leaves:
        node = leaf.grad_fn if isinstance(leaf, torch.Tensor) else None
        if node is not None and node not in nodes:
            nodes.add(node)
            node.register_prehook(visit)
    if not nodes:
        unseen(section)
    return result
