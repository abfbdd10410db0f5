"""A plan: what becomes of each saved allocation of a step. Pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, Self, TypeVar

from . import json_form

Mode = Literal["save", "selective", "recompute"]
"""How a section's backward gets what it needs.

`"save"`: all of it is saved, on the device or away. `"selective"`: products and attention are saved, the rest is
computed again. `"recompute"`: the section's inputs alone are saved, and its forward runs again.
"""

_Entry = TypeVar("_Entry")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """One allocation that leaves the device.

    Raises:
        ValueError: it would be released before it was saved.
    """

    save: int
    """Its `SavedAllocation.save`."""

    release_after: int
    """Its device memory is given back once so many phases have ended after the one that saved it: 0, at the end of its
    own section's forward. The compute stream waits there for the copy, if it has not finished."""

    def __post_init__(self) -> None:
        if self.release_after < 0:
            raise ValueError(
                "a move gives memory back once 0 or more phases have ended after the one that saved it; got "
                f"release_after={self.release_after} for save {self.save}. Use 0 to release it as its own phase ends."
            )


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
    """What becomes of each section, and when what has left comes back.

    Raises:
        ValueError: a save is moved twice, or fetched twice.
    """

    sections: tuple[SectionPlan, ...]
    """One for each of `Timeline.sections`."""

    fetches: tuple[tuple[Fetch, ...], ...]
    """For each of `Timeline.phases`: the reloads that start as the phase begins, the most urgent first. What is not
    listed anywhere is reloaded when it is asked for."""

    why: str = ""
    """What the plan as a whole is for, or why it moves nothing."""

    def __post_init__(self) -> None:
        for index, section in enumerate(self.sections):
            if (save := _twice(move.save for move in section.moves)) is not None:
                raise ValueError(
                    f"an allocation leaves once in a step; the plan moves save {save} of section {index} "
                    f"({section.name}) twice. Leave one of the moves out."
                )
        if (fetch := _twice(fetch for phase in self.fetches for fetch in phase)) is not None:
            at = [phase for phase, row in enumerate(self.fetches) for each in row if each == fetch]
            raise ValueError(
                f"an allocation comes back once in a step; the plan fetches save {fetch.save} of section "
                f"{fetch.section} {len(at)} times, in phases {', '.join(map(str, at))}. Leave all but the first out."
            )

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


def _twice(entries: Iterable[_Entry]) -> _Entry | None:
    """The first that was there before."""
    seen: set[_Entry] = set()
    for entry in entries:
        if entry in seen:
            return entry
        seen.add(entry)
    return None
