"""Urgent reloads on an accelerator: they overtake, what comes after gives way, and their blocks have fences too."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lighterage.engine import lanes
from lighterage.engine.accelerator import Accelerator
from lighterage.engine.lanes import Fence, Resting
from lighterage.engine.pinned_disk import DiskTransport
from lighterage.engine.pinned_host import HostTransport
from lighterage.engine.policy import Policy
from lighterage.engine.stores import Stores
from lighterage.engine.streams import EventFence
from tests.gpu.test_engine_cuda import LONG, MIB, Churn, noise, offloader_of

pytestmark = pytest.mark.gpu


class Moved:
    """A transport to pinned memory, used directly; `holds_up` are the names of lanes that wait before each copy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tier: str = "host", **policy: Any) -> None:
        self.holds_up: set[str] = set()
        self.stores = Stores(Policy(tier=tier, **policy), self._hold_up)  # type: ignore[arg-type]
        transport = self.stores.open(torch.device("cuda", torch.cuda.current_device()))
        assert isinstance(transport, Accelerator)
        monkeypatch.setattr(transport, "has_room", lambda: False)  # wait for host memory rather than stay
        self.transport: Any = transport

    def _hold_up(self) -> None:
        streams, now = self.transport._streams, torch.accelerator.current_stream()
        if any(now == getattr(streams, name) for name in self.holds_up):
            torch.cuda._sleep(LONG)

    def rest(self, data: Tensor) -> Resting:
        (found,) = self.transport.evict([(data.untyped_storage(), 0, data.nbytes)])
        assert found is not None, self.transport.refusal
        return found  # type: ignore[no-any-return]

    def back(self, one: Resting, into: Tensor, *, urgent: bool = False) -> Fence:
        (fence,) = self.transport.restore([[(one, into)]], urgent=urgent)
        return fence  # type: ignore[no-any-return]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Moved]]:
    made: list[Moved] = []

    def make(**policy: Any) -> Moved:
        made.append(Moved(monkeypatch, **policy))
        return made[-1]

    yield make
    torch.cuda.synchronize()
    for one in made:
        one.transport.close()
        one.stores.close()


def ms_between(first: torch.Event, second: Fence) -> float:
    assert isinstance(second, EventFence)
    return float(first.elapsed_time(second.event))


@pytest.mark.parametrize("nbytes", [1, 7, 4096, 65535, 3 * MIB + 8, 3 * MIB + 5])
def test_a_kernel_reads_what_the_copy_engine_would(moved: Callable[..., Moved], nbytes: int) -> None:
    world = moved()
    world.transport._reader.make_ready()
    large = noise(256 * MIB, 0)
    resting, back = world.rest(large), torch.empty_like(large)
    data = noise(nbytes, 1)
    small, into = world.rest(data), torch.empty_like(data)
    torch.cuda.synchronize()
    calls: list[int] = []
    read = world.transport._reader._read
    world.transport._reader._read = lambda to, source: (calls.append(to.numel()), read(to, source))
    with torch.cuda.stream(world.transport._streams.inbound):
        torch.cuda._sleep(100_000_000)  # however long the host takes until it asks for more
    world.back(resting, back)
    world.back(small, into, urgent=True)
    torch.cuda.synchronize()
    assert sum(calls) == nbytes, "the lane was at work"
    assert torch.equal(into, data) and torch.equal(back, large)
    into.zero_()
    world.back(small, into, urgent=True)
    torch.cuda.synchronize()
    assert sum(calls) == nbytes, "the lane was idle"
    assert torch.equal(into, data)


@pytest.mark.undisturbed
@pytest.mark.parametrize("urgent", [True, False])
def test_an_urgent_reload_finishes_before_a_large_earlier_one(moved: Callable[..., Moved], urgent: bool) -> None:
    """512 MiB take some 10 ms; 8 MiB that are asked for meanwhile are read by a kernel, or wait for all of it."""
    world = moved()
    world.transport._reader.make_ready()
    large, small = noise(512 * MIB, 0), noise(8 * MIB, 1)
    resting = world.rest(large), world.rest(small)
    backs = torch.empty_like(large), torch.empty_like(small)
    torch.cuda.synchronize()
    shares = []
    for _ in range(5):
        begin = torch.Event("cuda", enable_timing=True)
        torch.accelerator.current_stream().record_event(begin)
        first = world.back(resting[0], backs[0])
        second = world.back(resting[1], backs[1], urgent=urgent)
        torch.cuda.synchronize()
        shares.append(ms_between(begin, second) / ms_between(begin, first))
        assert torch.equal(backs[0], large) and torch.equal(backs[1], small)
        for back in backs:
            back.zero_()
    print(f"urgent={urgent}: the small one was there after {[round(share, 3) for share in shares]} of the large one")
    if urgent:
        assert sorted(shares)[2] < 0.5
    else:
        assert min(shares) > 0.99


@pytest.mark.undisturbed
@pytest.mark.parametrize("what", ["out", "in"])
def test_what_is_issued_after_an_urgent_reload_gives_way(moved: Callable[..., Moved], what: str) -> None:
    world = moved()
    first, second, third = (noise(4 * MIB, seed) for seed in range(3))
    resting = world.rest(first), world.rest(second)
    back, other = torch.empty_like(first), torch.empty_like(second)
    torch.cuda.synchronize()
    world.holds_up = {"urgent"}
    urgent = world.back(resting[0], back, urgent=True)
    later = world.rest(third).left if what == "out" else world.back(resting[1], other)
    torch.cuda.synchronize()
    assert isinstance(urgent, EventFence) and ms_between(urgent.event, later) >= 0
    assert torch.equal(back, first)


def test_an_urgent_reload_of_bytes_on_their_way_out_comes_after_them(moved: Callable[..., Moved]) -> None:
    world = moved()
    data = noise(64 * MIB, 0)
    back = torch.zeros_like(data)
    torch.cuda.synchronize()
    world.holds_up = {"outbound"}
    one = world.rest(data)
    world.back(one, back, urgent=True).order()
    assert torch.equal(back, data)


@pytest.mark.parametrize("gives_way", [True, False])
def test_a_block_is_written_again_only_after_an_urgent_reload_has_read_it(
    moved: Callable[..., Moved], gives_way: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the block's own fence, whether or not the outbound lane comes after the copy anyway."""
    if not gives_way:
        monkeypatch.setattr(HostTransport, "_go_first", lambda *_: None)
    world = moved(host_budget=24 * MIB)
    old, new = noise(20 * MIB, 0), noise(20 * MIB, 1)
    back = torch.zeros_like(old)
    resting = [world.rest(old)]
    torch.cuda.synchronize()
    world.holds_up = {"urgent"}
    fence = world.back(resting[0], back, urgent=True)
    resting.clear()
    second = world.rest(new)  # there is room for it in that block alone
    fence.order()
    assert torch.equal(back, old)
    world.holds_up = set()
    world.back(second, back).order()
    assert torch.equal(back, new)


@pytest.mark.parametrize("chunk", [50_000, 400_000])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_chunks_and_delayed_lanes_give_the_same_bits(tier: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward in any order, so that much is urgent; every lane is held up at random."""
    monkeypatch.setattr(lanes, "CHUNK_BYTES", chunk)
    num_urgent = [0, 0]
    for kind in (HostTransport, DiskTransport):
        restore = kind.restore

        def counted(self: Any, batches: Any, *, urgent: bool = False, restore: Any = restore) -> Any:
            num_urgent[urgent] += len(batches)
            return restore(self, batches, urgent=urgent)

        monkeypatch.setattr(kind, "restore", counted)
    chance = random.Random(chunk)
    enough, too_long = time.monotonic() + 4, time.monotonic() + 120
    for seed in itertools.count():
        offloader = offloader_of(
            lambda: torch.cuda._sleep(chance.choice([0, 0, 0, 100_000, 1_000_000, 5_000_000])),
            tier=tier,
            host_budget=chance.choice([3 * MIB, 6 * MIB]),
            release_after=seed % 2,
            prefetch_ahead=seed % 4,
        )
        with offloader:
            churn = Churn(seed, offloader)
            churn.run(20)
            assert churn.num_seen > 0 and int(churn.wrong) == 0
            assert offloader.stats().host_bytes_in_use == 0
        if time.monotonic() > (enough if min(num_urgent) > 20 else too_long):
            break
    assert min(num_urgent) > 20, "one of the lanes in was hardly used"


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_memory_that_goes_on_the_way_back_is_not_used_again_too_early(tier: str, moved: Callable[..., Moved]) -> None:
    """What an urgent reload writes is dropped before it has: the allocator is told of its lane."""
    world = moved(tier=tier)
    data = noise(20 * MIB, 0)
    one = world.rest(data)
    torch.cuda.synchronize()
    world.holds_up = {"urgent"}
    for _ in range(5):  # on a busy machine the copy may be over before it is looked at
        back = torch.empty_like(data)
        fence = world.back(one, back, urgent=True)
        world.transport.bury(back.untyped_storage(), fence)
        address = back.data_ptr()
        del back
        if tier == "disk":
            fence.ticket.wait()  # type: ignore[attr-defined]
        world.transport.tidy()
        taken = [torch.full((20 * MIB,), 85, dtype=torch.uint8, device="cuda") for _ in range(4)]
        early = not fence.done()
        torch.cuda.synchronize()
        assert all(bool((one == 85).all()) for one in taken)
        if early:
            assert address not in {one.data_ptr() for one in taken}
            return
        del taken
    raise AssertionError("no copy was ever under way")


@pytest.mark.undisturbed
def test_an_urgent_reload_from_disk_overtakes_a_large_one(moved: Callable[..., Moved]) -> None:
    world = moved(tier="disk")
    large, small = noise(512 * MIB, 0), noise(MIB, 1)
    resting = world.rest(large), world.rest(small)
    for one in resting:
        one.written.wait()  # type: ignore[attr-defined]
    backs = torch.empty_like(large), torch.empty_like(small)
    torch.cuda.synchronize()
    first = world.back(resting[0], backs[0])
    second = world.back(resting[1], backs[1], urgent=True)
    second.wait()
    assert not first.done()
    first.wait()
    assert torch.equal(backs[0], large) and torch.equal(backs[1], small)
