"""What the steps before a plan have shown, and the timeline that they make together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection

import torch

from ...planner.timeline import Link, Timeline
from ..allocation import SavedAt
from ..traffic import HELD_ELSEWHERE, StillAlive
from .course import Course
from .section_log import MEASURED, SectionLog
from .step_log import StepLog
from .timelines import Recipe, derives_enough, is_like, phase_ms, read_timeline, recipe_of, runs_again
from .trial import Costs, Trial


class Measurements:
    """The logs of the first step, of those that were timed, and of the trial."""

    def __init__(self, device: torch.device, still_alive: StillAlive) -> None:
        """`still_alive`: what was found to free nothing when it was moved."""
        self._device = device
        self._still_alive = still_alive
        self._first: StepLog | None = None
        self._known: dict[int, Recipe] = {}
        self._derives: set[object] = set()
        """The kinds of sections that derive what is cheap."""
        self.timed: list[StepLog] = []
        self.trial = Trial(on_host=device.type == "cpu")
        self._costs: dict[object, Costs] = {}
        self._classes: dict[int, object] = {}
        """By section, what is the same for those that take the same time."""
        self.may_rest: frozenset[int] = frozenset()
        """The sections that are like one that was seen to rest in the trial."""
        self._before_trial: Timeline
        """What the trial is planned for, once its sections are chosen."""

    def begin(self, first: StepLog) -> None:
        """Start with the log of a step that told sizes, and what can be computed again."""
        self._first, self.timed = first, []

    def clear(self) -> None:
        """Forget the logs. What can be computed again, and how, stays known."""
        self._first, self.timed, self.trial.logs = None, [], []

    def is_like_first(self, log: StepLog) -> bool:
        """Whether `log` is of the same step as the first."""
        assert self._first is not None
        return is_like(log, self._first)

    def choose_trials(self, *, limited: bool) -> None:
        """Decide what the trial does with which sections. `limited`: whether steps must not take all of the device.

        Raises:
            ValueError: the logs do not make up a whole step.
        """
        assert self._first is not None
        self._find_derived()
        sections = {s.index: s for s in self._first.sections if s.index is not None and not s.gap}
        again = {index for index, section in sections.items() if section.not_recomputed is None}
        selective = {i for i in again if sections[i].kind in self._derives or runs_again(sections[i])}
        moved = {section.index for section in self.timed[-1].sections if section.role == "moved"}
        # Moving takes longer than keeping.
        self._classes = {index: (section.kind, index in moved) for index, section in sections.items()}
        self.trial.choose(self._classes, selective, again, limited=limited)
        self._before_trial = self._read({})

    def trial_course(self) -> Course | None:
        """What the next step of the trial carries out; None: they are over."""
        timeline, step = self._before_trial, len(self.trial.logs)
        if step >= self.trial.num_steps:
            return None
        plan, bare = self.trial.plan(timeline, step), self.trial.bare(step)
        return Course(plan, timeline, self.recipes(), reason=MEASURED, may_rest=bare)

    def _find_derived(self) -> None:
        """Decide which kinds of sections derive what is cheap, as far as the first step has proven it."""
        assert self._first is not None
        alike: dict[object, list[SectionLog]] = collections.defaultdict(list)
        for section in self._first.sections:
            if section.not_recomputed is None and not section.gap:
                alike[section.kind].append(section)
        self._derives = set()
        for kind, sections in alike.items():
            if all(map(derives_enough, sections)) and all(
                s.proof is not None and s.proof.holds_for(s) for s in sections
            ):
                self._derives.add(kind)

    @property
    def trials_done(self) -> bool:
        """Whether there is nothing to try, or what was tried can be read. Never blocks."""
        logs = self.trial.logs
        return len(logs) >= self.trial.num_steps and all(log.readable for log in logs)

    def timeline(self) -> Timeline:
        """The timeline of the step.

        Raises:
            ValueError: the logs do not make up a whole step.
        """
        times = [phase_ms(log) for log in self.timed]
        usual = {index: (_least(times, "forward", index), _least(times, "backward", index)) for index in self._classes}
        self._costs = self.trial.costs(usual)
        rested = self.trial.rested()
        self.may_rest = frozenset(index for index, one in self._classes.items() if one in rested)
        found = {index: self._costs[one] for index, one in self._classes.items() if one in self._costs}
        return _with_what_stays(self._read(found), self._still_alive.saves)

    def seen_over(self, link: Link) -> Link:
        """`link` with what each moved allocation costs the host, as far as the trial has shown. After `timeline`."""
        moves = sum(costs.num_moves for costs in self._costs.values())
        move_us = 1e3 * sum(costs.moves for costs in self._costs.values()) / moves if moves else 0.0
        return dataclasses.replace(link, move_us=move_us)

    def _read(self, costs: dict[int, Costs]) -> Timeline:
        assert self._first is not None
        return read_timeline(
            self.timed,
            self._first,
            device=_name(self._device),
            costs=costs,
            others_part=self.trial.others_part(self.timed),
            derives=self._derives,
        )

    def recipes(self) -> dict[int, Recipe]:
        """How each section that a first step has told of is computed again."""
        if self._first is not None:
            self._known = {
                s.index: recipe_of(s, derives=s.kind in self._derives)
                for s in self._first.sections
                if s.index is not None
            }
        return self._known


def _with_what_stays(timeline: Timeline, saves: Collection[SavedAt]) -> Timeline:
    """`timeline` with what moved in the trial and freed nothing, by `saves`, told as what stays."""
    known = {(name, save) for name, save, _ in saves}
    if not known:
        return timeline
    sections = []
    for section in timeline.sections:
        allocations = tuple(
            dataclasses.replace(a, kept=HELD_ELSEWHERE) if a.kept is None and (section.name, a.save) in known else a
            for a in section.allocations
        )
        sections.append(dataclasses.replace(section, allocations=allocations))
    return dataclasses.replace(timeline, sections=tuple(sections))


def _least(times: list[dict[tuple[str, int], float]], direction: str, index: int) -> float:
    return min((ms[direction, index] for ms in times if (direction, index) in ms), default=0.0)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
