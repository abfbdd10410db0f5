"""The curve of peak memory against step time: what each can be had for."""

from __future__ import annotations

import dataclasses
from typing import Literal

from .choose import find
from .goal import Goal, Rule, choices
from .plan import Plan
from .timeline import Link, Timeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """One plan that no other beats in both."""

    step_ms: float
    slowdown: float
    """Of the step without any wait: 0.02 is 2 % longer."""

    peak_bytes: int
    num_moved: int
    """Allocations that leave the device."""

    num_selective: int
    num_recomputed: int
    """Sections that are computed again, in part and whole."""

    plan: Plan
    """Without its reasons: `lighterage.plan` gives them."""


def pareto(
    timeline: Timeline,
    link: Link,
    *,
    recompute: Literal["auto", "never"] = "auto",
    rules: tuple[Rule, ...] = (),
    most_points: int = 24,
) -> tuple[ParetoPoint, ...]:
    """The best plans that were found, the fastest first; of many, some that are evenly spread over the peaks.

    Raises:
        ValueError: a rule matches nothing, or cannot be followed.
    """
    goal = Goal(max_slowdown=0.0, recompute=recompute, rules=rules)
    found = find(timeline, link, choices(timeline, goal))
    points = list(found.frontier)
    if len(points) > most_points:
        low, high = points[-1].peak_bytes, points[0].peak_bytes
        wanted = (high - (high - low) * i / (most_points - 1) for i in range(most_points))
        near = (min(points, key=lambda point: abs(point.peak_bytes - peak)) for peak in wanted)
        points = list(dict.fromkeys(near))
    curve = []
    for point in points:
        made, ms = found.plan_of(point)
        modes = [section.mode for section in made.sections]
        curve.append(
            ParetoPoint(
                step_ms=ms,
                slowdown=ms / timeline.step_ms - 1 if timeline.step_ms else 0.0,
                peak_bytes=point.peak_bytes,
                num_moved=made.num_moves,
                num_selective=modes.count("selective"),
                num_recomputed=modes.count("recompute"),
                plan=made,
            )
        )
    return tuple(curve)
