"""One step on the compute stream and both lanes, with decisions taken phase by phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from .lanes import Lanes
from .layout import BIRTH, DEATH, GONE, NEED, REBORN, WORK, Layout, host_time
from .timeline import Link

UNBORN, HERE, AWAY, COMING, BACK = range(5)
"""Where a moved item is: on the device since its birth, away, on its way back, and back (or read before it left)."""


class Decisions(Protocol):
    """Says what comes back and what is let go of, as each phase begins and ends."""

    def fetches(self, phase: int, run: Run) -> Sequence[int]:
        """Items to bring back as `phase` begins, the most urgent first. Those that are not away are passed over."""
        ...

    def releases(self, phase: int, run: Run) -> Sequence[int]:
        """Items whose memory is given back as `phase` ends. Those that are not on the device any more, or have been
        read again, are passed over."""
        ...


@dataclasses.dataclass(slots=True)
class Recording:
    """What happened, in detail."""

    curve: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    starts_ms: list[float] = dataclasses.field(default_factory=list)
    ends_ms: list[float] = dataclasses.field(default_factory=list)
    reload_ms: list[float] = dataclasses.field(default_factory=list)
    release_ms: list[float] = dataclasses.field(default_factory=list)
    slowed_ms: list[float] = dataclasses.field(default_factory=list)
    host_ms: list[float] = dataclasses.field(default_factory=list)
    peaks: list[int] = dataclasses.field(default_factory=list)


class Run:
    """Carries out a step. After `go`: `now_ms` is its time, `peak_bytes` its peak, `state` where each item is."""

    def __init__(self, layout: Layout, link: Link, moved: Sequence[bool], *, recording: bool = False) -> None:
        self.layout = layout
        self.moved = moved
        self.held = [item.allocation.held_bytes for item in layout.items]
        self.lanes = Lanes(link, [item.allocation.nbytes for item in layout.items], recording=recording)
        self.recording = Recording() if recording else None
        self.state = [UNBORN] * len(layout.items)
        self.now_ms = 0.0
        self.now_in_phase_ms = 0.0
        """The end of the phase's work, while its releases are decided."""

        self.slowed_ms = 0.0
        """By so much compute took longer because lanes were busy."""

        self._slowdown = link.compute_slowdown
        self._host = host_time(layout, link, moved)
        self.host_ms = sum(self._host, 0.0)
        """The host's work for what is moved or computed again."""

        self.live_bytes = 0
        self.peak_bytes = 0
        self.on_demand: list[int] = []

    def go(self, decisions: Decisions) -> None:
        """Carry out every phase."""
        for phase in range(len(self.layout.ms)):
            self._phase(phase, decisions)

    def _phase(self, phase: int, decisions: Decisions) -> None:
        state, moved, lanes, recording = self.state, self.moved, self.lanes, self.recording
        now = start = self.now_ms
        live, reload_ms = self.live_bytes, 0.0
        busy_before = 0.0
        if self._slowdown:
            lanes.advance(now)
            busy_before = lanes.busy_ms
        for item in decisions.fetches(phase, self):
            if state[item] == AWAY:
                state[item] = COMING
                live += self.held[item]
                lanes.fetch(item, now)
        begin, at, work, peak = now, 0.0, 0, live
        for ms, what, item, nbytes in self.layout.events[phase]:
            if ms > at:
                # From the phase's start and what was waited in it, so that no error of rounding adds up.
                now = begin + ms
                at = ms
            if what == NEED:
                if moved[item]:
                    if state[item] == AWAY:
                        live += nbytes
                        self.on_demand.append(item)
                        lanes.fetch(item, now, urgent=True)
                        state[item] = COMING
                        if live + work > peak:
                            peak = live + work
                        if recording is not None:
                            recording.curve.append((now, live + work))
                    if state[item] == COMING:
                        if self._slowdown:
                            lanes.advance(now)
                            busy_before -= lanes.busy_ms
                        came = lanes.when_fetched(item, now)
                        if self._slowdown:
                            busy_before += lanes.busy_ms  # what waits is not slowed
                        reload_ms += came - now
                        begin += came - now
                        now = came
                    state[item] = BACK
                continue
            if what == BIRTH:
                live += nbytes
                if moved[item]:
                    state[item] = HERE
                    lanes.send(item, now)
            elif what == REBORN:
                live += nbytes
            elif what in (DEATH, GONE):
                live -= nbytes
            elif what == WORK:
                work = nbytes
            if live + work > peak:
                peak = live + work
            if recording is not None:
                recording.curve.append((now, live + work))
        now = begin + self.layout.ms[phase]
        slowed = 0.0
        if self._slowdown:
            # Told once, as the phase ends.
            lanes.advance(now)
            slowed = self._slowdown * (lanes.busy_ms - busy_before)
            self.slowed_ms += slowed
            now += slowed
        host = 0.0
        if self._host:
            host = self._host[phase]
            now += host
        ended = self.now_in_phase_ms = now
        for item in decisions.releases(phase, self):
            if state[item] == HERE:
                now = lanes.when_sent(item, now)
                live -= self.held[item]
                state[item] = AWAY
                if recording is not None:
                    recording.curve.append((now, live + work))
        self.now_ms, self.live_bytes = now, live
        self.peak_bytes = max(self.peak_bytes, peak)
        if recording is not None:
            recording.starts_ms.append(start)
            recording.ends_ms.append(now)
            recording.reload_ms.append(reload_ms)
            recording.release_ms.append(now - ended)
            recording.slowed_ms.append(slowed)
            recording.host_ms.append(host)
            recording.peaks.append(peak)
