"""Measures, in a moment, how fast bytes leave a device and come back."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from ..planner.links import PCIE_COMPUTE_SLOWDOWN
from ..planner.timeline import Link
from .disk import DiskStore
from .units import KIB, MIB

_LARGE = 16 * MIB
_SMALL = 64 * KIB
_ROUNDS = 5

# What a lane can do is asked, and not what else copied meanwhile: an offloader that was just closed gives gigabytes of
# pinned memory back in the background, for one, and took more than half of one direction in one measurement of twenty.
_UNLIKE = 0.92
"""The slower direction of a link carries so much of what the faster one does, or something was in its way."""
_SHARED = 0.8
"""Both at once carry so much of what they do one by one; less may be the link's own, or something was in the way."""
_IMPROVES = 1.03
"""The last rounds are so much faster than the first, or all than those before the pause: what was in the way goes."""
_PAUSES_S = (0.02, 0.05, 0.1, 0.15, 0.15)
"""Before each further measurement where something seems to be in the way."""


def measure_link(
    device: torch.device, tier: Literal["host", "disk"] | None = None, disk_dir: str | os.PathLike[str] | None = None
) -> Link:
    """The link between `device` and `tier`, measured with a few MiB in a tenth of a second.

    The best rate that was seen counts. Where the two directions of an accelerator's lanes are unlike each other, do
    much less together than one by one, or still become faster, something else may be in the way: they are measured
    again up to five times, with short pauses, for well under a second in all.

    `tier`: None for the one that is used unless another is named: disk for a CPU, the host for anything else. On an
    accelerator the lanes are streams of their own and host memory is pinned (CUDA) or not (others); the device is
    waited for. The disk tier is measured with a file of its own; the system's page cache is part of it.

    Raises:
        OffloadError: the disk tier's file cannot be made, written or read.
    """
    device = torch.device(device)
    tier = tier or ("disk" if device.type == "cpu" else "host")
    name = f"{device.type} and {tier}"
    if tier == "host":
        return _memory(name) if device.type == "cpu" else _lanes(device, name)
    disk = _disk(disk_dir, name)
    if device.type == "cpu":
        return disk
    # Two hops at once: the slower one counts.
    link = _lanes(device, name)
    return Link(
        out_bytes_per_s=min(link.out_bytes_per_s, disk.out_bytes_per_s),
        in_bytes_per_s=min(link.in_bytes_per_s, disk.in_bytes_per_s),
        both_bytes_per_s=min(link.both_bytes_per_s, disk.both_bytes_per_s),
        copy_us=link.copy_us + disk.copy_us,
        name=name,
        compute_slowdown=link.compute_slowdown,
        move_us=link.move_us,
    )


class Lanes:
    """Buffers and streams to time copies of an accelerator with. Gives its memory back when it goes."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        pinned = device.type == "cuda"
        self._here = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._there = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._streams = [torch.Stream(device) for _ in range(2)]

    def seconds(self, nbytes: int, *, out: int = 0, back: int = 0) -> float:
        """Device time of `out` copies out and `back` copies in of `nbytes` each, both lanes at once."""
        before = torch.accelerator.current_stream(self._device)
        # Events of the lanes' own: the host's clock would count the calls, and those of a busy host take long.
        begun, *ended = (torch.Event(self._device, enable_timing=True) for _ in range(3))
        torch.accelerator.synchronize(self._device)
        try:
            begun.record(self._streams[0])
            self._streams[1].wait_event(begun)
            # In turn, so that neither lane has begun long before the other.
            for number in range(max(out, back)):
                if number < out:
                    torch.accelerator.set_stream(self._streams[0])
                    self._there[0][:nbytes].copy_(self._here[0][:nbytes], non_blocking=True)
                if number < back:
                    torch.accelerator.set_stream(self._streams[1])
                    self._here[1][:nbytes].copy_(self._there[1][:nbytes], non_blocking=True)
        finally:
            torch.accelerator.set_stream(before)
        for event, stream in zip(ended, self._streams, strict=True):
            event.record(stream)
        torch.accelerator.synchronize(self._device)
        return max(begun.elapsed_time(event) for event in ended) / 1e3

    def rate(self, nbytes: int, *, out: int = 0, back: int = 0, rounds: int = _ROUNDS) -> float:
        """Bytes a second in the best of `rounds`: what a lane can do is asked, not what else the machine did."""
        seconds = min(self.seconds(nbytes, out=out, back=back) for _ in range(rounds))
        return nbytes * (out + back) / max(seconds, 1e-9)


def _lanes(device: torch.device, name: str) -> Link:
    # Pools and streams are per device: the calling thread's own device comes back whatever happens.
    anywhere = device == torch.device(device.type)
    index = torch.accelerator.current_device_index() if anywhere else device.index
    with torch.accelerator.device_index(index):
        lanes = Lanes(device, _LARGE)
        lanes.seconds(_LARGE, out=1, back=1)  # the first copy of a process makes what copies need
        out, back, both = _rates(lanes.seconds)
        small_s = min(lanes.seconds(_SMALL, out=16) for _ in range(_ROUNDS)) / 16
    # Too little to be measured in a moment.
    slowdown = PCIE_COMPUTE_SLOWDOWN if device.type == "cuda" else 0.0
    return _link(name, out, back, both, small_s, slowdown)


class _Times(Protocol):
    """Seconds of copies of `nbytes` each, so many out and so many in, both lanes at once."""

    def __call__(self, nbytes: int, *, out: int = 0, back: int = 0) -> float: ...


# So many copies that the gap before the first of them does not count: out, in, and both at once.
_COPIES = ((8, 0), (0, 8), (8, 8))


def _rates(seconds: _Times, pause: Callable[[float], object] = time.sleep) -> tuple[float, float, float]:
    """Bytes a second out, in, and both at once: the best seen, looked for again while something seems in the way."""
    best_s = [math.inf] * len(_COPIES)
    for pause_s in (0.0, *_PAUSES_S):
        if pause_s:
            pause(pause_s)
        improves = False
        for kind, (out, back) in enumerate(_COPIES):
            rounds = [seconds(_LARGE, out=out, back=back) for _ in range(_ROUNDS)]
            early_s, before_s = min(rounds[:-2]), best_s[kind]
            best_s[kind] = max(min(before_s, *rounds), 1e-9)
            improves |= early_s > _IMPROVES * min(rounds[-2:]) or math.inf > before_s > _IMPROVES * best_s[kind]
        out_rate, back_rate, both_rate = (
            _LARGE * sum(copies) / best for copies, best in zip(_COPIES, best_s, strict=True)
        )
        alike = min(out_rate, back_rate) >= _UNLIKE * max(out_rate, back_rate)
        if alike and not improves and both_rate >= _SHARED * (out_rate + back_rate):
            break
    return out_rate, back_rate, both_rate


def _disk(disk_dir: str | os.PathLike[str] | None, name: str) -> Link:
    store = DiskStore(disk_dir, budget=None)
    try:
        data = torch.zeros(_LARGE, dtype=torch.uint8)
        extent = store.acquire(_LARGE)
        assert extent is not None, "a store without a budget refuses nothing"
        store.write(extent, data)  # the first write finds the blocks of the file
        write_s, _ = _seconds(lambda: store.write(extent, data))
        read_s, _ = _seconds(lambda: store.read(extent, data))
        _, small_s = _seconds(lambda: store.write(extent, data[:_SMALL]))
        extent.retire()
    finally:
        store.close()
    return _link(name, _LARGE / write_s, _LARGE / read_s, 2 * _LARGE / (write_s + read_s), small_s)


def _memory(name: str) -> Link:
    here, there = (torch.zeros(_LARGE, dtype=torch.uint8) for _ in range(2))
    copy_s, _ = _seconds(lambda: there.copy_(here))
    _, small_s = _seconds(lambda: there[:_SMALL].copy_(here[:_SMALL]))
    return _link(name, _LARGE / copy_s, _LARGE / copy_s, _LARGE / copy_s, small_s)


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Median and least time of `work`."""
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(statistics.median(times), 1e-9), min(times)


def _link(name: str, out: float, back: float, both: float, small_s: float, compute_slowdown: float = 0.0) -> Link:
    """`small_s`: of one small copy out. What its bytes do not account for is what a copy costs beside them."""
    return Link(
        out_bytes_per_s=out,
        in_bytes_per_s=back,
        # Clocks are coarse: together the lanes carry no less than one of them, and no more than both.
        both_bytes_per_s=min(max(both, out, back), out + back),
        copy_us=max((small_s - _SMALL / out) * 1e6, 0.0),
        name=name,
        compute_slowdown=compute_slowdown,
    )
