"""Makes a plan: the fastest within a budget, or the smallest at a price."""

from __future__ import annotations

import dataclasses

from ..errors import BudgetError
from .coarse import Coarse, coarsen
from .figures import size
from .frontier import Frontier, Point
from .goal import Choices, Goal, choices
from .plan import Fetch, Move, Plan, SectionPlan
from .postpone import postpone
from .prediction import Prediction
from .search import Search
from .simulate import simulate
from .timeline import Link, Timeline
from .why import explain

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

    def plan_of(self, point: Point) -> Plan:
        """The decisions of `point` for every allocation, without its reasons."""
        layout, moved, schedule = self.search.carry_out(point)
        members = self.coarse.members
        moves: list[list[Move]] = [[] for _ in self.timeline.sections]
        for index, item in enumerate(layout.items):
            # What was never let go of need not travel.
            if moved[index] and schedule.released[index] >= 0:
                after = schedule.released[index] - item.birth[0]
                for save in members[item.section, item.allocation.save]:
                    moves[item.section].append(Move(save=save, release_after=after))
        fetches = tuple(
            tuple(
                Fetch(section=layout.items[index].section, save=save)
                for index in row
                for save in members[layout.items[index].section, layout.items[index].allocation.save]
            )
            for row in schedule.rows
        )
        return Plan(
            sections=tuple(
                SectionPlan(name=section.name, mode=mode, moves=tuple(sorted(each, key=lambda move: move.save)))
                for section, mode, each in zip(self.timeline.sections, point.modes, moves, strict=True)
            ),
            fetches=fetches,
        )


def find(timeline: Timeline, link: Link, allowed: Choices) -> Found:
    """The frontier of `timeline` over `link`."""
    coarse = coarsen(timeline, allowed)
    search = Search(coarse.timeline, link, coarse.choices)
    return Found(timeline, link, search, search.go(), coarse)


def nothing(timeline: Timeline) -> Plan:
    """The plan in which everything stays."""
    return Plan(
        sections=tuple(SectionPlan(name=section.name) for section in timeline.sections),
        fetches=((),) * len(timeline.phases),
    )


def plan(timeline: Timeline, link: Link, goal: Goal) -> Plan:
    """What to keep, to move and to compute again, and when, so that `goal` is reached over `link`.

    Nothing is random, and nothing depends on the clock: equal arguments give equal plans.

    Raises:
        BudgetError: no plan keeps the peak within `goal.device_budget`; it names the smallest that was found.
        ValueError: a rule of the goal matches nothing, or cannot be followed.
    """
    allowed = choices(timeline, goal)
    kept = nothing(timeline)
    before = simulate(timeline, kept, link)
    free = not any(rule[1] != "keep" for rule in goal.rules)
    if free and goal.device_budget is not None and before.peak_bytes <= goal.device_budget:
        return explain(timeline, link, goal, kept, before, before)
    found = find(timeline, link, allowed)
    if goal.device_budget is not None:
        point = found.frontier.within(goal.device_budget)
        if point is None:
            raise _too_little(goal.device_budget, found, before)
    else:
        assert goal.max_slowdown is not None
        point = found.frontier.at_price(timeline.step_ms * (1 + goal.max_slowdown))
        point = point or next(iter(found.frontier))
    made = found.plan_of(point)
    after = simulate(timeline, made, link)
    made, after = postpone(timeline, link, made, after)
    if free and goal.max_slowdown is not None and after.peak_bytes > before.peak_bytes * (1 - _LEAST_GAIN):
        made, after = kept, before
    return explain(timeline, link, goal, made, before, after)


def _too_little(budget: int, found: Found, before: Prediction) -> BudgetError:
    smallest = list(found.frontier)[-1]
    return BudgetError(
        f"no plan keeps the step within device_budget={size(budget)}; the smallest peak that was found is "
        f"{size(smallest.peak_bytes)} ({smallest.peak_bytes} bytes) at {smallest.ms / found.timeline.step_ms:.2f} "
        f"times the step, and with nothing moved it is {size(before.peak_bytes)}. Raise the budget "
        "to that, or take smaller batches.",
        smallest_bytes=smallest.peak_bytes,
    )
