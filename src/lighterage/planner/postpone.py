"""Puts off each reload as far as it costs nothing, so that what is away stays away."""

from __future__ import annotations

import bisect
import dataclasses

from .plan import Fetch, Plan
from .prediction import Prediction
from .simulate import simulate
from .timeline import Link, Timeline

_MARGIN = 1.25
"""How much longer than predicted a reload may take, and still be in time."""


def postpone(timeline: Timeline, link: Link, plan: Plan, seen: Prediction) -> tuple[Plan, Prediction]:
    """`plan` with later fetches and its prediction; or as it was, if that would take longer.

    The peak cannot rise by it: less is on the device.
    """
    backward = {phase.section: index for index, phase in enumerate(timeline.phases) if phase.direction == "backward"}
    starts = [phase.start_ms for phase in seen.phases]
    need_ms: dict[tuple[int, int], float] = {}
    for section, record in enumerate(timeline.sections):
        for allocation in record.allocations:
            firsts = []
            for use in allocation.uses:
                index = backward[use.section]
                again = plan.sections[use.section].mode != "save"
                firsts.append(starts[index] + (0.0 if again else use.first_ms))
            if firsts:
                need_ms[section, allocation.save] = min(firsts)
    rows: list[list[Fetch]] = [[] for _ in plan.fetches]
    rate = min(link.in_bytes_per_s, max(link.both_bytes_per_s / 2, link.both_bytes_per_s - link.out_bytes_per_s)) / 1e3
    sizes = {(s, a.save): a.nbytes for s, record in enumerate(timeline.sections) for a in record.allocations}
    before = float("inf")
    for index in reversed(range(len(plan.fetches))):
        for fetch in reversed(plan.fetches[index]):
            key = (fetch.section, fetch.save)
            if key in need_ms:
                before = min(before, need_ms[key])
                before -= (link.copy_us / 1e3 + sizes[key] / rate) * _MARGIN
                rows[max(index, bisect.bisect_right(starts, before) - 1)].insert(0, fetch)
    later = dataclasses.replace(plan, fetches=tuple(tuple(row) for row in rows))
    if later.fetches == plan.fetches:
        return plan, seen
    then = simulate(timeline, later, link)
    return (later, then) if then.step_ms <= seen.step_ms + 1e-6 else (plan, seen)
