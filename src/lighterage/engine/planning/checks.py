"""Times planned steps again, now and then, and tells what they took beside what was foreseen."""

from __future__ import annotations

from ...planner.prediction import Prediction
from .step_log import StepLog

# A planned step is timed again so early, and then every so many steps.
FIRST_CHECK, CHECK_EVERY = 2, 50
# Steps that take so much longer than foreseen, so many checked ones in a row, are measured anew.
SLOWER, SLOW_CHECKS = 1.25, 4


class Checks:
    """What steps under the plan were last seen to take."""

    def __init__(self) -> None:
        self._log: StepLog | None = None
        self._slow = 0
        self.measured_ms: float | None = None
        self.measured_peak_bytes: int | None = None
        self.measured_phases_ms: list[tuple[str, int | None, float]] = []
        """Direction, section and milliseconds of its phases, waits among them."""

    def new_plan(self) -> None:
        """Forget what was seen under another plan."""
        self._slow = 0
        self.measured_ms = self.measured_peak_bytes = None
        self.measured_phases_ms = []

    def is_due(self, number: int) -> bool:
        """Whether step `number` of the plan, counted from 1, is to be timed."""
        return number == FIRST_CHECK or number % CHECK_EVERY == 0 or self._slow > 0

    def take(self, log: StepLog) -> None:
        """A step that was timed is over; it is read when the device has come past it."""
        self._log = log

    def read(self) -> bool:
        """Read what the last timed step took, if that can be told by now and was not before; whether it was."""
        log = self._log
        if log is None or not log.readable:
            return False
        self._log = None
        self.measured_ms = log.clock.ms(log.boundaries[0].at, log.boundaries[-1].at)
        peaks = [b.peak_bytes for b in log.boundaries if b.peak_bytes is not None]
        self.measured_peak_bytes = max(peaks) if peaks else max((b.live_bytes for b in log.boundaries), default=0)
        self.measured_phases_ms = [
            (b.direction, None if b.section is None else b.section.index, log.clock.ms(b.at, after.at))
            for b, after in zip(log.boundaries, log.boundaries[1:], strict=False)
        ]
        return True

    def are_slow(self, prediction: Prediction) -> bool:
        """Count the step that was just read; whether so many in a row took longer than foreseen that something is."""
        assert self.measured_ms is not None
        self._slow = self._slow + 1 if self.measured_ms > SLOWER * prediction.step_ms else 0
        if self._slow < SLOW_CHECKS:
            return False
        self._slow = 0
        return True
