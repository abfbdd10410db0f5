"""What the engine knows of a graph under capture: which one it is, its fences, and the memory that belongs to it."""

from __future__ import annotations

from typing import Protocol

import torch

from .graph_driver import Deed, GraphDriver

# Note [Copies inside a capture]
# What is captured does not run: it is written down, and runs at each replay. Five things follow.
# 1. No event that was recorded inside may ever be queried or waited for by the host, and none that was recorded outside
#    may be waited for inside. So fences made inside are of a class of their own, which holds within its capture; to
#    everybody else it is finished, because a stream that comes after a replay comes after all of it. Fences from
#    outside are waited for by the host before the capture goes on.
# 2. A lane that was drawn into a capture has to be joined by its end, and nobody tells the engine when that is. So a
#    lane forgets after each use what it captured, as far as the driver is concerned, and is told again before the next:
#    the copies are leaves of the graph, and a replay is over when all of its leaves are.
# 3. Whatever a captured copy reads or writes is read or written at each replay. A host block that a graph uses belongs
#    to it until it is destroyed. Device memory is the private pool's, which PyTorch keeps for the graph.
# 4. What comes first after a kernel goes on in its branch of the replay, and a copy that does so shares the kernels'
#    queue: 47 GB/s instead of 55 out of an H100. So a copy out depends on the point at which its bytes were saved, not
#    on that at which it is issued: kernels have come after that, and the copy gets a branch of its own.
# 5. Bytes that were copied inside one capture are where they should be only after its replay. So an allocation that was
#    saved inside a capture is copied out there or not at all, and what came back inside one is not used outside of it.


class Captures:
    """The captures that the streams of a device take part in, by their ids."""

    def __init__(self, driver: GraphDriver) -> None:
        self.driver = driver
        self._known: dict[int, Capture] = {}

    def of(self, stream: int) -> Capture | None:
        """The capture that the raw `stream` takes part in."""
        found = self.driver.capture_of(stream)
        if found is None:
            return None
        number, graph = found
        capture = self._known.get(number)
        if capture is None:
            self._known = {n: c for n, c in list(self._known.items()) if not c.is_over}
            capture = self._known[number] = Capture(self.driver, number, graph, stream)
        return capture


class Capture:
    """One graph while it is captured. Afterwards it is over for ever."""

    def __init__(self, driver: GraphDriver, number: int, graph: int, stream: int) -> None:
        self._driver = driver
        self.number = number
        """What the driver calls it: no two captures of a process have the same."""
        self.streams = {stream}
        """The streams, not lanes, on which the engine was used in it."""
        self.tails: dict[int, CapturedFence] = {}
        """By lane, the end of what was captured on it."""
        self._graph = graph
        self._stream = stream
        self._over = False
        self._tenure: Tenure | None = None

    @property
    def is_over(self) -> bool:
        if not self._over:
            found = self._driver.capture_of(self._stream)
            self._over = found is None or found[0] != self.number
        return self._over

    def includes(self, stream: int) -> bool:
        """Whether the raw `stream` takes part in it now."""
        found = self._driver.capture_of(stream)
        return found is not None and found[0] == self.number

    def tenure(self) -> Tenure | None:
        """What belongs to the graph, or None where the driver does not say when it is destroyed."""
        if self._tenure is None:
            deed = self._driver.own(self._graph)
            self._tenure = None if deed is None else Tenure(deed)
        return self._tenure


class Tenure:
    """Rooms that a graph uses: they stay its own until it, and what was instantiated from it, is destroyed."""

    def __init__(self, deed: Deed) -> None:
        self._deed = deed
        self._held: set[object] = set()

    def hold(self, room: object) -> None:
        """Give the graph a share in `room`, which gives itself back when nobody holds it; harmless when repeated."""
        self._held.add(room)

    def end_if_over(self) -> bool:
        """Give the rooms back if the graph is gone; whether it is."""
        if not self._deed.is_over:
            return False
        self._held.clear()
        return True

    def wait(self) -> None:
        """Block the calling thread until the graph is gone."""
        self._deed.wait()


class _Streams(Protocol):
    def key(self) -> int: ...

    def current(self) -> torch.Stream: ...


class CapturedFence:
    """A point inside a capture. See Note [Copies inside a capture]: outside of it there is nothing to wait for."""

    __slots__ = ("_capture", "_ordered", "_streams", "event")

    def __init__(self, streams: _Streams, capture: Capture, event: torch.Event) -> None:
        self._streams = streams
        self._capture = capture
        self._ordered: set[int] = set()
        self.event = event

    def done(self) -> bool:
        return self._capture.is_over

    def wait(self) -> None:
        """Nothing of a capture runs, so the host has nothing to wait for."""

    def order(self) -> None:
        key = self._streams.key()
        if key not in self._ordered and self._capture.includes(key):
            self._streams.current().wait_event(self.event)
            self._ordered.add(key)

    def order_lane(self, lane: torch.Stream) -> None:
        """Make `lane` come after it, when the current stream, which `lane` follows, is of the same capture."""
        if self._capture.includes(self._streams.key()):
            lane.wait_event(self.event)

    def ordered_on(self, key: int) -> bool:
        return key in self._ordered or self._capture.is_over
