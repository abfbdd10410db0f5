"""A plan made ready to be looked up: by section and save what leaves, and by phase what is due."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ...planner.layout import is_saved
from ...planner.plan import Fetch, Mode, Move, Plan, SectionPlan
from ...planner.timeline import SectionRecord, Timeline
from ..traffic import GATHER_BYTES
from .step_log import OTHERS_INSIDE
from .timelines import Recipe

PLAN_KEEPS = "plan: it stays"
"""The reason for which an allocation stays that a plan does not move."""

# A save that is larger than in the step that was measured by more than this part is not the one that was planned for.
TOLERANCE = 0.25


class AtRest(NamedTuple):
    """What a section saves of which nothing leaves, as it was measured."""

    saves: int
    kept: dict[str, int]
    """By reason, in bytes."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SectionCourse:
    """What the plan says of one section, the same in every step."""

    index: int
    mode: Mode
    recipe: Recipe
    moved: dict[int, float]
    """The saves whose allocations leave, and the most bytes that each has where it is the one that was planned for."""

    derived: frozenset[int]
    """The saves that are derived from others; none where the section runs again, or saves all."""

    again_bytes: int
    """What is there again of its saves when backward has computed it again."""

    at_rest: AtRest | None
    """What it saves where nothing of that leaves or has to be seen: see Note [Sections at rest]."""


class Course:
    """A plan over the phases of the timeline that it was made for."""

    def __init__(
        self,
        plan: Plan,
        timeline: Timeline,
        recipes: dict[int, Recipe],
        *,
        reason: str = PLAN_KEEPS,
        may_rest: frozenset[int] | None = None,
    ) -> None:
        """`may_rest`: the only sections that rest where they can; None: all."""
        self.reason = reason
        """Why what it does not move stays."""
        self.plan = plan
        self.phase_of: dict[tuple[str, int], int] = {}
        for number, phase in enumerate(timeline.phases):
            if phase.section is not None:
                self.phase_of.setdefault((phase.direction, phase.section), number)
        self.others = frozenset(number for number, phase in enumerate(timeline.phases) if phase.section is None)
        """The phases that belong to no section, so that nothing tells when they begin."""
        # Sections are known by their name and by how many of that name came before.
        self.numbered: dict[tuple[str, int], SectionCourse] = {}
        back = {(fetch.section, fetch.save): phase for phase, row in enumerate(plan.fetches) for fetch in row}
        foreign = _read_elsewhere(plan, timeline)
        self.moved_bytes = 0
        """What leaves of sections that are not computed again holds, in the step that was measured."""
        self.due: dict[int, list[tuple[int, list[int]]]] = {}
        """By phase: of which sections which saves' device memory is let go of at its end."""
        seen: collections.Counter[str] = collections.Counter()
        for index, section in enumerate(plan.sections):
            record = timeline.sections[index] if index < len(timeline.sections) else None
            sizes = {} if record is None else {a.save: (1 + TOLERANCE) * a.nbytes for a in record.allocations}
            self.numbered[(section.name, seen[section.name])] = SectionCourse(
                index=index,
                mode=section.mode,
                recipe=recipes.get(index, Recipe()),
                moved={move.save: sizes.get(move.save, math.inf) for move in section.moves},
                derived=_derived(index, section, record, recipes.get(index, Recipe())),
                again_bytes=sum(
                    a.held_bytes for a in (record.allocations if record else ()) if not is_saved(a, index, section.mode)
                ),
                at_rest=_at_rest(section, record, reason)
                if record is not None and index not in foreign and (may_rest is None or index in may_rest)
                else None,
            )
            seen[section.name] += 1
            if record is not None and section.mode == "save":
                leave = {move.save for move in section.moves}
                self.moved_bytes += sum(a.held_bytes for a in record.allocations if a.save in leave)
            here = self.phase_of.get(("forward", index), 0)
            nbytes = {} if record is None else {a.save: a.nbytes for a in record.allocations}
            latest = {move.save: back.get((index, move.save), math.inf) - here - 1 for move in section.moves}
            after = _with_their_batch(section.moves, nbytes, latest)
            for due, saves in _by_phase({save: here + max(0, phases) for save, phases in after.items()}):
                self.due.setdefault(due, []).append((index, saves))
        self.fetches = {number: _by_section(row) for number, row in enumerate(plan.fetches) if row}
        """By phase: of which sections which saves come back as it begins, the most urgent first."""


def _derived(index: int, section: SectionPlan, record: SectionRecord | None, recipe: Recipe) -> frozenset[int]:
    if record is None or section.mode != "selective" or not recipe.derives:
        return frozenset()
    return frozenset(a.save for a in record.allocations if not is_saved(a, index, section.mode))


def _read_elsewhere(plan: Plan, timeline: Timeline) -> set[int]:
    """The sections whose backward reads something that leaves and was saved in another section."""
    found: set[int] = set()
    for index, (section, record) in enumerate(zip(plan.sections, timeline.sections, strict=False)):
        leave = {move.save for move in section.moves}
        for allocation in record.allocations:
            if allocation.save in leave or section.mode != "save":
                found.update(use.section for use in allocation.uses if use.section != index)
    return found


def _at_rest(section: SectionPlan, record: SectionRecord, reason: str) -> AtRest | None:
    """What `section` saves; None where something of it leaves or is computed again."""
    if section.mode != "save" or section.moves or record.not_recomputed == OTHERS_INSIDE:
        return None
    kept: dict[str, int] = {}
    for allocation in record.allocations:
        why = allocation.kept or reason
        kept[why] = kept.get(why, 0) + allocation.nbytes
    return AtRest(len(record.allocations), kept)


# Note [Small copies leave with a large one]
# What a section saves is copied by the batch: small allocations leave with the next large one, and one fence stands for
# all of them (`Traffic.gather`). To wait for a small one is to wait for the large one. A plan knows copies one by one,
# and would let go of a few kilobytes 5 ms before the 256 MiB that they share their batch with: on an H100 the compute
# stream of a mixture of experts waited 4 ms of 120 for that. So what is small is let go of with its batch. Not where
# the plan brings it back before that: a reload of what is still there is passed over, and would be waited for later.


def _with_their_batch(moves: Sequence[Move], nbytes: dict[int, int], latest: dict[int, float]) -> dict[int, int]:
    """By save: the phases after its forward at whose end it is let go of, put off to no later than `latest`."""
    after: dict[int, int] = {}
    batch: list[Move] = []
    batch_bytes = 0
    for move in sorted(moves, key=lambda move: move.save):
        batch.append(move)
        batch_bytes += nbytes.get(move.save, 0)
        if batch_bytes >= GATHER_BYTES:
            for one in batch:
                put_off = one.release_after < move.release_after <= latest[one.save]
                after[one.save] = move.release_after if put_off else one.release_after
            batch, batch_bytes = [], 0
    after.update({one.save: one.release_after for one in batch})
    return after


def _by_phase(due: dict[int, int]) -> list[tuple[int, list[int]]]:
    found: dict[int, list[int]] = {}
    for save, phase in due.items():
        found.setdefault(phase, []).append(save)
    return list(found.items())


def _by_section(row: tuple[Fetch, ...]) -> list[tuple[int, list[int]]]:
    """Reloads in the same order, those of one section that follow each other together."""
    groups = itertools.groupby(row, key=lambda fetch: fetch.section)
    return [(section, [fetch.save for fetch in group]) for section, group in groups]
