"""Learns in which order backward visits sections, and tells which come next."""

from __future__ import annotations

from collections.abc import Iterator

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

    def upcoming(self, index: int, live: dict[int, Section]) -> Iterator[Section]:
        """The live, unvisited sections that backward is expected to come to after `index`, in order."""
        self._expected = None
        for section in self._predict(index, live):
            if self._expected is None:
                self._expected = section.index
            yield section

    def _predict(self, index: int, live: dict[int, Section]) -> Iterator[Section]:
        position = self._last_position.get(index)
        if position is not None and self._fits(index):
            for later in self._last_visits[position + 1 :]:
                section = live.get(later)
                if section is not None and not section.visited and self._fits(later):
                    yield section
            return
        waiting = [s for i, s in sorted(live.items(), reverse=True) if not s.visited]
        yield from (s for s in waiting if s.index is not None and s.index < index)
        yield from (s for s in waiting if s.index is not None and s.index > index)

    def _fits(self, index: int) -> bool:
        last = self._last_names
        return index < len(last) and index < len(self._names) and last[index] == self._names[index]

    def finish_step(self) -> None:
        if self._visits:
            self._last_names, self._last_visits = self._names, self._visits
            self._last_position = {index: position for position, index in enumerate(self._visits)}
        self._names, self._visits = [], []
        self._expected = None
