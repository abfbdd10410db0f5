"""Sections, and the order in which backward really visits them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .allocation import Allocation
from .ledger import Row

if TYPE_CHECKING:
    from .measure import SectionLog
    from .offloader import Offloader
    from .orders import Orders


KEEP_LAST = "keep_last"
"""The reason for which a section at the end of forward stays."""

KEEP_SECTION = 'plan="keep"'
"""The reason for which a section stays that was opened so."""


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
        self, owner: Offloader, name: str, keep_reason: str | None, gap: bool = False, by_hand: bool = False
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
        self.log: SectionLog | None = None
        """Where it is recorded, in a step that is measured."""
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


class BackwardOrder:
    """Learns in which order backward visits sections, and tells which come next.

    A training step creates the same sections in the same order each time, so a section is known by its index within the
    step. Where the last step does not fit (another number of microbatches, a dropped layer) the guess is
    last-in-first-out.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._visits: list[int] = []
        self._last_names: list[str] = []
        self._last_visits: list[int] = []
        self._last_position: dict[int, int] = {}
        self.hits = 0
        self.misses = 0
        self._expected: int | None = None

    def created(self, name: str) -> int:
        """Register a section; its index within the step."""
        self._names.append(name)
        return len(self._names) - 1

    def visited(self, index: int) -> None:
        """Backward has come to the section with this index."""
        if self._expected is not None:
            if self._expected == index:
                self.hits += 1
            else:
                self.misses += 1
        self._visits.append(index)

    def upcoming(self, index: int, live: dict[int, Section]) -> Iterator[Section]:
        """The live, unvisited sections that backward is expected to come to after `index`, in order."""
        self._expected = None
        for section in self._predict(index, live):
            if self._expected is None:
                self._expected = section.index
            yield section

    def _predict(self, index: int, live: dict[int, Section]) -> Iterator[Section]:
        position = self._last_position.get(index)
        if position is not None and self._fits(index):
            for later in self._last_visits[position + 1 :]:
                section = live.get(later)
                if section is not None and not section.visited and self._fits(later):
                    yield section
            return
        waiting = [s for i, s in sorted(live.items(), reverse=True) if not s.visited]
        yield from (s for s in waiting if s.index is not None and s.index < index)
        yield from (s for s in waiting if s.index is not None and s.index > index)

    def _fits(self, index: int) -> bool:
        last = self._last_names
        return index < len(last) and index < len(self._names) and last[index] == self._names[index]

    def finish_step(self) -> None:
        if self._visits:
            self._last_names, self._last_visits = self._names, self._visits
            self._last_position = {index: position for position, index in enumerate(self._visits)}
        self._names, self._visits = [], []
        self._expected = None
