"""What plans leave free of a budget, after steps took more than it."""

from __future__ import annotations

import dataclasses

import pytest

from lighterage import Policy
from lighterage.engine.planning import budget as budget_module
from lighterage.engine.planning.budget import MOST_TIGHTENED, Budget
from lighterage.errors import BudgetError
from lighterage.planner.goal import Goal
from lighterage.planner.prediction import Prediction
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Timeline
from tests.planner.decoder import LINK, decoder
from tests.planner.test_plan import plan_of_nothing

MIB = 1 << 20


class Planner:
    """Makes plans for whatever is not under its floor."""

    floor_bytes = 0
    goals: list[int]

    def __init__(self, timeline: Timeline, link: Link, goal: Goal, *, agree: bool) -> None:
        assert goal.device_budget is not None
        self.goals.append(goal.device_budget)
        self.error: BudgetError | None = None
        if goal.device_budget < self.floor_bytes:
            self.error = BudgetError("too little", smallest_bytes=self.floor_bytes)

    def run(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "goals", [], raising=False)
    monkeypatch.setattr(budget_module, "Planning", Planner)


def tighter(budget: Budget, took_mib: int, foreseen_mib: int | None = None) -> bool:
    """Whether there is a plan for less after a step took so much."""
    timeline = decoder(2)
    foreseen: Prediction | None = None
    if foreseen_mib is not None:
        kept = simulate(timeline, plan_of_nothing(timeline), LINK)
        foreseen = dataclasses.replace(kept, peak_bytes=foreseen_mib * MIB)
    return budget.tighter(took_mib * MIB, timeline, LINK, foreseen) is not None


def test_each_time_twice_as_much_of_what_was_too_much_is_left_free() -> None:
    budget = Budget(Policy(device_budget="100MiB"))
    assert budget.broken_by(101 * MIB) and not budget.broken_by(100 * MIB)
    for _ in range(MOST_TIGHTENED):
        assert tighter(budget, 101)
    assert Planner.goals == [(100 - free) * MIB for free in (1, 3, 7, 15)]
    assert not tighter(budget, 101), "so often and no more"


@pytest.mark.parametrize(("foreseen_mib", "found"), [(None, False), (98, False), (99, True)])
def test_no_more_is_left_free_than_the_smallest_plan_leaves(
    foreseen_mib: int | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing where the plan that there is comes nearest, as far as is known."""
    monkeypatch.setattr(Planner, "floor_bytes", 98 * MIB)
    assert tighter(Budget(Policy(device_budget="100MiB")), 103, foreseen_mib) is found
    assert Planner.goals == [97 * MIB, 98 * MIB][: 1 + found]
