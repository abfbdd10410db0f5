"""Makes a plan: the fastest within a budget, or the smallest at a price."""

from __future__ import annotations

import dataclasses

from ..errors import BudgetError
from .coarse import Coarse, coarsen
from .figures import size
from .frontier import Frontier, Point
from .goal import Choices, Goal, choices
from .layout import Layout, costs_host, lay_out
from .plan import Fetch, Move, Plan, SectionPlan
from .postpone import postpone
from .run import Run
from .schedule import Pace, Schedule
from .search import Search
from .simulate import simulate
from .timeline import Link, Timeline
from .why import explain

_EFFORT = 250_000
"""Of a search, in items and phases that its runs pass. It bounds the time without a look at the clock, which would make
plans differ from run to run."""

_TRIES = 4

_LEAST_GAIN = 0.005
"""Of the peak: a plan that frees less than this is not worth the copies."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The frontier of a timeline, and how to make plans of its points."""

    timeline: Timeline
    link: Link
    search: Search
    frontier: Frontier
    coarse: Coarse

    def plan_of(self, point: Point) -> tuple[Plan, float]:
        """The decisions of `point` for every allocation, without its reasons; and the milliseconds of their step."""
        layout = lay_out(self.timeline, point.modes)
        places = self.coarse.places
        at = [places[item.section, item.allocation.save] for item in layout.items]
        moved = [place in point.moved for place in at]
        lazy, must = (
            {index for index, place in enumerate(at) if place in these} for these in (point.lazy, self.search.must)
        )
        # Anew, for what was grouped: members are not all saved at once. What one of them may hold, all of them did.
        schedule, run = self._carry_out(layout, moved, point, lazy, must)
        in_vain = {i for i, at in enumerate(schedule.released) if moved[i] and at < 0} - must
        if run.host_ms and in_vain:
            # What is never let go of costs the host something all the same.
            left = [leaves and index not in in_vain for index, leaves in enumerate(moved)]
            other, again = self._carry_out(layout, left, point, lazy, must)
            if again.now_ms <= run.now_ms and again.peak_bytes <= run.peak_bytes:
                moved, schedule, run = left, other, again
        moves: list[list[Move]] = [[] for _ in self.timeline.sections]
        for index, item in enumerate(layout.items):
            # What was never let go of need not travel.
            if moved[index] and schedule.released[index] >= 0:
                after = schedule.released[index] - item.birth[0]
                moves[item.section].append(Move(save=item.allocation.save, release_after=after))
        fetches = tuple(
            tuple(Fetch(section=layout.items[i].section, save=layout.items[i].allocation.save) for i in row)
            for row in schedule.rows
        )
        sections = tuple(
            SectionPlan(name=section.name, mode=mode, moves=tuple(each))
            for section, mode, each in zip(self.timeline.sections, point.modes, moves, strict=True)
        )
        return Plan(sections=sections, fetches=fetches), run.now_ms

    def _carry_out(
        self, layout: Layout, moved: list[bool], point: Point, lazy: set[int], must: set[int]
    ) -> tuple[Schedule, Run]:
        limit, pace = point.limit_bytes, point.pace
        schedule = Schedule(layout, self.link, moved, limit_bytes=limit, pace=pace, lazy=lazy, must=must)
        run = Run(layout, self.link, moved)
        run.go(schedule)
        return schedule, run


def find(timeline: Timeline, link: Link, allowed: Choices) -> Found:
    """The frontier of `timeline` over `link`."""
    coarse = coarsen(timeline, allowed, move_ms=link.move_us / 1e3)
    # A group stands for as many copies as it has members.
    groups = sum(len(section.allocations) for section in coarse.timeline.sections)
    grouped = dataclasses.replace(link, copy_us=link.copy_us * len(coarse.places) / max(groups, 1))
    effort = _EFFORT if coarse.is_exact else _EFFORT * 2 // 5 if costs_host(timeline, link) else _EFFORT // 3
    search = Search(coarse.timeline, grouped, coarse.choices, effort=effort, copies=coarse.members)
    return Found(timeline, link, search, search.go(), coarse)


def nothing(timeline: Timeline) -> Plan:
    """The plan in which everything stays."""
    return Plan(
        sections=tuple(SectionPlan(name=section.name) for section in timeline.sections),
        fetches=((),) * len(timeline.phases),
    )


def plan(timeline: Timeline, link: Link, goal: Goal, *, caution: float = 1.0) -> Plan:
    """What to keep, to move and to compute again, and when, so that `goal` is reached over `link`.

    Nothing is random, and nothing depends on the clock: equal arguments give equal plans.

    Args:
        timeline: what was measured of the step.
        link: between device and host memory.
        goal: a budget in bytes, or a price as a part of the step's time.
        caution: the part of a price, 0 to 1, that the plan is foreseen to spend: 1 where what is foreseen can be relied
            on.

    Raises:
        BudgetError: no plan keeps the peak within `goal.device_budget`; it names the smallest that was found.
        ValueError: a rule of the goal matches nothing, or cannot be followed; or `caution` is not from 0 to 1.
    """
    given: object = caution
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise ValueError(f"caution is the part of a price that may be spent, a number from 0 to 1; got {caution!r}.")
    allowed = choices(timeline, goal)
    kept = nothing(timeline)
    before = _kept_peak(timeline, link)
    free = not any(rule[1] != "keep" for rule in goal.rules)
    if free and goal.device_budget is not None and before <= goal.device_budget:
        return explain(timeline, link, goal, kept, before, None)
    found = find(timeline, link, allowed)
    if goal.device_budget is not None:
        point = found.frontier.within(goal.device_budget)
        if point is None:
            raise _too_little(goal.device_budget, found, before)
        made, _ = found.plan_of(point)
    else:
        assert goal.max_slowdown is not None
        made = _at_price(found, timeline.step_ms * (1 + caution * goal.max_slowdown), kept if free else None)
    made, after = postpone(timeline, link, made, simulate(timeline, made, link))
    if free and goal.max_slowdown is not None and after.peak_bytes > before * (1 - _LEAST_GAIN):
        return explain(timeline, link, goal, kept, before, None)
    return explain(timeline, link, goal, made, before, after)


def _kept_peak(timeline: Timeline, link: Link) -> int:
    layout = lay_out(timeline, ["save"] * len(timeline.sections))
    run = Run(layout, link, [False] * len(layout.items))
    run.go(Schedule(layout, link, run.moved, limit_bytes=0, pace=Pace()))
    return run.peak_bytes


def _at_price(found: Found, most_ms: float, kept: Plan | None) -> Plan:
    """The smallest step of at most `most_ms`, or the fastest there is. `kept`: that in which all stays, if it may."""
    allowed_ms = most_ms
    for _ in range(_TRIES):
        point = found.frontier.at_price(allowed_ms) or next(iter(found.frontier))
        made, ms = found.plan_of(point)
        if ms <= most_ms + 1e-6:
            break
        # The groups promised more than their members keep.
        allowed_ms = min(allowed_ms - 1.5 * (ms - most_ms), point.ms - 1e-3)
    else:
        if kept is not None:
            return kept
    return made


def _too_little(budget: int, found: Found, before: int) -> BudgetError:
    smallest, step_ms = list(found.frontier)[-1], found.timeline.step_ms
    cost = f" at {smallest.ms / step_ms:.2f} times the step" if step_ms else ""
    return BudgetError(
        f"no plan keeps the step within device_budget={size(budget)}; the smallest peak that was found is "
        f"{size(smallest.peak_bytes)} ({smallest.peak_bytes} bytes){cost}, and with nothing moved it is "
        f"{size(before)}. Raise the budget to that, or take smaller batches.",
        smallest_bytes=smallest.peak_bytes,
    )
