"""What the steps before a plan have shown, and the timeline that they make together."""

from __future__ import annotations

import collections
import statistics

import torch

from ...planner.plan import Plan, SectionPlan
from ...planner.timeline import Timeline
from .course import Course
from .section_log import MEASURED, SectionLog
from .step_log import StepLog
from .timelines import Recipe, derives_enough, is_like, phase_ms, read_timeline, recipe_of, runs_again

# Note [What hooks cost]
# Where the host is what a step waits for, steps that are measured take longer than any other: every save of theirs is
# recorded, and under a budget all of it moves. Phases were seen to take 1.4 times what they take without, and a plan
# made for such times computes too little again, for which there would be time enough, and moves too much, which is what
# costs the host. So in the trial some sections rest: they are called as without an offloader. What their phases take
# less than in the steps that were measured is taken off those of their kind; not where that is little, which is noise.

TRIALS_OF_A_KIND = 3
BARE_OF_A_KIND = 2
_INFLATED = 0.9
"""Phases that take more than this part of their time without hooks are left as they were measured."""
_LEAST_AGAIN = 0.02
"""Of a section's forward: the least that selective recomputation is taken to cost."""


class Measurements:
    """The logs of the first step, of those that were timed, and of the trial."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first: StepLog | None = None
        self._known: dict[int, Recipe] = {}
        self._trial_kinds: dict[int, object] = {}
        self._derives: set[object] = set()
        """The kinds of sections that derive what is cheap."""
        self._bare: list[int] = []
        self._alike: dict[int, object] = {}
        self.timed: list[StepLog] = []
        self.trial: StepLog | None = None
        self.trial_course: Course | None = None
        """What the trial carries out."""

    def begin(self, first: StepLog) -> None:
        """Start with the log of a step that told sizes, and what can be computed again."""
        self._first, self.timed = first, []

    def clear(self) -> None:
        """Forget the logs. What can be computed again, and how, stays known."""
        self._first, self.timed, self.trial = None, [], None

    def is_like_first(self, log: StepLog) -> bool:
        """Whether `log` is of the same step as the first."""
        assert self._first is not None
        return is_like(log, self._first)

    def choose_trials(self) -> None:
        """Decide which sections the trial computes again, to see what that takes.

        Raises:
            ValueError: the logs do not make up a whole step.
        """
        assert self._first is not None
        self.trial, self._trial_kinds = None, {}
        self._find_derived()
        by_kind: dict[object, list[int]] = {}
        for section in self._first.sections:
            if section.not_recomputed is None and (section.kind in self._derives or runs_again(section)):
                assert section.index is not None
                by_kind.setdefault(section.kind, []).append(section.index)
        # Not one at the end: backward begins and ends with those.
        self._trial_kinds = {
            index: kind for kind, indices in by_kind.items() for index in _spread(indices, TRIALS_OF_A_KIND)
        }
        self._choose_bare()
        timeline = self._read({}, {})
        sections = tuple(
            SectionPlan(name=record.name, mode="selective" if index in self._trial_kinds else "save")
            for index, record in enumerate(timeline.sections)
        )
        nothing = Plan(sections=sections, fetches=((),) * len(timeline.phases))
        self.trial_course = Course(nothing, timeline, self.recipes(), reason=MEASURED, may_rest=frozenset(self._bare))

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
    def tries_bare(self) -> bool:
        """Whether it is tried what sections take without hooks. The steps of a CPU are the host's in any case."""
        return self._device.type != "cpu"

    def _choose_bare(self) -> None:
        """Decide which sections rest in the trial: see Note [What hooks cost]."""
        assert self._first is not None
        kinds = {s.index: s.kind for s in self._first.sections if s.index is not None and not s.gap}
        # Moving costs more than keeping.
        self._alike = {
            s.index: (kinds[s.index], s.row.bytes_out > 0) for s in self.timed[-1].sections if s.index in kinds
        }
        self._bare = []
        if self.tries_bare:
            by_kind: dict[object, list[int]] = {}
            for index, alike in self._alike.items():
                if index not in self._trial_kinds and index != max(self._alike):
                    by_kind.setdefault(alike, []).append(index)
            self._bare = [index for indices in by_kind.values() for index in _spread(indices, BARE_OF_A_KIND)]

    @property
    def trials_done(self) -> bool:
        """Whether there is nothing to try, or what was tried can be read. Never blocks."""
        return not (self._trial_kinds or self._bare) or (self.trial is not None and self.trial.readable)

    def timeline(self) -> Timeline:
        """The timeline of the step.

        Raises:
            ValueError: the logs do not make up a whole step.
        """
        parts = self._parts_without_hooks()
        return self._read(self._selective_ms(parts), parts)

    def _read(self, selective: dict[object, float], parts: dict[tuple[str, int], float]) -> Timeline:
        assert self._first is not None
        return read_timeline(
            self.timed, self._first, device=_name(self._device), selective=selective, parts=parts, derives=self._derives
        )

    def _parts_without_hooks(self) -> dict[tuple[str, int], float]:
        """Of phases, by direction and section, the part of their time that they take without hooks."""
        if self.trial is None or not self.timed:
            return {}
        all_usual = [phase_ms(log) for log in self.timed]
        tried = phase_ms(self.trial)
        rested = {s.index for s in self.trial.sections if s.row.at_rest}
        found: dict[tuple[str, object], list[float]] = collections.defaultdict(list)
        for direction in ("forward", "backward"):
            for index in self._bare:
                usual = min((ms.get((direction, index), 0.0) for ms in all_usual), default=0.0)
                if index in rested and usual > 0 and (direction, index) in tried:
                    found[direction, self._alike[index]].append(tried[direction, index] / usual)
        parts = {key: statistics.median(all_parts) for key, all_parts in found.items()}
        return {
            (direction, index): parts[direction, alike]
            for direction in ("forward", "backward")
            for index, alike in self._alike.items()
            if parts.get((direction, alike), 1.0) < _INFLATED
        }

    def _selective_ms(self, parts: dict[tuple[str, int], float]) -> dict[object, float]:
        if self.trial is None or not self.timed:
            return {}
        all_usual = [phase_ms(log) for log in self.timed]
        tried = phase_ms(self.trial)
        found: dict[object, list[float]] = collections.defaultdict(list)
        for index, kind in self._trial_kinds.items():
            part = parts.get(("backward", index), 1.0)
            usual = [part * ms["backward", index] for ms in all_usual if ("backward", index) in ms]
            least = _LEAST_AGAIN * parts.get(("forward", index), 1.0)
            forward = [least * ms["forward", index] for ms in all_usual if ("forward", index) in ms]
            if usual and forward and ("backward", index) in tried:
                # It takes some time, whatever the noise says.
                found[kind].append(max(min(forward), tried["backward", index] - min(usual)))
        return {kind: statistics.median(times) for kind, times in found.items()}

    def recipes(self) -> dict[int, Recipe]:
        """How each section that a first step has told of is computed again."""
        if self._first is not None:
            self._known = {
                s.index: recipe_of(s, derives=s.kind in self._derives)
                for s in self._first.sections
                if s.index is not None
            }
        return self._known


def _spread(indices: list[int], num: int) -> list[int]:
    """Up to `num` of `indices`, from the middle of as many equal parts."""
    num = min(num, len(indices))
    return [indices[(2 * part + 1) * len(indices) // (2 * num)] for part in range(num)]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
