"""A plan's reasons, in sentences with figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .figures import rate, size
from .goal import Goal
from .layout import is_saved, recompute_time
from .plan import Plan, SectionPlan
from .prediction import Prediction
from .timeline import Link, SavedAllocation, SectionRecord, Timeline


def explain(timeline: Timeline, link: Link, goal: Goal, plan: Plan, before: int, after: Prediction | None) -> Plan:
    """`plan` with a sentence for each section and one for the whole.

    `before`: the peak with everything kept; `after`: the prediction for `plan`, or None if it keeps everything.
    """
    ends = {phase.section: i for i, phase in enumerate(timeline.phases) if phase.direction == "backward"}
    begins = {phase.section: i for i, phase in enumerate(timeline.phases) if phase.direction == "forward"}
    sections = tuple(
        dataclasses.replace(
            each, why=_section(timeline, link, section, each, begins[section], ends.get(section), after)
        )
        for section, each in enumerate(plan.sections)
    )
    return dataclasses.replace(plan, sections=sections, why=_whole(timeline, link, goal, plan, before, after))


def _whole(timeline: Timeline, link: Link, goal: Goal, plan: Plan, before: int, after: Prediction | None) -> str:
    wish = (
        f"within {size(goal.device_budget)}"
        if goal.device_budget is not None
        else f"at most {goal.max_slowdown:.1%} slower"
    )
    if after is None or all(not section.moves and section.mode == "save" for section in plan.sections):
        if goal.device_budget is not None:
            return f"Everything stays: the step's peak, {size(before)}, is {wish} as it is."
        if not any(section.allocations for section in timeline.sections):
            return "Everything stays: no section saved an allocation."
        host = f", with {link.move_us:.0f} µs of the host's work for each move" if link.move_us else ""
        return (
            f"Everything stays: {wish}, over a link of {rate(link.out_bytes_per_s)} out and "
            f"{rate(link.in_bytes_per_s)} in{host}, nothing lowers the peak of {size(before)} by 0.5 % or more."
        )
    parts = []
    if plan.num_moves:
        moving = sum(bool(section.moves) for section in plan.sections)
        parts.append(f"{size(after.bytes_out)} of {moving} sections leave the device")
    again = sum(section.mode != "save" for section in plan.sections)
    if again:
        parts.append(f"{again} of {len(plan.sections)} sections are computed again, in part or whole")
    host_ms = after.stalls_ms.host
    host = f", {host_ms:.1f} ms of it the host's work for that" if host_ms >= 0.05 else ""
    return (
        f"To be {wish}, {' and '.join(parts)}: a peak of {size(after.peak_bytes)} instead of {size(before)}"
        f"{_change(after.peak_bytes, before)} in {after.step_ms:.1f} ms instead of {timeline.step_ms:.1f}"
        f"{_change(after.step_ms, timeline.step_ms)}{host}."
    )


def _change(after: float, before: float) -> str:
    """By which part `after` is more than `before`, in brackets; of nothing there is no part to tell."""
    return f" ({after / before - 1:+.1%})" if before else ""


def _section(
    timeline: Timeline,
    link: Link,
    section: int,
    plan: SectionPlan,
    begin: int,
    end: int | None,
    after: Prediction | None,
) -> str:
    """`begin`, `end`: its forward and backward phase."""
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
        waits = after.phases[end].stalls_ms.reload if after is not None and end is not None else 0.0
        late = f"and {waits:.2f} ms are waited for what comes back" if waits > 0.005 else "and nothing is waited for"
        when = sorted({moving[a.save].release_after for a in moved})
        then = "as its forward ends" if when == [0] else f"{_several(when)} phases after its forward"
        parts.append(
            f"{size(sum(a.nbytes for a in moved))} in {len(moved)} of {len(saved)} saved allocations leave the device, "
            f"given back {then}, {late}"
        )
    if moved or plan.mode != "save":
        host_ms = _host_time(link, record, moved, end)
        if host_ms > 0.005:
            parts.append(f"the host's work for that takes {host_ms:.2f} ms")
    if saved and not moved:
        may = [a for a in saved if a.kept is None]
        host_ms = _host_time(link, record, may, end, hooks=plan.mode == "save")
        why = _why_stay(timeline, saved, begin, end, host_ms)
        parts.append(f"{size(sum(a.held_bytes for a in saved))} stay{why}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _host_time(
    link: Link, record: SectionRecord, moved: Sequence[SavedAllocation], end: int | None, *, hooks: bool = True
) -> float:
    """Milliseconds of the host for moving those of one section, and for its hooks."""
    moves_ms = sum(link.move_us / 1e3 * (1.0 if a.uses else 0.5) for a in moved)
    hooks_ms = record.hooks_forward_ms + (0.0 if end is None else record.hooks_backward_ms)
    return moves_ms + (hooks_ms if hooks else 0.0)


def _several(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _why_stay(timeline: Timeline, saved: Sequence[SavedAllocation], begin: int, end: int | None, host_ms: float) -> str:
    """`host_ms`: the host's work for moving them."""
    reasons = [a.kept for a in saved if a.kept is not None]
    if len(reasons) == len(saved):
        return f": {reasons[0]}"
    if end is not None and all(phase.direction == "other" for phase in timeline.phases[begin + 1 : end]):
        return ": backward needs them at once"
    host = f", {host_ms:.2f} ms of the host's work for all of them" if host_ms > 0.005 else ""
    return f": moving them would not lower the peak, or cost more than it may{host}"
