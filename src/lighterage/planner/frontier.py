"""What can be had: ways to run the step that no other beats in both time and peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .plan import Mode
from .schedule import Pace

Modes = tuple[Mode, ...]

_SAME_MS = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One way to run the step, and what it was found to do."""

    ms: float
    peak_bytes: int
    modes: Modes
    moved: frozenset[int]
    """Of the allocations of the timeline, by their place in it."""

    limit_bytes: float
    pace: Pace
    lazy: frozenset[int] = frozenset()
    """Of those that are moved: what comes back no earlier than in the phase that reads it."""

    slowed_ms: float = 0.0
    """Of its time: what compute takes longer because of copies beside it, and the host's work for them."""


class Frontier:
    """Points of which none is as fast and as small as another."""

    def __init__(self) -> None:
        self._points: list[Point] = []

    def __iter__(self) -> Iterator[Point]:
        """The fastest first."""
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def add(self, point: Point) -> bool:
        """Whether `point` is better somewhere than all before it."""
        points = self._points
        for other in points:
            if other.ms > point.ms + _SAME_MS:
                break
            if other.peak_bytes <= point.peak_bytes:
                return False
        at = next((i for i, other in enumerate(points) if other.ms >= point.ms - _SAME_MS), len(points))
        points[at:] = [point, *(other for other in points[at:] if other.peak_bytes < point.peak_bytes)]
        return True

    def within(self, peak_bytes: float) -> Point | None:
        """The fastest of at most `peak_bytes`."""
        return next((point for point in self._points if point.peak_bytes <= peak_bytes), None)

    def above(self, point: Point) -> int:
        """The peak of the point before, which is larger and faster; of `point` itself if it is the fastest."""
        before = [other.peak_bytes for other in self._points if other.ms < point.ms]
        return before[-1] if before else point.peak_bytes

    def at_price(self, ms: float) -> Point | None:
        """The smallest of at most `ms`."""
        return next((point for point in reversed(self._points) if point.ms <= ms + _SAME_MS), None)
