"""What a plan is to reach, and the rules that bind it."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Literal, get_args

from .layout import is_saved
from .plan import Mode
from .timeline import MOST_BYTES, NOT_SEEN, SavedAllocation, SectionRecord, Timeline

MOST_SLOWDOWN = 1e15
"""So that what it allows can still be told in figures."""

Action = Literal["offload", "keep", "recompute"]
Rule = tuple[str, Action] | tuple[str, Action, str]
"""(pattern, action) or (pattern, action, label).

The pattern is a glob of a section's name, or of a module's inside a section. `"keep"`: it stays on the device and is
not computed again; `"offload"`: it leaves; `"recompute"`: the section is computed again, whole. The label is a glob of
the allocation's shape and dtype as the timeline has them: `"(8192, *) bfloat16"`. The first rule that matches
counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """The fastest step within a budget, or the smallest peak at a price.

    Raises:
        TypeError: one is no number.
        ValueError: both or neither are given, or one is out of its range, or a rule is none.
    """

    max_slowdown: float | None = None
    """The step may take so much longer: 0.02 is 2 %. The plan has the smallest peak that this buys."""

    device_budget: int | None = None
    """Bytes that the step's peak may reach. The plan is the fastest under it."""

    recompute: Literal["auto", "never"] = "auto"
    """Whether the planner may choose to compute sections again. A rule that says so wins."""

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        if (self.max_slowdown is None) == (self.device_budget is None):
            raise ValueError(
                "a goal is either max_slowdown or device_budget; got "
                f"max_slowdown={self.max_slowdown}, device_budget={self.device_budget}. Give exactly one."
            )
        slowdown: object = self.max_slowdown  # as it came, whatever its type says
        if isinstance(slowdown, bool) or not isinstance(slowdown, int | float | None):
            raise TypeError(f"max_slowdown is a number, 0.02 for 2 %; got {slowdown!r}.")
        budget: object = self.device_budget
        if isinstance(budget, bool) or not isinstance(budget, int | None):
            raise TypeError(f"device_budget is a whole number of bytes, 40 << 30 for 40 GiB; got {budget!r}.")
        if self.max_slowdown is not None and not 0 <= self.max_slowdown <= MOST_SLOWDOWN:
            raise ValueError(f"max_slowdown is a part of the step, 0.02 for 2 %; got {self.max_slowdown}.")
        if self.device_budget is not None and not 0 < self.device_budget <= MOST_BYTES:
            raise ValueError(f"device_budget is a number of bytes above 0, as a device has; got {self.device_budget}.")
        if self.recompute not in ("auto", "never"):
            raise ValueError(f'recompute is "auto" or "never"; got {self.recompute!r}.')
        for rule in self.rules:
            if (
                not all(isinstance(part, str) for part in rule)
                or len(rule) not in (2, 3)
                or rule[1] not in get_args(Action)
            ):
                raise ValueError(
                    'a rule is (pattern, action) or (pattern, action, label), the action "offload", "keep" or '
                    f'"recompute"; got {rule!r}. For instance ("*.mlp", "offload").'
                )


@dataclasses.dataclass(frozen=True)
class Choices:
    """What is left for the planner to choose, under the rules."""

    modes: tuple[tuple[Mode, ...], ...]
    """Of each section, those it may have; the first is the one to start from."""

    bound: dict[tuple[int, int], Action]
    """Allocations, by section and save, that a rule decides."""


def choices(timeline: Timeline, goal: Goal) -> Choices:
    """What the timeline and the goal's rules allow.

    Raises:
        ValueError: a rule matches nothing, or asks for a section to be computed again that must not be.
    """
    used: set[int] = set()
    bound: dict[tuple[int, int], Action] = {}
    modes: list[tuple[Mode, ...]] = []
    for index, section in enumerate(timeline.sections):
        whole = _whole(section, goal.rules, used)
        if whole == "recompute" and section.not_recomputed != NOT_SEEN:
            if section.not_recomputed is not None:
                raise ValueError(
                    f"a rule has {section.name} computed again, which must not be: {section.not_recomputed}. "
                    "Drop the rule."
                )
            modes.append(("recompute",))
        else:
            modes.append(_free_modes(section, goal))
        for allocation in section.allocations:
            action = _action(section, allocation, goal.rules, used)
            if action in ("keep", "offload"):
                bound[index, allocation.save] = action
        if whole != "recompute":
            # What is to stay or to leave has to be saved.
            must = [a for a in section.allocations if (index, a.save) in bound]
            modes[-1] = tuple(m for m in modes[-1] if all(is_saved(a, index, m) for a in must))
    for number, rule in enumerate(goal.rules):
        if number not in used:
            names = ", ".join(dict.fromkeys(section.name for section in timeline.sections))
            raise ValueError(f"no section or allocation matches the rule {rule!r}. The sections are: {names}.")
    return Choices(tuple(modes), bound)


def _free_modes(section: SectionRecord, goal: Goal) -> tuple[Mode, ...]:
    if goal.recompute == "never" or section.gap or section.not_recomputed is not None:
        return ("save",)
    return ("save", "recompute") if section.selective_ms is None else ("save", "selective", "recompute")


def _is_for(rule: Rule, section: SectionRecord) -> bool:
    """Whether the rule is for sections of this sort: what is saved between two is nothing to compute again."""
    return not (section.gap and rule[1] == "recompute")


def _whole(section: SectionRecord, rules: tuple[Rule, ...], used: set[int]) -> Action | None:
    for number, rule in enumerate(rules):
        if len(rule) == 2 and _is_for(rule, section) and fnmatch.fnmatchcase(section.name, rule[0]):
            used.add(number)
            return rule[1]
    return None


def _action(
    section: SectionRecord, allocation: SavedAllocation, rules: tuple[Rule, ...], used: set[int]
) -> Action | None:
    names = [section.name]
    for part in filter(None, allocation.module.split(".")):
        names.append(f"{names[-1]}.{part}")
    for number, rule in enumerate(rules):
        if len(rule) == 3 and not fnmatch.fnmatchcase(allocation.label, rule[2]):
            continue
        matching = [name for name in names if fnmatch.fnmatchcase(name, rule[0])]
        if not matching or not _is_for(rule, section):
            continue
        if rule[1] == "recompute" and (len(rule) == 3 or section.name not in matching):
            raise ValueError(
                f"a section is computed again whole, and the rule {rule!r} names a part of {section.name}. "
                "Name the section."
            )
        used.add(number)
        return rule[1]
    return None
