"""Adds up what the waits of one step took, as that becomes known."""

from __future__ import annotations

from collections.abc import Iterable

from .lanes import Wait


class Waits:
    """Waits of one step, added up as they become known."""

    def __init__(self, waits: Iterable[Wait]) -> None:
        self._unknown = list(waits)
        self._ms = 0.0
        self.settle()

    def settle(self) -> float:
        """Milliseconds in all, as far as is known. Never blocks."""
        unknown = []
        for wait in self._unknown:
            ms = wait.milliseconds()
            if ms is None:
                unknown.append(wait)
            else:
                self._ms += ms
        self._unknown = unknown
        return self._ms
