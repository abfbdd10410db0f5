"""Law 6 for pinned memory without a device: streams whose work runs in any order that their waits allow."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lighterage.engine import accelerator, lanes
from lighterage.engine.arena import Arena
from lighterage.engine.lanes import Fence, Resting
from lighterage.engine.pinned_host import HostTransport
from lighterage.engine.streams import EventFence, Streams

Work = tuple[Callable[[], bool], Callable[[], None]]
"""Whether it may run, and what it does."""


class Record:
    """One record of an event; whoever waits for the event waits for its last one at that time."""

    passed = False


class PlayedEvent:
    def __init__(self, world: World) -> None:
        self.world = world
        self.last = Record()

    def query(self) -> bool:
        return self.last.passed

    def synchronize(self) -> None:
        assert self.world.run_until(self.query), "the host waits for what can never come"


class Stream:
    """Work in order; none of it runs before `World` lets it."""

    def __init__(self, key: int) -> None:
        self.stream_id = key
        self.work: deque[Work] = deque()

    def issue(self, run: Callable[[], None]) -> None:
        self.work.append((lambda: True, run))

    def record_event(self, event: PlayedEvent) -> None:
        record = event.last = Record()
        self.issue(lambda: setattr(record, "passed", True))

    def wait_event(self, event: PlayedEvent) -> None:
        record = event.last
        self.work.append((lambda: record.passed, lambda: None))

    def synchronize(self) -> None:
        pass


class Events(list[PlayedEvent]):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def pop(self, *_: Any) -> PlayedEvent:  # type: ignore[override]
        return super().pop() if self else PlayedEvent(self.world)


class World:
    """In the place of `Streams`, and of the driver's copies: a compute stream and the lanes."""

    def __init__(self, seed: int = 0, chance: random.Random | None = None) -> None:
        self.chance = chance or random.Random(seed)
        self.main, self.outbound, self.inbound, self.urgent = (Stream(key) for key in range(4))
        self.lanes = (self.outbound, self.inbound, self.urgent)
        self.events = Events(self)
        self.now_on = self.main
        self.copies: list[tuple[Stream, int]] = []
        """Lane and bytes of each copy, in the order in which they ran."""

    # What the transport asks of streams.
    def key(self) -> int:
        return self.now_on.stream_id

    def current(self) -> Stream:
        return self.now_on

    def capturing(self) -> bool:
        return False

    def capture(self) -> None:
        return None

    def apart(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def after(self, stream: Stream, lane: Stream, since: object = None) -> None:
        lane.wait_event(EventFence(self, stream).event)  # type: ignore[arg-type]

    def fence(self, lane: Stream) -> Fence:
        return EventFence(self, lane)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def on(self, lane: Stream, back_to: Stream) -> Iterator[None]:
        self.now_on = lane
        try:
            yield
        finally:
            self.now_on = back_to

    def copy(self, destinations: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: int) -> bool:
        lane = self.now_on
        assert lane.stream_id == stream
        for to, here, size in zip(destinations, sources, sizes, strict=True):

            def run(to: int = to, here: int = here, size: int = size) -> None:
                ctypes.memmove(to, here, size)
                self.copies.append((lane, size))

            lane.issue(run)
        return True

    # What a test asks of the world.
    def step(self) -> bool:
        """Run one piece of work that may run; whether there was one."""
        ready = [s for s in (self.main, *self.lanes) if s.work and s.work[0][0]()]
        if not ready:
            return False
        self.chance.choice(ready).work.popleft()[1]()
        return True

    def run_until(self, reached: Callable[[], bool]) -> bool:
        while not reached():
            if not self.step():
                return False
        return True

    def finish(self) -> None:
        while self.step():
            pass
        assert not any(s.work for s in (self.main, *self.lanes)), "the streams wait for each other"


def transport_in(world: World, monkeypatch: pytest.MonkeyPatch, budget: int | None = None) -> HostTransport:
    monkeypatch.setattr(accelerator, "Streams", lambda device, before_copies: world)
    # Nothing is pinned bit by bit, so that each block has one address and all copies go by the played driver.
    made = HostTransport(torch.device("cpu"), Arena(pinner=None, budget=budget, capacity=16 << 20))
    monkeypatch.setattr(made, "has_room", lambda: False)
    made._batches = world  # type: ignore[assignment]
    return made


def noise(nbytes: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rest(transport: HostTransport, data: Tensor) -> Resting:
    (found,) = transport.evict([(data.untyped_storage(), 0, data.nbytes)])
    assert found is not None
    return found


class Churn:
    """Few blocks for many bytes; device memory is spoilt, or used again, as soon as the compute stream may do so."""

    def __init__(self, world: World, transport: HostTransport) -> None:
        self.world, self.transport, self.chance = world, transport, world.chance
        self.held: list[object] = []
        """All device memory there ever was: pending work names addresses."""
        self.free: list[Tensor] = []
        """Device memory that the compute stream has finished with, by the order of its work."""
        self.resting: list[tuple[Resting, Tensor]] = []
        self.dropped: list[tuple[Tensor, Tensor]] = []
        self.num_wrong = self.num_checked = self.num_refused = 0

    def save(self) -> None:
        several = [noise(self.chance.choice([700, 3000, 9000]), self.chance.randrange(1 << 30)) for _ in range(2)]
        expected = [data.clone() for data in several]
        self.held += several
        found = self.transport.evict([(data.untyped_storage(), 0, data.nbytes) for data in several])
        for data, wanted, one in zip(several, expected, found, strict=True):
            if one is None:
                self.num_refused += 1
                continue
            if self.chance.random() < 0.5:
                one.left.order()
                self.world.main.issue(lambda data=data: data.fill_(7))  # type: ignore[misc]
            self.resting.append((one, wanted))

    def load(self, urgent: bool) -> None:
        if not self.resting:
            return
        index = self.chance.randrange(len(self.resting))
        one, wanted = self.resting[index] if self.chance.random() < 0.3 else self.resting.pop(index)
        back = next((free for free in self.free if free.nbytes == wanted.nbytes), None)
        if back is None:
            back = torch.zeros_like(wanted)
        else:
            self.free = [free for free in self.free if free is not back]
        self.held.append(back)
        (fence,) = self.transport.restore([[(one, back)]], urgent=urgent)
        if self.chance.random() < 0.2:
            self.dropped.append((back, wanted))  # on its way back: its block is used again
            return
        fence.order()

        def check() -> None:
            self.num_checked += 1
            self.num_wrong += not torch.equal(back, wanted)
            back.fill_(9)

        self.world.main.issue(check)
        self.free.append(back)

    def go(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.chance.choice([self.save, lambda: self.load(False), lambda: self.load(True)])()
            for _ in range(self.chance.choice([0, 0, 3, 20])):
                self.world.step()
            if len(self.resting) > 4:
                self.resting.pop(0)
        self.world.finish()
        # Nobody would see it in a gradient; but what is read has to be what was written.
        self.num_wrong += sum(not torch.equal(back, wanted) for back, wanted in self.dropped)


@pytest.mark.parametrize("gives_way", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_the_lanes_brings_the_bits_back(
    seed: int, gives_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fences of blocks hold by themselves: who gives way to an urgent copy comes after it anyway."""
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 2048)
    if not gives_way:
        monkeypatch.setattr(HostTransport, "_go_first", lambda *_: None)
    world = World(seed)
    churn = Churn(world, transport_in(world, monkeypatch, budget=48 << 10))
    churn.go(150)
    assert churn.num_wrong == 0, "a block was used again too early, or read too early"
    assert churn.num_checked > 30
    used = {lane.stream_id for lane, _ in world.copies}
    assert used == {1, 2, 3} and max(size for lane, size in world.copies if lane is not world.outbound) <= 2048


class PlayedReader:
    """In the place of the kernel that reads past the copy engine; now and then it is not there."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.num_read = 0

    def read(self, work: Sequence[tuple[Tensor, tuple[Tensor, ...]]]) -> bool:
        if self.world.chance.random() < 0.2:
            return False
        for to, parts in work:
            at = 0
            for part in parts:
                self.world.copy([to.data_ptr() + at], [part.data_ptr()], [part.numel()], self.world.key())
                at += part.numel()
            self.num_read += 1
        return True


@pytest.mark.parametrize("gives_way", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_what_a_kernel_reads_has_the_fences_of_a_copy(
    seed: int, gives_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not gives_way:
        monkeypatch.setattr(HostTransport, "_go_first", lambda *_: None)
    world = World(seed)
    transport = transport_in(world, monkeypatch, budget=48 << 10)
    reader = transport._reader = PlayedReader(world)  # type: ignore[assignment]
    churn = Churn(world, transport)
    churn.go(150)
    assert churn.num_wrong == 0, "a block was used again too early, or read too early"
    assert churn.num_checked > 30 and reader.num_read > 5


def test_a_block_that_a_kernel_reads_is_written_again_only_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HostTransport, "_go_first", lambda *_: None)  # the block's own fence has to hold
    world = World()
    transport = transport_in(world, monkeypatch, budget=2048)
    reader = transport._reader = PlayedReader(world)  # type: ignore[assignment]
    monkeypatch.setattr(world.chance, "random", lambda: 1.0)
    other, small, new = noise(600, 0), noise(900, 1), noise(901, 2)
    resting = [rest(transport, other), rest(transport, small)]
    world.finish()
    backs = torch.zeros_like(other), torch.zeros_like(small)
    world.inbound.work.append((lambda: False, lambda: None))  # it is at work
    transport.restore([[(resting[0], backs[0])]])
    world.urgent.work.append((lambda: False, lambda: None))
    transport.restore([[(resting[1], backs[1])]], urgent=True)
    assert reader.num_read == 1
    world.copies.clear()
    resting.pop()
    rest(transport, new)  # there is no room but in the block that is read
    while world.step():
        pass
    assert world.copies == [], "the block was written before it was read"
    world.urgent.work.popleft()
    world.inbound.work.popleft()
    world.finish()
    assert torch.equal(backs[0], other) and torch.equal(backs[1], small)


class InTurns(random.Random):
    """Streams take turns, piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0

    def choice(self, ready: Sequence[Any]) -> Any:
        self.turn += 1
        return ready[self.turn % len(ready)]


def test_an_urgent_reload_gets_in_between_the_chunks_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lanes take turns copy by copy. An H100's do not: there a kernel reads what is urgent."""
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 1024)
    world = World(chance=InTurns())
    transport = transport_in(world, monkeypatch)
    large, small = noise(64 << 10, 0), noise(900, 1)
    resting = rest(transport, large), rest(transport, small)
    world.finish()
    world.copies.clear()
    backs = torch.zeros_like(large), torch.zeros_like(small)
    transport.restore([[(resting[0], backs[0])]])
    transport.restore([[(resting[1], backs[1])]], urgent=True)
    world.finish()
    assert torch.equal(backs[0], large) and torch.equal(backs[1], small)
    place = world.copies.index((world.urgent, 900))
    assert place <= 4 and len(world.copies) == 65, "it waited for more than a few chunks"


def test_what_is_issued_after_an_urgent_reload_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways; and only once, so that nothing is waited for that was waited for before."""
    world = World()
    transport = transport_in(world, monkeypatch)
    first, second = noise(900, 0), noise(901, 1)
    resting = rest(transport, first), rest(transport, second)
    world.finish()
    back, other, leaving = torch.zeros_like(first), torch.zeros_like(second), noise(902, 2)
    world.copies.clear()
    (fence,) = transport.restore([[(resting[0], back)]], urgent=True)
    transport.restore([[(resting[1], other)]])
    rest(transport, leaving)
    world.urgent.work.appendleft((lambda: False, lambda: None))
    while world.step():
        pass
    assert world.copies == [] and not fence.done(), "a copy did not give way"
    world.urgent.work.popleft()
    world.finish()
    assert world.copies[0] == (world.urgent, 900) and len(world.copies) == 3
    num_waits = len(world.outbound.work)
    rest(transport, noise(900, 3))
    assert not transport._goes_first and len(world.outbound.work) - num_waits <= 3


def test_an_urgent_reload_of_bytes_on_their_way_out_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    transport = transport_in(world, monkeypatch)
    data, other = noise(5000, 0), noise(300, 1)
    wanted = data.clone()
    world.outbound.work.append((lambda: False, lambda: None))
    one = rest(transport, data)
    back = torch.zeros_like(data)
    transport.restore([[(one, back)]], urgent=True)
    rest(transport, other)
    while world.step():
        pass
    assert world.copies == []
    world.outbound.work.popleft()
    world.finish()
    assert torch.equal(back, wanted)
    assert [lane.stream_id for lane, _ in world.copies] == [1, 3, 1]


def test_memory_that_the_lanes_use_is_made_known_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    transport = transport_in(world, monkeypatch)
    told: list[Stream] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda _, stream: told.append(stream))
    transport.share_with_lanes(noise(100, 0).untyped_storage())
    assert told == list(world.lanes)


def test_copies_are_cut_into_chunks_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 100)
    whole = [1000, 2000], [5000, 6000], [100, 7]
    assert lanes.in_chunks(*whole) == tuple(whole)
    assert lanes.in_chunks([1000, 2000], [5000, 6000], [250, 7]) == (
        [1000, 1100, 1200, 2000],
        [5000, 5100, 5200, 6000],
        [100, 100, 50, 7],
    )
    assert lanes.in_chunks([], [], []) == ([], [], [])
    parts = torch.arange(250, dtype=torch.uint8), torch.arange(80, dtype=torch.uint8)
    chunks = [(at, chunk.numel()) for at, chunk in lanes.chunks_of(parts)]
    assert chunks == [(0, 100), (100, 100), (200, 50), (250, 50), (300, 30)]
    assert torch.equal(torch.cat([chunk for _, chunk in lanes.chunks_of(parts)]), torch.cat(parts))
    small = torch.zeros(100, dtype=torch.uint8)
    assert [chunk is small for _, chunk in lanes.chunks_of((small,))] == [True]


def test_the_urgent_lane_is_made_once_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, int]] = []

    def stream(device: torch.device, **how: int) -> Stream:
        made.append(how)
        return Stream(len(made))

    monkeypatch.setattr(torch, "Stream", stream)
    streams = Streams(torch.device("cpu"), None)
    assert len(made) == 2 and streams.lanes == (streams.outbound, streams.inbound)
    assert streams.urgent is streams.urgent and made[2:] == [{"priority": -1}]
    assert streams.lanes == (streams.outbound, streams.inbound, streams.urgent)
