"""The two lanes of a link, as queues whose copies take time."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from .timeline import Link

_FOREVER = float("inf")

CHUNK_BYTES = 16 << 20
"""Copies are cut into chunks of so many bytes, between which an urgent one gets in.

At 50 GB/s a chunk takes a third of a millisecond: the most that an urgent reload waits for another one. A copy costs
the lane up to 5 µs beside its bytes, 1.5 % of a chunk. With chunks of a quarter of the size that would be 6 %, to make
a wait shorter that is already no longer than a kernel or two.
"""


class _Lane:
    """One direction: a queue, and the copy in progress."""

    __slots__ = (
        "carried", "current", "cut_off", "finished_ms", "interrupted", "is_urgent", "left", "queue", "rate", "records",
        "setup", "started_ms", "urgent",
    )  # fmt: skip

    def __init__(self, bytes_per_s: float, count: int, recording: bool) -> None:
        self.rate = bytes_per_s / 1e3  # a millisecond
        self.queue: collections.deque[int] = collections.deque()
        self.urgent: collections.deque[int] = collections.deque()
        self.current = -1
        self.is_urgent = False
        """Whether the copy in progress is one of the urgent ones."""
        self.setup = 0.0
        self.left = 0.0
        """Bytes until it has finished, or until it gives way."""
        self.cut_off = 0.0
        """Bytes of it that are left for afterwards, where it gives way."""
        self.carried = 0.0
        """Bytes of it that were carried before it gave way the last time."""
        self.interrupted: tuple[int, float, float] | None = None
        """What has given way: item, bytes left, bytes carried."""
        self.started_ms = 0.0
        self.finished_ms = [_FOREVER] * count
        self.records: list[tuple[int, float, float, float]] | None = [] if recording else None

    def start(self, now: float, sizes: Sequence[int], setup_ms: float) -> bool:
        """Whether a copy is in progress, after taking the next from the queue if none was."""
        if self.current < 0:
            self.is_urgent = False
            if self.urgent:
                self.current = self.urgent.popleft()
                self.is_urgent = True
            elif self.interrupted is not None:
                self.current, self.left, self.carried = self.interrupted
                self.interrupted = None
                self.setup, self.started_ms = 0.0, now
                return True
            elif self.queue:
                self.current = self.queue.popleft()
            else:
                return False
            self.setup = setup_ms
            self.left = float(sizes[self.current])
            self.carried = 0.0
            self.started_ms = now
        return True

    def give_way(self, sizes: Sequence[int]) -> None:
        """Let the copy in progress end with its present chunk, for now."""
        if self.current < 0 or self.is_urgent or self.cut_off:
            return
        to_chunk_end = CHUNK_BYTES - (sizes[self.current] - self.left) % CHUNK_BYTES
        if to_chunk_end < self.left:
            self.cut_off = self.left - to_chunk_end
            self.left = to_chunk_end

    def finish(self, now: float, sizes: Sequence[int]) -> None:
        """The copy in progress has come to its end, or to where it gives way."""
        carried = sizes[self.current] - self.cut_off
        if self.records is not None:
            item, start, came = self.current, self.started_ms, self.carried
            if self.records and self.records[-1][0] == item and self.records[-1][2] == start:
                # It gave way to what was through before its chunk was.
                _, start, _, before = self.records.pop()
                came -= before
            self.records.append((item, start, now, carried - came))
        if self.cut_off:
            self.interrupted = (self.current, self.cut_off, carried)
            self.cut_off = 0.0
        else:
            self.finished_ms[self.current] = now
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

    Copies go in the order of the queue, one at a time. Urgent ones come next on the inbound lane, once the copy in
    progress has come to the end of its chunk; and until they are through the outbound lane begins no chunk.

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
        self.busy_ms = 0.0
        """So long a lane was busy so far: both at once count twice."""

    def send(self, item: int, now: float) -> None:
        """Queue a copy out."""
        self.advance(now)
        self.out.queue.append(item)

    def fetch(self, item: int, now: float, *, urgent: bool = False) -> None:
        """Queue a copy in; an urgent one before those that wait, and before the other chunks of all in progress."""
        self.advance(now)
        if urgent:
            self.back.urgent.append(item)
            self.back.give_way(self._sizes)
            self.out.give_way(self._sizes)
        else:
            self.back.queue.append(item)

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
            back_busy = back.start(now, sizes, setup_ms)
            hurry = back.is_urgent or back.urgent
            out_busy = out.current >= 0 if hurry else out.start(now, sizes, setup_ms)
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
                    self.busy_ms += until - now
                    return
                self._now = now + ms
                self.busy_ms += ms
                lane.finish(self._now, sizes)
                if lane is back or not hurry:
                    lane.start(self._now, sizes, setup_ms)  # at once, and not only when time goes on
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
                self.busy_ms += 2 * (until - now)
                return
            self._now = now + ms
            self.busy_ms += 2 * ms
            for lane, lane_ms, rate in ((out, out_ms, out_rate), (back, back_ms, back_rate)):
                if lane_ms > ms:
                    lane.pass_ms(ms, rate)
                elif lane.setup:
                    lane.setup = 0.0
                else:
                    lane.finish(self._now, sizes)
                    if lane is back or not hurry:
                        lane.start(self._now, sizes, setup_ms)

    def drain(self) -> None:
        """Let all that is queued finish."""
        self.advance(_FOREVER)
