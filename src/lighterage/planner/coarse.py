"""A timeline of many allocations as one of few groups, for the search; and a plan for the groups as one for all."""

from __future__ import annotations

import dataclasses

from .goal import Choices
from .timeline import SavedAllocation, SectionRecord, Timeline, Use

_MOST = 160
"""Allocations that are searched one by one."""


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

    is_exact: bool
    """Whether each group has one member."""


def coarsen(timeline: Timeline, choices: Choices) -> Coarse:
    """Groups of what one section saves that is alike in kind, readers and rules, neighbours in time of need."""
    count = sum(len(section.allocations) for section in timeline.sections)
    if count <= _MOST:
        keys = [(s, a.save) for s, record in enumerate(timeline.sections) for a in record.allocations]
        return Coarse(timeline, choices, {key: place for place, key in enumerate(keys)}, True)
    total = sum(a.held_bytes for section in timeline.sections for a in section.allocations)
    sections: list[SectionRecord] = []
    places: dict[tuple[int, int], int] = {}
    bound = {}
    place = 0
    for index, section in enumerate(timeline.sections):
        groups: list[list[SavedAllocation]] = []
        last: object = None
        for allocation in sorted(section.allocations, key=lambda a: (_alike(a, index, choices), _when(a), a.save)):
            alike = _alike(allocation, index, choices)
            full = groups and sum(a.held_bytes for a in groups[-1]) + allocation.held_bytes > total / _MOST
            if alike != last or full:
                groups.append([])
            groups[-1].append(allocation)
            last = alike
        groups.sort(key=lambda group: min(a.save for a in group))
        merged = tuple(_merge(group, number) for number, group in enumerate(groups, start=1))
        sections.append(dataclasses.replace(section, allocations=merged))
        for number, group in enumerate(groups, start=1):
            places.update(((index, a.save), place) for a in group)
            place += 1
            if (index, group[0].save) in choices.bound:
                bound[index, number] = choices.bound[index, group[0].save]
    coarse = dataclasses.replace(timeline, sections=tuple(sections))
    return Coarse(coarse, dataclasses.replace(choices, bound=bound), places, False)


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
