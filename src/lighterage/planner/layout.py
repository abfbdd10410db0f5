"""A timeline under given modes, laid out as what the compute stream meets in each phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .plan import Mode
from .timeline import Link, SavedAllocation, Timeline

# What the compute stream meets. Of what happens at one moment, the smaller number comes first: what is allocated there
# is there beside what is freed there.
BIRTH, REBORN, NEED, WORK, DEATH, GONE = range(6)

Event = tuple[float, int, int, int]
"""(ms from the phase's start, what, item or -1, bytes)"""

NEVER = float("inf")
BEFORE = -1.0
"""The time of what comes before all else in a phase."""


@dataclasses.dataclass(slots=True)
class Item:
    """One allocation that is saved under the modes; positions are (phase, ms from its start)."""

    section: int
    allocation: SavedAllocation
    birth: tuple[int, float]
    need: tuple[float, float]
    """Where it is first read again; (NEVER, 0) if nowhere."""

    death: tuple[float, float]
    copies: int = 1
    """As how many allocations it leaves: of a group, all its members."""


@dataclasses.dataclass(slots=True)
class Hooks:
    """What it costs that the saves of a section are seen."""

    forward: int
    """Its forward phase."""

    backward: int | None
    forward_ms: float
    backward_ms: float
    at_rest: bool
    """Whether they are seen only where one of them is moved."""


@dataclasses.dataclass(slots=True)
class Layout:
    """What the compute stream does under given modes, whatever is moved."""

    items: list[Item]
    """In the order of sections, then of saves."""

    ms: list[float]
    """Of each phase, with what is computed again in it."""

    recompute_ms: list[float]
    """Of each phase, what is computed again in it."""

    events: list[list[Event]]
    """Of each phase, in order; each begins with its `WORK`."""

    hooks: dict[int, Hooks]
    """Of each section whose hooks cost anything."""


def recompute_time(timeline: Timeline, section: int, mode: Mode, forward_ms: float | None = None) -> float:
    """Milliseconds that backward of `section` takes longer in `mode`. `forward_ms`: its forward's, if it is at hand.

    Raises:
        ValueError: the section cannot be computed again in this way.
    """
    if mode == "save":
        return 0.0
    record = timeline.sections[section]
    if record.gap or record.not_recomputed is not None:
        reason = "it is what was saved between sections" if record.gap else record.not_recomputed
        raise ValueError(f'section {section} ({record.name}) cannot have mode "{mode}": {reason}. Its mode is "save".')
    if mode == "selective":
        if record.selective_ms is None:
            raise ValueError(f'section {section} ({record.name}) cannot have mode "selective": its time is not known.')
        return record.selective_ms
    if record.recompute_ms is not None:
        return record.recompute_ms
    if forward_ms is not None:
        return forward_ms
    return next(phase.ms for phase in timeline.phases if phase.direction == "forward" and phase.section == section)


def is_saved(allocation: SavedAllocation, section: int, mode: Mode) -> bool:
    """Whether a section in `mode` saves this allocation of its own, and does not compute it again.

    What another section reads is saved: that section has it for an input.
    """
    if mode == "save" or allocation.kind == "input" or any(use.section != section for use in allocation.uses):
        return True
    return mode == "selective" and allocation.kind != "pointwise"


def lay_out(timeline: Timeline, modes: Sequence[Mode]) -> Layout:
    """What happens in each phase under `modes`, one for each section."""
    forward: dict[int, int] = {}
    backward: dict[int, int] = {}
    for index, phase in enumerate(timeline.phases):
        if phase.section is not None:
            (forward if phase.direction == "forward" else backward)[phase.section] = index
    again = [recompute_time(timeline, s, mode, timeline.phases[forward[s]].ms) for s, mode in enumerate(modes)]
    count = len(timeline.phases)
    layout = Layout([], [phase.ms for phase in timeline.phases], [0.0] * count, [[] for _ in range(count)], {})
    for index, phase in enumerate(timeline.phases):
        events = layout.events[index]
        extra = again[phase.section] if phase.direction == "backward" and phase.section is not None else 0.0
        if extra:
            work = max(phase.work_bytes, timeline.phases[forward[phase.section]].work_bytes)  # type: ignore[index]
            events += [(BEFORE, WORK, -1, work), (extra, WORK, -1, phase.work_bytes)]
            layout.ms[index] += extra
            layout.recompute_ms[index] = extra
        else:
            events.append((BEFORE, WORK, -1, phase.work_bytes))
    for section, record in enumerate(timeline.sections):
        mode = modes[section]
        begin = forward[section]
        length = timeline.phases[begin].ms
        own = backward.get(section)
        if record.hooks_forward_ms or record.hooks_backward_ms:
            costs = record.hooks_forward_ms, 0.0 if own is None else record.hooks_backward_ms
            layout.hooks[section] = Hooks(begin, own, *costs, at_rest=mode != "selective")
        for allocation in record.allocations:
            born_ms = min(max(allocation.born_ms, 0.0), length)
            if is_saved(allocation, section, mode):
                item = _saved(allocation, section, (begin, born_ms), timeline, modes, backward, again, length)
                _enter(layout, item)
                continue
            # Its first forward makes it all the same, and has it until its end.
            layout.events[begin].append((born_ms, REBORN, -1, allocation.held_bytes))
            layout.events[begin].append((length, GONE, -1, allocation.held_bytes))
            if own is not None:
                # The second forward brings it back, in its place of that stretch, for this phase's own backward.
                scale = again[section] / length if length else 0.0
                end = layout.ms[own]
                last = max((use.last_ms for use in allocation.uses), default=NEVER)
                reborn = min(born_ms * scale, end)
                layout.events[own].append((reborn, REBORN, -1, allocation.held_bytes))
                gone = min(max(again[section] + last, reborn), end)
                layout.events[own].append((gone, GONE, -1, allocation.held_bytes))
    for events in layout.events:
        events.sort()
    return layout


def costs_host(timeline: Timeline, link: Link) -> bool:
    """Whether what is moved, or computed again, costs the host anything."""
    return bool(link.move_us) or any(s.hooks_forward_ms or s.hooks_backward_ms for s in timeline.sections)


def host_time(layout: Layout, link: Link, moved: Sequence[bool]) -> list[float]:
    """Milliseconds that the host's work makes each phase longer where those are moved; empty if it costs nothing."""
    if not (link.move_us or layout.hooks):
        return []
    host = [0.0] * len(layout.ms)
    seen = {section for section, hooks in layout.hooks.items() if not hooks.at_rest}
    half_ms = link.move_us / 2e3
    for item, leaves in zip(layout.items, moved, strict=True):
        if leaves:
            seen.add(item.section)
            host[item.birth[0]] += half_ms * item.copies
            if item.need[0] != NEVER:
                host[int(item.need[0])] += half_ms * item.copies
    for section, hooks in layout.hooks.items():
        if section in seen:
            host[hooks.forward] += hooks.forward_ms
            if hooks.backward is not None:
                host[hooks.backward] += hooks.backward_ms
    return host


def _saved(
    allocation: SavedAllocation,
    section: int,
    birth: tuple[int, float],
    timeline: Timeline,
    modes: Sequence[Mode],
    backward: dict[int, int],
    again: list[float],
    forward_ms: float,
) -> Item:
    need: tuple[float, float] = (NEVER, 0.0)
    death: tuple[float, float] = (-1.0, 0.0)
    for use in allocation.uses:
        phase = backward[use.section]
        end = timeline.phases[phase].ms + again[use.section]
        first = min(max(again[use.section] + use.first_ms, 0.0), end)
        last = min(max(again[use.section] + use.last_ms, 0.0), end)
        if modes[use.section] != "save":
            # An input is read as the second forward begins; what selective recomputation has kept, where it was made.
            own = use.section == section and allocation.kind != "input"
            first = min(first, birth[1] * again[section] / forward_ms) if own and forward_ms else 0.0
        need = min(need, (phase, first))
        death = max(death, (phase, last))
    return Item(section, allocation, birth, need, death if allocation.uses else (NEVER, 0.0))


def _enter(layout: Layout, item: Item) -> None:
    index = len(layout.items)
    layout.items.append(item)
    held = item.allocation.held_bytes
    layout.events[item.birth[0]].append((item.birth[1], BIRTH, index, held))
    if item.need[0] != NEVER:
        layout.events[int(item.need[0])].append((item.need[1], NEED, index, held))
        layout.events[int(item.death[0])].append((item.death[1], DEATH, index, held))
