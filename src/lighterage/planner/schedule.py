"""When what leaves is let go of, and when it comes back: decided phase by phase, under a limit of device memory."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Collection, Sequence
from typing import NamedTuple

from .layout import BIRTH, DEATH, GONE, NEED, NEVER, REBORN, WORK, Layout, host_time
from .run import AWAY, HERE, Run
from .timeline import Link

_MOST_OVERTAKEN = 12


class Pace(NamedTuple):
    """How reloads are spread."""

    haste: float = 1.15
    """They begin so many times earlier than their own bytes need. A little is a margin; much pays where memory is in
    the way of some, and the lane should be free of others by then."""

    overtaking: bool = False
    """Whether one may begin before another that is needed earlier and finds no room yet."""


class Schedule:
    """Decisions for a run in which `moved` leave, that keep the peak under `limit_bytes` where that can be done.

    Memory is given back as soon as its copy has finished, and waited for only where the next phase would not fit
    otherwise. What is away comes back in the order of need, as late as the link allows at
    the given pace, or where memory lets it. What finds no room before it is needed is left to be asked for.

    Why this can be exact: what is on the device at a given place of the compute stream follows from the decisions
    alone, never from how fast the copies are.
    """

    def __init__(
        self,
        layout: Layout,
        link: Link,
        moved: Sequence[bool],
        *,
        limit_bytes: float,
        pace: Pace,
        lazy: Collection[int] = (),
        must: Collection[int] = (),
    ) -> None:
        """`lazy`: items that come back no earlier than in the phase that reads them. `must`: items that leave before
        they are read, whatever is waited for that."""
        self._items = layout.items
        self._held = [item.allocation.held_bytes for item in layout.items]
        count = len(layout.ms)
        self.released = [-1] * len(layout.items)
        """The phase at whose end each item was let go of, or -1."""

        self.rows: list[list[int]] = [[] for _ in range(count)]
        """What was fetched as each phase began."""

        self._order = sorted((i for i, m in enumerate(moved) if m), key=lambda i: (self._items[i].need, i))
        self._first_pending = 0
        self._leaving: list[int] = []
        self._leaving_bytes = 0
        self._stretches: list[list[float]] = []
        self._rank: dict[int, int] = {}
        self._profile(layout, moved)
        self._most: list[float] = [max(row) for row in self._stretches]
        """Of each phase, with what is there all through it before it is needed."""

        self._through: list[float] = [0] * count
        # What cannot be helped is no reason to hold back elsewhere.
        self._limit = max(limit_bytes, max(self._most, default=0))
        self._most_overtaken = _MOST_OVERTAKEN if pace.overtaking else 0
        self._due = self._latest(layout, link, pace.haste, host_time(layout, link, moved))
        for item in lazy:
            if item in self._due:
                self._due[item] = int(self._items[item].need[0])
        self._lazy = bool(lazy)
        self._must = must
        self._in_order: list[list[int]] = [[] for _ in range(count)]
        for item in sorted(self._order, key=lambda i: self._items[i].birth):
            self._in_order[self._items[item].birth[0]].append(item)

    def _profile(self, layout: Layout, moved: Sequence[bool]) -> None:
        """The most memory in each stretch of each phase, of what has to be there.

        That is a moved item in the phase that saves it, and from its first use on. A phase's stretches are parted by
        the first uses in it.
        """
        live = 0
        for events in layout.events:
            stretches: list[float] = []
            most, work, born = live, 0, 0
            for _, what, item, nbytes in events:
                if what == NEED:
                    if not moved[item]:
                        continue
                    self._rank[item] = len(stretches)
                    stretches.append(most)
                    live += nbytes
                    most = 0
                elif what == BIRTH:
                    live += nbytes
                    if moved[item]:
                        born += nbytes
                elif what == REBORN:
                    live += nbytes
                elif what in (DEATH, GONE):
                    live -= nbytes
                elif what == WORK:
                    work = nbytes
                most = max(most, live + work)
            stretches.append(most)
            self._stretches.append(stretches)
            live -= born

    def _latest(self, layout: Layout, link: Link, haste: float, host_ms: Sequence[float]) -> dict[int, int]:
        """The last phase at whose beginning each item can be fetched in time, if nothing is ever waited for."""
        lengths = map(operator.add, layout.ms, host_ms) if host_ms else layout.ms
        starts = [0.0, *itertools.accumulate(lengths)][:-1]
        setup_ms, rate = link.copy_us / 1e3, link.in_bytes_per_s / 1e3
        due: dict[int, int] = {}
        before = NEVER
        for item in reversed(self._order):
            phase, ms = self._items[item].need
            if phase == NEVER:
                continue
            before = min(before, starts[int(phase)] + ms)
            before -= (setup_ms + self._items[item].allocation.nbytes / rate) * haste
            due[item] = max(bisect.bisect_right(starts, before) - 1, 0)
        return due

    def fetches(self, phase: int, run: Run) -> Sequence[int]:
        row, without_room = self.rows[phase], 0
        order, state, due = self._order, run.state, self._due
        while self._first_pending < len(order) and self._items[order[self._first_pending]].need[0] < phase:
            self._first_pending += 1
        for position in range(self._first_pending, len(order)):
            item = order[position]
            if item not in due:
                break
            if due[item] > phase:
                if self._lazy:
                    continue
                break
            if state[item] != AWAY:
                continue
            if not self._fits(item, phase):
                without_room += 1
                if without_room > self._most_overtaken:
                    break
                continue
            self._occupy(item, phase)
            row.append(item)
        return row

    def _fits(self, item: int, phase: int) -> bool:
        room = self._limit - self._held[item] - self._leaving_bytes
        last = int(self._items[item].need[0])
        if phase < last and max(self._most[phase:last]) > room:
            return False
        return max(self._stretches[last][: self._rank[item] + 1]) + self._through[last] <= room

    def _occupy(self, item: int, phase: int) -> None:
        """Count `item` as there from the beginning of `phase` until it is needed."""
        held = self._held[item]
        last = int(self._items[item].need[0])
        for each in range(phase, last):
            self._through[each] += held
            self._most[each] += held
        self._add(item, held)

    def _add(self, item: int, nbytes: int) -> None:
        """Count `nbytes` more in the phase that reads `item`, until it does."""
        last = int(self._items[item].need[0])
        row = self._stretches[last]
        for rank in range(self._rank[item] + 1):
            row[rank] += nbytes
        self._most[last] = max(row) + self._through[last]

    def releases(self, phase: int, run: Run) -> Sequence[int]:
        for item in self._in_order[phase]:
            self._leaving.append(item)
            self._leaving_bytes += self._held[item]
        following = phase + 1
        if not self._leaving or following == len(self._stretches):
            return []
        run.lanes.advance(run.now_in_phase_ms)
        sent = run.lanes.out.finished_ms
        released: list[int] = []
        waiting: list[int] = []
        for item in self._leaving:
            if run.state[item] != HERE:
                self._leaving_bytes -= self._held[item]
            elif sent[item] <= run.now_in_phase_ms:
                released.append(item)
                self._leaving_bytes -= self._held[item]
            else:
                waiting.append(item)
        # What the next phase reads, and has not left, stays until then; the last to be read goes first if it must.
        asked = [item for item in waiting if self._items[item].need[0] == following]
        forced = [item for item in asked if item in self._must]
        for item in forced:
            self._leaving_bytes -= self._held[item]
        asked = [item for item in asked if item not in self._must]
        for item in asked:
            self._occupy(item, following)
            self._leaving_bytes -= self._held[item]
        others = [item for item in waiting if self._items[item].need[0] != following]
        kept_from = 0
        while kept_from < len(others) and self._over(following):
            self._leaving_bytes -= self._held[others[kept_from]]
            kept_from += 1
        forced += others[:kept_from]
        asked.sort(key=lambda i: self._items[i].need)
        while asked and self._over(following):
            item = asked.pop()
            self._add(item, -self._held[item])
            forced.append(item)
        forced.sort(key=lambda i: self._items[i].birth)
        released += forced
        self._leaving = others[kept_from:]
        for item in released:
            self.released[item] = phase
        return released

    def _over(self, phase: int) -> bool:
        return self._most[phase] + self._leaving_bytes > self._limit
