"""Plans for less, where a step under the plan took more than the budget."""

from __future__ import annotations

from ...errors import BudgetError
from ...planner.goal import Goal
from ...planner.prediction import Prediction
from ...planner.timeline import Link, Timeline
from ..policy import Policy
from ..units import format_bytes
from .making import Planning, goal_of

# So often a plan is made for less, after a step under it took more than the budget. Each time twice as much of what it
# took too much is left free: the next plan may be another one, and foreseen too low by as much again.
MOST_TIGHTENED = 4


class Budget:
    """What of the budget plans have to leave free, so that steps keep to it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._spare_bytes = 0
        """What steps took beyond the budget under plans that were to keep to it."""
        self._num_tightened = 0

    @property
    def goal(self) -> Goal:
        """What a plan is to reach."""
        return goal_of(self._policy, self._spare_bytes)

    def broken_by(self, peak_bytes: int | None) -> bool:
        """Whether steps that take so much do not keep to it."""
        budget = self._policy.device_budget_bytes
        return budget is not None and peak_bytes is not None and peak_bytes > budget

    def told(self, peak_bytes: int | None) -> str:
        """What to say of a step that took so much; nothing where it kept to the budget."""
        budget = self._policy.device_budget_bytes
        if budget is None or peak_bytes is None or not self.broken_by(peak_bytes):
            return ""
        return (
            f" A step under it took {format_bytes(peak_bytes)}, which is more than the budget of "
            f"{format_bytes(budget)}; no plan for less was found. Raise the budget, or take smaller batches."
        )

    def tighter(self, peak_bytes: int, timeline: Timeline, link: Link, foreseen: Prediction | None) -> Planning | None:
        """A plan for less, after a step took `peak_bytes` under one of which `foreseen` was; None where none is better.

        The caller waits for it to be made.
        """
        budget = self._policy.device_budget_bytes
        assert budget is not None
        if self._num_tightened == MOST_TIGHTENED:
            return None
        self._spare_bytes += (peak_bytes - budget) << self._num_tightened
        self._num_tightened += 1
        for _ in range(2):
            job = Planning(timeline, link, self.goal, agree=False)
            job.run()
            if job.error is None:
                return job
            peak = None if foreseen is None else foreseen.peak_bytes
            if not isinstance(job.error, BudgetError) or peak is None or job.error.smallest_bytes >= peak:
                return None  # the plan that there is comes nearest
            self._spare_bytes = budget - job.error.smallest_bytes
        return None
