"""Keeps what is foreseen of a plan at the pace of its steps, and has the plan made anew where that changes much."""

from __future__ import annotations

from ...planner.plan import Plan
from ...planner.prediction import Prediction
from ...planner.timeline import Link, Timeline
from .checks import Checks
from .making import Foreseeing, Planning, begin
from .pace import SETTLED, TRIES, Pace, foreseen_compute_ms, scaled


class Calibration:
    """What timed steps under a plan have changed of its times. See Note [The pace of steps].

    Nothing here holds a step up: what takes time is done beside the steps, and asked for as later ones begin. On a CPU,
    whose steps are the host's, it is done there and then.
    """

    def __init__(self, *, beside: bool) -> None:
        """`beside`: whether there is a device that goes on with its steps meanwhile."""
        self._beside = beside
        self.pace = Pace()
        self._made_of: Timeline | None = None
        """What the plan in force was made of; None: its steps are not compared with anything."""
        self._made_for: Link | None = None
        self._foreseeing: tuple[Foreseeing, float] | None = None
        """What the plan will do with its times scaled by so much more."""
        self._remaking: Planning | None = None
        self._at_pace = True
        self._compared = False
        """Whether a step of the plan was compared after clocks had settled."""

    def follow(self, job: Planning, *, measured: bool) -> None:
        """The plan of `job` is carried out from now on. `measured`: what it was made of is a new measurement."""
        self.stop()
        self._compared = False
        self._made_of, self._made_for = job.timeline, job.link
        if measured:
            self.pace.measured()
        else:
            self.pace.planned()

    def stop(self) -> None:
        """Compare nothing until the next plan, and forget what is in the making."""
        self._made_of = self._made_for = self._foreseeing = self._remaking = None

    @property
    def follows(self) -> bool:
        """Whether a plan is carried out whose steps are compared with what was foreseen."""
        return self._made_of is not None

    @property
    def in_the_making(self) -> bool:
        """Whether something is that will change what is foreseen, or the plan."""
        return self._foreseeing is not None or self._remaking is not None

    def is_due(self, number: int, checks: Checks) -> bool:
        """Whether step `number` of the plan, counted from 1, is to be timed for its pace."""
        if self._made_of is None or checks.pending:
            return False
        return self.pace.doubts or (not self._compared and SETTLED <= number < SETTLED + TRIES)

    def factor(self, checks: Checks, prediction: Prediction | None) -> float | None:
        """How much longer than foreseen the step computed that was just read; None where they cannot be compared."""
        factor = self._factor(checks, prediction)
        if factor is None:
            self.pace.passed_over()
        return factor

    def _factor(self, checks: Checks, prediction: Prediction | None) -> float | None:
        if self._made_of is None or prediction is None or checks.compute_ms is None:
            return None
        foreseen_ms = foreseen_compute_ms(prediction)
        measured = foreseen_ms > 0 and checks.compute_ms > 0  # neither, where a clock tells NaN
        if not measured or checks.is_slower(self.pace.as_measured(prediction.step_ms)):
            return None  # nothing was measured, or something has changed
        return checks.compute_ms / foreseen_ms

    def see(self, factor: float, plan: Plan, number: int) -> None:
        """A step of `plan`, of which `number` are over by now, computed `factor` times as long as was foreseen."""
        self._compared |= number >= SETTLED
        if self.in_the_making:
            return  # what it was compared with is about to change
        by = self.pace.seen(factor)
        if by is None:
            return
        assert self._made_for is not None
        job = Foreseeing(self.scaled(by), plan, self._made_for)
        if self._beside:
            begin(job)
        else:
            job.run()
        self._foreseeing = job, by  # an interrupt meanwhile leaves nothing that would be waited for

    def scaled(self, factor: float) -> Timeline:
        """What the plan was made of, at the pace that is known and `factor` times as long."""
        assert self._made_of is not None
        return scaled(self._made_of, factor * self.pace.since_made)

    def foreseen_anew(self) -> tuple[Timeline, Prediction] | None:
        """The scaled timeline and what the plan in force will do by it, once, when that is known."""
        if self._foreseeing is None or not self._foreseeing[0].done.is_set():
            return None
        (job, factor), self._foreseeing = self._foreseeing, None
        if job.prediction is None:
            return None
        self.pace.scale(factor)
        return job.timeline, job.prediction

    def remake(self, job: Planning, *, at_pace: bool) -> None:
        """Have a plan made of the scaled timeline; the one in force is carried out meanwhile.

        `at_pace`: whether that is because of the pace, for which it is done so often.
        """
        begin(job)
        self.pace.num_tried += at_pace
        self._remaking, self._at_pace = job, at_pace

    def remade(self) -> Planning | None:
        """The plan that was made anew, once, when it is ready."""
        job = self._remaking
        if job is None or not job.done.is_set():
            return None
        self._remaking = None
        if job.error is not None:
            return None  # what stands in the way of another plan is no reason to leave the one that there is
        self.pace.num_remade += self._at_pace
        return job
