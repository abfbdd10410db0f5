"""The way of an accelerator's bytes to disk, with streams that a test plays: their copies run at once, on the host."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lighterage.engine import accelerator, lanes
from lighterage.engine.arena import Arena
from lighterage.engine.captures import Captures
from lighterage.engine.disk import DiskStore
from lighterage.engine.lanes import Resting
from lighterage.engine.pinned_disk import DiskTransport
from lighterage.engine.streams import EventFence
from tests.engine.lockstep import eventually
from tests.engine.test_captures import Driver
from tests.engine.test_host_transport import PlayedStreams
from tests.engine.test_urgent import Gate, noise

CHUNK = 1 << 12


class Event:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Lane:
    """Notes what it is told to wait for; what it carries is carried at once."""

    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)

    def record_event(self, event: object = None) -> Event:
        return Event()

    def synchronize(self) -> None:
        pass


class Streams(PlayedStreams):
    """Without captures."""

    def __init__(self) -> None:
        super().__init__(Driver())
        self.outbound, self.inbound, self.main, self.urgent = Lane(), Lane(), Lane(), Lane()  # type: ignore[assignment]
        self.lanes = (self.outbound, self.inbound, self.urgent)
        self.events: list[Any] = [Event() for _ in range(100)]
        self._captures = Captures(self.driver)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def fence(self, lane: Any) -> EventFence:  # type: ignore[override]
        return EventFence(self, lane)  # type: ignore[arg-type]


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> Iterator[DiskTransport]:
    monkeypatch.setattr(lanes, "CHUNK_BYTES", CHUNK)
    streams = Streams()
    monkeypatch.setattr(accelerator, "Streams", lambda device, before_copies: streams)
    store = DiskStore(None, budget=None, checksums=True)
    made = DiskTransport(torch.device("cpu"), Arena(pinner=None, budget=None, capacity=16 << 20), store)
    yield made
    made.close()


def rest(transport: DiskTransport, data: Tensor) -> Resting:
    (found,) = transport.evict([(data.untyped_storage(), 0, data.nbytes)])
    assert found is not None
    return found


class Slow:
    """Holds back what `lane` reads or writes from its chunk number `passes` on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lane: str, passes: int) -> None:
        self.gate = Gate(lane, passes=passes)
        self.log: list[tuple[str, int]] = []
        for verb in ("write", "read"):
            monkeypatch.setattr(DiskStore, verb, self._slowed(getattr(DiskStore, verb)))

    def _slowed(self, transfer: Any) -> Any:
        def slowed(store: DiskStore, extent: Any, data: Tensor, offset: int = 0) -> None:
            self.gate()
            transfer(store, extent, data, offset)
            self.log.append((threading.current_thread().name.removeprefix("lighterage-disk-"), offset))

        return slowed


@pytest.mark.parametrize("urgent", [False, True])
def test_bytes_go_and_come_back_in_chunks(
    transport: DiskTransport, urgent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, "nobody", 0)
    data, back = noise(2 * CHUNK + 10), torch.zeros(2 * CHUNK + 10, dtype=torch.uint8)
    one = rest(transport, data)
    (fence,) = transport.restore([[(one, back)]], urgent=urgent)
    fence.wait()
    assert torch.equal(back, data)
    lane = "urgent" if urgent else "in"
    assert slow.log == [(name, at) for name in ("out", lane) for at in (0, CHUNK, 2 * CHUNK)]


def test_an_urgent_reload_overtakes_what_is_read_and_what_is_queued(
    transport: DiskTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, "lighterage-disk-in", 2)
    saved = [noise(size, seed) for seed, size in enumerate((8 * CHUNK, CHUNK, 100))]
    resting = [rest(transport, data) for data in saved]
    backs = [torch.zeros_like(data) for data in saved]
    first, second = transport.restore([[(one, back)] for one, back in zip(resting[:2], backs[:2], strict=True)])
    eventually(lambda: slow.gate.num_arrived == 3, "the large one is being read")
    (urgent,) = transport.restore([[(resting[2], backs[2])]], urgent=True)
    urgent.wait()
    assert torch.equal(backs[2], saved[2]) and not first.done() and not second.done()
    slow.gate.is_open.set()
    second.wait()
    assert torch.equal(backs[0], saved[0]) and torch.equal(backs[1], saved[1])


@pytest.mark.parametrize("what", ["out", "in"])
def test_other_lanes_stop_between_chunks_while_something_urgent_is_read(
    transport: DiskTransport, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, "lighterage-disk-urgent", 0)
    small, large = noise(100, 0), noise(5 * CHUNK, 1)
    resting = rest(transport, small), rest(transport, large)
    resting[1].written.wait()  # type: ignore[attr-defined]
    slow.log.clear()
    back, other = torch.zeros_like(small), torch.zeros_like(large)
    (urgent,) = transport.restore([[(resting[0], back)]], urgent=True)
    eventually(lambda: slow.gate.num_arrived == 1, "it is being read")
    later = rest(transport, noise(5 * CHUNK, 2)) if what == "out" else transport.restore([[(resting[1], other)]])[0]
    time.sleep(0.02)
    assert slow.log == []
    slow.gate.is_open.set()
    (later.written if what == "out" else later).wait()  # type: ignore[union-attr]
    urgent.wait()
    assert torch.equal(back, small) and len(slow.log) == 6


def test_an_urgent_reload_of_bytes_that_are_still_written_waits_for_them(
    transport: DiskTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch, "lighterage-disk-out", 1)
    data, back = noise(5 * CHUNK), torch.zeros(5 * CHUNK, dtype=torch.uint8)
    one = rest(transport, data)
    eventually(lambda: slow.gate.num_arrived == 2, "it is being written")
    (urgent,) = transport.restore([[(one, back)]], urgent=True)
    slow.gate.is_open.set()
    urgent.wait()
    assert torch.equal(back, data)


def test_streams_too_come_after_an_urgent_reload(transport: DiskTransport) -> None:
    streams = transport._streams
    data = noise(100)
    one = rest(transport, data)
    (urgent,) = transport.restore([[(one, torch.zeros_like(data))]], urgent=True)
    urgent.wait()
    copied = urgent.copied.event  # type: ignore[attr-defined]
    rest(transport, noise(100, 1))
    assert copied in streams.outbound.waited  # type: ignore[attr-defined]
    (fence,) = transport.restore([[(one, torch.zeros_like(data))]])
    fence.wait()
    assert copied in streams.inbound.waited and not transport._goes_first  # type: ignore[attr-defined]


def test_an_extent_is_written_again_only_after_an_urgent_reload_has_read_it(
    transport: DiskTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport._store._budget = 2 * CHUNK
    slow = Slow(monkeypatch, "lighterage-disk-urgent", 0)
    monkeypatch.setattr(transport._way, "give", lambda: None)  # by its fence, and not since it gives way
    old, new, back = noise(2 * CHUNK, 0), noise(2 * CHUNK, 1), torch.zeros(2 * CHUNK, dtype=torch.uint8)
    resting = [rest(transport, old)]
    resting[0].written.wait()  # type: ignore[attr-defined]
    (urgent,) = transport.restore([[(resting[0], back)]], urgent=True)
    eventually(lambda: slow.gate.num_arrived == 1, "it is being read")
    resting.clear()
    second = rest(transport, new)
    time.sleep(0.02)
    assert not second.written.done()  # type: ignore[attr-defined]
    slow.gate.is_open.set()
    second.written.wait()  # type: ignore[attr-defined]
    assert urgent.done() and torch.equal(back, old)


def test_close_finishes_what_is_urgent(transport: DiskTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch, "lighterage-disk-urgent", 0)
    data, back = noise(100), torch.zeros(100, dtype=torch.uint8)
    one = rest(transport, data)
    (urgent,) = transport.restore([[(one, back)]], urgent=True)
    closer = threading.Thread(target=transport.close)
    closer.start()
    closer.join(0.03)
    assert closer.is_alive()
    slow.gate.is_open.set()
    closer.join(10)
    assert not closer.is_alive() and urgent.done() and torch.equal(back, data)
