"""The two lanes of a link, as queues whose copies take time."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from .timeline import Link

_FOREVER = float("inf")


class _Lane:
    """One direction: a queue, and the copy in progress."""

    __slots__ = ("current", "finished_ms", "left", "queue", "rate", "records", "setup", "started_ms", "urgent")

    def __init__(self, bytes_per_s: float, count: int, recording: bool) -> None:
        self.rate = bytes_per_s / 1e3  # a millisecond
        self.queue: collections.deque[int] = collections.deque()
        self.urgent: collections.deque[int] = collections.deque()
        self.current = -1
        self.setup = 0.0
        self.left = 0.0
        self.started_ms = 0.0
        self.finished_ms = [_FOREVER] * count
        self.records: list[tuple[int, float, float]] | None = [] if recording else None

    def start(self, now: float, sizes: Sequence[int], setup_ms: float) -> bool:
        """Whether a copy is in progress, after taking the next from the queue if none was."""
        if self.current < 0:
            if self.urgent:
                self.current = self.urgent.popleft()
            elif self.queue:
                self.current = self.queue.popleft()
            else:
                return False
            self.setup = setup_ms
            self.left = float(sizes[self.current])
            self.started_ms = now
        return True

    def finish(self, now: float) -> None:
        self.finished_ms[self.current] = now
        if self.records is not None:
            self.records.append((self.current, self.started_ms, now))
        self.current = -1

    def alone_ms(self) -> float:
        """Until the copy in progress has finished, if the other lane stays idle."""
        return self.setup + self.left / self.rate

    def pass_ms(self, ms: float, rate: float) -> None:
        """Let time go by that does not suffice to finish."""
        if ms < self.setup:
            self.setup -= ms
        else:
            self.left = max(self.left - (ms - self.setup) * rate, 0.0)
            self.setup = 0.0


class Lanes:
    """Both directions of a link at once, in milliseconds of the step. Time goes on only when it is told to.

    A copy first takes the link's `copy_us`, in which it carries nothing. While both lanes carry bytes they share
    `both_bytes_per_s` evenly, each no faster than its own rate: what the slower cannot use is the other's.
    """

    def __init__(self, link: Link, sizes: Sequence[int], *, recording: bool = False) -> None:
        self._sizes = sizes
        self._setup_ms = link.copy_us / 1e3
        self.out = _Lane(link.out_bytes_per_s, len(sizes), recording)
        self.back = _Lane(link.in_bytes_per_s, len(sizes), recording)
        both = link.both_bytes_per_s / 1e3
        half = both / 2
        self._shared_out = min(self.out.rate, max(half, both - self.back.rate))
        self._shared_back = min(self.back.rate, max(half, both - self.out.rate))
        self._now = 0.0

    def send(self, item: int, now: float) -> None:
        """Queue a copy out."""
        self.advance(now)
        self.out.queue.append(item)

    def fetch(self, item: int, now: float, *, urgent: bool = False) -> None:
        """Queue a copy in; an urgent one before those that wait."""
        self.advance(now)
        (self.back.urgent if urgent else self.back.queue).append(item)

    def when_sent(self, item: int, now: float) -> float:
        """The moment, not before `now`, at which a queued copy out has finished."""
        self.advance(now)
        if self.out.finished_ms[item] == _FOREVER:
            self.advance(_FOREVER, self.out.finished_ms, item)
        return max(now, self.out.finished_ms[item])

    def when_fetched(self, item: int, now: float) -> float:
        """The moment, not before `now`, at which a queued copy in has finished."""
        self.advance(now)
        if self.back.finished_ms[item] == _FOREVER:
            self.advance(_FOREVER, self.back.finished_ms, item)
        return max(now, self.back.finished_ms[item])

    def advance(self, until: float, finished: list[float] | None = None, item: int = -1) -> None:
        """Let time go on to `until`, or until `item` has an entry in `finished`."""
        out, back, sizes, setup_ms = self.out, self.back, self._sizes, self._setup_ms
        while self._now < until and (finished is None or finished[item] == _FOREVER):
            now = self._now
            out_busy, back_busy = out.start(now, sizes, setup_ms), back.start(now, sizes, setup_ms)
            if not (out_busy and back_busy):
                if not (out_busy or back_busy):
                    if until < _FOREVER:
                        self._now = until
                    return
                lane = out if out_busy else back
                ms = lane.alone_ms()
                if now + ms > until:
                    lane.pass_ms(until - now, lane.rate)
                    self._now = until
                    return
                self._now = now + ms
                lane.finish(self._now)
                continue
            # Up to the next change of either: a copy begins to carry bytes, or has finished.
            sharing = not (out.setup or back.setup)
            out_rate, back_rate = (self._shared_out, self._shared_back) if sharing else (out.rate, back.rate)
            out_ms = out.setup or out.left / out_rate
            back_ms = back.setup or back.left / back_rate
            ms = min(out_ms, back_ms)
            if now + ms > until:
                out.pass_ms(until - now, out_rate)
                back.pass_ms(until - now, back_rate)
                self._now = until
                return
            self._now = now + ms
            for lane, lane_ms, rate in ((out, out_ms, out_rate), (back, back_ms, back_rate)):
                if lane_ms > ms:
                    lane.pass_ms(ms, rate)
                elif lane.setup:
                    lane.setup = 0.0
                else:
                    lane.finish(self._now)

    def drain(self) -> None:
        """Let all that is queued finish."""
        self.advance(_FOREVER)
