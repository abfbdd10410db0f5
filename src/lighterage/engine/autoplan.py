"""Decides, step by step, what is measured and which plan is carried out; makes the plan in between."""

from __future__ import annotations

import collections
import contextlib
import enum
import statistics
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import BudgetError
from ..planner.plan import Plan, SectionPlan
from ..planner.prediction import Prediction
from ..planner.timeline import Link, Timeline
from .clock import Gauge, clock_of
from .hooks import class_of
from .lanes import Wait
from .measure import MEASURED, SectionLog, StepLog
from .orders import Course, Orders, PlannedOrders, Run
from .planning import Planning, goal_of
from .policy import Policy
from .recompute import SectionCall, why_never
from .repeatable import Repeatable
from .sections import Section
from .timelines import Recipe, is_like, phase_ms, read_timeline, recipe_of
from .traffic import Traffic
from .units import format_bytes

# So many steps are timed; of each phase the shortest counts, which leaves the noise of first times out.
TIMED_STEPS = 2
# A planned step is timed again so early, and then every so many steps.
FIRST_CHECK, CHECK_EVERY = 2, 50
# Steps that take so much longer than foreseen, so many checked ones in a row, are measured anew.
SLOWER, SLOW_CHECKS = 1.25, 4
# After each new plan so many steps pass, doubled each time, before drift may ask for the next.
PATIENCE = 4
TRIALS_OF_A_KIND = 3
# So often a plan is made for less, after a step under it took more than the budget.
MOST_TIGHTENED = 4
_LEAST_AGAIN = 0.02
"""Of a section's forward: the least that selective recomputation is taken to cost."""


class Stage(enum.Enum):
    """What the steps are for."""

    SIZING = "sizing"
    """Sizes are told, and what could be computed again; times are those of first times."""
    TIMING = "timing"
    TRIAL = "trial"
    """One section of each kind is computed again selectively, to see what that takes."""
    PLANNING = "planning"
    """The plan is being made beside the steps."""
    PLANNED = "planned"


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
    ) -> None:
        self._policy = policy
        self._traffic = traffic
        self._module_of = module_of
        self._measure_link = measure_link
        self._device = device
        self._clock = clock_of(device)
        self._gauge = Gauge(device)
        self._stage = Stage.SIZING
        self._first: StepLog | None = None
        self._timed: list[StepLog] = []
        self._trial: StepLog | None = None
        self._trial_kinds: dict[int, object] = {}
        self._trial_course: Course | None = None
        self._log: StepLog | None = None
        self._run: Run | None = None
        self._course: Course | None = None
        self._given = False
        self._link: Link | None = None
        self._job: Planning | None = None
        self._most_bytes = 0
        self._restarts = 0
        self._limit: int | None = None
        self._steps = 0
        self._slow = 0
        self._patience = PATIENCE
        self._num_plans = 0
        self._num_tightened = 0
        self._spare_bytes = 0
        """What steps took beyond the budget under plans that were to keep to it: so much of it is left free."""
        self._check: StepLog | None = None
        self._known: dict[int, Recipe] = {}
        self._repeatable = Repeatable()
        self.timeline: Timeline | None = None
        self.prediction: Prediction | None = None
        self.measured_ms: float | None = None
        """A step under the plan, as it was last timed."""
        self.measured_peak_bytes: int | None = None
        self.measured_phases_ms: list[tuple[str, int | None, float]] = []
        """Direction, section and milliseconds of its phases, waits among them."""
        self.num_drifts = 0
        """How often steps did not fit the plan so that they were measured again."""
        self.planning_ms: float | None = None
        self.agreed_with = 1
        """Ranks that the plan was made for together."""

    @property
    def plan(self) -> Plan | None:
        return None if self._course is None else self._course.plan

    @property
    def told(self) -> str:
        """The plan in a sentence, or what is still missing to make one."""
        if self._course is None:
            return f"none yet; the steps are measured ({self._stage.value})"
        why = self._course.plan.why or "as it was given"
        budget, peak_bytes = self._policy.device_budget_bytes, self.measured_peak_bytes
        if budget is not None and peak_bytes is not None and peak_bytes > budget:
            why += (
                f" A step under it took {format_bytes(peak_bytes)}, which is more than the budget of "
                f"{format_bytes(budget)}; no plan for less was found. Raise the budget, or take smaller batches."
            )
        return why

    @property
    def link_text(self) -> str | None:
        """The link, for people."""
        link = self._link
        if link is None:
            return None
        rates = (link.out_bytes_per_s, link.in_bytes_per_s, link.both_bytes_per_s)
        out, back, both = (f"{rate / 1e9:.1f}" for rate in rates)
        return f"{link.name or 'unnamed'}: {out} GB/s out, {back} in, {both} in total both ways"

    def use(self, plan: Plan, timeline: Timeline) -> None:
        """Carry `plan` out from the next step on, and measure nothing more."""
        self._given = True
        self._course = Course(plan, timeline, self._recipes())
        self.timeline = timeline
        self.prediction = None
        self._stage = Stage.PLANNED
        self._steps = 0

    # --- steps ------------------------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """A step is about to begin; harmless when repeated before anything was saved.

        Raises:
            BudgetError: no plan keeps to the budget.
        """
        self._log = self._run = None
        self._repeatable.step_begins()
        if self._link is None and not self._given and self._device.type != "cpu":
            self._link = self._measure_link()  # the first step is slow anyway
        if _capturing(self._device):
            return  # what is captured does not run, so that it takes no time: it is none of the steps
        self._look()
        if self._stage is Stage.PLANNED:
            assert self._course is not None
            self._run = Run(self._course)
            if self._is_check():
                # What is saved has to be told for the peak where no allocator can tell it.
                self._log = StepLog(self._clock, self._gauge, detailed=self._gauge.now() is None)
        elif self._stage is Stage.TRIAL:
            if self._trial is None:
                assert self._trial_course is not None
                self._run = Run(self._trial_course)
                self._log = StepLog(self._clock, self._gauge, detailed=False)
        elif self._stage is Stage.SIZING or (self._stage is Stage.TIMING and len(self._timed) < TIMED_STEPS):
            self._log = StepLog(self._clock, self._gauge, detailed=True)

    def _is_check(self) -> bool:
        number = self._steps + 1
        return number == FIRST_CHECK or number % CHECK_EVERY == 0 or self._slow > 0

    def step_ended(self) -> None:
        """What the step saved is gone."""
        log, self._log = self._log, None
        run, self._run = self._run, None
        self._repeatable.step_ended(log)
        try:
            self._end(log, run)
        finally:
            if run is not None:
                run.close()

    def _end(self, log: StepLog | None, run: Run | None) -> None:
        if log is not None:
            log.close()
            for section in log.sections:
                self._most_bytes = max(self._most_bytes, sum(save.held_bytes for save in section.saves))
        if log is not None and not any(b.direction == "backward" for b in log.boundaries):
            return  # no backward came: it tells nothing
        if self._stage is Stage.PLANNED:
            if run is not None:
                self._steps += 1
                self._check = log or self._check
                self._watch_drift(run)
        elif log is not None:
            self._take(log)

    def _take(self, log: StepLog) -> None:
        if self._stage is Stage.SIZING:
            self._first, self._timed, self._stage = log, [], Stage.TIMING
        elif self._stage is Stage.TIMING:
            assert self._first is not None
            if is_like(log, self._first) or self._restarts >= 3:
                self._timed.append(log)
            else:
                self._restarts += 1
                self._stage = Stage.SIZING
        elif self._stage is Stage.TRIAL:
            self._trial = log

    def _look(self) -> None:
        """See whether what was measured can be read by now, and go on."""
        check = self._check
        if check is not None and check.readable:
            self._check = None
            self._read_check(check)
        if self._stage is Stage.TIMING and len(self._timed) >= TIMED_STEPS:
            if not all(log.readable for log in self._timed):
                return
            try:
                self._choose_trials()
            except ValueError:  # the steps do not make up a whole one: an exception ended one's backward, say
                self._start_over()
                return
            self._stage = Stage.TRIAL
        if self._stage is Stage.PLANNING:
            assert self._job is not None
            if self._job.done.is_set():
                self._adopt(self._job)
            return
        if self._stage is Stage.TRIAL and (not self._trial_kinds or (self._trial is not None and self._trial.readable)):
            try:
                self._make()
            except ValueError:
                self._start_over()
                return
            self._look()

    def _start_over(self) -> None:
        """Measure from the first step on: what was seen is of no use."""
        self._first, self._timed, self._trial = None, [], None
        self._restarts = 0
        self._stage = Stage.SIZING

    # --- planning ---------------------------------------------------------------------------------------------------

    def _choose_trials(self) -> None:
        assert self._first is not None
        self._trial, self._trial_kinds = None, {}
        by_kind: dict[object, list[int]] = {}
        for section in self._first.sections:
            if section.not_recomputed is None and section.products and not section.overwritten:
                assert section.index is not None
                by_kind.setdefault(section.kind, []).append(section.index)
        # Not one at the end: backward begins and ends with those.
        self._trial_kinds = {
            index: kind for kind, indices in by_kind.items() for index in _spread(indices, TRIALS_OF_A_KIND)
        }
        timeline = self._read({})
        sections = tuple(
            SectionPlan(name=record.name, mode="selective" if index in self._trial_kinds else "save")
            for index, record in enumerate(timeline.sections)
        )
        nothing = Plan(sections=sections, fetches=((),) * len(timeline.phases))
        self._trial_course = Course(nothing, timeline, self._recipes(), reason=MEASURED)

    def _read(self, selective: dict[object, float]) -> Timeline:
        assert self._first is not None
        return read_timeline(self._timed, self._first, device=_name(self._device), selective=selective)

    def _selective_ms(self) -> dict[object, float]:
        if self._trial is None or not self._timed:
            return {}
        all_usual = [phase_ms(log) for log in self._timed]
        tried = phase_ms(self._trial)
        found: dict[object, list[float]] = collections.defaultdict(list)
        for index, kind in self._trial_kinds.items():
            usual = [ms["backward", index] for ms in all_usual if ("backward", index) in ms]
            forward = [ms["forward", index] for ms in all_usual if ("forward", index) in ms]
            if usual and forward and ("backward", index) in tried:
                # It takes some time, whatever the noise says.
                least = _LEAST_AGAIN * min(forward)
                found[kind].append(max(least, tried["backward", index] - min(usual)))
        return {kind: statistics.median(times) for kind, times in found.items()}

    def _recipes(self) -> dict[int, Recipe]:
        if self._first is not None:
            self._known = {s.index: recipe_of(s) for s in self._first.sections if s.index is not None}
        return self._known

    def _make(self) -> None:
        """Begin to make a plan: at once on the CPU, whose steps are the host's; beside the steps elsewhere."""
        self._recipes()
        if self._link is None:
            self._link = self._measure_link()
        self._job = Planning(
            self._read(self._selective_ms()),
            self._link,
            goal_of(self._policy, self._spare_bytes),
            agree=self._num_plans == 0,
        )
        self._stage = Stage.PLANNING
        self._first, self._timed, self._trial = None, [], None
        if self._device.type == "cpu":
            self._job.run()
        else:
            threading.Thread(target=self._job.run, name="lighterage-plan", daemon=True).start()

    def _adopt(self, job: Planning) -> None:
        """Carry out, from this step on, what was planned.

        Raises:
            BudgetError, ValueError: no plan keeps to the budget, or to the rules.
        """
        if job.error is not None and self._course is not None and not isinstance(job.error, BudgetError):
            # It was measured anew, and the rules do not fit what ran: go on as before.
            self._stage, self._steps, self._job = Stage.PLANNED, 0, None
            return
        self.timeline = job.timeline
        if job.error is not None:
            raise job.error.with_traceback(None)
        self._job = None
        assert job.plan is not None
        self._course = Course(job.plan, job.timeline, self._known)
        self.prediction, self.planning_ms, self.agreed_with = job.prediction, job.ms, job.num_ranks
        self.measured_ms = self.measured_peak_bytes = None
        self.measured_phases_ms = []
        self._stage = Stage.PLANNED
        self._steps = self._slow = 0
        self._num_plans += 1

    # --- drift ------------------------------------------------------------------------------------------------------

    def _read_check(self, log: StepLog) -> None:
        self.measured_ms = log.clock.ms(log.boundaries[0].at, log.boundaries[-1].at)
        peaks = [b.peak_bytes for b in log.boundaries if b.peak_bytes is not None]
        self.measured_peak_bytes = max(peaks) if peaks else max((b.live_bytes for b in log.boundaries), default=0)
        self.measured_phases_ms = [
            (b.direction, None if b.section is None else b.section.index, log.clock.ms(b.at, after.at))
            for b, after in zip(log.boundaries, log.boundaries[1:], strict=False)
        ]
        if self._keep_to_budget(self.measured_peak_bytes):
            return
        if self.prediction is not None:
            self._slow = self._slow + 1 if self.measured_ms > SLOWER * self.prediction.step_ms else 0
            if self._slow >= SLOW_CHECKS:
                self._slow = 0
                if self._measure_again():
                    self._link = None  # it may be that which has changed

    def _keep_to_budget(self, peak_bytes: int) -> bool:
        """Plan anew, for less, if a step under the plan took more than the budget; whether that was done.

        The step that begins now waits for it.
        """
        budget = self._policy.device_budget_bytes
        if budget is None or peak_bytes <= budget or self._given or self.timeline is None or self._link is None:
            return False
        if self._num_tightened == MOST_TIGHTENED:
            return False
        self._num_tightened += 1
        self._spare_bytes += peak_bytes - budget
        for _ in range(2):
            job = Planning(self.timeline, self._link, goal_of(self._policy, self._spare_bytes), agree=False)
            job.run()
            if job.error is None:
                self._adopt(job)
                return True
            foreseen = None if self.prediction is None else self.prediction.peak_bytes
            if not isinstance(job.error, BudgetError) or foreseen is None or job.error.smallest_bytes >= foreseen:
                return False  # the plan that there is comes nearest
            self._spare_bytes = budget - job.error.smallest_bytes
        return False

    def _watch_drift(self, run: Run) -> None:
        if run.unplanned or run.missing or run.resized or run.strayed:
            self._measure_again()

    def _measure_again(self) -> bool:
        """Begin to measure, unless that was done too lately; whether it begins."""
        if self._given or self._steps < self._patience:
            return False
        self._patience *= 2
        self.num_drifts += 1
        self._stage = Stage.SIZING
        self._restarts = 0
        # Measuring must not take more memory than the plan did.
        foreseen = None if self.prediction is None else self.prediction.peak_bytes
        self._limit = self.measured_peak_bytes or foreseen
        return True

    # --- sections ---------------------------------------------------------------------------------------------------

    def opened(self, section: Section, call: SectionCall | None) -> contextlib.AbstractContextManager[object]:
        """A section begins: gives it its orders. The context is for its forward."""
        if _capturing(self._device):
            self.abandoned()
            self._run = None
            return contextlib.nullcontext()
        log, run = self._log, self._run
        if section.by_hand or section.keep_reason is not None:
            pass
        elif run is not None:
            section.orders = run.orders_for(section)
            trial = self._stage is Stage.TRIAL
            if section.orders is None and self._may_keep():
                section.orders = Orders("its step is not the one that was planned for")
            elif trial and section.orders is not None and section.orders.mode == "save" and not self._may_keep():
                section.orders = None
        elif self._may_keep():
            section.orders = Orders(MEASURED)
        around: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        module = self._module_of(section.name)
        if isinstance(section.orders, PlannedOrders) and section.orders.mode != "save":
            around = self._repeatable.check(section.orders, section.name, module, call)
        if log is None:
            return around
        one = section.log = SectionLog(section.name, section.gap, section.row)
        log.entered(one)
        if self._stage is not Stage.SIZING or section.gap:
            return around
        one.kind = class_of(module)
        one.not_recomputed = why_never(module, call) if self._policy.may_recompute else 'recompute="never"'
        if module is None or call is None:
            return around
        for position, tensor in enumerate(call.tensors):
            if tensor.layout is torch.strided and type(tensor) is torch.Tensor:
                one.input_keys.setdefault(tensor.untyped_storage()._cdata, position)
        return self._repeatable.told(
            one, module, call, lambda: section.row.saves, with_modules=bool(self._policy.rules) and not call.compiled
        )

    @property
    def detailed_log(self) -> StepLog | None:
        """Where saves of this step are recorded, if they are."""
        return self._log if self._log is not None and self._log.detailed else None

    def abandoned(self) -> None:
        """An exception ended a section: the step tells nothing."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def first_save(self, section: Section) -> None:
        """A section has saved something, so that it has its place in the step."""
        if section.log is not None and self._log is not None:
            section.log.index = section.index
            self._log.sections.append(section.log)
        if isinstance(section.orders, PlannedOrders) and self._run is not None:
            self._carry_out(*self._run.begins("forward", section.orders.index))

    def left(self, section: Section) -> None:
        """A section's forward has ended."""
        orders, run = section.orders, self._run
        if section.log is not None and self._log is not None:
            self._log.left(section.log)
            self._log.settle_marks(
                section.log, self._policy.select == "marked", "it is moved by hand" if section.by_hand else None
            )
        if isinstance(orders, PlannedOrders) and run is not None:
            if section.index is None:
                run.taken_back(section)
            else:
                self._carry_out(*run.forward_ended(orders.index))

    def visited(self, section: Section) -> None:
        """Backward has come to a section."""
        self._repeatable.visited(section.orders, section.log)
        if section.log is not None and self._log is not None:
            self._log.visited(section.log)
        if isinstance(section.orders, PlannedOrders) and self._run is not None:
            self._carry_out(*self._run.begins("backward", section.orders.index))

    def _carry_out(self, release: list[tuple[PlannedOrders, int]], back: list[Any]) -> None:
        try:
            for orders, save in release:
                section = orders.section
                if section is not None:
                    self._traffic.release_some(section, orders.allocations(save))
        finally:
            self._traffic.fetch(back)

    def waited(self, wait: Wait) -> None:
        """The compute stream was made to wait for a copy out."""
        if self._log is not None:
            self._log.waited(wait)

    @property
    def measures(self) -> bool:
        """Whether what this step shows is taken for what a step is."""
        return self._log is not None and self._run is None

    def reloaded(self) -> None:
        """What a section saved, and was away, is on its way back as its backward begins."""
        if self._log is not None:
            self._log.settle_live()

    def _may_keep(self) -> bool:
        """Whether there is room on the device for what one more section saves."""
        need = 2 * self._most_bytes
        budget = self._policy.device_budget_bytes
        limit = self._limit if budget is None else budget
        used = self._gauge.now()
        if used is None:
            if limit is None:
                return True
            if self._log is None or not self._log.detailed:
                return False
            used = sum(save.live_bytes for one in self._log.sections for save in one.saves)
            return used + self._most_bytes <= limit
        if limit is not None and used + need > limit:
            return False
        room, total = self._gauge.room(), self._gauge.total()
        return room is None or total is None or room > need + total // 20


def _spread(indices: list[int], num: int) -> list[int]:
    """Up to `num` of `indices`, from the middle of as many equal parts."""
    num = min(num, len(indices))
    return [indices[(2 * part + 1) * len(indices) // (2 * num)] for part in range(num)]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
