"""Which moves to try where the host works for each: few and large ones, of few sections."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

from .frontier import Modes
from .layout import Layout
from .timeline import Link
from .worth import Chain, by_worth, moments

_PRICES = tuple(0.001 * 1.3**number for number in range(27))
"""Parts of the step that the host may take, for which the smallest peak is looked for."""

_MOST_SECTIONS = 24
_SMALLEST = (0.125, 0.25, 0.5)


class Thrift:
    """What to move of a timeline, by place, so that the host does little for what is freed."""

    def __init__(
        self, link: Link, place: Mapping[tuple[int, int], int], must: frozenset[int], order: Sequence[int]
    ) -> None:
        """`place`: of each allocation, by section and save; `must`: places that are moved; `order`: of the others,
        those that may be, the longest idle first."""
        self._link = link
        self._place = place
        self._must = must
        self._order = order
        self._chains: dict[Modes, list[Chain]] = {}
        self._spent = 0

    def spent(self) -> int:
        """The effort since this was asked for the last time, in items that were passed."""
        spent, self._spent = self._spent, 0
        return spent

    def spread(self, modes: Modes, layout: Layout, levels: Sequence[float]) -> list[float]:
        """`levels` and those that some prices buy, in turn; such that any beginning of them is spread over all."""
        chains = self._chains_of(modes, layout)
        dearest, step_ms = max(chain.ms[-1] for chain in chains), sum(layout.ms)
        prices = itertools.takewhile(lambda ms: ms < dearest, (step_ms * part for part in _PRICES))
        bought = {min(chain.least[chain.within(ms)] for chain in chains) for ms in prices}
        pairs = itertools.zip_longest(halving(bought), halving(levels))
        return [level for pair in pairs for level in pair if level is not None]

    def reaching(self, modes: Modes, layout: Layout, level: float) -> list[tuple[float, frozenset[int]]]:
        """Moves that can bring the peak down to `level`, and about what they cost, if none is waited for: the cheapest
        first."""
        found: dict[frozenset[int], float] = {}
        for chain in self._chains_of(modes, layout):
            if (count := chain.reaching(level)) is not None:
                found.setdefault(self._must.union(self._places(layout, chain.order[:count])), chain.ms[count])
        return sorted(((ms, moved) for moved, ms in found.items()), key=lambda pair: pair[0])

    def order(self, modes: Modes, layout: Layout) -> list[int]:
        """Places that may be moved, what is worth the most first."""
        return self._places(layout, self._chains_of(modes, layout)[-1].order)

    def near(self, layout: Layout, moved: frozenset[int]) -> Iterator[frozenset[int]]:
        """What is left of `moved` without all or the smallest of one section or of all; and with all of another one."""
        may = set(self._order)
        size: dict[int, float] = {}
        sections: dict[int, list[int]] = {}
        for item in layout.items:
            place = self._place[item.section, item.allocation.save]
            if place in may:
                size[place] = item.allocation.held_bytes / item.copies
                sections.setdefault(item.section, []).append(place)
        leaving = {section: [p for p in places if p in moved] for section, places in sections.items()}
        open_ones = sorted((s for s in leaving if leaving[s]), key=lambda s: sum(size[p] for p in leaving[s]))
        for section in open_ones[:_MOST_SECTIONS]:
            yield moved.difference(leaving[section])
        everything = [place for section in open_ones for place in leaving[section]]
        for places in (everything, *(leaving[section] for section in open_ones[:_MOST_SECTIONS])):
            smallest = sorted(places, key=lambda place: size[place])
            for count in sorted({round(part * len(smallest)) for part in _SMALLEST} - {0, 1}):
                yield moved.difference(smallest[:count])
        least = min((size[place] for place in everything), default=0)
        for section in [s for s in sections if len(leaving[s]) < len(sections[s])][:_MOST_SECTIONS]:
            more = moved.union(place for place in sections[section] if size[place] >= least)
            yield more
            for other in open_ones[:2]:
                if other != section:
                    yield more.difference(leaving[other])

    def _places(self, layout: Layout, indices: Collection[int]) -> list[int]:
        items = (layout.items[index] for index in indices)
        return [self._place[item.section, item.allocation.save] for item in items]

    def _chains_of(self, modes: Modes, layout: Layout) -> list[Chain]:
        if modes not in self._chains:
            index = {self._place[item.section, item.allocation.save]: i for i, item in enumerate(layout.items)}
            must = {index[place] for place in self._must if place in index}
            order = [index[place] for place in self._order if place in index]
            when = moments(layout, must, set(order))
            orders = [order, *by_worth(layout, self._link, must, order, when)]
            self._spent += len(layout.items) + len(orders) * len(order) * (1 + len(when.at) // 100)
            self._chains[modes] = [Chain(layout, self._link, must, each, when) for each in orders]
        return self._chains[modes]


def halving(levels: Collection[float]) -> list[float]:
    """The middle first, then the middles of both halves, and so on."""
    every = sorted(levels)
    stride = 1 << len(every).bit_length() >> 1
    found: list[float] = []
    while stride:
        found += every[stride - 1 :: 2 * stride]
        stride //= 2
    return found
