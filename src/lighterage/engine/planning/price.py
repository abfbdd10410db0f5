"""Sees whether steps under a plan keep to the price that it was made for, by steps without it in turn with them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from ...planner.choose import nothing
from ...planner.goal import Goal
from ...planner.plan import Plan, SectionPlan
from ...planner.prediction import Prediction
from ...planner.timeline import Timeline
from ..policy import Policy
from .agree import is_alone
from .clock import Clock
from .course import Course
from .making import goal_of
from .pace import Pace, scaled
from .room import Room
from .step_log import StepLog

# Note [A price is seen to be kept]
# What a plan costs is foreseen from what a few steps took, and the host's part of that changes from minute to minute:
# a price of 3 % for eight blocks of experts came out at 1.4 % and at 6 % on one day. Nor can planned steps alone
# tell: where they are slow it may be the machine that is (see Note [The pace of steps]). So once a plan has settled,
# rows of steps at rest and rows of steps under it run in turn. Before each the host waits for the device: a host that
# is ahead of it by half a step, since those at rest left it the time, would hide what the plan costs it for the
# length of a row. The first step of a row fills the device again, and is not read. A planned row is compared with the
# rows at rest on both its sides, or with one, where a collection of garbage, say, held up the other. Only steps of one
# size are compared: what is smaller takes less time, at rest and under a plan.
# Rows differ by about a percent on a device that runs at its limit of power, which may be the price itself: five of 13
# rows of a plan that cost 0.96 % in their mean broke a price of 1 %, one by 2.5. So a plan is believed until its rows
# contradict it. Their median counts, give or take a part of what they differ by that becomes smaller with each row.
# Rows are added until that much does not matter, eight at most; if it matters still, the plan stays.
# The host may be what breaks a price, in the next minute: where it would if the host took a tenth longer, the price is
# taken to be broken. A plan of blocks of experts in bf16 cost 2.1 % in such rows, and 15 % in rows a minute later. What
# a step takes the host is the least of a row: it waits for the device where that has no more room for launches, which
# is no work of its own. Where the price is not kept, what steps took beyond what was foreseen, at least, is charged to
# what the plan has not left at rest, and a plan is made anew.

IN_A_ROW = 5
"""Steps, of which the first is not read.

Every second or fourth step of a program may take longer, by which four in a row are all held up alike.
"""

LEAST_ROWS, MOST_ROWS = 4, 8
"""So many planned rows are read."""

DIFFERS = 0.005
"""By so large a part rows are taken to differ at least: few of them may be alike by chance."""

HELD_UP = 1.04
"""A row at rest that took so many times as long as half of them was held up by something else."""

GIVE = 6.0
"""The median of `n` rows may be off by `GIVE / n` of what they differ by.

That is more than the error of few of them, since the question is asked after each. Where rows come out a percent apart,
one in seven plans that spend a price of 1 % whole is taken to break it, and seven of eight that cost twice as much.
"""

MOST_MISSED, MOST_BEGUN = 12, 1000
"""Steps that cannot be read, or that begin and do not end, before the question is given up."""

HOST_CAUTION = 1.1
"""By so much longer the host may take in a minute that is not seen."""

ALIKE = 0.02
"""By so large a part of what its sections are given a step may differ from the first."""

MOST_CORRECTED = 4
"""So often a plan is made anew for what steps under it cost; the last time whatever no rule moves stays."""


class _Row(NamedTuple):
    """The median step of a row, in milliseconds."""

    ms: float
    host_ms: float
    """What the host took to issue a step, at least."""


class _Part(NamedTuple):
    """By what part of a step at rest planned ones took longer."""

    steps: float
    host: float
    """If the host took by `HOST_CAUTION` longer, and the device waited for it."""


class _Estimate(NamedTuple):
    """What rows say of a part."""

    part: float
    give: float
    """By what it may be off, up or down."""


def _estimate(parts: Sequence[float]) -> _Estimate:
    part = statistics.median(parts)
    # As a standard deviation, if it is chance.
    differ = math.sqrt(math.pi / 2) * statistics.mean(abs(one - part) for one in parts)
    return _Estimate(part, max(differ, DIFFERS) * GIVE / len(parts))


def _parts(rows: Sequence[_Row], caution: float) -> Iterator[_Part]:
    """Of each planned row that can be compared. `rows`: at rest and planned in turn. `caution`: see `HOST_CAUTION`."""
    usual_ms = statistics.median(row.ms for row in rows[::2])
    for before, planned, after in zip(rows[::2], rows[1::2], rows[2::2], strict=False):
        at_rest = [row for row in (before, after) if row.ms <= HELD_UP * usual_ms]
        if at_rest:
            rest_ms = statistics.mean(row.ms for row in at_rest)
            host_ms = caution * statistics.mean(row.host_ms for row in at_rest)
            yield _Part(planned.ms / rest_ms - 1, caution * planned.host_ms / max(rest_ms, host_ms) - 1)


class Price:
    """What steps cost under the plan in force. See Note [A price is seen to be kept].

    While it is due, it says of each step what is carried out, and takes its log.
    """

    def __init__(self, policy: Policy, device: torch.device, clock: Clock, room: Room) -> None:
        """Make one that has no plan to look at. `room`: for steps in which all stays."""
        self._slowdown = None if device.type == "cpu" else goal_of(policy).max_slowdown
        """The price, as a part of the step; None: there is none, or nobody looks at it: on a CPU steps would wait for
        another plan."""
        # What the host takes is not its own time where it waits for copies.
        self._host_caution = 1.0 if policy.tier == "disk" else HOST_CAUTION
        self._clock = clock
        self._room = room
        self._plan: Plan | None = None
        """What may break the price; None: nothing does."""
        self._open = False
        """Whether it is yet to be seen what steps cost."""
        self._at_rest: Course | None = None
        self._awaited: Course | None = None
        """What the step under way carries out, if it is one of a row."""
        self._waited = False
        """Whether the device was waited for before the row that is to begin."""
        self._row: list[StepLog] = []
        self._rows: list[_Row] = []
        """Those that are over: at rest and planned in turn."""
        self._input_bytes: int | None = None
        """What sections were given in the first row: only steps of that size are compared."""
        self._num_missed = self._num_begun = 0
        self._least: float | None = None
        """The part by which steps took longer at the least, or would if their host did, where that broke the price."""
        self._correction = 1.0, 0.0
        """How the plan that is asked for differs: its pace, and what each section that is not at rest is charged."""
        self._num_tried = 0
        self._is_left = False
        """Whether all stays because other plans broke the price."""
        self._give = self._host_part = 0.0
        """By what `measured` may be off; as `measured`, if the host took by `HOST_CAUTION` longer."""
        self._charge_ms = 0.0
        """What a section that is not at rest was found to cost beyond what was foreseen."""
        self.measured: float | None = None
        """The part by which steps under the plan took longer, by the rows that settled what becomes of it."""
        self.num_corrected = 0
        """How often the plan was made anew for that."""

    def follow(self, plan: Plan, num_ranks: int = 1) -> None:
        """`plan`, made by so many ranks, is carried out from now on."""
        was_broken = self._plan if self._least is not None else None
        measured, least = self.measured, self._least
        self.stop()
        self._is_left = was_broken is not None
        if num_ranks > 1 or self._slowdown is None or not any(map(_num_charges, plan.sections)):
            return
        self._plan, self._open, self._is_left = plan, True, False
        if was_broken is not None and _decisions(plan) == _decisions(was_broken):
            # What was seen of it holds, and there is nothing more to see. The next try is the last.
            self._open, self._num_tried = False, max(self._num_tried, MOST_CORRECTED - 1)
            self.measured, self._least = measured, least

    def stop(self) -> None:
        """Look at nothing until the next plan, and forget what was seen of this one. What it cost stays known."""
        self._close()
        self._charge_ms += self._correction[1]
        self._correction = 1.0, 0.0
        self._plan = self._least = self.measured = self._input_bytes = None
        self._num_missed, self._num_begun, self._rows = 0, 0, []

    def _close(self) -> None:
        """Nothing more is to be seen of the plan in force."""
        self._open = False
        self._row, self._at_rest, self._awaited, self._waited = [], None, None, False

    @property
    def is_due(self) -> bool:
        """Whether it is yet to be seen what steps cost.

        Not where steps must not take all that the device has, nor among ranks, whose steps wait for each other's.
        """
        return self._open and not self._room.is_limited and is_alone()

    def turn(self, course: Course, timeline: Timeline, may_rest: frozenset[int]) -> Course | None:
        """What the step that begins now carries out, to be timed: `course`, of the plan, or that all stays.

        None: nothing is to be seen by it. `may_rest`: the sections of which it was seen that they can.
        """
        self._awaited = None
        if not torch.is_grad_enabled():
            return None  # nothing is saved: it is no step
        try:
            if len(self._row) == IN_A_ROW:
                self._clock.catch_up()
                self._waited = True
                self._read_row()
            planned = len(self._rows) % 2 == 1
            if self._open and not planned and not self._room.has_for_step():
                self._missed()
                return None
            if self._open and not self._row and not self._waited:
                self._clock.catch_up()
                self._waited = True
        except RuntimeError:  # whoever forbids to wait for the device; if it is the device's own error, it comes again
            self._close()
        # Steps that are begun and never end are none that could be seen: nobody tells of what they save.
        self._num_begun += 1
        if self._num_begun > MOST_BEGUN:
            self._close()
        if not self._open:
            return None
        if self._at_rest is None:
            stays = "it stays in this step, beside the plan's"
            self._at_rest = Course(nothing(timeline), timeline, {}, reason=stays, may_rest=may_rest)
        self._awaited = course if planned else self._at_rest
        return self._awaited

    def took(self, log: StepLog | None, course: Course, *, fits: bool) -> bool:
        """A step is over that has carried out `course`; whether `log` is of a row. `fits`: whether it can be read."""
        if self._awaited is None or course is not self._awaited:
            return False
        self._awaited, self._num_begun, self._waited = None, 0, False
        if log is None and course is self._at_rest:
            self._close()  # an exception ended it: for want of memory, perhaps, which the plan would have left
        elif log is None or not fits:
            self._missed()
        elif not log.input_bytes:
            self._close()  # its sections are given no tensors that tell its size
        elif self._is_alike(log):
            self._row.append(log)
        else:
            self._missed()
            if self._open and not self._rows:  # the size that comes next may be the usual one
                self._input_bytes, self._row = log.input_bytes, [log]
        return True

    def _is_alike(self, log: StepLog) -> bool:
        """Whether its sections were given as much as those of the first row: what is larger takes longer."""
        if self._input_bytes is None:
            self._input_bytes = log.input_bytes
        return abs(log.input_bytes - self._input_bytes) <= ALIKE * self._input_bytes

    def _missed(self) -> None:
        self._num_missed += 1
        if self._num_missed > MOST_MISSED:
            self._close()

    def _read_row(self) -> None:
        """Read the row that is over, and see what is known by now."""
        row, self._row = self._row, []
        if not all(log.readable for log in row):  # its backward ran on another stream
            self._missed()
            return
        took = [log.clock.ms(log.boundaries[0].at, log.boundaries[-1].at) for log in row[1:]]
        self._rows.append(_Row(statistics.median(took), min(log.host_ms for log in row)))
        if not all(math.isfinite(ms) and ms > 0 for ms in took):
            self._close()
        elif len(self._rows) % 2 == 1:
            self._judge()

    def _judge(self) -> None:
        """See whether it is known by now what steps under the plan cost."""
        assert self._slowdown is not None
        parts = list(_parts(self._rows, self._host_caution))
        if len(parts) < LEAST_ROWS:  # of `MOST_ROWS` five can be compared at the least: half are not held up
            return
        steps, host = _estimate([part.steps for part in parts]), _estimate([part.host for part in parts])
        sure = max(one.part - one.give for one in (steps, host))
        if sure > self._slowdown:
            self._least = sure
        elif len(self._rows) // 2 < MOST_ROWS and any(one.part + one.give > self._slowdown for one in (steps, host)):
            return
        self.measured, self._give, self._host_part = steps.part, steps.give, host.part
        self._close()

    @property
    def is_broken(self) -> bool:
        """Whether the plan in force was seen to break the price."""
        return self._least is not None

    @property
    def asks_for_a_plan(self) -> bool:
        """Whether the price was broken, and another plan may keep to it."""
        return self.is_broken and self._num_tried < MOST_CORRECTED

    def corrected(self, timeline: Timeline, prediction: Prediction, pace: Pace) -> Timeline:
        """What another plan is to be made of after the price was broken.

        It is `timeline` at the pace of steps at rest, with what the plan cost charged to what it has not left at rest.

        Args:
            timeline: at the pace that was taken for the machine's.
            prediction: what was foreseen of the plan at that pace.
            pace: of the timeline. It is told when the plan is there.
        """
        assert self._least is not None
        assert self._plan is not None
        self._num_tried += 1
        if not self._rows:
            return timeline  # it was done, and the same plan came of it
        by = pace.within(statistics.median(row.ms for row in self._rows[::2]) / timeline.step_ms)
        unforeseen = max(0.0, self._least - (prediction.step_ms / timeline.step_ms - 1))
        timeline = scaled(timeline, by)
        charge_ms = unforeseen * timeline.step_ms / sum(map(_num_charges, self._plan.sections))
        self._correction = by, charge_ms
        return _charged(timeline, charge_ms)

    def corrected_goal(self, goal: Goal) -> Goal:
        """What that plan is to reach: what `goal` says, but at the last try whatever no rule moves stays.

        A cost that does not become less with what moves is brought under a price by nothing else.
        """
        if self._num_tried < MOST_CORRECTED:
            return goal
        return dataclasses.replace(goal, rules=(*goal.rules, ("*", "keep")))

    def replaced(self, pace: Pace) -> None:
        """Another plan is about to take the place of the one in force: because of the price, if that is broken."""
        if self.is_broken:
            pace.scale(self._correction[0])
            self.num_corrected += 1

    def charged(self, timeline: Timeline) -> Timeline:
        """A new measurement, with what plans were found to cost beyond such measurements."""
        return _charged(timeline, self._charge_ms) if self._charge_ms else timeline

    @property
    def told(self) -> str:
        """What was seen, in a sentence after the plan's own; nothing while it is not known."""
        if self.measured is None:
            return " Steps under other plans took longer than that price." if self._is_left else ""
        took = f"{self.measured:.1%} longer" if self.measured > 0 else "no longer"
        took += f" (give or take {self._give:.1%})"
        said = f" Steps under it took {took} than steps at rest in turn with them"
        if not self.is_broken:
            return f"{said}."
        if self._slowdown is not None and self.measured - self._give <= self._slowdown:
            said += f", and would take {self._host_part:.1%} longer if their host took a tenth longer"
        said += ", which is more than that price"
        if self.asks_for_a_plan:
            return f"{said}."
        return f"{said}, and no plan that keeps to it was found. Raise max_slowdown, or say by rules what is to stay."


def _decisions(plan: Plan) -> object:
    """What `plan` does, without its reasons."""
    return plan.fetches, [(section.mode, section.moves) for section in plan.sections]


def _num_charges(section: SectionPlan) -> int:
    """How often a section is charged that costs more than was foreseen."""
    return (section.mode == "selective" or bool(section.moves)) + (section.mode == "recompute")


def _charged(timeline: Timeline, ms: float) -> Timeline:
    """`timeline` with `ms` more for each section that has hooks, and for each whose whole forward runs again."""
    forward = {p.section: p.ms for p in timeline.phases if p.direction == "forward"}
    sections = []
    for index, section in enumerate(timeline.sections):
        again = forward.get(index) if section.recompute_ms is None else section.recompute_ms
        sections.append(
            dataclasses.replace(
                section,
                hooks_forward_ms=section.hooks_forward_ms + ms,
                recompute_ms=None if again is None else again + ms,
            )
        )
    return dataclasses.replace(timeline, sections=tuple(sections))
