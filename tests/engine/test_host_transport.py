"""The transport to pinned memory, with streams and a driver that a test plays: its copies run at once, on the host."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lighterage import OffloadError
from lighterage.engine import accelerator, lanes
from lighterage.engine.allocation import Allocation
from lighterage.engine.arena import Arena
from lighterage.engine.captures import CapturedFence, Captures
from lighterage.engine.lanes import FINISHED, Fence
from lighterage.engine.ledger import Ledger, Row
from lighterage.engine.orders import Orders
from lighterage.engine.pinned_host import HostTransport
from lighterage.engine.traffic import GATHER_BYTES, Traffic
from lighterage.engine.views import describe, emptied_alias
from tests.engine.test_captures import Driver, Lane, Pinner

PAGE = 4096


class PlayedStreams:
    """One stream and two lanes; `driver.now` says what is captured on them."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._captures = Captures(driver)
        self.outbound, self.inbound, self.main, self.urgent = Lane(), Lane(), Lane(), Lane()
        self.now_on: Lane | None = None
        self.since: list[object] = []

    def key(self) -> int:
        return 1

    def current(self) -> Lane:
        return self.main

    def capturing(self) -> bool:
        return 1 in self.driver.now

    def capture(self) -> Any:
        return self._captures.of(1)

    def after(self, stream: Lane, lane: Lane, since: object = None) -> None:
        self.since.append(since)

    @contextlib.contextmanager
    def on(self, lane: Lane, back_to: Lane) -> Iterator[None]:
        self.now_on = lane
        yield
        self.now_on = None

    def fence(self, lane: Lane) -> Fence:
        capture = self.capture()
        return FINISHED if capture is None else CapturedFence(self, capture, "event")  # type: ignore[arg-type]


class PlayedCopies:
    """Copies at once; outside of a capture it is shut, as where the driver takes no batches."""

    def __init__(self, streams: PlayedStreams) -> None:
        self.streams = streams
        self.captured: list[tuple[int, int, int]] = []
        self.lanes: list[Lane | None] = []

    def copy(self, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> bool:
        if not self.streams.capturing():
            return False
        for to, here, size in zip(destinations, sources, sizes, strict=True):
            self.captured.append((to, here, size))
            self.lanes.append(self.streams.now_on)
            ctypes.memmove(to, here, size)
        return True


@pytest.fixture
def driver() -> Iterator[Driver]:
    made = Driver()
    yield made
    for deed in made.deeds:  # an arena whose graphs live has a thread that waits for them
        deed.event.set()


@pytest.fixture
def transport(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> HostTransport:
    streams = PlayedStreams(driver)
    monkeypatch.setattr(accelerator, "Streams", lambda device, before_copies: streams)
    made = HostTransport(torch.device("cpu"), Arena(pinner=Pinner(), budget=None, capacity=64 << 20))
    monkeypatch.setattr(made, "has_room", lambda: False)
    made._batches = PlayedCopies(streams)  # type: ignore[assignment]
    return made


def noise(nbytes: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def source(data: Tensor) -> tuple[torch.UntypedStorage, int, int]:
    return data.untyped_storage(), 0, data.nbytes


def there_and_back(transport: HostTransport, sizes: Sequence[int]) -> None:
    saved = [noise(size, seed) for seed, size in enumerate(sizes)]
    resting = transport.evict([source(data) for data in saved])
    back = [torch.zeros_like(data) for data in saved]
    transport.restore([[(rest, data)] for rest, data in zip(resting, back, strict=True) if rest is not None])
    for data, wanted in zip(back, saved, strict=True):
        assert torch.equal(data, wanted)


def cut_arena(transport: HostTransport) -> None:
    """Two registrations, and nothing in use: a block of more than a page lies across both."""
    arena = transport._arena
    first = arena.acquire(PAGE)
    assert first is not None
    first.retire()
    wide = arena.acquire(3 * PAGE)
    assert wide is not None and len(wide.parts) > 1
    wide.retire()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("sizes", [[1000], [1000, 5000, 513], [3 * PAGE], [PAGE, 2 * PAGE]], ids=str)
def test_bytes_come_back_across_registrations_too(
    transport: HostTransport, driver: Driver, captured: bool, sizes: list[int]
) -> None:
    cut_arena(transport)
    driver.now = {1: 5} if captured else {}
    there_and_back(transport, sizes)
    assert bool(transport._batches.captured) == captured  # type: ignore[union-attr]


def test_each_captured_copy_stays_within_one_registration(transport: HostTransport, driver: Driver) -> None:
    cut_arena(transport)
    ends = [transport._arena._address + end for end in transport._arena._segment_ends]
    driver.now = {1: 5}
    there_and_back(transport, [3 * PAGE])
    copies = transport._batches.captured  # type: ignore[union-attr]
    assert len(copies) == 4
    for to, here, size in copies:
        assert not any(lo < end < lo + size for end in ends for lo in (to, here))


def test_a_capture_has_no_urgent_lane_and_no_chunks(
    transport: HostTransport, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 1000)
    saved, back = noise(2500, 0), torch.zeros(2500, dtype=torch.uint8)
    driver.now = {1: 5}
    (rest,) = transport.evict([source(saved)])
    assert rest is not None
    transport.restore([[(rest, back)]], urgent=True)
    streams, copies = transport._streams, transport._batches
    assert torch.equal(back, saved)
    assert copies.lanes == [streams.outbound, streams.inbound]  # type: ignore[union-attr]
    assert not transport._goes_first


def test_blocks_that_a_graph_used_are_its_own(transport: HostTransport, driver: Driver) -> None:
    driver.now = {1: 5}
    there_and_back(transport, [1000, 5000])
    driver.now = {}
    assert transport._arena.bytes_in_use > 0 and len(driver.deeds) == 1
    there_and_back(transport, [1000])  # eagerly: in blocks of its own, given back at once
    held = transport._arena.bytes_in_use
    driver.deeds[0].event.set()
    assert held > 0 and transport._arena.bytes_in_use == 0


def test_a_block_that_two_graphs_use_waits_for_both(transport: HostTransport, driver: Driver) -> None:
    data = noise(1000, 0)
    driver.now = {1: 5}
    (rest,) = transport.evict([source(data)])
    driver.now = {1: 6}
    back = torch.zeros_like(data)
    assert rest is not None
    transport.restore([[(rest, back)]])
    driver.now = {}
    del rest
    assert torch.equal(back, data)
    forward, backward = driver.deeds
    forward.event.set()
    assert transport._arena.bytes_in_use == 1000
    backward.event.set()
    assert transport._arena.bytes_in_use == 0


def test_nothing_moves_where_nobody_says_when_a_graph_is_gone(
    transport: HostTransport, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rest,) = transport.evict([source(noise(1000, 0))])
    monkeypatch.setattr(driver, "own", lambda graph: None)
    driver.now = {1: 5}
    assert transport.evict([source(noise(1000, 1))]) == [None]
    assert "does not say when it is destroyed" in str(transport.refusal)
    assert rest is not None
    with pytest.raises(OffloadError, match="does not say when it is destroyed"):
        transport.restore([[(rest, torch.zeros(1000, dtype=torch.uint8))]])
    driver.now = {}
    there_and_back(transport, [1000])
    assert transport.refusal is None


@pytest.mark.parametrize("captured", [False, True])
def test_a_copy_that_fails_leaves_no_block_behind(
    transport: HostTransport, driver: Driver, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise RuntimeError("no")

    monkeypatch.setattr(transport._batches, "copy", fail)
    driver.now = {1: 5} if captured else {}
    with pytest.raises(RuntimeError, match="no"):
        transport.evict([source(noise(1000, 0)), source(noise(2000, 1))])
    driver.now = {}
    for deed in driver.deeds:
        deed.event.set()
    assert transport._arena.bytes_in_use == 0


def test_a_refused_copy_of_a_capture_is_an_error(
    transport: HostTransport, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport._batches, "copy", lambda *_: False)
    driver.now = {1: 5}
    with pytest.raises(OffloadError, match=r"capture under torch\.cuda\.device"):
        transport.evict([source(noise(1000, 0))])


def test_memory_of_a_capture_is_dropped_once_its_stream_waits_for_the_copy(
    transport: HostTransport, driver: Driver
) -> None:
    data = noise(1000, 0)
    driver.now = {1: 5}
    (rest,) = transport.evict([source(data)])
    assert rest is not None
    transport.bury(data.untyped_storage(), rest.left)
    assert len(transport._buried) == 1
    transport.tidy()
    assert len(transport._buried) == 1  # not while it is captured
    rest.left.order()
    transport.bury(data.untyped_storage(), rest.left)
    assert len(transport._buried) == 1
    driver.now = {}
    transport.tidy()
    assert not transport._buried


def test_streams_of_a_capture_are_not_taken_for_those_of_other_work(
    transport: HostTransport, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is claimed for two streams wherever two are in play: a capture before or after does not hide one."""
    now = 1
    monkeypatch.setattr(transport._streams, "key", lambda: now)
    monkeypatch.setattr(transport._streams, "capturing", lambda: now in driver.now)
    monkeypatch.setattr(transport._streams, "capture", lambda: transport._streams._captures.of(now))
    transport.stream_key()
    driver.now = {2: 5, 3: 5}
    for now in (2, 3, 2):  # noqa: B007 the streams of the capture, which the transport is asked on in turn
        transport.stream_key()
    assert transport._several_streams
    driver.now = {}
    assert transport._keys == {1}
    transport.stream_key()  # eager work on the last stream of the capture
    assert transport._keys == {1, 2} and transport._several_streams
    driver.now = {2: 6, 3: 6}
    now = 3
    transport.stream_key()
    now = 2
    transport.stream_key()
    assert transport._several_streams


def test_a_captured_copy_out_depends_on_the_point_at_which_its_bytes_were_saved(
    driver: Driver, transport: HostTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels have come after that, so that the copy is not the first thing after one of them."""
    points: list[str] = []

    def point(_: HostTransport) -> str:
        points.append(f"point {len(points)}")
        return points[-1]

    monkeypatch.setattr(HostTransport, "point", point)
    ledger = Ledger()
    traffic = Traffic(threading.RLock(), ledger, only_marked=False)
    section = types.SimpleNamespace(by_hand=False)
    driver.now[1] = 7
    for number in range(3):
        data = noise(8 << 20, number)
        saved = Allocation(
            transport, data.untyped_storage(), number, data.nbytes, data.data_ptr(), emptied_alias(data),
            data._version, Row("layer", gap=False), describe(data, data.nbytes), data, transport.capture(),
        )  # fmt: skip
        traffic.gather(saved, section, data.nbytes, None)  # type: ignore[arg-type]
    assert transport._streams.since == ["point 0", "point 1"], "each starts when the next is saved"
    traffic.flush()
    assert transport._streams.since == ["point 0", "point 1", "point 2"]


@pytest.mark.parametrize("planned", [True, False])
def test_under_a_plan_what_is_large_and_saved_whole_starts_to_leave_at_once(
    planned: bool, driver: Driver, transport: HostTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next save may be a long time of computing away. Without a plan it may still be marked."""
    traffic = Traffic(threading.RLock(), Ledger(), only_marked=False)
    section = types.SimpleNamespace(by_hand=False, orders=Orders("on purpose") if planned else None)
    evicted: list[list[int]] = []

    def evict(_: Traffic, allocations: list[Allocation], *__: object) -> None:
        evicted.append([allocation.key for allocation in allocations])

    monkeypatch.setattr(Traffic, "_evict", evict)

    def save(number: int, data: torch.Tensor) -> None:
        saved = Allocation(
            transport, data.untyped_storage(), number, data.untyped_storage().nbytes(), data.data_ptr(),
            emptied_alias(data), data._version, Row("layer", gap=False),
            describe(data, data.nbytes), data, transport.capture(),
        )  # fmt: skip
        traffic.gather(saved, section, data.nbytes, None)  # type: ignore[arg-type]

    save(0, noise(GATHER_BYTES // 4, 0))
    assert not evicted, "more may share its copy"
    save(1, noise(GATHER_BYTES, 1))
    assert evicted == ([[0, 1]] if planned else [])
    save(2, noise(2 * GATHER_BYTES, 2)[:GATHER_BYTES])
    assert evicted == [[0, 1]], "more of the last may be saved"
    save(3, noise(GATHER_BYTES, 3))
    assert evicted == [[0, 1], [2], [3]][: 3 if planned else 2]
