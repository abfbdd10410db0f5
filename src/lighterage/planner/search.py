"""Looks for the frontier of a timeline: what leaves, what is computed again, and under which limit.

One search serves every goal, so a larger budget can never give a slower plan: both choose from the same points.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence

from .frontier import Frontier, Modes, Point
from .goal import Choices
from .layout import Layout, costs_host, is_saved, lay_out, recompute_time
from .mixes import mixes
from .plan import Mode
from .run import Run
from .schedule import Pace, Schedule
from .thrift import Thrift
from .timeline import Link, Timeline
from .worth import by_idleness, opening_ms

_PACES = (Pace(), Pace(2.5), Pace(8.0), Pace(8.0, True))

_NUM_LEVELS = 28
_MOST_MODES = 16
_MOST_NEIGHBOURS = 40
_ALL_BUT = 1.002
"""A step so little longer has no wait worth the name."""

_HARDLY_FASTER = 0.999

_LEAST_TURN = 4
_FEW_MODES = 100
_MANY_MODES = 1000
_FEW = 20
"""Allocations among which more is tried than what is next to a point."""

_DEPTH: dict[Mode, int] = {"save": 0, "selective": 1, "recompute": 2}


class Search:
    """The frontier of `timeline` over `link`, within `choices`.

    Moves are tried in the order of how long an allocation lies idle. Sections are computed again in the order of what
    that frees at the peak for its time, the later of equals first: the link can take the earlier. Then whatever is
    next to a point of the frontier is tried.
    """

    def __init__(
        self, timeline: Timeline, link: Link, choices: Choices, *, effort: int, copies: Sequence[int] | None = None
    ) -> None:
        """`copies`: as how many allocations each of the timeline's leaves, by its place; without it, each as one."""
        self.timeline = timeline
        self.frontier = Frontier()
        self._link = link
        self._choices = choices
        self._effort = effort
        self._copies = copies
        self._layouts: dict[Modes, Layout] = {}
        self._gone: dict[Point, frozenset[int]] = {}
        """Of what may leave, what did."""

        self._seen: dict[tuple[Modes, frozenset[int], float, Pace, frozenset[int]], Point] = {}
        keys = [(s, a.save) for s, record in enumerate(timeline.sections) for a in record.allocations]
        self._place = {key: place for place, key in enumerate(keys)}
        self._section = [section for section, _ in keys]
        allocations = [a for record in timeline.sections for a in record.allocations]
        self._held = [a.held_bytes for a in allocations]
        free = [a.kept is None and a.nbytes > 0 for a in allocations]
        self.must = frozenset(
            place for key, place in self._place.items() if free[place] and choices.bound.get(key) == "offload"
        )
        may = {place for key, place in self._place.items() if free[place] and key not in choices.bound}
        self._order = by_idleness(timeline, self._place, may)
        self._thrift = Thrift(link, self._place, self.must, self._order) if costs_host(timeline, link) else None
        self.start: Modes = tuple(modes[0] for modes in choices.modes)
        self.base = self._try(self.start, self.must, float("inf"))

    def go(self) -> Frontier:
        """Search until nothing better is found, or the effort is spent."""
        path = self._path()
        everything = self.must.union(self._order)
        smallest = min(self._try(modes, everything, 0.0).peak_bytes for modes in path)
        step = (self.base.peak_bytes - smallest) / _NUM_LEVELS
        if step > 0:
            levels = [self.base.peak_bytes - step * number for number in range(1, _NUM_LEVELS)] + [smallest]
            self._mix(self._effort - self._effort // 6)
            for number, modes in enumerate(path):
                # Something is left to each of the others, and to the improvement of what they find.
                first = 4 if self._thrift is None else 2
                share = self._effort // (len(path) - number + 2 if number else min(len(path) + 2, first))
                self._sweep(modes, levels, self._effort - share)
            self._improve()
            self._search_modes(levels)
        return self.frontier

    def _mix(self, until: int) -> None:
        """Mixes of all three means. See Note [What plans come to]."""
        for modes, head in mixes(self.start, self._choices.modes):
            if self._effort <= until:
                return
            moved = self.must.union(place for place in self._order if self._section[place] in head)
            self._try(modes, moved, self._try(modes, moved, 0.0).peak_bytes if head else math.inf)

    def _search_modes(self, levels: list[float]) -> None:
        """With the effort that is left, the modes that are not on the path, if they are not too many."""
        if math.prod(len(modes) for modes in self._choices.modes) > _MANY_MODES:
            return
        every = list(itertools.product(*self._choices.modes))
        for number, modes in enumerate(every):
            if self._effort <= 0:
                return
            self._sweep(modes, levels, self._effort - self._effort // (len(every) - number + 1))
        self._improve()

    def _layout(self, modes: Modes) -> Layout:
        if modes not in self._layouts:
            layout = self._layouts[modes] = lay_out(self.timeline, modes)
            if self._copies is not None:
                for item in layout.items:
                    item.copies = self._copies[self._place[item.section, item.allocation.save]]
            self._effort -= 2 * len(self._held)
        return self._layouts[modes]

    def _flags(self, modes: Modes, moved: frozenset[int]) -> list[bool]:
        place = self._place
        return [place[item.section, item.allocation.save] in moved for item in self._layout(modes).items]

    def _try(
        self,
        modes: Modes,
        moved: frozenset[int],
        limit: float,
        pace: Pace = _PACES[0],
        lazy: frozenset[int] = frozenset(),
    ) -> Point:
        key = (modes, moved, limit, pace, lazy)
        if (point := self._seen.get(key)) is None:
            layout, flags = self._layout(modes), self._flags(modes, moved)
            run = Run(layout, self._link, flags)
            schedule = self._schedule(modes, flags, limit, pace, lazy)
            run.go(schedule)
            self._effort -= len(flags) + 3 * sum(flags) + 2 * len(layout.ms)
            beside_ms = run.slowed_ms + run.host_ms
            point = self._seen[key] = Point(run.now_ms, run.peak_bytes, modes, moved, limit, pace, lazy, beside_ms)
            if self.frontier.add(point):
                items, place = layout.items, self._place
                self._gone[point] = frozenset(
                    place[items[i].section, items[i].allocation.save]
                    for i, at in enumerate(schedule.released)
                    if at >= 0
                )
        return point

    def _schedule(self, modes: Modes, moved: list[bool], limit: float, pace: Pace, lazy: frozenset[int]) -> Schedule:
        layout = self._layout(modes)
        late, must = (self._indices(layout, places) for places in (lazy, self.must))
        return Schedule(layout, self._link, moved, limit_bytes=limit, pace=pace, lazy=late, must=must)

    def _indices(self, layout: Layout, places: frozenset[int]) -> set[int]:
        if not places:
            return set()
        at = (self._place[item.section, item.allocation.save] for item in layout.items)
        return {index for index, place in enumerate(at) if place in places}

    def _path(self) -> list[Modes]:
        """From nothing computed again to everything, one section after another, the cheapest bytes first.

        Where there are few ways at all, every one of them.
        """
        if math.prod(len(modes) for modes in self._choices.modes) <= _FEW_MODES and len(self._held) <= _FEW:
            return list(itertools.product(*self._choices.modes))
        layout, at = self._layout(self.start), self._peak_phase()
        spans = [[len(layout.ms), -1] for _ in self.timeline.sections]
        for index, phase in enumerate(self.timeline.phases):
            if phase.section is not None:
                spans[phase.section][phase.direction == "backward"] = index
        modes = list(self.start)
        heap: list[tuple[float, int, Mode, Mode]] = []

        def offer(section: int) -> None:
            forward, backward = spans[section]
            # What frees nothing where the peak is comes last.
            idle_there = forward < at < backward or backward < 0
            for other in self._choices.modes[section]:
                if _DEPTH[other] > _DEPTH[modes[section]]:
                    worth = self._worth(section, modes[section], other) * (1.0 if idle_there else 1e-6)
                    if worth > 0:
                        heapq.heappush(heap, (-worth, -section, other, modes[section]))

        for section in range(len(modes)):
            offer(section)
        steps: list[tuple[int, Mode]] = []
        while heap:
            _, negative, other, was = heapq.heappop(heap)
            if was == modes[-negative]:  # else it was worth something from where its section was, and was offered anew
                modes[-negative] = other
                steps.append((-negative, other))
                offer(-negative)
        count = min(len(steps) + 1, _MOST_MODES)
        path, modes, taken = [self.start], list(self.start), 0
        for i in range(1, count):
            until = round(i * len(steps) / (count - 1))
            for section, other in steps[taken:until]:
                modes[section] = other
            path.append(tuple(modes))
            taken = until
        return path

    def _peak_phase(self) -> int:
        run = Run(self._layout(self.start), self._link, self._flags(self.start, frozenset()), recording=True)
        run.go(Schedule(run.layout, self._link, run.moved, limit_bytes=float("inf"), pace=Pace()))
        assert run.recording is not None
        return max(range(len(run.recording.peaks)), key=run.recording.peaks.__getitem__)

    def _worth(self, section: int, mode: Mode, other: Mode) -> float:
        """Bytes that are no longer saved, for a millisecond."""
        cost = recompute_time(self.timeline, section, other) - recompute_time(self.timeline, section, mode)
        if mode == "save":
            cost += opening_ms(self._layout(self.start), section)
        freed = sum(
            a.held_bytes
            for a in self.timeline.sections[section].allocations
            if is_saved(a, section, mode) and not is_saved(a, section, other)
        )
        return freed / max(cost, 1e-3)

    def _sweep(self, modes: Modes, levels: list[float], until: int) -> None:
        """For each level under the other, the fewest moves that reach it in these modes, and some more.

        Where the effort, down to `until`, does not suffice for that: the lowest level that costs no wait.
        """
        kept = self._try(modes, self.must, float("inf"))
        if self._thrift is not None:
            self._sweep_thriftily(self._thrift, modes, [level for level in levels if level < kept.peak_bytes], until)
            if len(self._held) > _FEW:
                return
        layout = self._layout(modes)
        floor_ms = sum(layout.ms)
        saved = {self._place[item.section, item.allocation.save] for item in layout.items}
        order = [place for place in self._order if place in saved]
        levels = [level for level in levels if level < kept.peak_bytes]
        sums = [0, *itertools.accumulate(self._held[place] for place in order)]
        each = 3 * len(layout.items) + 2 * len(layout.ms)
        if self._effort - until < 2 * each * len(levels):
            self._lowest_without_wait(
                modes, levels, floor_ms, order, [kept.peak_bytes - freed for freed in sums], until
            )
            return
        stride = max(1, len(order) // 24)
        count = 0
        for level in levels:
            best = self.frontier.within(level)
            if (best is not None and not _waits(best, floor_ms)) or self._effort < until:
                continue
            while count < len(order) and sums[count] < kept.peak_bytes - level:
                count += 1
            point = self._try(modes, self.must.union(order[:count]), level)
            while point.peak_bytes > level and count < len(order):
                count = min(count + stride, len(order))
                point = self._try(modes, self.must.union(order[:count]), level)
            if point.peak_bytes > level:
                return
            further = count
            for pace in _PACES[1:]:
                if _waits(point, floor_ms):
                    self._try(modes, point.moved, level, pace)
            while _waits(point, floor_ms) and further < len(order):
                further = min(further + stride, len(order))
                more = self._try(modes, self.must.union(order[:further]), level)
                if more.ms >= point.ms:
                    break
                point = more

    def _sweep_thriftily(self, thrift: Thrift, modes: Modes, levels: list[float], until: int) -> None:
        """For each level, and for some prices, the cheapest moves that can reach it; then dearer ones, as long as they
        can be better."""
        if self._effort < until:
            return
        layout = self._layout(modes)
        floor_ms = sum(layout.ms)
        for level in thrift.spread(modes, layout, levels):
            if self._effort < until:
                return
            for moves_ms, moved in thrift.reaching(modes, layout, level):
                best = self.frontier.within(level)
                if self._effort < until or (best is not None and best.ms <= floor_ms + moves_ms + 1e-6):
                    break
                self._try(modes, moved, level)
            best = self.frontier.within(level)
            if best is not None and best.modes == modes and _waits(best, floor_ms):
                for pace in _PACES[1:]:
                    if self._try(modes, best.moved, level, pace).ms > best.ms * _HARDLY_FASTER:
                        break
            self._effort -= thrift.spent()

    def _lowest_without_wait(
        self, modes: Modes, levels: list[float], floor_ms: float, order: list[int], least: list[float], until: int
    ) -> None:
        """By halving. `least`: of so many moves, the peak that they cannot go below."""
        low, high = 0, len(levels) - 1
        while low <= high and self._effort > until:
            middle = (low + high) // 2
            level = levels[middle]
            count = next((number for number, peak in enumerate(least) if peak <= level), len(order))
            # Some more than suffices if all were away at the peak: the last of them will not be.
            count = min(count + 1 + len(order) // 24, len(order))
            point = self._try(modes, self.must.union(order[:count]), level)
            if point.peak_bytes <= level and point.ms - point.slowed_ms <= floor_ms * _ALL_BUT:
                low = middle + 1
            else:
                high = middle - 1

    def _improve(self) -> None:
        """Try what is next to each point of the frontier, in turn, until the effort is spent."""
        open_points: dict[Point, Iterator[tuple[Modes, frozenset[int], float, Pace, frozenset[int]]]] = {}
        finished: set[Point] = set()
        rounds = 0
        while self._effort > 0:
            points = list(self.frontier)
            turn = [point for point in points if point not in finished]
            if not turn:
                return
            rounds += 1
            if rounds % 3:
                # Where a little less memory costs much, there is most to be found.
                cliffs = {after: after.ms - before.ms for before, after in itertools.pairwise(points)}
                turn.sort(key=lambda point: -cliffs.get(point, 0.0))
                turn = turn[: max(_LEAST_TURN, len(turn) // 4)]
            for point in turn:
                if self._effort <= 0:
                    return
                neighbours = open_points.setdefault(point, self._neighbours(point))
                decisions = next(neighbours, None)
                if decisions is None:
                    finished.add(point)
                else:
                    self._try(*decisions)

    def _neighbours(self, point: Point) -> Iterator[tuple[Modes, frozenset[int], float, Pace, frozenset[int]]]:
        modes, moved, peak = point.modes, point.moved, point.peak_bytes
        yield modes, moved, peak - 1, point.pace, point.lazy
        # A copy of what stays in the end is in the way of others.
        moved = self._gone[point] | self.must
        yield modes, moved, peak, point.pace, point.lazy
        # The most that something new may hold and still be better than the point before.
        above = self.frontier.above(point) - 1
        others = [
            (section, other)
            for section, mode in enumerate(modes)
            for other in self._choices.modes[section]
            if other != mode
        ]
        order = self._order
        if self._thrift is not None:
            order = self._thrift.order(modes, self._layout(modes))
            self._effort -= self._thrift.spent()
            for other_moves in self._thrift.near(self._layout(modes), moved):
                yield modes, other_moves, peak, point.pace, point.lazy
                yield modes, other_moves, above, point.pace, point.lazy
        boundary = sum(place in moved for place in order)
        near = sorted(range(len(order)), key=lambda rank: abs(rank - boundary))[:_MOST_NEIGHBOURS]
        every = max(1, len(others) // _MOST_NEIGHBOURS)
        for section, other in others[::every]:
            changed = (*modes[:section], other, *modes[section + 1 :])
            yield changed, moved, peak, point.pace, point.lazy
            yield changed, moved, peak - 1, point.pace, point.lazy
            yield changed, moved, above, point.pace, point.lazy
        for rank in near:
            toggled = moved ^ {order[rank]}
            yield modes, toggled, peak, point.pace, point.lazy
            yield modes, toggled, peak - 1, point.pace, point.lazy
            yield modes, toggled, above, point.pace, point.lazy
        if len(self._order) <= _FEW:
            inside, outside = moved.intersection(self._order), set(self._order) - moved
            for gone, new in itertools.product(sorted(inside), sorted(outside)):
                yield modes, moved - {gone} | {new}, peak, point.pace, point.lazy
                yield modes, moved - {gone} | {new}, above, point.pace, point.lazy
            for place in sorted(outside):
                yield modes, moved | {place}, peak - 1, point.pace, point.lazy | {place}
            for place in sorted(inside):
                yield modes, moved, peak, point.pace, point.lazy ^ {place}
                yield modes, moved, above, point.pace, point.lazy ^ {place}
            if self._thrift is not None:  # small ones together may cost less than a large one does
                for two in itertools.combinations(sorted(outside), 2):
                    yield modes, moved.union(two), above, point.pace, point.lazy
            for section, other in others:
                changed = (*modes[:section], other, *modes[section + 1 :])
                for place in self._order:
                    yield changed, moved ^ {place}, above, point.pace, point.lazy
        for pace in _PACES:
            yield modes, moved, peak, pace, point.lazy


def _waits(point: Point, floor_ms: float) -> bool:
    """Whether its step waits for a copy, where it takes `floor_ms` without any beside it."""
    return point.ms - point.slowed_ms > floor_ms + 1e-6
