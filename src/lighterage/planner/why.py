"""A plan's reasons, in sentences with figures."""

from __future__ import annotations

import dataclasses

from .figures import rate, size
from .goal import Goal
from .layout import is_saved, recompute_time
from .plan import Plan, SectionPlan
from .prediction import Prediction
from .timeline import Link, Timeline


def explain(timeline: Timeline, link: Link, goal: Goal, plan: Plan, before: Prediction, after: Prediction) -> Plan:
    """`plan` with a sentence for each section and one for the whole.

    `before`, `after`: the predictions for everything kept, and for `plan`.
    """
    away = {
        section: min((copy.end_ms for copy in after.in_copies if copy.section == section), default=None)
        for section in range(len(timeline.sections))
    }
    sections = tuple(
        dataclasses.replace(each, why=_section(timeline, section, each, away[section], after))
        for section, each in enumerate(plan.sections)
    )
    return dataclasses.replace(plan, sections=sections, why=_whole(timeline, link, goal, plan, before, after))


def _whole(timeline: Timeline, link: Link, goal: Goal, plan: Plan, before: Prediction, after: Prediction) -> str:
    wish = (
        f"within {size(goal.device_budget)}"
        if goal.device_budget is not None
        else f"at most {goal.max_slowdown:.1%} slower"
    )
    if all(not section.moves and section.mode == "save" for section in plan.sections):
        if goal.device_budget is not None:
            return f"Everything stays: the step's peak, {size(before.peak_bytes)}, is {wish} as it is."
        if not any(section.allocations for section in timeline.sections):
            return "Everything stays: no section saved an allocation."
        return (
            f"Everything stays: {wish}, over a link of {rate(link.out_bytes_per_s)} out and "
            f"{rate(link.in_bytes_per_s)} in, nothing lowers the peak of {size(before.peak_bytes)} by 0.5 % or more."
        )
    parts = []
    if plan.num_moves:
        moving = sum(bool(section.moves) for section in plan.sections)
        parts.append(f"{size(after.bytes_out)} of {moving} sections leave the device")
    again = sum(section.mode != "save" for section in plan.sections)
    if again:
        parts.append(f"{again} of {len(plan.sections)} sections are computed again, in part or whole")
    return (
        f"To be {wish}, {' and '.join(parts)}: a peak of {size(after.peak_bytes)} instead of {size(before.peak_bytes)} "
        f"({after.peak_bytes / before.peak_bytes - 1:+.1%}) in {after.step_ms:.1f} ms instead of {before.step_ms:.1f} "
        f"({after.step_ms / before.step_ms - 1:+.1%})."
    )


def _section(timeline: Timeline, section: int, plan: SectionPlan, back_ms: float | None, after: Prediction) -> str:
    record = timeline.sections[section]
    saved = [a for a in record.allocations if is_saved(a, section, plan.mode)]
    dropped = sum(a.held_bytes for a in record.allocations) - sum(a.held_bytes for a in saved)
    moving = {move.save: move for move in plan.moves}
    moved = [a for a in saved if a.save in moving and a.kept is None]
    parts: list[str] = []
    if not record.allocations:
        return "It saves nothing."
    if plan.mode != "save":
        what = "the cheap part of it is" if plan.mode == "selective" else "it is"
        parts.append(
            f"{what} computed again, {recompute_time(timeline, section, plan.mode):.2f} ms for {size(dropped)}"
        )
    if moved:
        waits = after.phases[_phase(timeline, section)].stalls_ms.reload if _phase(timeline, section) >= 0 else 0.0
        late = f"and {waits:.2f} ms are waited for what comes back" if waits > 0.005 else "and nothing is waited for"
        when = sorted({moving[a.save].release_after for a in moved})
        ends = "its own forward" if when == [0] else f"{_several(when)} phases later"
        where = "the device" if back_ms is not None else "for good: nobody reads it"
        parts.append(
            f"{size(sum(a.nbytes for a in moved))} in {len(moved)} of {len(saved)} saved allocations leave {where}, "
            f"given back at the end of {ends}, {late}"
        )
    elif saved:
        parts.append(f"{size(sum(a.held_bytes for a in saved))} stay" + _why_stay(timeline, section, saved))
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _several(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _phase(timeline: Timeline, section: int) -> int:
    phases = timeline.phases
    return next((i for i, p in enumerate(phases) if p.section == section and p.direction == "backward"), -1)


def _why_stay(timeline: Timeline, section: int, saved: list) -> str:  # type: ignore[type-arg]
    reasons = {a.kept for a in saved}
    if None not in reasons:
        return f": {sorted(reasons)[0]}"
    forward = next(i for i, p in enumerate(timeline.phases) if p.section == section and p.direction == "forward")
    backward = _phase(timeline, section)
    if backward >= 0 and all(phase.direction == "other" for phase in timeline.phases[forward + 1 : backward]):
        return ": backward needs them at once"
    return ": moving them would not lower the peak, or cost more than it may"
