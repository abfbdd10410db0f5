"""What a plan is predicted to do to a step. Pure data."""

from __future__ import annotations

import dataclasses

from .timeline import Direction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stalls:
    """Milliseconds that a step takes longer, by their cause."""

    reload: float = 0.0
    """Waiting for bytes that backward needs."""

    release: float = 0.0
    """Waiting for copies out whose device memory is given back."""

    recompute: float = 0.0
    """Computing sections again."""

    slowdown: float = 0.0
    """Computing beside copies, which take some of the device's bandwidth and power."""

    host: float = 0.0
    """The host's work for what is moved or computed again: the moves, and the hooks that see what is saved."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.reload + self.release + self.recompute + self.slowdown + self.host


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePrediction:
    """One phase of the step."""

    direction: Direction
    section: int | None
    start_ms: float
    end_ms: float
    """With its waits, those for releases at its end among them."""

    stalls_ms: Stalls
    peak_bytes: int
    """The most device memory in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    """One copy on a lane, or a part of one that gave way to an urgent reload."""

    section: int
    save: int
    nbytes: int
    start_ms: float
    end_ms: float
    on_demand: bool = False
    """Whether it was asked for before any fetch of the plan had started it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step under a plan."""

    step_ms: float
    peak_bytes: int
    stalls_ms: Stalls
    phases: tuple[PhasePrediction, ...]
    curve: tuple[tuple[float, int], ...]
    """Device bytes over the step: (ms, bytes), each holding until the next."""

    out_copies: tuple[Copy, ...]
    in_copies: tuple[Copy, ...]
    """What the lanes carry, in order. The last copies out may end after the step."""

    bytes_out: int
    bytes_in: int
    out_busy: float
    """Part of the step for which the outbound lane is busy, 0 to 1."""

    in_busy: float
    num_on_demand: int
    """Reloads that no fetch of the plan had started when they were needed."""

    on_demand_bytes: int

    @property
    def floor_ms(self) -> float:
        """The step without any wait or recomputation."""
        return self.step_ms - self.stalls_ms.total
