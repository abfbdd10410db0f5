"""Makes one plan from what was measured, or foresees anew what it does, beside the steps that go on meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator

from ... import background
from ...errors import BudgetError
from ...plan_worker import Made
from ...planner.choose import nothing
from ...planner.choose import plan as make_plan
from ...planner.goal import Goal, choices
from ...planner.plan import Plan
from ...planner.prediction import Prediction
from ...planner.simulate import simulate
from ...planner.timeline import Link, Timeline
from ..policy import DEFAULT_SLOWDOWN, Policy
from .agree import agreed
from .apart import NotApart, made_apart
from .course import Course

# Plans are made for a link that is slower than measured: what comes late costs more than room to spare. Steps under
# plans for a link 7 % slower waited for next to nothing, and left some of the link unused.
LINK_CAUTION = 0.97

# A price of 1 % came out between 0.5 and 1.1 % in five runs of one day on an H100: where it is foreseen to be spent
# whole, what steps vary by breaks it.
PRICE_CAUTION = 0.9


def goal_of(policy: Policy, spare_bytes: int = 0) -> Goal:
    """What a plan under `policy` is to reach, with so much of the budget left free."""
    budget = policy.device_budget_bytes
    if budget is not None:
        budget = max(budget - spare_bytes, 1)
    slowdown = DEFAULT_SLOWDOWN if budget is None and policy.max_slowdown is None else policy.max_slowdown
    return Goal(
        device_budget=budget,
        max_slowdown=None if slowdown is None else float(slowdown),
        recompute="auto" if policy.may_recompute else "never",
        rules=tuple(tuple(map(_plain, rule)) for rule in policy.rules),  # type: ignore[misc]
    )


def _plain(text: str) -> str:
    """A string that is of no class of the user's, nor of NumPy's: the planner's own process knows none."""
    return "".join(text)


class Fault:
    """An error that is the planner's own, and what steps do without its plan.

    They go on as those did that were measured, under a budget too: those have kept to it as far as that is done without
    a plan, and an error would end the training and keep to none.
    """

    def __init__(self, error: Exception, timeline: Timeline) -> None:
        """`timeline`: what was to be planned. Of `error` text is kept alone: a traceback holds what its frames hold."""
        self._timeline = timeline
        self._error = traceback.format_exception_only(error)[0].partition("\n")[0]
        try:
            self._traceback = "".join(traceback.format_exception(error)).rstrip()
        except MemoryError:  # as `error` may be one: training does not end for want of a traceback
            self._traceback = self._error

    @functools.cached_property
    def course(self) -> Course:
        """All stays. It is carried out as trials are, in which sections move that find no room."""
        return Course(nothing(self._timeline), self._timeline, {}, reason="no plan could be made")

    def told(self, policy: Policy) -> str:
        """What failed, what becomes of what sections save, and what to do about it."""
        told = f"the planner failed ({self._error}), and steps go on without a plan. "
        if policy.device_budget is None:
            told += "What sections save stays on the device; where that is almost full, sections move whole. "
        else:
            told += (
                f"Sections move whole where the device has no room for them within "
                f"device_budget={policy.device_budget!r} (on a CPU all do), and nothing else keeps to it. "
            )
        told += "No rule is followed, and nothing is computed again. "
        return f"{told}Name keep_last, release_after or prefetch_ahead to say by hand what moves, and report the error."

    def warn(self, policy: Policy) -> None:
        """Warn of it, with its traceback."""
        data = "What it was to plan is offloader.timeline.to_json()."
        warnings.warn(f"{self.told(policy)} {data}\n\n{self._traceback}", stacklevel=2)


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
        self.fault: Fault | None = None
        """Tells of `error` where that is a fault of the planner's, and no refusal of what it was asked for."""
        self.ms = 0.0
        self.num_ranks = 1
        self.in_thread: str | None = None
        """Why it was made in a thread, where it was to be made in a process of its own."""

    @property
    def link(self) -> Link:
        """What it is made for."""
        return self._link

    def run(self) -> None:
        """Make it here; `done` is set whatever comes of it."""
        self._run(apart=False)

    def run_beside(self) -> None:
        """Make it in a process of its own if that can be had; `done` is set whatever comes of it."""
        self._run(apart=True)

    def _run(self, *, apart: bool) -> None:
        try:
            if self._agree:
                self.timeline, self._link, self.num_ranks = agreed(self.timeline, self._link)
            self.plan, self.prediction, self.ms = self._made_apart() if apart else self._made_here()
        except Exception as error:  # it belongs to whoever begins the next step
            if not self._refuses(error):
                self.fault = Fault(error, self.timeline)
            # Its traceback would hold the frames below this one, and with them a step that could then never end.
            self.error = error.with_traceback(None)
            self.error.__context__ = None
        self.done.set()

    def _made_apart(self) -> Made:
        try:
            return made_apart(self.timeline, self._link, self._goal, PRICE_CAUTION)
        except NotApart as why:
            self.in_thread = str(why)
        return self._made_here()

    def _made_here(self) -> Made:
        start = time.perf_counter()
        with _giving_way():
            plan = make_plan(self.timeline, self._link, self._goal, caution=PRICE_CAUTION)
            prediction = simulate(self.timeline, plan, self._link)
        return Made(plan, prediction, (time.perf_counter() - start) * 1e3)

    def _refuses(self, error: Exception) -> bool:
        """Whether `error` says that the budget or the rules cannot be kept to."""
        if not isinstance(error, ValueError):
            return isinstance(error, BudgetError)
        try:
            choices(self.timeline, self._goal)  # rules are refused there, and as often as it is asked
        except Exception as again:
            return isinstance(again, ValueError)
        return False


class Foreseeing:
    """What a plan that there is will do, in the making."""

    def __init__(self, timeline: Timeline, plan: Plan, link: Link) -> None:
        """`link`: as the plan was made for it. `timeline`: with other times than the plan was made for, perhaps."""
        self.timeline = timeline
        self._plan = plan
        self._link = link
        self.done = threading.Event()
        self.prediction: Prediction | None = None

    def run(self) -> None:
        """Foresee it; `done` is set whatever comes of it."""
        try:
            with _giving_way():
                self.prediction = simulate(self.timeline, self._plan, self._link)
        finally:
            self.done.set()

    run_beside = run
    """It is a millisecond."""


def begin(job: Planning | Foreseeing) -> None:
    """Have `job` run beside the steps; in the one under way, where there is no thread to be had."""
    try:
        background.start(job.run_beside, "lighterage-plan")
    except RuntimeError:
        job.run()


# Note [Planning beside the steps]
# Where a plan cannot be made in a process of its own (see Note [Planning apart]) it is a second of pure Python in a
# thread, and the steps go on meanwhile. Whoever wants the interpreter's lock from a thread that computes is given it
# after the switch interval, 5 ms by default; backward asks for it at each saved tensor, so that steps of 180 ms took
# 800 while a plan was made. With a short interval they wait for less, and the plan takes a little longer. The interval
# is the interpreter's, so that how many plans are being made is counted for the process: whoever began last must not
# take the short one for the usual.

_SWITCH_S = 5e-5
_switching = threading.Lock()
_num_giving_way = 0
_usual_s = 0.0


@contextlib.contextmanager
def _giving_way() -> Iterator[None]:
    """Let other threads have the interpreter soon after they ask for it. See Note [Planning beside the steps]."""
    global _num_giving_way, _usual_s
    with _switching:
        if not _num_giving_way:
            _usual_s = sys.getswitchinterval()
            sys.setswitchinterval(min(_SWITCH_S, _usual_s))
        _num_giving_way += 1
    try:
        yield
    finally:
        with _switching:
            _num_giving_way -= 1
            _back_to_usual()


def _back_to_usual() -> None:
    # Not where somebody else has set it meanwhile.
    if not _num_giving_way and abs(sys.getswitchinterval() - _SWITCH_S) < 1e-6:
        sys.setswitchinterval(_usual_s)


def _begin_anew() -> None:
    """In a forked child nobody is planning, and the lock may have been held."""
    global _switching, _num_giving_way
    if _num_giving_way:
        _num_giving_way = 0
        _back_to_usual()
    _switching = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)


def _cautious(link: Link) -> Link:
    """A link as slow as it may be in a moment that was not measured."""
    return dataclasses.replace(
        link,
        out_bytes_per_s=LINK_CAUTION * link.out_bytes_per_s,
        in_bytes_per_s=LINK_CAUTION * link.in_bytes_per_s,
        both_bytes_per_s=LINK_CAUTION * link.both_bytes_per_s,
    )
