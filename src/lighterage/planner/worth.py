"""In which order to move: the longest idle first.

Or, where the host works for each move, by the bytes that are away at the peak for its time.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

from .layout import BIRTH, DEATH, GONE, NEED, NEVER, REBORN, WORK, Item, Layout, host_time, lay_out
from .timeline import Link, Timeline

_DEPTHS = (0.0, 1.0)
"""How far under the peak, in parts of what can be freed, a moment is that counts."""

_MOST_MOMENTS = 128

_LEAST_MS = 1e-9


@dataclasses.dataclass(slots=True)
class Moments:
    """When there is most in each phase, with nothing away and with all; but for what is lower than all this at the
    lowest."""

    at: list[tuple[float, float]]
    """Phase, and ms from its start."""

    nbytes: list[int]
    """With none away."""

    def away(self, item: Item) -> tuple[int, int]:
        """The stretch of them in which `item` is away if it is moved: the first, and the one after the last."""
        return bisect.bisect_left(self.at, (item.birth[0] + 1, -1.0)), bisect.bisect_left(self.at, item.need)


def moments(layout: Layout, must: Collection[int], may: Collection[int]) -> Moments:
    """Of `layout`, where the items of `must` are moved and those of `may` may be."""
    found: dict[tuple[float, float], int] = {}
    live = fewest = lowest = 0
    for phase, events in enumerate(layout.events):
        work, most, most_of_fewest = 0, (-1, 0.0, 0), (-1, 0.0, 0)
        born = born_of_may = 0
        for ms, what, item, nbytes in events:
            if what == WORK:
                work = nbytes
            elif what == NEED:
                live += nbytes if item in must else 0
                fewest += nbytes if item in must or item in may else 0
            elif what in (BIRTH, REBORN):
                live += nbytes
                fewest += nbytes
                if what == BIRTH:
                    born += nbytes if item in must else 0
                    born_of_may += nbytes if item in may else 0
            elif what in (DEATH, GONE):
                live -= nbytes
                fewest -= nbytes
            most = max(most, (live + work, ms, live + work), key=lambda each: each[0])
            most_of_fewest = max(most_of_fewest, (fewest + work, ms, live + work), key=lambda each: each[0])
        live -= born
        fewest -= born + born_of_may
        lowest = max(lowest, most_of_fewest[0])
        for _, ms, nbytes in (most, most_of_fewest):
            found[float(phase), ms] = nbytes
    at = sorted(place for place, nbytes in found.items() if nbytes >= lowest)
    few = -(-len(at) // _MOST_MOMENTS)
    at = [max(at[first : first + few], key=found.__getitem__) for first in range(0, len(at), few)]
    return Moments(at, [found[place] for place in at])


class Chain:
    """One order of moves, of which a beginning is made: what each beginning costs, and how far down it leads."""

    def __init__(
        self, layout: Layout, link: Link, must: Collection[int], order: Sequence[int], moments: Moments
    ) -> None:
        self.order = order
        flags = [index in must for index in range(len(layout.items))]
        seen = {layout.items[index].section for index in must}
        self.ms = [sum(host_time(layout, link, flags), 0.0)]
        """Of each number of moves: about what the step takes longer, if none is waited for."""

        there = moments.nbytes.copy()
        self.least = [max(there)]
        """Of each number of moves: about the peak, if those are away whenever they can be."""

        for index in order:
            item = layout.items[index]
            cost = _move_ms(item, link)
            if item.section not in seen:
                seen.add(item.section)
                cost += opening_ms(layout, item.section)
            self.ms.append(self.ms[-1] + cost)
            first, end = moments.away(item)
            held = item.allocation.held_bytes
            there[first:end] = [nbytes - held for nbytes in there[first:end]]
            self.least.append(max(there))

    def reaching(self, peak_bytes: float) -> int | None:
        """The fewest moves that bring the peak so far down; None if all do not."""
        count = bisect.bisect_left(self.least, -peak_bytes, key=lambda nbytes: -nbytes)
        return count if count < len(self.least) else None

    def within(self, ms: float) -> int:
        """The most moves that make the step at most so much longer, if none is waited for."""
        return max(bisect.bisect_right(self.ms, ms + _LEAST_MS) - 1, 0)


def by_idleness(timeline: Timeline, place: Mapping[tuple[int, int], int], may: Collection[int]) -> list[int]:
    """The places of `may`, by how long what is there lies idle, the longest first. `place`: by section and save."""
    layout = lay_out(timeline, ["save"] * len(timeline.sections))
    starts = [0.0, *itertools.accumulate(layout.ms)]
    idle: list[tuple[float, int]] = []
    for item in layout.items:
        at = place[item.section, item.allocation.save]
        if at in may:
            end = starts[-1] if item.need[0] == NEVER else starts[int(item.need[0])] + item.need[1]
            idle.append((starts[item.birth[0]] + item.birth[1] - end, at))
    return [at for _, at in sorted(idle)]


def opening_ms(layout: Layout, section: int) -> float:
    """What the first move of `section` costs beside itself."""
    hooks = layout.hooks.get(section)
    return hooks.forward_ms + hooks.backward_ms if hooks is not None and hooks.at_rest else 0.0


def _move_ms(item: Item, link: Link) -> float:
    """What a move costs beside that: the host, and compute beside its copies."""
    host_ms = link.move_us / 1e3 * item.copies * (0.5 if item.need[0] == NEVER else 1.0)
    copying_ms = 1e3 * item.allocation.nbytes * (1 / link.out_bytes_per_s + 1 / link.in_bytes_per_s)
    return host_ms + link.compute_slowdown * copying_ms


def by_worth(
    layout: Layout, link: Link, must: Collection[int], order: Sequence[int], moments: Moments
) -> Iterator[list[int]]:
    """`order`, sorted by bytes that are away at the peak for the time that they cost; for the peak alone, and for more
    and more of what is close to it.

    A section's first moves are one bundle, with what its hooks cost: those that together are worth the most.
    """
    opened = {layout.items[index].section for index in must}
    highest, lowest = max(moments.nbytes), min(moments.nbytes)
    for depth in _DEPTHS:
        least = highest - depth * (highest - lowest)
        counted = [0, *itertools.accumulate(int(nbytes >= least) for nbytes in moments.nbytes)]
        yield _bundled(layout, link, opened, order, moments, counted)


def _bundled(
    layout: Layout,
    link: Link,
    opened: Collection[int],
    order: Sequence[int],
    moments: Moments,
    counted: Sequence[int],
) -> list[int]:
    """`counted`: of the first so many moments, how many count."""
    freed: dict[int, float] = {}
    cost: dict[int, float] = {}
    sections: dict[int, list[int]] = {}
    rank = {index: number for number, index in enumerate(order)}
    for index in order:
        item = layout.items[index]
        first, end = moments.away(item)
        freed[index] = (
            (counted[end] - counted[first]) / counted[-1] * item.allocation.held_bytes if first < end else 0.0
        )
        cost[index] = max(_move_ms(item, link), _LEAST_MS)
        sections.setdefault(item.section, []).append(index)
    keys: dict[int, tuple[float, int, int]] = {}
    for section, indices in sections.items():
        indices.sort(key=lambda index: (-freed[index] / cost[index], rank[index]))
        opening = 0.0 if section in opened else opening_ms(layout, section)
        bundle = 0
        if opening:
            sums = itertools.accumulate(freed[index] for index in indices)
            costs = itertools.accumulate(cost[index] for index in indices)
            worths = [nbytes / (opening + ms) for nbytes, ms in zip(sums, costs, strict=True)]
            best = max(worths)
            bundle = worths.index(best) + 1
            first = min(rank[index] for index in indices[:bundle])
            keys.update((index, (-best, first, number)) for number, index in enumerate(indices[:bundle]))
        keys.update((index, (-freed[index] / cost[index], rank[index], 0)) for index in indices[bundle:])
    return sorted(order, key=keys.__getitem__)
