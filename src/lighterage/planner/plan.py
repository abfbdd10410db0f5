"""A plan: what becomes of each saved allocation of a step. Pure data."""

from __future__ import annotations

import dataclasses
from typing import Literal, Self

from . import json_form

Mode = Literal["save", "selective", "recompute"]
"""How a section's backward gets what it needs.

`"save"`: all of it is saved, on the device or away. `"selective"`: products and attention are saved, the rest is
computed again. `"recompute"`: the section's inputs alone are saved, and its forward runs again.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """One allocation that leaves the device."""

    save: int
    """Its `SavedAllocation.save`."""

    release_after: int
    """Its device memory is given back once so many phases have ended after the one that saved it: 0, at the end of its
    own section's forward. The compute stream waits there for the copy, if it has not finished."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SectionPlan:
    """What becomes of one section."""

    name: str
    mode: Mode = "save"
    moves: tuple[Move, ...] = ()
    """Of the allocations that are saved in this mode; all others stay."""

    why: str = ""
    """One sentence for people: what was chosen and for what reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """One reload."""

    section: int
    save: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of each section, and when what has left comes back."""

    sections: tuple[SectionPlan, ...]
    """One for each of `Timeline.sections`."""

    fetches: tuple[tuple[Fetch, ...], ...]
    """For each of `Timeline.phases`: the reloads that start as the phase begins, the most urgent first. What is not
    listed anywhere is reloaded when it is asked for."""

    why: str = ""
    """What the plan as a whole is for, or why it moves nothing."""

    @property
    def num_moves(self) -> int:
        """Allocations that leave the device."""
        return sum(len(section.moves) for section in self.sections)

    def to_json(self) -> str:
        """This plan as text that `from_json` reads."""
        return json_form.write(self, "plan")

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote.

        Raises:
            ValueError: the text is no plan, of another version, or damaged.
        """
        return json_form.read(cls, "plan", text)

    def __str__(self) -> str:
        return "\n".join([self.why, *(f"{section.name}: {section.why}" for section in self.sections)])
