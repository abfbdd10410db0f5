"""Fences and blocks of a capture, with a driver that tests play; the same bits wherever captures begin and end."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import random
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage.engine.arena import Arena
from lighterage.engine.captures import CapturedFence, Captures, Tenure
from lighterage.engine.cpu import CpuTransport
from lighterage.engine.graph_driver import Semaphore
from lighterage.engine.pinned_host import _Shared

MIB = 1 << 20


class Deed:
    def __init__(self) -> None:
        self.event = threading.Event()

    @property
    def is_over(self) -> bool:
        return self.event.is_set()

    def wait(self) -> None:
        assert self.event.wait(10)


class Driver:
    """A driver whose captures are what `now` says, by stream."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.deeds: list[Deed] = []

    def capture_of(self, stream: int) -> tuple[int, int] | None:
        return (self.now[stream], 7000 + self.now[stream]) if stream in self.now else None

    def own(self, graph: int) -> Deed:
        self.deeds.append(Deed())
        return self.deeds[-1]

    def rejoin(self, lane: int, stream: int) -> bool:
        return True

    def relaxed(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def recorded_events(self, graph: int) -> frozenset[int]:
        return frozenset()


class Lane:
    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class OneStream:
    """Streams of which one is current."""

    def __init__(self, key: int) -> None:
        self.lane = Lane()
        self._key = key

    def key(self) -> int:
        return self._key

    def current(self) -> Lane:
        return self.lane


def fence_of(driver: Driver, stream: int = 1) -> tuple[CapturedFence, OneStream]:
    capture = Captures(driver).of(stream)
    assert capture is not None
    streams = OneStream(stream)
    return CapturedFence(streams, capture, "event"), streams  # type: ignore[arg-type]


def test_a_capture_is_one_object_until_it_is_over() -> None:
    driver = Driver()
    captures = Captures(driver)
    assert captures.of(1) is None
    driver.now = {1: 5, 2: 5}
    first = captures.of(1)
    assert first is not None and first is captures.of(2) and not first.is_over
    assert first.includes(2) and not first.includes(3)
    driver.now = {1: 6}
    second = captures.of(1)
    assert first.is_over and second is not None and second is not first
    driver.now = {1: 5}  # whatever a driver says later
    assert first.is_over


def test_a_fence_is_waited_for_inside_its_capture_and_once() -> None:
    driver = Driver()
    driver.now = {1: 5}
    fence, streams = fence_of(driver)
    assert not fence.done() and not fence.ordered_on(1)
    fence.wait()  # returns: nothing of a capture runs
    assert fence.order() is None and fence.order() is None
    assert streams.lane.waited == ["event"] and fence.ordered_on(1) and not fence.ordered_on(2)
    lane = Lane()
    fence.order_lane(lane)  # type: ignore[arg-type]
    assert lane.waited == ["event"]


@pytest.mark.parametrize("elsewhere", [{}, {1: 6}], ids=["outside", "another capture"])
def test_a_fence_is_finished_for_everybody_else(elsewhere: dict[int, int]) -> None:
    driver = Driver()
    driver.now = {1: 5}
    fence, streams = fence_of(driver)
    driver.now = elsewhere
    lane = Lane()
    fence.order()
    fence.order_lane(lane)  # type: ignore[arg-type]
    assert fence.done() and fence.ordered_on(1)
    assert streams.lane.waited == lane.waited == []


def shared_block(arena: Arena) -> _Shared:
    block = arena.acquire(MIB)
    assert block is not None
    return _Shared(block)


def test_a_block_is_its_graph_s_until_the_graph_is_gone() -> None:
    arena, deeds = Arena(pinner=None, budget=None, capacity=64 * MIB), [Deed(), Deed()]
    tenures = [Tenure(deed) for deed in deeds]
    room = shared_block(arena)
    offset = room.block.offset
    for tenure in tenures:
        arena.lend(tenure)
        tenure.hold(room)
        tenure.hold(room)  # counts once
    del room
    assert arena.bytes_in_use == MIB
    deeds[1].event.set()
    assert arena.bytes_in_use == MIB
    other = arena.acquire(MIB)
    assert other is not None and other.offset != offset
    deeds[0].event.set()
    assert arena.bytes_in_use == MIB
    again = arena.acquire(MIB)
    assert again is not None and again.offset == offset


def test_a_graph_that_goes_first_leaves_the_block_to_its_handles() -> None:
    arena, deed = Arena(pinner=None, budget=None, capacity=64 * MIB), Deed()
    tenure, room = Tenure(deed), shared_block(arena)
    arena.lend(tenure)
    tenure.hold(room)
    deed.event.set()
    assert arena.bytes_in_use == MIB
    del room
    assert arena.bytes_in_use == 0


class Pinner:
    def __init__(self) -> None:
        self.pinned: set[int] = set()

    def pin(self, address: int, nbytes: int) -> None:
        self.pinned.add(address)

    def unpin(self, address: int) -> None:
        self.pinned.remove(address)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dropped"])
def test_an_arena_stays_pinned_until_the_last_graph_is_gone(closed: bool) -> None:
    pinner, deed = Pinner(), Deed()
    arena = Arena(pinner=pinner, budget=None, capacity=64 * MIB)
    tenure, room = Tenure(deed), shared_block(arena)
    arena.lend(tenure)
    tenure.hold(room)
    if closed:
        arena.close()
        assert arena.acquire(MIB) is None and arena.bytes_reserved > 0
    del room, arena
    assert pinner.pinned
    deed.event.set()
    until = time.monotonic() + 10
    while pinner.pinned and time.monotonic() < until:
        time.sleep(0.01)
    assert not pinner.pinned


def test_a_semaphore_is_posted_without_python() -> None:
    deed = Semaphore()
    assert not deed.is_over
    seen: list[bool] = []
    waiting = [threading.Thread(target=lambda: (deed.wait(), seen.append(deed.is_over))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    post = ctypes.CDLL(None).sem_post
    post.argtypes = [ctypes.c_void_p]
    assert post(deed.address) == 0
    for thread in waiting:
        thread.join(10)
    assert seen == [True, True] and deed.is_over


# --- the engine, wherever captures begin and end ------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 64)
        self.outer = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(nn.functional.gelu(self.inner(x)))


def step(layers: nn.Module, seed: int) -> list[Tensor]:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    out = layers(x).square().mean()
    parameters = [x, *layers.parameters()]
    once = torch.autograd.grad(out, parameters, retain_graph=True)
    return [out.detach(), *once, *torch.autograd.grad(out, parameters)]


@pytest.mark.parametrize("tier", ["disk", "host"])
def test_the_bits_are_the_same_wherever_captures_begin_and_end(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here everything runs at once, so all must be right whatever is taken for captured."""
    chance = random.Random(1)
    now = [0]

    def capture(_: CpuTransport) -> int:
        if chance.random() < 0.05:
            now[0] = chance.choice([0, 1, 2])
        return now[0]

    monkeypatch.setattr(CpuTransport, "capture", capture)
    layers = nn.Sequential(*(Layer() for _ in range(5)))
    twin = copy.deepcopy(layers)
    moved = 0
    policy: dict[str, Any] = {"keep_last": 0, "min_bytes": 1, "tier": tier}
    for release_after in (0, 2):
        with lighterage.offload(layers, release_after=release_after, **policy) as offloader:
            for seed in range(20):
                got, wanted = step(layers, seed), step(twin, seed)
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            stats = offloader.stats(total=True)
            moved += stats.bytes_in
            assert stats.host_bytes_in_use == 0 and offloader._traffic._unused.nbytes == 0
    assert moved > 0


def test_what_was_saved_in_a_capture_is_not_copied_out_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1]
    monkeypatch.setattr(CpuTransport, "capture", lambda _: now[0])
    layer = Layer()
    with lighterage.offload([nn.Identity()], keep_last=0, min_bytes=1) as offloader:
        with offloader.section("captured", plan="manual"):
            out = layer(torch.randn(64, 32))
        now[0] = 0
        offloader.release(offloader.sections[0])
        out.sum().backward()
        del out
        assert offloader.stats().bytes_out == 0
        assert "the capture of a graph began or ended before it was copied out" in str(offloader.report())


def test_bytes_of_a_capture_come_back_anew_in_each_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay between two backward passes writes them anew."""
    now = [1]
    monkeypatch.setattr(CpuTransport, "capture", lambda _: now[0])
    layers = nn.Sequential(Layer(), Layer())
    with lighterage.offload(layers, keep_last=0, min_bytes=1, release_after=0) as offloader:
        out = layers(torch.randn(64, 32)).sum()
        now[0] = 0
        for _ in range(2):
            out.backward(retain_graph=True)
        del out
        stats = offloader.stats()
        assert stats.bytes_in == 2 * stats.bytes_out > 0


def test_each_capture_brings_back_only_what_its_own_forward_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1]
    monkeypatch.setattr(CpuTransport, "capture", lambda _: now[0])
    restored: dict[int, int] = {}
    restore = CpuTransport.restore

    def counted(self: CpuTransport, batches: Any, **how: Any) -> Any:
        restored[now[0]] = restored.get(now[0], 0) + sum(rest.nbytes for batch in batches for rest, _ in batch)
        return restore(self, batches, **how)

    monkeypatch.setattr(CpuTransport, "restore", counted)
    layers = [Layer(), Layer()]
    x = torch.randn(64, 32)
    with lighterage.offload(layers, keep_last=0, min_bytes=1, release_after=0, prefetch_ahead=2) as offloader:
        first = layers[0](x)
        now[0] = 2
        second = layers[1](x)
        now[0] = 3
        second.sum().backward()
        now[0] = 4
        first.sum().backward()
        del first, second
        stats = offloader.stats()
    assert restored == {3: stats.bytes_out // 2, 4: stats.bytes_out // 2} and stats.bytes_out > 0


def test_a_capture_copies_for_itself_what_was_moved_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A static input: what rests elsewhere is of one moment, and each replay must save it as it is then."""
    now = [0]
    monkeypatch.setattr(CpuTransport, "capture", lambda _: now[0])
    x = torch.randn(64, 32, requires_grad=True)
    with lighterage.offload([nn.Identity()], keep_last=0, min_bytes=1) as offloader:
        outs = []
        for capture in (0, 1, 1, 2):
            now[0] = capture
            with offloader.section(f"section {len(outs)}"):
                outs.append(x.square())
        del outs
        assert offloader.stats().bytes_out == 3 * x.nbytes
