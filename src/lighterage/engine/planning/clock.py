"""Marks in the work of a device, and the time between them; reading them does not wait for the device."""

from __future__ import annotations

import time
from typing import Literal, Protocol

import torch

Mark = float | torch.Event
"""A moment: of the host in seconds, or of the stream that was current."""


class Clock(Protocol):
    """Tells how long the work between two marks took."""

    def mark(self) -> Mark:
        """The point that the calling thread's work has come to."""
        ...

    def passed(self, mark: Mark) -> bool:
        """Whether the device has come past `mark`. Never blocks."""
        ...

    def catch_up(self) -> None:
        """Block the calling thread until the device has done what was issued to the current stream."""
        ...

    def ms(self, start: Mark, end: Mark) -> float:
        """Milliseconds between two marks that have passed."""
        ...


class HostClock:
    """The clock of a device whose work is over when the call returns."""

    def mark(self) -> Mark:
        return time.perf_counter()

    def passed(self, mark: Mark) -> bool:
        return True

    def catch_up(self) -> None:
        pass

    def ms(self, start: Mark, end: Mark) -> float:
        assert isinstance(start, float)
        assert isinstance(end, float)
        return (end - start) * 1e3


class DeviceClock:
    """Timing events on the stream that is current where they are made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        event = torch.Event(self._device, enable_timing=True)
        torch.accelerator.current_stream(self._device).record_event(event)
        return event

    def passed(self, mark: Mark) -> bool:
        assert not isinstance(mark, float)
        return bool(mark.query())

    def catch_up(self) -> None:
        event = torch.Event(self._device)
        torch.accelerator.current_stream(self._device).record_event(event)
        event.synchronize()

    def ms(self, start: Mark, end: Mark) -> float:
        assert not isinstance(start, float)
        assert not isinstance(end, float)
        return float(start.elapsed_time(end))


def clock_of(device: torch.device) -> Clock:
    return HostClock() if device.type == "cpu" else DeviceClock(device)


class Gauge:
    """Device memory as the allocator tells it. Its peak is begun anew by `start`, for every reader of it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known = device.type not in ("cpu", "meta")

    def _allocated(self, which: Literal["current", "peak"]) -> int | None:
        if not self._known:
            return None
        if not torch._C._accelerator_isAllocatorInitialized():
            return 0
        given: int | None = self.device.index
        index = torch.accelerator.current_device_index() if given is None else given
        # What is public, `torch.accelerator.memory_allocated`, flattens and sorts some hundred figures to give one.
        return int(torch._C._accelerator_getDeviceStats(index)["allocated_bytes"]["all"][which])

    def now(self) -> int | None:
        return self._allocated("current")

    def peak(self) -> int | None:
        """The most since `start`."""
        return self._allocated("peak")

    def start(self) -> None:
        if self._known:
            torch.accelerator.reset_peak_memory_stats(self.device)

    def total(self) -> int | None:
        """What the device has."""
        return int(torch.accelerator.get_memory_info(self.device)[1]) if self._known else None

    def room(self) -> int | None:
        """What could be allocated still, the allocator's own reserve included."""
        if not self._known:
            return None
        free, _ = torch.accelerator.get_memory_info(self.device)
        reserve = torch.accelerator.memory_reserved(self.device) - torch.accelerator.memory_allocated(self.device)
        return int(free + reserve)
