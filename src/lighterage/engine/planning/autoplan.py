"""Decides, step by step, what is measured and which plan is carried out; has the plan made in between."""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import nn

from ...errors import BudgetError
from ...planner.plan import Plan
from ...planner.prediction import Prediction
from ...planner.timeline import Link, Timeline
from ..policy import Policy
from ..traffic import Traffic
from .budget import Budget
from .calibration import Calibration
from .checks import Checks
from .clock import Gauge, clock_of
from .course import Course
from .events import Events
from .making import Fault, Planning, begin
from .measurements import Measurements
from .pace import SETTLED, scaled
from .price import Price
from .room import Room
from .run import Run
from .step_log import StepLog

# So many steps are timed; of each phase the shortest counts, which leaves the noise of first times out.
TIMED_STEPS = 2
# So often a step is passed over that is not like the first, or that waited for host memory.
MOST_RESTARTS = 3
# After each new plan so many steps pass, doubled each time, before drift may ask for the next.
PATIENCE = 4


class Stage(enum.Enum):
    """What the steps are for."""

    SIZING = "sizing"
    """Sizes are told, and what could be computed again; times are those of first times."""
    TIMING = "timing"
    TRIAL = "trial"
    """Sections run in the ways that a plan may choose, to see what each takes."""
    PLANNING = "planning"
    """The plan is being made beside the steps."""
    PLANNED = "planned"
    UNPLANNED = "unplanned"
    """The planner failed at the first plan. It is not asked again, and nothing is measured, until a plan is given."""


class Autoplan:
    """Measures the first steps, makes a plan, carries it out, and makes it anew when the steps change.

    All methods are called with the offloader's lock held. It decides speed and memory: what is saved can be asked for
    at any time whatever it says.
    """

    def __init__(
        self,
        policy: Policy,
        traffic: Traffic,
        module_of: Callable[[str], nn.Module | None],
        device: torch.device,
        measure_link: Callable[[], Link],
        unready: Callable[[], int],
        settle_waits: Callable[[], None],
    ) -> None:
        """Make one that has yet to see a step.

        Args:
            unready: grows where a step lacks host memory: it waits for that, or keeps what was to leave.
            settle_waits: reads what reloads in the last steps have waited, as far as is known.
        """
        self._policy = policy
        self._measure_link = measure_link
        self._unready = unready
        self._settle_waits = settle_waits
        self._unready_before = 0
        self._device = device
        self._clock = clock_of(device)
        self._gauge = Gauge(device)
        self._room = Room(self._gauge, policy)
        self._budget = Budget(policy)
        self._measurements = Measurements(device, traffic.still_alive)
        self._stage = Stage.SIZING
        self._course: Course | None = None
        self._fault: Fault | None = None
        self._given = False
        self._together = False
        """Whether the timeline is one that several ranks have in common."""
        self.link: Link | None = None
        """What the copies go over, as it was measured."""
        self._job: Planning | None = None
        self._restarts = 0
        self._steps = 0
        self._patience = PATIENCE
        self._num_plans = 0
        self.events = Events(policy, traffic, module_of, device, self._room)
        """Whom to tell of what happens to sections, within a step."""
        self.checks = Checks()
        """What steps take under the plan."""
        self._calibration = Calibration(beside=device.type != "cpu")
        self.pace = self._calibration.pace
        """How that compares with what was measured before."""
        self.price = Price(policy, device, self._clock, self._room)
        """How that compares with what they take without the plan."""
        self.timeline: Timeline | None = None
        self.prediction: Prediction | None = None
        self.num_drifts = 0
        """How often steps did not fit the plan so that they were measured again."""
        self.planning_ms: float | None = None
        self.planned_in_thread: str | None = None
        self.agreed_with = 1
        """Ranks that the plan was made for together."""

    @property
    def plan(self) -> Plan | None:
        return None if self._course is None else self._course.plan

    @property
    def told(self) -> str:
        """The plan in a sentence, or what is still missing to make one."""
        if self._stage is Stage.UNPLANNED and self._fault is not None:
            return f"none: {self._fault.told(self._policy)}"
        if self._course is None:
            return f"none yet; the steps are measured ({self._stage.value})"
        why = self._course.plan.why or "as it was given"
        return f"{why}{self._budget.told(self.checks.measured_peak_bytes)}{self.price.told}"

    def use(self, plan: Plan, timeline: Timeline) -> None:
        """Carry `plan` out from the next step on, and measure nothing more."""
        self._given = True
        self._calibration.stop()
        self.price.stop()
        self.pace.measured()  # its times are as they were given
        self._course = Course(plan, timeline, self._measurements.recipes())
        self._measurements.clear()
        self.timeline = timeline
        self.prediction = self.planning_ms = self.planned_in_thread = self._job = None  # they were of another plan
        self.agreed_with, self._together = 1, False
        self.checks.new_plan()
        self._stage = Stage.PLANNED
        self._steps = 0

    # --- steps ------------------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """A step is about to begin; harmless when repeated before anything was saved.

        Raises:
            BudgetError: no plan keeps to the budget.
        """
        self.events.step_begins()  # whatever comes of it below, what is left of another step is none of this one's
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.events.captured()
            return  # what is captured does not run, so that it takes no time: it is none of the steps
        if self.link is None and not self._given and self._device.type != "cpu":
            self.link = self._measure_link()  # the first step is slow anyway
        self._look()
        self._unready_before = self._unready()
        if self._stage is Stage.PLANNED:
            assert self._course is not None
            # What is saved has to be told for the peak where no allocator can tell it.
            number, course = self._steps + 1, self._turn()
            timed = course is not None or self.checks.is_due(number) or self._calibration.is_due(number, self.checks)
            log = self._new_log(detailed=course is None and self._gauge.now() is None) if timed else None
            self.events.step_begins(log, Run(course or self._course))
        elif self._stage is Stage.UNPLANNED:
            assert self._fault is not None
            self.events.step_begins(None, Run(self._fault.course), trial=True)
        elif self._stage is Stage.TRIAL:
            if (course := self._measurements.trial_course()) is not None:
                self.events.step_begins(self._new_log(detailed=False), Run(course), trial=True)
        elif self._stage is Stage.SIZING:
            self.events.step_begins(self._new_log(detailed=True), first=True)
        elif self._stage is Stage.TIMING and len(self._measurements.timed) < TIMED_STEPS:
            self.events.step_begins(self._new_log(detailed=True))

    def _new_log(self, *, detailed: bool) -> StepLog:
        return StepLog(self._clock, self._gauge, detailed=detailed)

    def step_ended(self) -> None:
        """What the step saved is gone."""
        log, run = self.events.step_ended()
        try:
            self._end(log, run)
        finally:
            if run is not None:
                run.close()

    def _end(self, log: StepLog | None, run: Run | None) -> None:
        if log is not None:
            log.close()
            self._room.seen(log)
        if log is not None and not any(b.direction == "backward" for b in log.boundaries):
            return  # no backward came: it tells nothing
        if self._stage is Stage.PLANNED:
            if run is not None:
                self._steps += 1
                unready = self._unready() > self._unready_before
                fits = not (run.strange or run.is_smaller or unready)
                log = log if log is not None and log.is_whole else None  # else an exception ended its backward
                of_a_row = self.price.took(log, run.course, fits=fits)
                if run.course is self._course:
                    if log is not None and not of_a_row and not (unready and self.checks.passes_over()):
                        self.checks.take(log, fits=fits)
                    if run.strange:
                        self._measure_again()
        elif log is not None:
            self._take(log)

    def _take(self, log: StepLog) -> None:
        measured = self._measurements
        if self._stage is Stage.SIZING:
            measured.begin(log)
            self._stage = Stage.TIMING
        elif self._stage is Stage.TIMING:
            if self._restarts >= MOST_RESTARTS:
                measured.timed.append(log)
            elif not measured.is_like_first(log):
                self._restarts += 1
                self._stage = Stage.SIZING
            elif self._unready() > self._unready_before:
                self._restarts += 1  # what it waited for will not be waited for again
            else:
                measured.timed.append(log)
        elif self._stage is Stage.TRIAL:
            measured.trial.logs.append(log)

    def _look(self) -> None:
        """See whether what was measured can be read by now, and go on."""
        measured = self._measurements
        if self.checks.readable:
            self._settle_waits()
            self.checks.read()
            self._judge()
        self._look_beside()
        try:
            if self._stage is Stage.TIMING and len(measured.timed) >= TIMED_STEPS:
                if not all(log.readable for log in measured.timed):
                    return
                measured.choose_trials(limited=self._room.is_limited)
                self._stage = Stage.TRIAL
            if self._stage is Stage.TRIAL and measured.trials_done:
                self._make()
        except ValueError:  # the steps do not make up a whole one: an exception ended one's backward, say
            self._start_over()
        if self._stage is Stage.PLANNING and self._job is not None and self._job.done.is_set():
            self._adopt(self._job, measured=True)

    def _start_over(self) -> None:
        """Measure from the first step on: what was seen is of no use."""
        self._measurements.clear()
        self._restarts = 0
        self._stage = Stage.SIZING

    # --- plans ------------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        """Begin to make a plan: at once on the CPU, whose steps are the host's; beside the steps elsewhere."""
        self._measurements.recipes()
        if self.link is None:
            self.link = self._measure_link()
        timeline = self.price.charged(self._measurements.timeline())
        self.link = self._measurements.seen_over(self.link)
        self._job = Planning(timeline, self.link, self._budget.goal, agree=self._num_plans == 0)
        self._stage = Stage.PLANNING
        self._measurements.clear()
        try:
            if self._device.type == "cpu":
                self._job.run()
            else:
                begin(self._job)
        except BaseException:  # Ctrl-C, which may be caught further out: training goes on, its plan is still due
            self._job = None
            self._start_over()
            raise

    def _adopt(self, job: Planning, *, measured: bool) -> None:
        """Carry out, from this step on, what was planned. `measured`: from a new measurement.

        Raises:
            BudgetError, ValueError: no plan keeps to the budget, or to the rules.
        """
        if job.error is not None and self._course is not None and not isinstance(job.error, BudgetError):
            # It was measured anew, and the rules do not fit what ran: go on as before.
            self._stage, self._steps, self._job = Stage.PLANNED, 0, None
            return
        self.timeline = job.timeline
        if job.fault is not None:
            self._stage, self._job, self._fault = Stage.UNPLANNED, None, job.fault
            job.fault.warn(self._policy)  # last: where warnings are errors it ends this step, and no other
            return
        if job.error is not None:
            raise job.error.with_traceback(None)
        self._job = None
        assert job.plan is not None
        if measured:
            self._together = job.num_ranks > 1
        self._course = Course(job.plan, job.timeline, self._measurements.recipes())
        self.prediction, self.planning_ms, self.agreed_with = job.prediction, job.ms, job.num_ranks
        self.planned_in_thread = job.in_thread
        self.checks.new_plan()
        self._calibration.follow(job, measured=measured)
        self.price.follow(job.plan, job.num_ranks)
        self._stage = Stage.PLANNED
        self._steps = 0
        self._num_plans += 1

    def _judge(self) -> None:
        """A planned step was timed: plan anew if it took more than the budget, or if steps have become slower.

        Otherwise what is foreseen is brought to its pace. Drift is judged first, and by what was measured before any
        step was compared: no slowness that has come since may hide in the pace.
        """
        peak_bytes = self.checks.measured_peak_bytes
        assert peak_bytes is not None
        timeline, link, prediction = self.timeline, self.link, self.prediction
        factor = self._calibration.factor(self.checks, prediction)
        if not self._given and timeline is not None and link is not None and self._budget.broken_by(peak_bytes):
            by = 1.0 if factor is None or self._together else self.pace.within(factor)
            job = self._budget.tighter(peak_bytes, scaled(timeline, by), link, prediction)
            if job is not None:
                self.pace.scale(by)
                self._adopt(job, measured=False)  # the step that begins now has waited for it
                return
        elif prediction is not None and self.checks.are_slow(self.pace.as_measured(prediction.step_ms)):
            if self._measure_again():
                self.link = None  # it may be that which has changed
            return
        if factor is not None and self._stage is Stage.PLANNED and self._course is not None:
            self._calibration.see(factor, self._course.plan, self._steps)

    def _look_beside(self) -> None:
        """See whether what was foreseen anew, or planned anew, beside the steps is ready by now."""
        foreseen = self._calibration.foreseen_anew()
        if foreseen is not None:
            timeline, self.prediction = foreseen
            if not self._together:
                self.timeline = timeline
        job = self._calibration.remade()
        if job is not None:
            self.price.replaced(self.pace)
            self._adopt(job, measured=False)
        elif self._may_remake and not self.price.is_due:  # what a plan costs must not pass for the machine's pace
            for_price = self.price.asks_for_a_plan
            if not for_price and (self.price.is_broken or not self.pace.asks_for_a_plan(self._steps)):
                return
            assert self.timeline is not None and self.prediction is not None and self.link is not None
            timeline, goal = self.timeline, self._budget.goal
            if for_price:
                timeline = self.price.corrected(timeline, self.prediction, self.pace)
                goal = self.price.corrected_goal(goal)
            job = Planning(timeline, self.link, goal, agree=False)
            self._calibration.remake(job, at_pace=not for_price)

    @property
    def _may_remake(self) -> bool:
        """Whether another plan may be made beside the steps now, of the timeline at their pace.

        A CPU's steps would wait for it. Ranks that planned together have one timeline, and each a pace of its own: they
        must not plan apart, for each waits for the slowest in its collectives.
        """
        if self._device.type == "cpu" or self._together or self.link is None or self.checks.pending:
            return False
        return self._calibration.follows and not self._calibration.in_the_making and not self.pace.doubts

    def _turn(self) -> Course | None:
        """What the step that begins carries out, to see what steps under the plan cost; None: it is one like others."""
        if self._course is None or self.timeline is None or not (self.price.is_due and self._may_remake):
            return None
        waits = self._steps < SETTLED or self._calibration.is_due(self._steps + 1, self.checks)
        return None if waits else self.price.turn(self._course, self.timeline, self._measurements.may_rest)

    @property
    def is_settled(self) -> bool:
        """Whether the plan is carried out, its steps were timed, and nothing that would change it is in the making."""
        if self._stage is not Stage.PLANNED or self.checks.pending or self._calibration.in_the_making:
            return False
        if self.price.is_due or self.price.asks_for_a_plan:
            return False
        return self._given or (self._steps > SETTLED and not self._calibration.is_due(self._steps + 1, self.checks))

    def _measure_again(self) -> bool:
        """Begin to measure, unless that was done too lately; whether it begins."""
        if self._given or self._steps < self._patience:
            return False
        self._patience *= 2
        self.num_drifts += 1
        self._calibration.stop()
        self.price.stop()
        self._stage = Stage.SIZING
        self._restarts = 0
        # Measuring must not take more memory than the plan did.
        foreseen = None if self.prediction is None else self.prediction.peak_bytes
        self._room.limit = self.checks.measured_peak_bytes or foreseen
        return True
