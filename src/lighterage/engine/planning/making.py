"""Makes one plan from what was measured, beside the steps that go on meanwhile."""

from __future__ import annotations

import dataclasses
import threading
import time

from ...planner.choose import plan as make_plan
from ...planner.goal import Goal
from ...planner.plan import Plan
from ...planner.prediction import Prediction
from ...planner.simulate import simulate
from ...planner.timeline import Link, Timeline
from ..policy import DEFAULT_SLOWDOWN, Policy
from .agree import agreed

# Plans are made for a link that is slower than measured: what comes late costs more than room to spare.
LINK_CAUTION = 0.93


def goal_of(policy: Policy, spare_bytes: int = 0) -> Goal:
    """What a plan under `policy` is to reach, with so much of the budget left free."""
    budget = policy.device_budget_bytes
    if budget is not None:
        budget = max(budget - spare_bytes, 1)
    slowdown = DEFAULT_SLOWDOWN if budget is None and policy.max_slowdown is None else policy.max_slowdown
    return Goal(
        device_budget=budget,
        max_slowdown=slowdown,
        recompute="auto" if policy.may_recompute else "never",
        rules=tuple(tuple(rule) for rule in policy.rules),  # type: ignore[misc]
    )


class Planning:
    """One plan in the making."""

    def __init__(self, timeline: Timeline, link: Link, goal: Goal, *, agree: bool) -> None:
        """`agree`: whether the ranks of the job plan together."""
        self.timeline = timeline
        self._link = _cautious(link)
        self._goal = goal
        self._agree = agree
        self.done = threading.Event()
        self.plan: Plan | None = None
        self.prediction: Prediction | None = None
        self.error: Exception | None = None
        self.ms = 0.0
        self.num_ranks = 1

    def run(self) -> None:
        """Make it; `done` is set whatever comes of it."""
        try:
            if self._agree:
                self.timeline, self.num_ranks = agreed(self.timeline)
            start = time.perf_counter()
            self.plan = make_plan(self.timeline, self._link, self._goal)
            self.prediction = simulate(self.timeline, self.plan, self._link)
            self.ms = (time.perf_counter() - start) * 1e3
        except Exception as error:  # it belongs to whoever begins the next step
            # Its traceback would hold the frames below this one, and with them a step that could then never end.
            self.error = error.with_traceback(None)
            self.error.__context__ = None
        self.done.set()


def _cautious(link: Link) -> Link:
    """A link as slow as it may be in a moment that was not measured."""
    return dataclasses.replace(
        link,
        out_bytes_per_s=LINK_CAUTION * link.out_bytes_per_s,
        in_bytes_per_s=LINK_CAUTION * link.in_bytes_per_s,
        both_bytes_per_s=LINK_CAUTION * link.both_bytes_per_s,
    )
