"""Times planned steps again, now and then, and tells what they took beside what was foreseen."""

from __future__ import annotations

from .pace import TRIES, compute_ms
from .step_log import StepLog

# A planned step is timed again so early, and then every so many steps.
FIRST_CHECK, CHECK_EVERY = 2, 50
# Steps that take so much longer than foreseen, so many checked ones in a row, are measured anew.
SLOWER, SLOW_CHECKS = 1.25, 4


class Checks:
    """What steps under the plan were last seen to take."""

    def __init__(self) -> None:
        self._log: StepLog | None = None
        self._fits = True
        self._slow = 0
        self._passed_over = 0
        self.measured_ms: float | None = None
        self.compute_ms: float | None = None
        """Of that what was no wait for copies; None where the step is not one to compare with others."""
        self.measured_peak_bytes: int | None = None
        self.measured_phases_ms: list[tuple[str, int | None, float]] = []
        """Direction, section and milliseconds of its phases, waits among them."""

    def new_plan(self) -> None:
        """Forget what was seen under another plan."""
        self._slow = self._passed_over = 0
        self._log = None
        self.measured_ms = self.compute_ms = self.measured_peak_bytes = None
        self.measured_phases_ms = []

    def is_due(self, number: int) -> bool:
        """Whether step `number` of the plan, counted from 1, is to be timed."""
        return number == FIRST_CHECK or number % CHECK_EVERY == 0 or self._slow > 0 or self._passed_over > 0

    def passes_over(self) -> bool:
        """Whether the step that was timed is not read, since it lacked host memory: the next one is timed instead.

        What found no room there has stayed on the device: such a step takes more of that than any other, and may wait.
        """
        self._passed_over += 1
        return self._passed_over <= TRIES

    def take(self, log: StepLog, *, fits: bool) -> None:
        """A step that was timed is over; it is read when the device has come past it.

        `fits`: whether it was the step that was planned for, and did nothing that others will not do.
        """
        self._log, self._fits = log, fits
        self._passed_over = 0

    @property
    def pending(self) -> bool:
        """Whether a timed step is over that was not read yet."""
        return self._log is not None

    @property
    def readable(self) -> bool:
        """Whether the device has come past it. Never blocks."""
        return self._log is not None and self._log.readable

    def read(self) -> None:
        """Read what the last timed step took, which is readable, and the waits in it settled."""
        log, self._log = self._log, None
        assert log is not None
        self.measured_ms = log.clock.ms(log.boundaries[0].at, log.boundaries[-1].at)
        self.compute_ms = compute_ms(log) if self._fits else None
        peaks = [b.peak_bytes for b in log.boundaries if b.peak_bytes is not None]
        self.measured_peak_bytes = max(peaks) if peaks else max((b.live_bytes for b in log.boundaries), default=0)
        self.measured_phases_ms = [
            (b.direction, None if b.section is None else b.section.index, log.clock.ms(b.at, after.at))
            for b, after in zip(log.boundaries, log.boundaries[1:], strict=False)
        ]

    def is_slower(self, foreseen_ms: float) -> bool:
        """Whether the step that was just read took so much longer than foreseen that something has changed."""
        assert self.measured_ms is not None
        return self.measured_ms > SLOWER * foreseen_ms

    def are_slow(self, foreseen_ms: float) -> bool:
        """Count the step that was just read; whether so many in a row took longer than foreseen that something is."""
        self._slow = self._slow + 1 if self.is_slower(foreseen_ms) else 0
        if self._slow < SLOW_CHECKS:
            return False
        self._slow = 0
        return True
