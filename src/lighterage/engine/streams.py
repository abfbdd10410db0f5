"""The two lanes of an accelerator as streams, and their fences as events."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from .captures import Capture, CapturedFence, Captures
from .graph_driver import graph_driver
from .lanes import Fence


class Streams:
    """The lanes of a device, and a pool of events."""

    def __init__(self, device: torch.device, before_copies: Callable[[], None] | None) -> None:
        self.device = device
        self.outbound = torch.Stream(device)
        self.inbound = torch.Stream(device)
        self._urgent: torch.Stream | None = None
        self.before_copies = before_copies
        self.events: list[torch.Event] = []
        self.key: Callable[[], int] = (
            functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
            if device.type == "cuda"
            else functools.partial(_stream_id, device)
        )
        """Tells the current stream from every other one of the device; cheaper than the stream itself."""
        self.capturing: Callable[[], bool] = (
            torch._C._cuda_isCurrentStreamCapturing if device.type == "cuda" else _never
        )
        """Whether a graph is captured on the calling thread's stream."""
        self._current_device: Callable[[], int] = (
            torch._C._cuda_getDevice if device.type == "cuda" else torch.accelerator.current_device_index
        )
        driver = graph_driver() if device.type == "cuda" else None
        self._captures = None if driver is None else Captures(driver)

    @property
    def urgent(self) -> torch.Stream:
        """The lane of reloads that backward waits for; made when it is first used.

        CUDA documents that a stream's priority has no effect on copies to and from the host. What lets them in is that
        the others are cut into chunks; the priority costs nothing, and serves where it does count.
        """
        if self._urgent is None:
            self._urgent = torch.Stream(self.device, priority=-1)
        return self._urgent

    @property
    def lanes(self) -> tuple[torch.Stream, ...]:
        """Those that there are."""
        lanes = (self.outbound, self.inbound)
        return lanes if self._urgent is None else (*lanes, self._urgent)

    def current(self) -> torch.Stream:
        """The stream that the calling thread issues work on."""
        return torch.accelerator.current_stream(self.device)

    def capture(self) -> Capture | None:
        """The capture that the calling thread's stream takes part in, as far as the driver tells of it."""
        if self._captures is None or not self.capturing():
            return None
        return self._captures.of(self.key())

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """For calls that have nothing to do with a capture, but may be made in the midst of one."""
        if self._captures is None or not self.capturing():
            return contextlib.nullcontext()
        return self._captures.driver.relaxed()

    @contextlib.contextmanager
    def on(self, lane: torch.Stream, back_to: torch.Stream) -> Iterator[None]:
        """Issue the block's work on `lane`, whose device is the current one meanwhile, and after it what was before."""
        if self._current_device() != self.device.index:
            # Making a stream the current one makes its device the current one too, which the caller's is to stay.
            with torch.accelerator.device_index(self.device.index), self.on(lane, back_to):
                yield
            return
        torch.accelerator.set_stream(lane)
        lane_key = self.key() if self.capturing() else None
        try:
            self.hold_up()
            yield
        finally:
            torch.accelerator.set_stream(back_to)
            if lane_key is not None:
                self._leave(lane, lane_key, back_to)

    def _leave(self, lane: torch.Stream, lane_key: int, stream: torch.Stream) -> None:
        """Let a capture end although nobody waits for `lane`: see Note [Copies inside a capture]."""
        if self._captures is None or not self._captures.driver.rejoin(lane_key, self.key()):
            event = torch.Event(self.device)
            lane.record_event(event)
            stream.wait_event(event)

    def hold_up(self) -> None:
        """Let tests delay the copies that come next on the current stream."""
        if self.before_copies is not None:
            self.before_copies()

    def after(self, stream: torch.Stream, lane: torch.Stream, since: torch.Event | None = None) -> None:
        """Make `lane` wait for what was issued on `stream`, which is the current one, so far.

        Inside a capture, where `since` was recorded on `stream` in it, for what was issued before that.
        """
        if not self.capturing():
            lane.wait_event(EventFence(self, stream).event)
            return
        if since is None:
            since = torch.Event(self.device)
            stream.record_event(since)
        lane.wait_event(since)
        capture = self.capture()
        if capture is not None and lane.stream_id in capture.tails:
            # A lane forgets after each use: see Note [Copies inside a capture].
            lane.wait_event(capture.tails[lane.stream_id].event)

    def fence(self, lane: torch.Stream) -> EventFence | CapturedFence:
        """What was issued on `lane`, which is the current stream, so far."""
        capture = self.capture()
        if capture is None:
            return EventFence(self, lane)
        event = torch.Event(self.device)
        lane.record_event(event)
        fence = capture.tails[lane.stream_id] = CapturedFence(self, capture, event)
        return fence


def _never() -> bool:
    return False


def _stream_id(device: torch.device) -> int:
    return int(torch.accelerator.current_stream(device).stream_id)


class EventFence:
    """A recorded event. The event goes back to its pool when nobody asks for it any more."""

    __slots__ = ("_is_over", "_ordered", "_streams", "event")

    def __init__(self, streams: Streams, stream: torch.Stream) -> None:
        self._streams = streams
        self._is_over = False
        self._ordered: set[int] = set()
        try:
            self.event = streams.events.pop()
        except IndexError:
            self.event = torch.Event(streams.device, enable_timing=True)
        stream.record_event(self.event)

    def __del__(self) -> None:
        # What was made to wait for the event waits for this record of it, whatever is recorded later.
        self._streams.events.append(self.event)

    def done(self) -> bool:
        # Many blocks share a fence, and each asks: the driver is asked until it says so once.
        if not self._is_over:
            with self._streams.apart():
                self._is_over = self.event.query()
        return self._is_over

    def wait(self) -> None:
        with self._streams.apart():
            self.event.synchronize()

    def order(self) -> DeviceWait | None:
        streams = self._streams
        if streams.capturing():
            self.wait()  # a graph cannot depend on it: see Note [Copies inside a capture]
            return None
        key = streams.key()
        if key in self._ordered:
            return None
        wait = None
        if not self.event.query():
            stream = streams.current()
            arrived = EventFence(streams, stream)
            stream.wait_event(self.event)
            wait = DeviceWait(arrived, self)
        # Not before the wait was issued: another thread on the same stream takes it that it was.
        self._ordered.add(key)
        return wait

    def ordered_on(self, key: int) -> bool:
        return key in self._ordered

    @property
    def in_capture(self) -> bool:
        """Whether it is asked in the midst of a capture."""
        return self._streams.capturing()


class DeviceWait:
    """A wait of the device: how long after the stream arrived the copies were finished."""

    __slots__ = ("_arrived", "_finished")

    def __init__(self, arrived: EventFence, finished: EventFence) -> None:
        self._arrived = arrived
        self._finished = finished

    def milliseconds(self) -> float | None:
        if self._arrived.in_capture or not (self._arrived.done() and self._finished.done()):
            return None
        return max(0.0, self._arrived.event.elapsed_time(self._finished.event))


def await_on(lane: torch.Stream, fence: Fence) -> None:
    """Make `lane`, which comes after the current stream, come after `fence` of another lane of some device."""
    if isinstance(fence, EventFence) and not fence.in_capture:
        lane.wait_event(fence.event)
    elif isinstance(fence, CapturedFence):
        fence.order_lane(lane)
    else:
        fence.wait()
