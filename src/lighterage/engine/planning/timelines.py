"""Logs of measured steps as a timeline, and how its saves are found again where a section is computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Protocol

from ...planner.timeline import NOT_SEEN, Kind, Phase, SavedAllocation, SectionRecord, Timeline, Use
from .section_log import SaveLog, SectionLog
from .step_log import StepLog

# What passes between two sections in less than this part of the step is no phase of its own.
_NO_PHASE = 0.0005
# Of the bytes that running a forward again frees, the least for which deriving is preferred: that costs half.
_ENOUGH = 0.7


_Scale = dict[tuple[str, int | None], float]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How what a section saves is found where it is computed again, in which other tensors are saved."""

    inputs: tuple[int | None, ...] = ()
    """For each tensor that the call was given: the save that stands for it, or None where none does."""

    products: tuple[int | None, ...] = ()
    """For each product, in the order of computing: the save that stands for it. None: nothing needs it."""

    derives: bool = False
    """Whether nothing runs again: what is cheap is derived from what is saved. See Note [Derived saves]."""


class SectionCosts(Protocol):
    """What a section takes."""

    @property
    def parts(self) -> tuple[float, float]: ...

    @property
    def hooks(self) -> tuple[float, float]: ...

    @property
    def selective(self) -> float | None: ...

    @property
    def again(self) -> float | None: ...


@dataclasses.dataclass
class _Stretch:
    """A phase in the making."""

    direction: str
    section: int | None
    ms: float
    work_bytes: int
    raw_ms: float
    """With the waits."""


def is_like(a: StepLog, b: StepLog) -> bool:
    """Whether two logs are of the same step: the same sections in the same order, with saves of about the same size."""
    if len(a.sections) != len(b.sections):
        return False
    return all(
        one.name == other.name and _near(_total(one), _total(other))
        for one, other in zip(a.sections, b.sections, strict=True)
    )


def _total(section: SectionLog) -> int:
    return sum(save.nbytes for save in section.saves)


def _near(a: int, b: int) -> bool:
    return abs(a - b) <= 0.25 * max(a, b)


def read_timeline(
    logs: list[StepLog],
    first: StepLog,
    *,
    device: str,
    costs: Mapping[int, SectionCosts],
    others_part: float,
    derives: Collection[object],
) -> Timeline:
    """The timeline of a step that was measured `len(logs)` times; the shortest counts.

    Args:
        logs: detailed and readable, at least one.
        first: the log in which products were told, for what can be computed again.
        costs: by section, what its phases take at rest, and what hooks and computing again take beside that.
        others_part: of what passes between sections, what passes there where less is recorded.
        derives: the kinds of sections that derive what is cheap.
    """
    all_stretches = [_stretches(log) for log in logs]
    fastest = min(range(len(logs)), key=lambda i: sum(s.ms for s in all_stretches[i]))
    log, stretches = logs[fastest], all_stretches[fastest]
    for other, theirs in zip(logs, all_stretches, strict=True):
        if other is log or [(s.direction, s.section) for s in theirs] != [(s.direction, s.section) for s in stretches]:
            continue
        for mine, their in zip(stretches, theirs, strict=True):
            mine.ms = min(mine.ms, their.ms)
            mine.work_bytes = max(mine.work_bytes, their.work_bytes)
    for mine in stretches:
        if mine.section is None:
            mine.ms *= others_part
        elif (section_costs := costs.get(mine.section)) is not None:
            mine.ms *= section_costs.parts[mine.direction == "backward"]
    stretches = _without_moments(stretches)
    peaks = [b.peak_bytes for b in log.boundaries if b.peak_bytes is not None]
    told = {(s.index, s.name): s for s in first.sections}
    # Moments inside a phase are told as if its waits had been spread over it.
    scale: _Scale = {(s.direction, s.section): s.ms / s.raw_ms for s in stretches if s.section is not None and s.raw_ms}
    return Timeline(
        sections=tuple(
            _section(log, one, told.get((one.index, one.name)), costs, scale, derives) for one in log.sections
        ),
        phases=tuple(
            Phase(direction=s.direction, section=s.section, ms=s.ms, work_bytes=s.work_bytes)  # type: ignore[arg-type]
            for s in stretches
        ),
        device=device,
        device_bytes=log.gauge.total(),
        measured_peak_bytes=max(peaks) if peaks else max(b.live_bytes for b in log.boundaries),
    )


def phase_ms(log: StepLog) -> dict[tuple[str, int], float]:
    """Milliseconds of each section's phases, waits for copies taken off."""
    return {(s.direction, s.section): s.ms for s in _stretches(log) if s.section is not None}


def others_ms(log: StepLog) -> float:
    """Milliseconds of the step that belong to no section."""
    return sum(s.ms for s in _stretches(log) if s.section is None)


def waiting_phases(log: StepLog) -> dict[tuple[str, int], bool]:
    """Of each section's phases, whether the device waited for its host in it."""
    found: dict[tuple[str, int], bool] = {}
    for here, there in zip(log.boundaries, log.boundaries[1:], strict=False):
        if here.section is not None and here.section.index is not None:
            key = (here.direction, here.section.index)
            found[key] = there.caught_up and found.get(key, True)
    return found


def _stretches(log: StepLog) -> list[_Stretch]:
    waits: dict[int, float] = {}
    for num, wait in log.waits:
        waits[num] = waits.get(num, 0.0) + (wait.milliseconds() or 0.0)
    found: dict[tuple[str, int], _Stretch] = {}
    stretches: list[_Stretch] = []
    for num, (here, there) in enumerate(zip(log.boundaries, log.boundaries[1:], strict=False)):
        section = None if here.section is None else here.section.index
        direction = "other" if section is None else here.direction
        raw = log.clock.ms(here.at, there.at)
        ms = raw - waits.get(num, 0.0)
        if direction == "backward" and here.section is not None:
            ms -= here.section.row.late_ms
        peak = there.peak_bytes or 0
        stretch = _Stretch(direction, section, max(ms, 0.0), max(0, peak - max(here.live_bytes, there.live_bytes)), raw)
        if section is not None:
            known = found.get((direction, section))
            if known is not None:  # something else came between
                known.ms += stretch.ms
                known.raw_ms += raw
                known.work_bytes = max(known.work_bytes, stretch.work_bytes)
                continue
            found[(direction, section)] = stretch
        if section is None and stretches and stretches[-1].section is None:
            stretches[-1].ms += stretch.ms
            stretches[-1].work_bytes = max(stretches[-1].work_bytes, stretch.work_bytes)
            continue
        stretches.append(stretch)
    return stretches


def _without_moments(stretches: list[_Stretch]) -> list[_Stretch]:
    total = sum(s.ms for s in stretches)
    kept: list[_Stretch] = []
    for stretch in stretches:
        if stretch.section is None and stretch.ms < _NO_PHASE * total and kept:
            kept[-1].ms += stretch.ms
            kept[-1].work_bytes = max(kept[-1].work_bytes, stretch.work_bytes)
        else:
            kept.append(stretch)
    return kept


def _section(
    log: StepLog,
    section: SectionLog,
    told: SectionLog | None,
    all_costs: Mapping[int, SectionCosts],
    scale: _Scale,
    derives: Collection[object],
) -> SectionRecord:
    born_from = next((b for b in log.boundaries if b.section is section and b.direction == "forward"), None)
    known = {save.save: save for save in told.saves} if told is not None else {}
    kinds: dict[int, Kind] = {} if told is None else _kinds(told, derives=told.kind in derives)
    allocations = []
    for save in section.saves:
        born_ms = 0.0 if born_from is None else max(0.0, log.clock.ms(born_from.at, save.born))
        born_ms *= scale.get(("forward", section.index), 1.0)
        twin = known.get(save.save)
        kind = save.kind if twin is None else twin.kind
        if told is not None:
            kind = kinds.get(save.save, kind)
        allocations.append(
            SavedAllocation(
                save=save.save,
                nbytes=save.nbytes,
                held_bytes=max(save.held_bytes, save.nbytes),
                born_ms=born_ms,
                uses=_uses(log, save, scale),
                kind=kind,
                label=save.label,
                module="" if twin is None else twin.module,
                kept=save.kept,
            )
        )
    reason = NOT_SEEN if told is None else told.not_recomputed
    costs = None if section.index is None else all_costs.get(section.index)
    may_select = reason is None and told is not None and (told.kind in derives or runs_again(told))
    return SectionRecord(
        name=section.name,
        gap=section.gap,
        allocations=tuple(allocations),
        not_recomputed=None if section.gap else reason,
        selective_ms=costs.selective if may_select and costs is not None else None,
        recompute_ms=costs.again if reason is None and costs is not None else None,
        hooks_forward_ms=0.0 if costs is None else costs.hooks[0],
        hooks_backward_ms=0.0 if costs is None else costs.hooks[1],
    )


def runs_again(section: SectionLog) -> bool:
    """Whether selective recomputation can run the forward again, with its products put by."""
    return bool(section.products) and not section.overwritten


def _kinds(section: SectionLog, *, derives: bool) -> dict[int, Kind]:
    """What each save of `section` is to selective recomputation. `derives`: what can be derived is, and that alone."""
    if not derives and not section.products:
        return {}
    dear = set() if derives else set(_dear(section).values())
    kinds: dict[int, Kind] = {}
    for save in section.saves:
        kind = save.kind
        if kind != "input" and derives:
            kind = "pointwise" if save.derivable else "product" if kind == "product" else "other"
        elif kind != "input":
            kind = "product" if save.save in dear else "other" if kind == "other" else "pointwise"
        kinds[save.save] = kind
    return kinds


def derives_enough(section: SectionLog) -> bool:
    """Whether deriving frees about as much of `section` as running its forward again would."""
    derived = sum(save.held_bytes for save in section.saves if save.derivable)
    if not runs_again(section):
        return derived > 0
    kinds = _kinds(section, derives=False)
    cheap = sum(save.held_bytes for save in section.saves if kinds[save.save] == "pointwise")
    return derived > 0 and derived >= _ENOUGH * cheap


def _uses(log: StepLog, save: SaveLog, scale: _Scale) -> tuple[Use, ...]:
    uses: list[Use] = []
    for num, at in save.uses:
        boundary = log.boundaries[num]
        if boundary.direction != "backward" or boundary.section is None or boundary.section.index is None:
            continue
        ms = max(0.0, log.clock.ms(boundary.at, at)) * scale.get(("backward", boundary.section.index), 1.0)
        if uses and uses[-1].section == boundary.section.index:
            uses[-1] = dataclasses.replace(uses[-1], last_ms=max(ms, uses[-1].last_ms))
        else:
            uses.append(Use(section=boundary.section.index, first_ms=ms, last_ms=ms))
    return tuple(uses)


def recipe_of(section: SectionLog, *, derives: bool) -> Recipe:
    """How `section`, whose products were told, finds its saves again."""
    positions = {key: save.save for save in section.saves if save.kind == "input" for key in save.keys}
    inputs: dict[int, int | None] = {}
    for key, position in section.input_keys.items():
        inputs[position] = positions.get(key)
    count = max(inputs, default=-1) + 1
    dear = _dear(section)
    return Recipe(
        inputs=tuple(inputs.get(position) for position in range(count)),
        products=tuple(dear.get(number) for number in range(len(section.products))),
        derives=derives,
    )


def _dear(section: SectionLog) -> dict[int, int]:
    """For each product by its number: the save that stands for it.

    A product that was saved stands for itself. One that was not (what is saved is made of it) has to be there all the
    same, or all that comes after it would be computed with it: the first save after it that is as large and cheap by
    itself stands for it. Products after the last save are needed by nothing.
    """
    by_key = {key: save for save in section.saves for key in save.keys}
    last = max((save.save for save in section.saves), default=0)
    taken: dict[int, int] = {}
    for number, product in enumerate(section.products):
        save = next((by_key[key] for key in product.keys if key in by_key), None)
        if save is not None and save.kind != "input":
            taken[number] = save.save
    stand_ins = set(taken.values())
    for number, product in enumerate(section.products):
        if number in taken or product.saves_before >= last:
            continue
        for save in section.saves:
            if (
                save.save > product.saves_before
                and save.save not in stand_ins
                and save.kind != "input"
                and abs(save.held_bytes - product.nbytes) <= 0.1 * product.nbytes
            ):
                taken[number] = save.save
                stand_ins.add(save.save)
                break
    return taken
