"""The two lanes of an accelerator as streams, and their fences as events."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from .lanes import Fence


class Streams:
    """The lanes of a device, and a pool of events."""

    def __init__(self, device: torch.device, before_copies: Callable[[], None] | None) -> None:
        self.device = device
        self.outbound = torch.Stream(device)
        self.inbound = torch.Stream(device)
        self.before_copies = before_copies
        self.events: list[torch.Event] = []
        self.key: Callable[[], int] = (
            functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
            if device.type == "cuda"
            else functools.partial(_stream_id, device)
        )
        """Tells the current stream from every other one of the device; cheaper than the stream itself."""

    def current(self) -> torch.Stream:
        """The stream that the calling thread issues work on."""
        return torch.accelerator.current_stream(self.device)

    @contextlib.contextmanager
    def on(self, lane: torch.Stream, back_to: torch.Stream) -> Iterator[None]:
        """Issue the block's work on `lane`."""
        torch.accelerator.set_stream(lane)
        try:
            self.hold_up()
            yield
        finally:
            torch.accelerator.set_stream(back_to)

    def hold_up(self) -> None:
        """Let tests delay the copies that come next on the current stream."""
        if self.before_copies is not None:
            self.before_copies()

    def after(self, stream: torch.Stream, lane: torch.Stream) -> None:
        """Make `lane` wait for what was issued on `stream` so far."""
        lane.wait_event(EventFence(self, stream).event)

    def fence(self, lane: torch.Stream) -> EventFence:
        """What was issued on `lane` so far."""
        return EventFence(self, lane)


def _stream_id(device: torch.device) -> int:
    return int(torch.accelerator.current_stream(device).stream_id)


class EventFence:
    """A recorded event. The event goes back to its pool when nobody asks for it any more."""

    __slots__ = ("_ordered", "_streams", "event")

    def __init__(self, streams: Streams, stream: torch.Stream) -> None:
        self._streams = streams
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
        return self.event.query()

    def wait(self) -> None:
        self.event.synchronize()

    def order(self) -> DeviceWait | None:
        streams = self._streams
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


class DeviceWait:
    """A wait of the device: how long after the stream arrived the copies were finished."""

    __slots__ = ("_arrived", "_finished")

    def __init__(self, arrived: EventFence, finished: EventFence) -> None:
        self._arrived = arrived
        self._finished = finished

    def milliseconds(self) -> float | None:
        if not (self._arrived.done() and self._finished.done()):
            return None
        return max(0.0, self._arrived.event.elapsed_time(self._finished.event))


def await_on(lane: torch.Stream, fence: Fence) -> None:
    """Make `lane` come after `fence`, which is that of another lane of some device."""
    if isinstance(fence, EventFence):
        lane.wait_event(fence.event)
    else:
        fence.wait()
