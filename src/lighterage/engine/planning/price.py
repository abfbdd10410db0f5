"""Counts what moves cost the host, where steps under a plan cost more than they may.

Note [What moves cost the host]
A plan knows what copies cost the device. It does not know what issuing them costs the host, and where that is what a
step waits for, sections that move take longer than was foreseen: blocks of experts in FP8 took 7 % longer where 3 %
were allowed. Those at rest do not. So in a timed step they tell how fast the device is at present, and with it what the
step would take if nothing moved; what it takes beyond that is what the moves cost. Where it is too much, twice in a
row, the plan is made anew, over a link beside which compute loses so much more.
"""

from __future__ import annotations

import dataclasses

from ...planner.prediction import Prediction
from ...planner.timeline import Link, Timeline
from .checks import Checks
from .course import Course
from .pace import SETTLED, scaled

# By less than this part of the step a price is not told from noise.
_MARGIN = 0.01
# Sections at rest tell the pace of the device where they are at least this part of the step.
_LEAST_AT_REST = 0.1
# So often a plan is made for it, from the times of one measurement.
MOST_COUNTED = 2
# Beside a busy lane compute is not taken to stand still.
_MOST_SLOWDOWN = 0.9


def pace_at_rest(checks: Checks, course: Course, timeline: Timeline, prediction: Prediction) -> float | None:
    """How much longer than foreseen the sections at rest took in the step that was read last; None: too few rest."""
    at_rest = {section.index for section in course.numbered.values() if section.at_rest is not None}
    foreseen_ms = measured_ms = 0.0
    for phase in prediction.phases:
        measured = None if phase.section is None else checks.compute_phases_ms.get((phase.direction, phase.section))
        if measured is not None and phase.section in at_rest:
            foreseen_ms += phase.end_ms - phase.start_ms - phase.stalls_ms.reload - phase.stalls_ms.release
            measured_ms += measured
    if not foreseen_ms > _LEAST_AT_REST * timeline.step_ms or not measured_ms > 0:
        return None
    return measured_ms / foreseen_ms


class Price:
    """What moves cost beyond what a plan foresees, so that steps keep to `max_slowdown`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Steps are measured anew: nothing is known of it."""
        self._slowdown = 0.0
        self._cost: float | None = None
        self._num_counted = 0
        self.new_plan()

    def new_plan(self) -> None:
        """Another plan is carried out."""
        self._doubted: float | None = None
        self._wanted: tuple[Timeline, float] | None = None

    @property
    def doubts(self) -> bool:
        """Whether the step that was read last cost too much, so that another one has to be timed."""
        return self._doubted is not None

    @property
    def asks(self) -> bool:
        """Whether a plan is to be made that counts it."""
        return self._wanted is not None

    def passed_over(self) -> None:
        """A step that was timed cannot be compared: the doubt about the one before it is given up."""
        self._doubted = None

    def link(self, link: Link) -> Link:
        """`link` with what moves cost beside."""
        slowdown = min(link.compute_slowdown + self._slowdown, max(link.compute_slowdown, _MOST_SLOWDOWN))
        return dataclasses.replace(link, compute_slowdown=slowdown)

    def take(self) -> tuple[Timeline, float]:
        """What the plan is to be made of: the step at the pace of sections at rest, and by what that is scaled."""
        assert self._wanted is not None
        wanted, self._wanted = self._wanted, None
        return wanted

    def see(
        self,
        asked: float,
        checks: Checks,
        course: Course,
        timeline: Timeline,
        prediction: Prediction,
        by: float,
        number: int,
    ) -> None:
        """A step of the plan, of which `number` are over, was read and can be compared with what was foreseen.

        Args:
            asked: what a step may cost, as a part of one without moves.
            by: by what the times of `timeline` were scaled since they were measured.
        """
        if number < SETTLED or self.asks or self._num_counted == MOST_COUNTED or checks.measured_ms is None:
            return
        pace = pace_at_rest(checks, course, timeline, prediction)
        doubted, self._doubted = self._doubted, None
        busy_ms = (prediction.out_busy + prediction.in_busy) * prediction.step_ms
        if pace is None or not busy_ms > 0:
            return
        cost = checks.measured_ms / (pace * timeline.step_ms) - 1.0
        if cost <= asked + _MARGIN:
            return
        if doubted is None:
            self._doubted = cost
            return
        self._cost = min(cost, doubted)
        beyond_ms = (1.0 + self._cost) * timeline.step_ms - prediction.step_ms
        self._slowdown += max(0.0, beyond_ms / busy_ms)
        self._num_counted += 1
        self._wanted = scaled(timeline, pace), by * pace

    @property
    def told(self) -> str:
        """What was seen, for people; empty where the price is kept to."""
        if self._cost is None:
            return ""
        return (
            f" Steps under an earlier plan took {self._cost:.1%} longer than without moves, the host's work for copies "
            "among it, and this one counts with that."
        )
