"""A timeline of many allocations as one of few groups, for the search; and a plan for the groups as one for all."""

from __future__ import annotations

import dataclasses
import math

from .goal import Choices
from .timeline import SavedAllocation, SectionRecord, Timeline, Use

_MOST = 160
"""Allocations that are searched one by one."""

_FINEST = 0.0025
"""Of the step: a group of what is moved first takes the host no longer, unless it is one allocation."""


@dataclasses.dataclass(frozen=True)
class Coarse:
    """A timeline whose allocations are groups of another's.

    A group is born with the first of its members, needed with the first and dead with the last, so that a plan's peak
    is never more for the members than it is for the groups.
    """

    timeline: Timeline
    choices: Choices
    places: dict[tuple[int, int], int]
    """Of each allocation of the timeline, by section and save: its place among the groups, in their order."""

    members: tuple[int, ...]
    """Of each group, by its place: how many it has."""

    is_exact: bool
    """Whether each group has one member."""


def coarsen(timeline: Timeline, choices: Choices, *, move_ms: float = 0.0) -> Coarse:
    """Groups of what one section saves that is alike in kind, readers and rules, neighbours in time of need.

    `move_ms`: the host's work for a move. Where it is some, groups are alike in size as well, and the largest are in
    groups of few members: only so can a small price buy a few moves.
    """
    count = sum(len(section.allocations) for section in timeline.sections)
    if count <= _MOST:
        keys = [(s, a.save) for s, record in enumerate(timeline.sections) for a in record.allocations]
        return Coarse(timeline, choices, {key: place for place, key in enumerate(keys)}, (1,) * count, True)
    total = sum(a.held_bytes for section in timeline.sections for a in section.allocations)
    finest_ms = _finest(timeline, move_ms)
    sections: list[SectionRecord] = []
    places: dict[tuple[int, int], int] = {}
    bound = {}
    members: list[int] = []
    for index, section in enumerate(timeline.sections):
        groups: list[list[SavedAllocation]] = []
        last: object = None
        ranks = _ranks(section, move_ms, finest_ms)
        for alike, _, _, allocation in sorted(
            ((*_alike(a, index, choices), ranks.get(a.save, 0)), _when(a), a.save, a) for a in section.allocations
        ):
            full = groups and sum(a.held_bytes for a in groups[-1]) + allocation.held_bytes > total / _MOST
            if ranks and not full and groups:
                most_ms = finest_ms * max(1 << ranks[allocation.save] >> 1, 1)
                full = move_ms * (len(groups[-1]) + 1) > most_ms
            if alike != last or full:
                groups.append([])
            groups[-1].append(allocation)
            last = alike
        groups.sort(key=lambda group: min(a.save for a in group))
        merged = tuple(_merge(group, number) for number, group in enumerate(groups, start=1))
        sections.append(dataclasses.replace(section, allocations=merged))
        for number, group in enumerate(groups, start=1):
            places.update(((index, a.save), len(members)) for a in group)
            members.append(len(group))
            if (index, group[0].save) in choices.bound:
                bound[index, number] = choices.bound[index, group[0].save]
    coarse = dataclasses.replace(timeline, sections=tuple(sections))
    return Coarse(coarse, dataclasses.replace(choices, bound=bound), places, tuple(members), False)


def _finest(timeline: Timeline, move_ms: float) -> float:
    """Milliseconds: the host's work for the first groups of each section, so that groups are not too many."""
    finest = _FINEST * timeline.step_ms
    costs = [move_ms * len(section.allocations) for section in timeline.sections if section.allocations]
    while 0 < finest < max(costs) and sum(2 + 2 * math.log2(max(ms / (2 * finest), 1.0)) for ms in costs) > 2 * _MOST:
        finest *= 2
    return finest


def _ranks(section: SectionRecord, move_ms: float, finest_ms: float) -> dict[int, int]:
    """Of each save: how often what the host does for the larger ones is twice the finest, and twice that, and so on."""
    if not move_ms or not finest_ms:
        return {}
    largest = sorted(section.allocations, key=lambda a: (-a.held_bytes, _when(a), a.save))
    return {a.save: int(number * move_ms / (2 * finest_ms)).bit_length() for number, a in enumerate(largest)}


def _alike(allocation: SavedAllocation, section: int, choices: Choices) -> tuple[object, ...]:
    readers = tuple(use.section for use in allocation.uses)
    return (
        allocation.kind if len(choices.modes[section]) > 1 else "",
        allocation.kept is not None,
        str(choices.bound.get((section, allocation.save))),
        readers,
    )


def _when(allocation: SavedAllocation) -> tuple[float, ...]:
    return tuple(use.first_ms for use in allocation.uses)


def _merge(group: list[SavedAllocation], number: int) -> SavedAllocation:
    uses = tuple(
        Use(
            section=each[0].section,
            first_ms=min(use.first_ms for use in each),
            last_ms=max(use.last_ms for use in each),
        )
        for each in zip(*(a.uses for a in group), strict=True)
    )
    return SavedAllocation(
        save=number,
        nbytes=sum(a.nbytes for a in group),
        held_bytes=sum(a.held_bytes for a in group),
        born_ms=min(a.born_ms for a in group),
        uses=uses,
        kind=group[0].kind,
        kept=group[0].kept,
    )
