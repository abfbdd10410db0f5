"""What was measured of one training step: its phases, and what each section saved."""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal, Self

from . import json_form

Direction = Literal["forward", "backward", "other"]
"""What a phase does: the forward or the backward of one section, or work of the step that belongs to no section."""

Kind = Literal["input", "product", "pointwise", "other"]
"""What a saved allocation is to selective recomputation.

`"input"`: what the section was given; it has to be there to compute the section again. `"product"`: the result of a
matrix product or of attention; dear to compute. `"pointwise"`: anything that is cheap to compute from the others.
`"other"`: of unknown origin; treated like a product.
"""

NOT_SEEN = "it was not seen running"
"""Why a section is not computed again that did not run in the step which told what can be: steps drop layers, say."""

# What is beyond these was not measured, and figures made of it would be none: sums of them stay finite.
MOST_BYTES, MOST_MS = 1 << 63, 1e15
LEAST_BYTES_PER_S, MOST_COPY_US, MOST_MOVE_US, MOST_COMPUTE_SLOWDOWN = 1e-3, 1e15, 1e15, 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """When backward reads an allocation."""

    section: int
    """Index of the section in whose backward phase it is read."""

    first_ms: float
    """From the start of that phase to the first read."""

    last_ms: float
    """From the start of that phase to the last read, after which the allocation is dead unless a later use follows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedAllocation:
    """One allocation that a section saved first, and how long backward needs it."""

    save: int
    """The number of the save within its section that brought it, from 1: the same in every step of the same model."""

    nbytes: int
    """Bytes that autograd saved of it: what travels if it is moved."""

    held_bytes: int
    """Device memory that goes free when it is let go of; at least `nbytes`."""

    born_ms: float
    """From the start of its section's forward phase to the save."""

    uses: tuple[Use, ...]
    """In the order of backward. Empty: backward never read it, and it lived until the step's end."""

    kind: Kind = "other"

    label: str = ""
    """Shape and dtype, for people and for rules: `(8192, 4096) bfloat16`."""

    module: str = ""
    """Where inside the section it was saved, dotted as in `named_modules`; "" for the section itself. For rules."""

    kept: str | None = None
    """Why it has to stay on the device whatever the plan says (a mark, a parameter), or None."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SectionRecord:
    """One run of one section: one forward pass of one module for one microbatch, or what is saved between two."""

    name: str
    """What the report calls it; rules match it."""

    gap: bool = False
    """Whether it is what the model's forward saved between two sections: then it cannot be computed again."""

    allocations: tuple[SavedAllocation, ...] = ()
    """In the order of their saves. An allocation that several sections saved belongs to the first of them."""

    not_recomputed: str | None = None
    """Why the section must not be computed again (its forward changes a buffer, say), or None."""

    selective_ms: float | None = None
    """Time to compute again all but products and attention. None: not known, so that it is not considered."""

    recompute_ms: float | None = None
    """Time to compute it again as a whole; None: what its forward phase takes."""

    hooks_forward_ms: float = 0.0
    """What its forward phase takes longer where what it saves is seen: one of its allocations is moved, or its mode is
    `"selective"`. The phases' times are without it."""

    hooks_backward_ms: float = 0.0
    """The same of its backward phase."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the step on the compute stream, from one boundary to the next."""

    direction: Direction
    section: int | None
    """Index into `Timeline.sections`; None for `"other"`."""

    ms: float
    """How long it takes without any wait for a copy."""

    work_bytes: int
    """The most device memory in it beside the recorded allocations that are alive: weights, gradients, temporaries."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step of a model as it was measured, with nothing moved or as if nothing were.

    Raises:
        ValueError: its parts do not fit together; the message names the part.
    """

    sections: tuple[SectionRecord, ...]
    """In the order of forward."""

    phases: tuple[Phase, ...]
    """In the order of the step. Each section has one forward phase and at most one backward phase: microbatches are
    sections of their own, so pipeline schedules need no other form."""

    device: str = ""
    """The device's name, for people."""

    device_bytes: int | None = None
    """Memory of the device, or None where that is not known."""

    measured_peak_bytes: int | None = None
    """The peak of the measured step as the device's allocator tells it, for comparison; None where it cannot tell."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def step_ms(self) -> float:
        """The step without any wait."""
        return sum(phase.ms for phase in self.phases)

    def to_json(self) -> str:
        """This timeline as text that `from_json` reads."""
        return json_form.write(self, "timeline")

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote.

        Raises:
            ValueError: the text is no timeline, of another version, or damaged.
        """
        return json_form.read(cls, "timeline", text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """How fast bytes travel between the device and where they rest."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    both_bytes_per_s: float
    """In total, while both directions are busy."""

    copy_us: float = 5.0
    """What a copy costs the lane beside its bytes."""

    name: str = ""

    compute_slowdown: float = 0.0
    """The part by which compute takes longer while one lane is busy; while both are, twice that. Copies take some of
    the device's memory bandwidth and power."""

    move_us: float = 0.0
    """What each moved allocation costs the compute stream, in microseconds, beside its bytes: half as it leaves, half
    as it comes back. Where the host is what the step waits for."""

    def __post_init__(self) -> None:
        for name in ("out_bytes_per_s", "in_bytes_per_s", "both_bytes_per_s", "copy_us", "compute_slowdown", "move_us"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} of a link is a number, 55e9 for 55 GB/s; got {value!r}.")
        rates = (self.out_bytes_per_s, self.in_bytes_per_s, self.both_bytes_per_s)
        if not all(LEAST_BYTES_PER_S <= rate <= sys.float_info.max for rate in rates):
            told = "{!r} out, {!r} in, {!r} in both".format(*rates)
            raise ValueError(f"a link carries some bytes each way, as 55e9 for 55 GB/s; got {told}.")
        if not 0 <= self.copy_us <= MOST_COPY_US:
            raise ValueError(f"a copy takes some time beside its bytes, and no negative one; got {self}.")
        if not 0 <= self.compute_slowdown <= MOST_COMPUTE_SLOWDOWN:
            raise ValueError(f"compute_slowdown is a part of compute's time, 0.02 for 2 %; got {self}.")
        if not 0 <= self.move_us <= MOST_MOVE_US:
            raise ValueError(
                "move_us is what a moved allocation costs the host, in microseconds, 80.0 for instance and 0 where the "
                f"host waits for the device; got {self}."
            )

    @property
    def told(self) -> str:
        """Its rates, for people."""
        rates = (self.out_bytes_per_s, self.in_bytes_per_s, self.both_bytes_per_s)
        out, back, both = (f"{rate / 1e9:.1f}" for rate in rates)
        return f"{self.name or 'unnamed'}: {out} GB/s out, {back} in, {both} in total both ways"

    def to_json(self) -> str:
        """This link as text that `from_json` reads."""
        return json_form.write(self, "link")

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote.

        Raises:
            ValueError: the text is no link, of another version, or damaged.
        """
        return json_form.read(cls, "link", text)


def _check(timeline: Timeline) -> None:
    count = len(timeline.sections)
    for name in ("device_bytes", "measured_peak_bytes"):
        nbytes = getattr(timeline, name)
        if nbytes is not None and not 0 <= nbytes < MOST_BYTES:
            raise ValueError(f"{name} of a timeline is a number of bytes, or None; got {nbytes}.")
    forward: dict[int, int] = {}
    backward: dict[int, int] = {}
    for index, phase in enumerate(timeline.phases):
        where = f"phase {index} of the timeline"
        if not 0 <= phase.ms <= MOST_MS or not 0 <= phase.work_bytes < MOST_BYTES:
            raise ValueError(
                f"{where} cannot take {phase.ms} ms and {phase.work_bytes} bytes: neither is negative, nor beyond "
                "measure."
            )
        if (phase.section is None) != (phase.direction == "other"):
            raise ValueError(f'{where} is {phase.direction} of section {phase.section}; only "other" has no section.')
        if phase.section is None:
            continue
        if not 0 <= phase.section < count:
            raise ValueError(f"{where} names section {phase.section}, and there are {count} sections, from 0.")
        seen = forward if phase.direction == "forward" else backward
        if seen.setdefault(phase.section, index) != index:
            name = timeline.sections[phase.section].name
            raise ValueError(
                f"{where} is a second {phase.direction} of section {phase.section} ({name}). Another run of the "
                "module is a section of its own."
            )
    for index, section in enumerate(timeline.sections):
        if index not in forward:
            raise ValueError(f"section {index} ({section.name}) has no forward phase in the timeline.")
        if backward.get(index, len(timeline.phases)) < forward[index]:
            raise ValueError(f"section {index} ({section.name}) has its backward phase before its forward phase.")
        for name in ("selective_ms", "recompute_ms"):
            ms = getattr(section, name)
            if ms is not None and not 0 <= ms <= MOST_MS:
                raise ValueError(f"{name} of section {index} ({section.name}) is a time; got {ms}.")
        for name in ("hooks_forward_ms", "hooks_backward_ms"):
            if not 0 <= (ms := getattr(section, name)) <= MOST_MS:
                raise ValueError(
                    f"{name} of section {index} ({section.name}) is a time, 0 where hooks cost nothing; got {ms}."
                )
        saves = {allocation.save for allocation in section.allocations}
        if len(saves) != len(section.allocations):
            raise ValueError(f"section {index} ({section.name}) has two allocations of the same save.")
        for allocation in section.allocations:
            where = f"save {allocation.save} of section {index} ({section.name})"
            if not 0 <= allocation.nbytes <= allocation.held_bytes:
                raise ValueError(f"{where} moves {allocation.nbytes} of {allocation.held_bytes} bytes; at most all.")
            if allocation.held_bytes >= MOST_BYTES:
                raise ValueError(f"{where} holds {allocation.held_bytes} bytes, which no machine has.")
            if not 0 <= allocation.born_ms <= MOST_MS:
                raise ValueError(
                    f"{where} is born some time after its section begins; got born_ms={allocation.born_ms}."
                )
            for use in allocation.uses:
                if not (0 <= use.first_ms <= MOST_MS and use.last_ms <= MOST_MS):
                    raise ValueError(f"{where} has a use at no time of its phase: {use}.")
                if use.section not in backward:
                    raise ValueError(f"{where} is used in backward of section {use.section}, which has no such phase.")
                if backward[use.section] < forward[index] or not use.first_ms <= use.last_ms:
                    raise ValueError(f"{where} has a use that ends before it begins: {use}.")
