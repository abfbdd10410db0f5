"""Tells at what pace planned steps run beside the steps that were measured, and scales a timeline to it."""

from __future__ import annotations

import dataclasses

from ...planner.prediction import Prediction
from ...planner.timeline import SavedAllocation, SectionRecord, Timeline
from .step_log import StepLog

# Note [The pace of steps]
# What is measured is not yet what will run. Where a budget would be broken everything moves in the steps that are
# measured: the device waits for copies, clocks higher in between, and its phases are 5 to 6 % shorter than under a
# plan that hides the copies; or the host, which issues all that, is what the phases wait for, and they are half as
# long again. So planned steps are timed too, now and then, and all times of the timeline are scaled by what they take
# beside what was foreseen, waits for copies left out on both sides. Where that changes much, the plan is made anew.

# The clocks of a device settle over the first steps of a plan: before so many of them no plan is made anew.
SETTLED = 8
# What differs by less than this part changes nothing; by more than that, it is seen twice before it counts, and the
# plan is made anew.
_ALIKE, NEAR = 0.005, 0.04
# So many steps are timed in a row, at most, until one of them can be read, or compared with what was foreseen.
TRIES = 4
# So often a plan is made anew from the times of one measurement.
MOST_REMADE = 2
# Times are scaled to between these parts of what was measured: what is slower has changed, and is measured anew.
LEAST, MOST = 0.5, 1.25


def compute_ms(log: StepLog) -> float:
    """What a readable step took without its waits for copies, computing again included."""
    took = log.clock.ms(log.boundaries[0].at, log.boundaries[-1].at)
    released = sum(wait.milliseconds() or 0.0 for _, wait in log.waits)
    rows = {id(section.row): section.row for section in log.sections}
    return took - released - sum(row.late_ms for row in rows.values())


def foreseen_compute_ms(prediction: Prediction) -> float:
    """The same of a step as it was foreseen."""
    return prediction.step_ms - prediction.stalls_ms.reload - prediction.stalls_ms.release


def scaled(timeline: Timeline, factor: float) -> Timeline:
    """`timeline` with all its times `factor` times as long."""
    return dataclasses.replace(
        timeline,
        sections=tuple(_section(section, factor) for section in timeline.sections),
        phases=tuple(dataclasses.replace(phase, ms=factor * phase.ms) for phase in timeline.phases),
    )


def _section(section: SectionRecord, factor: float) -> SectionRecord:
    return dataclasses.replace(
        section,
        allocations=tuple(_allocation(allocation, factor) for allocation in section.allocations),
        selective_ms=None if section.selective_ms is None else factor * section.selective_ms,
        recompute_ms=None if section.recompute_ms is None else factor * section.recompute_ms,
        hooks_forward_ms=factor * section.hooks_forward_ms,
        hooks_backward_ms=factor * section.hooks_backward_ms,
    )


def _allocation(allocation: SavedAllocation, factor: float) -> SavedAllocation:
    return dataclasses.replace(
        allocation,
        born_ms=factor * allocation.born_ms,
        uses=tuple(
            dataclasses.replace(use, first_ms=factor * use.first_ms, last_ms=factor * use.last_ms)
            for use in allocation.uses
        ),
    )


class Pace:
    """How much longer planned steps compute than the steps that were measured."""

    def __init__(self) -> None:
        self.since_measured = 1.0
        """By what the times of the timeline were scaled since they were measured."""
        self.since_made = 1.0
        """By what they were since the plan in force was made of them."""
        self.num_tried = self.num_remade = 0
        """How often a plan was begun, and made, anew since they were measured."""
        self._doubted: float | None = None
        self._passed_over = 0

    def measured(self) -> None:
        """A plan is carried out that was made from a new measurement."""
        self.since_measured, self.num_tried, self.num_remade = 1.0, 0, 0
        self.planned()

    def planned(self) -> None:
        """Another plan is carried out, made from the timeline as it was scaled by now."""
        self.since_made, self._doubted = 1.0, None

    @property
    def doubts(self) -> bool:
        """Whether the step that was read last was so far off that another one has to be timed before it counts."""
        return self._doubted is not None

    def passed_over(self) -> None:
        """A step that was timed cannot be compared; after some of them the doubt about an earlier one is given up."""
        self._passed_over += 1
        if self._passed_over >= TRIES:
            self._doubted = None

    def within(self, factor: float) -> float:
        """`factor`, or what of it keeps the times within reach of what was measured."""
        return min(max(factor * self.since_measured, LEAST), MOST) / self.since_measured

    def seen(self, factor: float) -> float | None:
        """A step computed `factor` times as long as foreseen; by what the times are to be scaled now, if at all."""
        doubted, self._doubted = self._doubted, None
        if doubted is not None:
            factor = min(factor, doubted, key=lambda one: abs(one - 1.0))  # one of the two may have been held up
        elif abs(factor - 1.0) > NEAR:
            self._doubted, self._passed_over = factor, 0
            return None
        factor = self.within(factor)
        return None if abs(factor - 1.0) < _ALIKE else factor

    def scale(self, factor: float) -> None:
        """The times were scaled by `factor`."""
        self.since_measured *= factor
        self.since_made *= factor

    def asks_for_a_plan(self, num_steps: int) -> bool:
        """Whether the plan in force, `num_steps` old, was made for another pace than that of its steps."""
        return num_steps >= SETTLED and self.num_tried < MOST_REMADE and abs(self.since_made - 1.0) > NEAR

    def as_measured(self, ms: float) -> float:
        """What of `ms` was foreseen before steps turned out slower: drift may not hide in many small steps."""
        return ms / max(self.since_measured, 1.0)
