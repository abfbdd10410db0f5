"""Sections: the grain at which policies and plans speak, and at which backward is followed."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from .allocation import Allocation
from .ledger import Row
from .orders import Orders

KEEP_LAST = "keep_last"
"""The reason for which a section at the end of forward stays."""

KEEP_SECTION = 'plan="keep"'
"""The reason for which a section stays that was opened so."""


@dataclasses.dataclass(slots=True, eq=False)
class SectionCall:
    """What a section's module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compiled: bool
    """Whether the call is part of a program that is compiled."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that it is given, in the order in which a checkpoint saves them."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


class Owner(Protocol):
    """Whoever opened a section."""

    def begin(self, section: Section) -> None:
        """Give `section` its place in the step."""
        ...

    def visit(self, section: Section, asked: Allocation | None = None) -> None:
        """Backward has come to `section`."""
        ...


class Section:
    """One forward pass of one wrapped module, or of one `with offloader.section(name)`.

    Handles hold it, so it lives as long as something that was saved in it.
    """

    __slots__ = (
        "__weakref__",
        "allocations",
        "by_hand",
        "capture",
        "ended_at",
        "gap",
        "index",
        "keep_reason",
        "log",
        "name",
        "open",
        "orders",
        "owner",
        "row",
        "undecided",
        "visited",
    )

    def __init__(
        self, owner: Owner, name: str, keep_reason: str | None, gap: bool = False, by_hand: bool = False
    ) -> None:
        self.owner = owner
        self.name = name
        self.gap = gap
        """Whether it is what a module's forward saved between two sections, rather than a section that was named."""
        self.by_hand = by_hand
        """Whether it is evicted and released on request alone."""
        self.keep_reason = keep_reason
        """Why all that it saves stays on the device, or None."""
        self.orders: Orders | None = None
        """What a plan says of it; None: that the policy decides."""
        self.log: object | None = None
        """Where it is recorded, in a step that is measured. Whoever records it alone looks inside."""
        self.capture = 0
        """The graph in whose capture it saved, or 0."""
        self.open = True
        self.visited = False
        self.index: int | None = None
        """Its place among the sections of this step that saved something."""
        self.ended_at = 0
        """How many sections had passed when its forward ended."""
        self.row = Row(name, gap)
        self.allocations: dict[int, weakref.ref[Allocation]] = {}
        self.undecided: list[weakref.ref[Allocation]] = []

    def begin(self) -> None:
        """It saves something: give it its place in the step, if it has none yet."""
        if self.index is None:
            self.owner.begin(self)

    def visit(self, asked: Allocation | None = None) -> None:
        """Backward has come to this section, and asks for `asked` first."""
        self.owner.visit(self, asked)

    def enter(self, allocation: Allocation) -> None:
        """Count `allocation` among what this section saved."""
        if not self.saved(allocation):
            self.allocations[id(allocation)] = weakref.ref(allocation)

    def saved(self, allocation: Allocation) -> bool:
        """Whether `allocation` is among what this section saved."""
        # An id outlives its object: a dead entry may stand under the id of a new allocation.
        ref = self.allocations.get(id(allocation))
        return ref is not None and ref() is allocation

    def live_allocations(self) -> Iterator[Allocation]:
        for ref in list(self.allocations.values()):
            allocation = ref()
            if allocation is not None:
                yield allocation

    def __repr__(self) -> str:
        state = "open" if self.open else "visited" if self.visited else "waiting"
        return f"<section {self.name!r} #{self.index}, {state}, {self.row.saves} saves>"


class LiveSection:
    """A section as `offloader.sections` lists it. Holding one holds nothing of what the section saved."""

    __slots__ = ("_section", "name", "runner")

    def __init__(self, section: Section) -> None:
        self._section = weakref.ref(section)
        self.runner: Callable[..., Any] | None = None
        """How the section's call is to be made, where it is to be computed again in backward; for the engine."""
        self.name = section.name
        """What the report calls it."""

    @property
    def section(self) -> Section | None:
        """The section itself; None once nothing that it saved is waiting for backward."""
        return self._section()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LiveSection) and self._section == other._section

    def __hash__(self) -> int:
        return hash(self._section)

    def __repr__(self) -> str:
        section = self._section()
        return f"<section {self.name!r}, over>" if section is None else repr(section)
