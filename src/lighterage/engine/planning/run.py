"""One step under a plan: what each section's saves are told, and what each phase begins with."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from ..allocation import Allocation
from ..orders import Orders
from ..sections import Section
from .course import TOLERANCE, Course, SectionCourse
from .own_saves import saves_before_inputs
from .tracing import Tracer


class PlannedOrders(Orders):
    """What the plan says of a section."""

    __slots__ = (
        "_moved",
        "_run",
        "_section",
        "_taken",
        "called",
        "course",
        "mode",
        "read_twice",
        "tracer",
        "watch",
    )

    def __init__(self, run: Run, course: SectionCourse, section: Section) -> None:
        super().__init__(run.course.reason)
        self._run = run
        self._section = weakref.ref(section)
        self._moved = course.moved
        self._taken: dict[int, list[weakref.ref[Allocation]]] = {}
        self.course = course
        self.mode = course.mode
        self.tracer: Tracer | None = None
        """What tells how, until its forward has begun."""
        self.read_twice: Callable[[], None] | None = None
        """To be told if backward reads a saved tensor twice, where it is not known whether it does."""
        self.watch: Callable[[], None] | None = None
        """To be told as backward comes to the section, where it is not known yet whether it may be computed again."""
        self.called: int | None = None
        """Where the section is computed again: the save of the plan that what comes next stands for, 0 for none."""

    def why_kept(self, save: int, nbytes: int) -> str | None:
        if self._runs_again:
            save = self._planned(save)
        elif save in self.course.derived:
            self._run.resized += self.derives  # it could be derived when it was measured
        most_bytes = self._moved.get(save)
        if most_bytes is None:
            return self._reason
        if nbytes > most_bytes:
            self._run.resized += 1
        return None

    def took(self, save: int, allocation: Allocation) -> None:
        if self.mode == "save":
            self._run.taken_bytes += allocation.nbytes
        elif self._runs_again:
            save = self._planned(save)
        self._taken.setdefault(save, []).append(weakref.ref(allocation))

    @property
    def derives(self) -> bool:
        """Whether its forward runs once, and what is cheap is derived from what is saved."""
        return self.mode != "save" and bool(self.course.derived)

    @property
    def _runs_again(self) -> bool:
        """Whether backward runs its forward again, in which other tensors are saved."""
        return self.mode != "save" and not self.derives

    def _planned(self, save: int) -> int:
        """The save of the plan that number `save` stands for where the section is computed again, 0 for none."""
        if self.called is not None:
            return self.called
        # Saves of the checkpoint's own come before the inputs.
        given, inputs = save - 1 - saves_before_inputs(), self.course.recipe.inputs
        return (inputs[given] if 0 <= given < len(inputs) else None) or 0

    def allocations(self, saves: list[int]) -> list[Allocation]:
        """What these saves of the plan have brought and is alive."""
        taken = self._taken
        found: list[Allocation] = []
        for save in saves:
            for ref in taken.get(save, ()):
                allocation = ref()
                if allocation is not None:
                    found.append(allocation)
        return found

    @property
    def section(self) -> Section | None:
        return self._section()


Due = tuple[list[tuple[PlannedOrders, list[int]]], list[Allocation]]
"""What to let go of, as orders and their saves, and what to bring back, the most urgent first."""


class Run:
    """One step under a plan."""

    def __init__(self, course: Course) -> None:
        self.course = course
        self.resized = 0
        """Saves that were much larger than planned for."""
        self.unplanned = 0
        """Sections that saved something and that the plan does not know."""
        self.strayed = 0
        """Visits of backward that came out of turn."""
        self.taken_bytes = 0
        """What was to leave of sections that are not computed again held."""
        self._seen: dict[str, int] = {}
        self._orders: dict[int, PlannedOrders] = {}
        self._phase = 0
        self._begun: set[int] = set()
        self._fetched: set[int] = set()

    def orders_for(self, section: Section) -> PlannedOrders | None:
        """What the plan says of a section that has just been opened; None where it knows none of that name."""
        name = section.name
        number = self._seen.get(name, 0)
        self._seen[name] = number + 1
        course = self.course.numbered.get((name, number))
        if course is None:
            return None
        orders = self._orders[course.index] = PlannedOrders(self, course, section)
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

    @property
    def is_smaller(self) -> bool:
        """Whether what leaves was much smaller than planned for: the plan will do for it, its times say nothing."""
        return self.taken_bytes < (1 - TOLERANCE) * self.course.moved_bytes

    def approached(self, index: int) -> Due:
        """A section opens whose forward phase begins if it saves something. Out of turn nothing is due."""
        phase = self.course.phase_of.get(("forward", index))
        before = () if phase is None else range(self._phase, phase)
        if phase is None or not all(p in self._begun or p in self.course.others for p in before):
            return [], []
        return self._end(phase)

    def begins(self, direction: str, index: int) -> Due:
        """A phase begins."""
        phase = self.course.phase_of.get((direction, index))
        if phase is None:
            self.strayed += 1
            return [], []
        if phase != self._phase:  # most often it is its turn
            others, begun = self.course.others, self._begun
            skipped = any(p not in begun and p not in others for p in range(self._phase, phase))
            self.strayed += skipped or phase < self._phase
        self._begun.add(phase)
        release, back = self._end(phase)
        self._fetch(phase, back)
        return release, back

    def forward_ended(self, index: int) -> Due:
        """A section's forward has ended."""
        phase = self.course.phase_of.get(("forward", index))
        if phase is None:
            return [], []
        release, back = self._end(phase + 1)
        # What belongs to no section has no hook of its own: it begins where the one before it ends.
        if phase + 1 in self.course.others:
            self._fetch(phase + 1, back)
        return release, back

    def _end(self, until: int) -> Due:
        """All phases before `until` have ended."""
        course = self.course
        release: list[tuple[PlannedOrders, list[int]]] = []
        back: list[Allocation] = []
        for phase in range(self._phase, until):
            for index, saves in course.due.get(phase, ()):
                orders = self._orders.get(index)
                if orders is not None:
                    release.append((orders, saves))
            if phase in course.others:
                self._fetch(phase, back)
        self._phase = max(self._phase, until)
        return release, back

    def _fetch(self, phase: int, back: list[Allocation]) -> None:
        """Append to `back` what starts to come back as `phase` begins."""
        fetches = self.course.fetches.get(phase)
        if fetches is None or phase in self._fetched:
            return
        self._fetched.add(phase)
        for index, saves in fetches:
            orders = self._orders.get(index)
            if orders is not None:
                back += orders.allocations(saves)
