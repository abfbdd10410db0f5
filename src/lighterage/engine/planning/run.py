"""One step under a plan: what each section's saves are told, and what each phase begins with."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable

from ..allocation import Allocation
from ..orders import Orders
from ..sections import Section
from .course import Course
from .timelines import Recipe

# A save that is larger than in the step that was measured by more than this part is not the one that was planned for.
TOLERANCE = 0.25


class PlannedOrders(Orders):
    """What the plan says of a section."""

    __slots__ = (
        "_moves",
        "_run",
        "_section",
        "_sizes",
        "_taken",
        "again_bytes",
        "called",
        "index",
        "mode",
        "read_twice",
        "recipe",
        "watch",
    )

    def __init__(self, run: Run, index: int, section: Section) -> None:
        course = run.course
        super().__init__(course.reason)
        self._run = run
        self._section = weakref.ref(section)
        self._moves = course.moves[index]
        self._sizes = course.sizes[index]
        self._taken: dict[int, list[weakref.ref[Allocation]]] = {}
        self.index = index
        self.mode = course.plan.sections[index].mode
        self.again_bytes = course.again_bytes[index]
        self.recipe = course.recipes.get(index, Recipe())
        self.read_twice: Callable[[], None] | None = None
        """To be told if backward reads a saved tensor twice, where it is not known whether it does."""
        self.watch: Callable[[], None] | None = None
        """To be told as backward comes to the section, where it is not known yet whether it may be computed again."""
        self.called: int | None = None
        """Where the section is computed again: the save of the plan that what comes next stands for, 0 for none."""

    def why_kept(self, save: int, nbytes: int) -> str | None:
        if self.called is not None:
            save = self.called
        elif self.mode != "save":
            inputs = self.recipe.inputs
            save = (inputs[save - 1] if save <= len(inputs) else None) or 0
        if save not in self._moves:
            return self._reason
        expected = self._sizes.get(save, nbytes)
        if nbytes > expected * (1 + TOLERANCE):
            self._run.resized += 1
        return None

    def took(self, save: int, allocation: Allocation) -> None:
        if self.called is not None:
            save = self.called
        elif self.mode != "save":
            inputs = self.recipe.inputs
            save = (inputs[save - 1] if save <= len(inputs) else None) or 0
        self._taken.setdefault(save, []).append(weakref.ref(allocation))

    def allocations(self, save: int) -> list[Allocation]:
        """What save number `save` of the plan has brought and is alive."""
        return [a for ref in self._taken.get(save, ()) if (a := ref()) is not None]

    @property
    def section(self) -> Section | None:
        return self._section()


class Run:
    """One step under a plan."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.resized = 0
        """Saves that were much larger than planned for."""
        self.unplanned = 0
        """Sections that the plan does not know."""
        self.strayed = 0
        """Visits of backward that came out of turn."""
        self._seen: collections.Counter[str] = collections.Counter()
        self._orders: dict[int, PlannedOrders] = {}
        self._phase = 0
        self._begun: set[int] = set()
        self._fetched: set[int] = set()

    def orders_for(self, section: Section) -> PlannedOrders | None:
        """What the plan says of a section that has just been opened; None where it knows none of that name."""
        number = self._seen[section.name]
        self._seen[section.name] += 1
        index = self.course.numbered.get((section.name, number))
        if index is None:
            self.unplanned += 1
            return None
        orders = self._orders[index] = PlannedOrders(self, index, section)
        return orders

    def taken_back(self, section: Section) -> None:
        """A section that was opened has saved nothing, so that it is none of the step."""
        self._seen[section.name] -= 1

    def close(self) -> None:
        """The step is over: let go of what its sections were told, which knows this run."""
        self._orders.clear()

    @property
    def missing(self) -> int:
        """Sections of the plan that have not run."""
        return len(self.course.plan.sections) - len(self._orders)

    @property
    def strange(self) -> bool:
        """Whether the step was not the one that was planned for."""
        return bool(self.unplanned or self.missing or self.resized or self.strayed)

    def begins(self, direction: str, index: int) -> tuple[list[tuple[PlannedOrders, int]], list[Allocation]]:
        """A phase begins: what to let go of, as orders and save, and what to bring back, the most urgent first."""
        phase = self.course.phase_of.get((direction, index))
        if phase is None:
            self.strayed += 1
            return [], []
        skipped = [p for p in range(self._phase, phase) if p not in self._begun and not self.course.is_other(p)]
        self.strayed += bool(skipped) or phase < self._phase
        self._begun.add(phase)
        return self._advance(phase, inclusive=False)

    def forward_ended(self, index: int) -> tuple[list[tuple[PlannedOrders, int]], list[Allocation]]:
        """A section's forward has ended: the same as for `begins`."""
        phase = self.course.phase_of.get(("forward", index))
        if phase is None:
            return [], []
        return self._advance(phase, inclusive=True)

    def _advance(self, phase: int, *, inclusive: bool) -> tuple[list[tuple[PlannedOrders, int]], list[Allocation]]:
        """`phase` begins, or, with `inclusive`, has ended."""
        ended = phase + 1 if inclusive else phase
        release: list[tuple[PlannedOrders, int]] = []
        for p in range(self._phase, ended):
            for index, save in self.course.due.get(p, ()):
                orders = self._orders.get(index)
                if orders is not None:
                    release.append((orders, save))
        begun = [] if inclusive else [phase]
        # What belongs to no section has no hook of its own: it begins where the one before it ends.
        begun += [phase + 1] if inclusive and self.course.is_other(phase + 1) else []
        begun += [p for p in range(self._phase, ended) if self.course.is_other(p)]
        self._phase = max(self._phase, ended)
        back: list[Allocation] = []
        for p in sorted(begun):
            if p in self._fetched or p >= len(self.course.plan.fetches):
                continue
            self._fetched.add(p)
            for fetch in self.course.plan.fetches[p]:
                orders = self._orders.get(fetch.section)
                if orders is not None:
                    back += orders.allocations(fetch.save)
        return release, back
