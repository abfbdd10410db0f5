"""A plan made ready to be looked up: by section and save what leaves, and by phase what is due."""

from __future__ import annotations

import collections

from ...planner.layout import is_saved
from ...planner.plan import Plan
from ...planner.timeline import Timeline
from .timelines import Recipe

PLAN_KEEPS = "plan: it stays"
"""The reason for which an allocation stays that a plan does not move."""


class Course:
    """A plan over the phases of the timeline that it was made for."""

    def __init__(self, plan: Plan, timeline: Timeline, recipes: dict[int, Recipe], *, reason: str = PLAN_KEEPS) -> None:
        self.reason = reason
        """Why what it does not move stays."""
        self.plan = plan
        self.timeline = timeline
        self.recipes = recipes
        self.phase_of: dict[tuple[str, int], int] = {}
        for number, phase in enumerate(timeline.phases):
            if phase.section is not None:
                self.phase_of.setdefault((phase.direction, phase.section), number)
        # Sections are known by their name and by how many of that name came before.
        self.numbered: dict[tuple[str, int], int] = {}
        seen: collections.Counter[str] = collections.Counter()
        for index, section in enumerate(plan.sections):
            self.numbered[(section.name, seen[section.name])] = index
            seen[section.name] += 1
        self.moves: list[dict[int, int]] = []
        """For each section: by save, the phase at whose end its device memory is let go of."""
        self.sizes: list[dict[int, int]] = []
        for index, section in enumerate(plan.sections):
            here = self.phase_of.get(("forward", index), 0)
            self.moves.append({move.save: here + max(0, move.release_after) for move in section.moves})
            record = timeline.sections[index] if index < len(timeline.sections) else None
            self.sizes.append({a.save: a.nbytes for a in record.allocations} if record is not None else {})
        self.again_bytes: list[int] = []
        """For each section: what is there again of its saves when backward has computed it again."""
        for index, section in enumerate(plan.sections):
            saves = timeline.sections[index].allocations if index < len(timeline.sections) else ()
            self.again_bytes.append(sum(a.held_bytes for a in saves if not is_saved(a, index, section.mode)))
        self.due: dict[int, list[tuple[int, int]]] = {}
        for index, moves in enumerate(self.moves):
            for save, due in moves.items():
                self.due.setdefault(due, []).append((index, save))

    def is_other(self, phase: int) -> bool:
        """Whether a phase belongs to no section, so that nothing tells when it begins."""
        return phase < len(self.timeline.phases) and self.timeline.phases[phase].section is None
