"""Learns in which order backward visits sections, and tells which come next."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping

from .sections import Section


class BackwardOrder:
    """Learns in which order backward visits sections, and tells which come next.

    A training step creates the same sections in the same order each time, so a section is known by its index within the
    step. Where the last step does not fit (another number of microbatches, a dropped layer) the guess is
    last-in-first-out.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._visits: list[int] = []
        self._last_names: list[str] = []
        self._last_visits: list[int] = []
        self._last_position: dict[int, int] = {}
        self.hits = 0
        self.misses = 0
        self._expected: int | None = None

    def created(self, name: str) -> int:
        """Register a section; its index within the step."""
        self._names.append(name)
        return len(self._names) - 1

    def visited(self, index: int) -> None:
        """Backward has come to the section with this index."""
        if self._expected is not None:
            if self._expected == index:
                self.hits += 1
            else:
                self.misses += 1
        self._visits.append(index)

    def upcoming(self, index: int, live: Mapping[int, weakref.ref[Section]]) -> Iterator[Section]:
        """The live, unvisited sections that backward is expected to come to after `index`, in order.

        They are looked up one by one as the caller asks for the next: few are wanted, and a step may have many.
        """
        self._expected = None
        for section in self._predict(index, live):
            if self._expected is None:
                self._expected = section.index
            yield section

    def _predict(self, index: int, live: Mapping[int, weakref.ref[Section]]) -> Iterator[Section]:
        position = self._last_position.get(index)
        if position is not None and self._fits(index):
            last = self._last_visits
            guesses: Iterable[int] = (i for i in map(last.__getitem__, range(position + 1, len(last))) if self._fits(i))
        else:
            waiting = sorted(live, reverse=True)
            guesses = [*(i for i in waiting if i < index), *(i for i in waiting if i > index)]
        for guess in guesses:
            ref = live.get(guess)
            section = None if ref is None else ref()
            if section is not None and not section.visited:
                yield section

    def _fits(self, index: int) -> bool:
        last = self._last_names
        return index < len(last) and index < len(self._names) and last[index] == self._names[index]

    def finish_step(self) -> None:
        if self._visits:
            self._last_names, self._last_visits = self._names, self._visits
            self._last_position = {index: position for position, index in enumerate(self._visits)}
        self._names, self._visits = [], []
        self._expected = None
