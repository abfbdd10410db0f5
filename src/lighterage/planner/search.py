"""Looks for the frontier of a timeline: what leaves, what is computed again, and under which limit.

One search serves every goal, so a larger budget can never give a slower plan: both choose from the same points.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .frontier import Frontier, Modes, Point
from .goal import Choices
from .layout import NEVER, Layout, is_saved, lay_out, recompute_time
from .plan import Mode
from .run import Run
from .schedule import Schedule
from .timeline import Link, Timeline

_HASTES = (1.15, 2.5, 8.0)
"""How much earlier than the link needs it reloads may begin. The first is a margin; the others are for where memory is
in the way of some, and it pays to have the lane free of others by then."""

_NUM_LEVELS = 28
_MOST_MODES = 16
_MOST_NEIGHBOURS = 40
_EFFORT = 250_000
"""Of a search, in items and phases that its runs pass. It bounds the time without a look at the clock, which would make
plans differ from run to run."""

_DEPTH: dict[Mode, int] = {"save": 0, "selective": 1, "recompute": 2}


class Search:
    """The frontier of `timeline` over `link`, within `choices`.

    Moves are tried in the order of how long an allocation lies idle. Sections are computed again in the order of what
    that frees at the peak for its time, the later of equals first: the link can take the earlier. Then whatever is
    next to a point of the frontier is tried.
    """

    def __init__(self, timeline: Timeline, link: Link, choices: Choices, *, effort: int = _EFFORT) -> None:
        self.timeline = timeline
        self.frontier = Frontier()
        self._link = link
        self._choices = choices
        self._effort = effort
        self._layouts: dict[Modes, Layout] = {}
        self._seen: dict[tuple[Modes, frozenset[int], float, float], Point] = {}
        keys = [(s, a.save) for s, record in enumerate(timeline.sections) for a in record.allocations]
        self._place = {key: place for place, key in enumerate(keys)}
        allocations = [a for record in timeline.sections for a in record.allocations]
        self._held = [a.held_bytes for a in allocations]
        free = [a.kept is None and a.nbytes > 0 for a in allocations]
        self._must = frozenset(
            place for key, place in self._place.items() if free[place] and choices.bound.get(key) == "offload"
        )
        may = {place for key, place in self._place.items() if free[place] and key not in choices.bound}
        self._order = self._by_idleness(may)
        self.start: Modes = tuple(modes[0] for modes in choices.modes)
        self.base = self._try(self.start, self._must, float("inf"))

    def go(self) -> Frontier:
        """Search until nothing better is found, or the effort is spent."""
        path = self._path()
        everything = self._must.union(self._order)
        smallest = min(self._try(modes, everything, 0.0).peak_bytes for modes in {self.start, path[-1]})
        step = (self.base.peak_bytes - smallest) / _NUM_LEVELS
        if step > 0:
            levels = [self.base.peak_bytes - step * number for number in range(1, _NUM_LEVELS)] + [smallest]
            for modes in path:
                self._sweep(modes, levels)
            self._improve()
        return self.frontier

    def carry_out(self, point: Point) -> tuple[Layout, list[bool], Schedule]:
        """The decisions behind a point."""
        layout, moved = self._layout(point.modes), self._flags(point.modes, point.moved)
        schedule = Schedule(layout, self._link, moved, limit_bytes=point.limit_bytes, haste=point.haste)
        Run(layout, self._link, moved).go(schedule)
        return layout, moved, schedule

    def _layout(self, modes: Modes) -> Layout:
        if modes not in self._layouts:
            self._layouts[modes] = lay_out(self.timeline, modes)
            self._effort -= 2 * len(self._held)
        return self._layouts[modes]

    def _flags(self, modes: Modes, moved: frozenset[int]) -> list[bool]:
        place = self._place
        return [place[item.section, item.allocation.save] in moved for item in self._layout(modes).items]

    def _try(self, modes: Modes, moved: frozenset[int], limit: float, haste: float = _HASTES[0]) -> Point:
        key = (modes, moved, limit, haste)
        if (point := self._seen.get(key)) is None:
            layout, flags = self._layout(modes), self._flags(modes, moved)
            run = Run(layout, self._link, flags)
            run.go(Schedule(layout, self._link, flags, limit_bytes=limit, haste=haste))
            self._effort -= len(flags) + 3 * sum(flags) + 2 * len(layout.ms)
            point = self._seen[key] = Point(run.now_ms, run.peak_bytes, modes, moved, limit, haste)
            self.frontier.add(point)
        return point

    def _by_idleness(self, may: set[int]) -> list[int]:
        layout = lay_out(self.timeline, ["save"] * len(self.timeline.sections))
        starts = [0.0, *itertools.accumulate(layout.ms)]
        idle: list[tuple[float, int]] = []
        for item in layout.items:
            place = self._place[item.section, item.allocation.save]
            if place in may:
                end = starts[-1] if item.need[0] == NEVER else starts[int(item.need[0])] + item.need[1]
                idle.append((starts[item.birth[0]] + item.birth[1] - end, place))
        return [place for _, place in sorted(idle)]

    def _path(self) -> list[Modes]:
        """From nothing computed again to everything, one section after another, the cheapest bytes first."""
        layout, at = self._layout(self.start), self._peak_phase()
        spans = [[len(layout.ms), -1] for _ in self.timeline.sections]
        for index, phase in enumerate(self.timeline.phases):
            if phase.section is not None:
                spans[phase.section][phase.direction == "backward"] = index
        modes, path = self.start, [self.start]
        while True:
            steps: list[tuple[float, int, Mode]] = []
            for section, mode in enumerate(modes):
                for other in self._choices.modes[section]:
                    if _DEPTH[other] > _DEPTH[mode]:
                        forward, backward = spans[section]
                        idle_there = forward < at < backward or backward < 0
                        worth = self._worth(section, mode, other) * (1.0 if idle_there else 1e-6)
                        if worth > 0:
                            steps.append((worth, section, other))
            if not steps:
                break
            _, section, other = max(steps, key=lambda step: step[:2])
            modes = (*modes[:section], other, *modes[section + 1 :])
            path.append(modes)
        if len(path) > _MOST_MODES:
            path = [path[round(i * (len(path) - 1) / (_MOST_MODES - 1))] for i in range(_MOST_MODES)]
        return path

    def _peak_phase(self) -> int:
        run = Run(self._layout(self.start), self._link, self._flags(self.start, frozenset()), recording=True)
        run.go(Schedule(run.layout, self._link, run.moved, limit_bytes=float("inf"), haste=1.0))
        assert run.recording is not None
        return max(range(len(run.recording.peaks)), key=run.recording.peaks.__getitem__)

    def _worth(self, section: int, mode: Mode, other: Mode) -> float:
        """Bytes that are no longer saved, for a millisecond."""
        cost = recompute_time(self.timeline, section, other) - recompute_time(self.timeline, section, mode)
        freed = sum(
            a.held_bytes
            for a in self.timeline.sections[section].allocations
            if is_saved(a, section, mode) and not is_saved(a, section, other)
        )
        return freed / max(cost, 1e-3)

    def _sweep(self, modes: Modes, levels: list[float]) -> None:
        """For each level under the other, the fewest moves that reach it in these modes, and some more."""
        kept = self._try(modes, self._must, float("inf"))
        floor_ms = sum(self._layout(modes).ms)
        saved = {self._place[item.section, item.allocation.save] for item in self._layout(modes).items}
        order = [place for place in self._order if place in saved]
        sums = [0, *itertools.accumulate(self._held[place] for place in order)]
        stride = max(1, len(order) // 24)
        count = 0
        for level in levels:
            best = self.frontier.within(level)
            if level >= kept.peak_bytes or (best is not None and best.ms <= floor_ms + 1e-6) or self._effort < 0:
                continue
            while count < len(order) and sums[count] < kept.peak_bytes - level:
                count += 1
            point = self._try(modes, self._must.union(order[:count]), level)
            while point.peak_bytes > level and count < len(order):
                count = min(count + stride, len(order))
                point = self._try(modes, self._must.union(order[:count]), level)
            if point.peak_bytes > level:
                return
            further = count
            for haste in _HASTES[1:]:
                if point.ms > floor_ms + 1e-6:
                    self._try(modes, point.moved, level, haste)
            while point.ms > floor_ms + 1e-6 and further < len(order):
                further = min(further + stride, len(order))
                more = self._try(modes, self._must.union(order[:further]), level)
                if more.ms >= point.ms:
                    break
                point = more

    def _improve(self) -> None:
        """Try what is next to each point of the frontier, all points in turn, until the effort is spent."""
        open_points: dict[Point, Iterator[tuple[Modes, frozenset[int], float, float]]] = {}
        finished: set[Point] = set()
        while self._effort > 0:
            turn = [point for point in self.frontier if point not in finished]
            if not turn:
                return
            for point in turn:
                if self._effort <= 0:
                    return
                neighbours = open_points.setdefault(point, self._neighbours(point))
                decisions = next(neighbours, None)
                if decisions is None:
                    finished.add(point)
                else:
                    self._try(*decisions)

    def _neighbours(self, point: Point) -> Iterator[tuple[Modes, frozenset[int], float, float]]:
        modes, moved, peak = point.modes, point.moved, point.peak_bytes
        yield modes, moved, peak - 1, point.haste
        others = [
            (section, other)
            for section, mode in enumerate(modes)
            for other in self._choices.modes[section]
            if other != mode
        ]
        boundary = sum(place in moved for place in self._order)
        near = sorted(range(len(self._order)), key=lambda rank: abs(rank - boundary))[:_MOST_NEIGHBOURS]
        every = max(1, len(others) // _MOST_NEIGHBOURS)
        for section, other in others[::every]:
            changed = (*modes[:section], other, *modes[section + 1 :])
            yield changed, moved, peak, point.haste
            yield changed, moved, peak - 1, point.haste
        for rank in near:
            toggled = moved ^ {self._order[rank]}
            yield modes, toggled, peak, point.haste
            yield modes, toggled, peak - 1, point.haste
        for haste in _HASTES:
            yield modes, moved, peak, haste
