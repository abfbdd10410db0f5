"""Whether there is room on the device for what one more section saves."""

from __future__ import annotations

from ..policy import Policy
from .clock import Gauge
from .course import TOLERANCE
from .step_log import StepLog


class Room:
    """What sections have been seen to save, beside what the device, the budget, and the plan so far leave for it."""

    def __init__(self, gauge: Gauge, policy: Policy) -> None:
        self._gauge = gauge
        self._policy = policy
        self._most_bytes = self._step_bytes = 0
        self.limit: int | None = None
        """What steps took under the plan so far: measuring anew must not take more. None: there is no plan yet."""

    def seen(self, log: StepLog) -> None:
        """A step is over: the largest of its sections is what one more may save, and it took so much in all."""
        peaks = [boundary.peak_bytes for boundary in log.boundaries if boundary.peak_bytes is not None]
        if peaks and log.used_bytes is not None:
            self._step_bytes = max(self._step_bytes, max(peaks) - log.used_bytes)
        for section in log.sections:
            self._most_bytes = max(self._most_bytes, sum(save.held_bytes for save in section.saves))

    @property
    def is_limited(self) -> bool:
        """Whether steps must not take all that the device has."""
        return self.limit is not None or self._policy.device_budget_bytes is not None

    def for_one_more(self, log: StepLog | None) -> bool:
        """Whether one more section may keep what it saves. `log` tells what is alive where no allocator can."""
        need = 2 * self._most_bytes
        budget = self._policy.device_budget_bytes
        limit = self.limit if budget is None else budget
        used = self._gauge.now()
        if used is None:
            if limit is None:
                return True
            if log is None or not log.detailed:
                return False
            used = sum(save.live_bytes for one in log.sections for save in one.saves)
            return used + self._most_bytes <= limit
        if limit is not None and used + need > limit:
            return False
        room, total = self._gauge.room(), self._gauge.total()
        return room is None or total is None or room > need + total // 20

    def has(self, nbytes: int) -> bool:
        """Whether so many bytes more may be taken for a moment."""
        used = self._gauge.now()
        if used is None:
            return True
        budget = self._policy.device_budget_bytes
        limit = self.limit if budget is None else budget
        if limit is not None and used + nbytes > limit:
            return False
        room = self._gauge.room()
        return room is None or room > nbytes

    def has_for_step(self) -> bool:
        """Whether a step may begin that takes the most that one has taken, and as much more as one may be larger."""
        total = self._gauge.total()
        return total is None or self.has(int((1 + TOLERANCE) * self._step_bytes) + total // 20)
