"""All plans of a small timeline there are, or many of a larger one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from lighterage.planner.layout import is_saved
from lighterage.planner.plan import Fetch, Mode, Move, Plan, SectionPlan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Timeline
from tests.planner import oracle

Choice = tuple[int, int | None] | None
"""Of one allocation: None to keep it, or (release_after, the phase of its fetch or None)."""


def _choices(timeline: Timeline, section: int, save: int) -> list[Choice]:
    allocation = next(a for a in timeline.sections[section].allocations if a.save == save)
    if allocation.kept is not None:
        return [None]
    at = {(p.direction, p.section): i for i, p in enumerate(timeline.phases)}
    birth = at["forward", section]
    need = min((at["backward", use.section] for use in allocation.uses), default=len(timeline.phases))
    found: list[Choice] = [None]
    for release in range(birth, need):
        fetches: list[int | None] = [None]
        if allocation.uses:
            fetches += range(release + 1, need + 1)
        found += [(release - birth, fetch) for fetch in fetches]
    return found


def _build(timeline: Timeline, modes: tuple[Mode, ...], chosen: dict[tuple[int, int], Choice]) -> Plan:
    at = {(p.direction, p.section): i for i, p in enumerate(timeline.phases)}
    rows: list[list[tuple[tuple, Fetch]]] = [[] for _ in timeline.phases]
    sections = []
    for index, record in enumerate(timeline.sections):
        moves = []
        for allocation in record.allocations:
            decision = chosen.get((index, allocation.save))
            if decision is None:
                continue
            moves.append(Move(save=allocation.save, release_after=decision[0]))
            if decision[1] is not None:
                need = min(((at["backward", u.section], u.first_ms) for u in allocation.uses), default=(99, 0))
                rows[decision[1]].append(((*need, index), Fetch(section=index, save=allocation.save)))
        sections.append(SectionPlan(name=record.name, mode=modes[index], moves=tuple(moves)))
    fetches = tuple(tuple(fetch for _, fetch in sorted(row, key=lambda pair: pair[0])) for row in rows)
    return Plan(sections=tuple(sections), fetches=fetches)


def _all_modes(timeline: Timeline, recompute: bool) -> Iterator[tuple[Mode, ...]]:
    options = [oracle.modes_of(timeline, i) if recompute else ["save"] for i in range(len(timeline.sections))]
    yield from itertools.product(*options)


def _saved(timeline: Timeline, modes: tuple[Mode, ...]) -> list[tuple[int, int]]:
    return [
        (index, a.save)
        for index, record in enumerate(timeline.sections)
        for a in record.allocations
        if is_saved(a, index, modes[index])
    ]


def every_plan(timeline: Timeline, *, recompute: bool) -> Iterator[Plan]:
    """Every subset, mode, release and fetch; those fetched in one phase in the order of need."""
    for modes in _all_modes(timeline, recompute):
        keys = _saved(timeline, modes)
        options = [_choices(timeline, *key) for key in keys]
        for decisions in itertools.product(*options):
            yield _build(timeline, modes, dict(zip(keys, decisions, strict=True)))


def count(timeline: Timeline) -> int:
    """How many `every_plan` makes, with nothing computed again."""
    keys = _saved(timeline, ("save",) * len(timeline.sections))
    return math.prod(len(_choices(timeline, *key)) for key in keys)


def many_plans(timeline: Timeline, rng: random.Random, count: int) -> Iterator[Plan]:
    """A random sample of the same, half of it with decisions that are alike for all."""
    every = list(_all_modes(timeline, True))
    for number in range(count):
        modes = rng.choice(every)
        keys = _saved(timeline, modes)
        chosen: dict[tuple[int, int], Choice] = {}
        ahead, after, part = rng.randint(0, 3), rng.randint(0, 3), rng.random()
        for key in keys:
            options = _choices(timeline, *key)
            if number % 2:
                chosen[key] = rng.choice(options)
                continue
            last = max((o[1] for o in options if o and o[1] is not None), default=None)
            alike = (after, None if last is None else last - ahead)
            chosen[key] = alike if rng.random() < part and alike in options else None
        yield _build(timeline, modes, chosen)


def frontier(timeline: Timeline, link: Link, plans: Iterator[Plan]) -> list[tuple[int, float]]:
    """(peak, ms) of those plans that no other beats."""
    best: dict[int, float] = {}
    for plan in plans:
        seen = simulate(timeline, plan, link)
        if seen.step_ms < best.get(seen.peak_bytes, float("inf")):
            best[seen.peak_bytes] = seen.step_ms
    kept: list[tuple[int, float]] = []
    for peak, ms in sorted(best.items()):
        if not kept or ms < kept[-1][1] - 1e-9:
            kept.append((peak, ms))
    return kept
