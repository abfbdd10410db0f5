"""What backward waits for goes first: on the worker lanes, and in what is asked of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import OffloadError, Policy
from lighterage.engine import lanes, stores
from lighterage.engine.cpu import CpuTransport
from lighterage.engine.disk import DiskStore
from lighterage.engine.lanes import Resting
from lighterage.engine.stores import Stores
from lighterage.engine.workers import RightOfWay
from tests.engine.lockstep import eventually
from tests.engine.test_lanes_cpu import in_child

CHUNK = 1 << 12
TIERS = pytest.mark.parametrize("tier", ["host", "disk"])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "CHUNK_BYTES", CHUNK)


class Gate:
    """Called on every lane before each chunk; holds those of `lane` back, one by one, until it is opened."""

    def __init__(self, lane: str, *, passes: int = 0) -> None:
        self.lane = lane
        self.num_arrived = 0
        self.is_open = threading.Event()
        self._passes = passes

    def __call__(self) -> None:
        if threading.current_thread().name == self.lane:
            self.num_arrived += 1
            if self.num_arrived > self._passes:
                assert self.is_open.wait(10)


def transport_of(tier: str, before_each: Callable[[], None] | None = None, **policy: Any) -> CpuTransport:
    transport = Stores(Policy(tier=tier, **policy), before_each).open(torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(transport, CpuTransport)
    return transport


def noise(nbytes: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rest(transport: CpuTransport, data: Tensor) -> Resting:
    (found,) = transport.evict([(data.untyped_storage(), 0, data.nbytes)])
    assert found is not None
    return found


class Seen:
    """Which lane wrote or read which bytes of a room, in order; `hold` keeps an urgent read under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.chunks: list[tuple[str, int, int]] = []
        self.under_way = threading.Event()
        self.go_on = threading.Event()
        for store in (DiskStore, stores._ArenaStore):
            for verb in ("write", "read"):
                monkeypatch.setattr(store, verb, self._watched(getattr(store, verb), fails))

    def _watched(self, transfer: Any, fails: bool) -> Any:
        def watched(store: Any, room: Any, data: Tensor, offset: int = 0) -> None:
            lane = threading.current_thread().name.removeprefix("lighterage-")
            if lane == "urgent":
                self.under_way.set()
                assert self.go_on.wait(10)
                if fails:
                    raise OffloadError("the disk is gone")
            transfer(store, room, data, offset)
            self.chunks.append((lane, offset, data.numel()))

        return watched

    def num_of(self, lane: str) -> int:
        return sum(name == lane for name, _, _ in self.chunks)


# --- the lanes ----------------------------------------------------------------------------------------------------


@TIERS
def test_large_copies_are_cut_into_chunks_and_count_as_one(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    transport = transport_of(tier, disk_checksums=tier == "disk")
    data, back = noise(2 * CHUNK + 100), torch.zeros(2 * CHUNK + 100, dtype=torch.uint8)
    one = rest(transport, data)
    (fence,) = transport.restore([[(one, back)]])
    fence.wait()
    assert torch.equal(back, data)
    cut = [(0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, 100)]
    assert seen.chunks == [*(("out", *chunk) for chunk in cut), *(("in", *chunk) for chunk in cut)]
    transport.close()


@TIERS
def test_an_urgent_reload_overtakes_the_queue_and_the_copy_in_progress(tier: str) -> None:
    gate = Gate("lighterage-in", passes=2)
    transport = transport_of(tier, gate)
    large, queued, small = noise(8 * CHUNK, 0), noise(CHUNK, 1), noise(100, 2)
    resting = [rest(transport, data) for data in (large, queued, small)]
    backs = [torch.zeros_like(data) for data in (large, queued, small)]
    (first,) = transport.restore([[(resting[0], backs[0])]])
    (second,) = transport.restore([[(resting[1], backs[1])]])
    eventually(lambda: gate.num_arrived == 3, "the large copy is in progress")
    (urgent,) = transport.restore([[(resting[2], backs[2])]], urgent=True)
    urgent.wait()
    assert torch.equal(backs[2], small)
    assert not first.done() and not second.done() and gate.num_arrived == 3
    gate.is_open.set()
    second.wait()
    assert torch.equal(backs[0], large) and torch.equal(backs[1], queued)
    transport.close()


@TIERS
@pytest.mark.parametrize("lane", ["out", "in"])
def test_other_copies_give_way_between_their_chunks(tier: str, lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    gate = Gate(f"lighterage-{lane}", passes=1)
    transport = transport_of(tier)
    small, large = noise(100, 0), noise(5 * CHUNK, 1)
    resting = rest(transport, small), rest(transport, large)
    resting[1].left.wait()
    before = seen.num_of(lane)
    transport._before_each = gate  # the lanes were made without it: it is called between chunks alone
    other, back = noise(5 * CHUNK, 2), torch.zeros(5 * CHUNK, dtype=torch.uint8)
    fence = rest(transport, other).left if lane == "out" else transport.restore([[(resting[1], back)]])[0]
    eventually(lambda: gate.num_arrived == 2, "it has come to its third chunk")
    urgent_back = torch.zeros_like(small)
    (urgent,) = transport.restore([[(resting[0], urgent_back)]], urgent=True)
    assert seen.under_way.wait(10)
    gate.is_open.set()
    time.sleep(0.02)
    assert seen.num_of(lane) - before == 2 and not fence.done(), "it did not give way"
    seen.go_on.set()
    fence.wait()
    urgent.wait()
    assert torch.equal(urgent_back, small)
    assert seen.num_of(lane) - before == 5
    transport.close()


@TIERS
def test_an_urgent_reload_of_bytes_on_their_way_out_waits_for_them_and_they_do_not_wait_for_it(tier: str) -> None:
    gate = Gate("lighterage-out", passes=1)
    transport = transport_of(tier, gate)
    data, back = noise(8 * CHUNK), torch.zeros(8 * CHUNK, dtype=torch.uint8)
    one = rest(transport, data)
    eventually(lambda: gate.num_arrived == 2, "it is on its way out")
    (urgent,) = transport.restore([[(one, back)]], urgent=True)
    gate.is_open.set()
    urgent.wait()
    assert torch.equal(back, data)
    transport.close()


@TIERS
def test_an_urgent_reload_that_fails_holds_nobody_up(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch, fails=True)
    seen.go_on.set()
    transport = transport_of(tier)
    data, back = noise(3 * CHUNK), torch.zeros(3 * CHUNK, dtype=torch.uint8)
    one = rest(transport, data)
    (urgent,) = transport.restore([[(one, back)]], urgent=True)
    with pytest.raises(OffloadError, match="the disk is gone"):
        urgent.wait()
    (fence,) = transport.restore([[(one, back)]])
    fence.wait()
    assert torch.equal(back, data)
    rest(transport, noise(3 * CHUNK, 1)).left.wait()
    transport.close()


def test_what_failed_on_its_way_out_is_told_on_the_urgent_lane_too(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, back = transport_of("host"), torch.zeros(CHUNK, dtype=torch.uint8)

    def full(*_: object) -> None:
        raise OffloadError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(stores._ArenaStore, "write", full)
        lost = rest(transport, noise(CHUNK))
        with pytest.raises(OffloadError, match="no space left"):
            lost.left.wait()
    (fence,) = transport.restore([[(lost, back)]], urgent=True)
    with pytest.raises(OffloadError, match="no space left"):
        fence.wait()
    transport.close()


@TIERS
def test_a_room_is_written_again_only_after_an_urgent_reload_has_read_it(tier: str) -> None:
    gate = Gate("lighterage-urgent")
    transport = transport_of(tier, gate, host_budget=2 * CHUNK)
    old, new, back = noise(2 * CHUNK, 0), noise(2 * CHUNK, 1), torch.zeros(2 * CHUNK, dtype=torch.uint8)
    resting = [rest(transport, old)]
    resting[0].left.wait()
    (urgent,) = transport.restore([[(resting[0], back)]], urgent=True)
    eventually(lambda: gate.num_arrived == 1, "nobody gives way yet: it has not begun")
    resting.clear()
    second = rest(transport, new)
    time.sleep(0.02)
    assert not second.left.done()
    gate.is_open.set()
    second.left.wait()
    assert urgent.done() and torch.equal(back, old)
    transport.close()


@TIERS
def test_close_finishes_what_is_urgent(tier: str) -> None:
    gate = Gate("lighterage-urgent")
    transport = transport_of(tier, gate)
    data, back = noise(3 * CHUNK), torch.zeros(3 * CHUNK, dtype=torch.uint8)
    one = rest(transport, data)
    (urgent,) = transport.restore([[(one, back)]], urgent=True)
    closer = threading.Thread(target=transport.close)
    closer.start()
    closer.join(0.03)
    assert closer.is_alive()
    gate.is_open.set()
    closer.join(10)
    assert not closer.is_alive() and urgent.done() and torch.equal(back, data)
    assert not [thread for thread in threading.enumerate() if thread.name == "lighterage-urgent"]


@pytest.mark.parametrize("was_used", [False, True])
def test_a_forked_child_has_no_urgent_lane_of_its_own(was_used: bool) -> None:
    transport = transport_of("host")
    one, back = rest(transport, noise(100)), torch.zeros(100, dtype=torch.uint8)
    one.left.wait()
    if was_used:
        transport.restore([[(one, back)]], urgent=True)[0].wait()

    def child() -> int:
        try:
            transport.restore([[(one, back)]], urgent=True)
        except OffloadError as error:
            transport.close()
            return 0 if "forked" in str(error) else 2
        return 1

    assert in_child(child) == 0
    transport.close()


def test_who_gives_way_waits_for_what_it_finds_and_not_for_what_comes_later() -> None:
    way, passed = RightOfWay(), threading.Event()
    way.give()
    first, second = way.taken(), way.taken()

    def give() -> None:
        way.give()
        passed.set()

    first.__enter__()
    other = threading.Thread(target=give)
    other.start()
    assert not passed.wait(0.02)
    with second:
        first.__exit__(None, None, None)
        assert passed.wait(10), "it waits for one that came later"
    other.join(10)


def test_an_error_ends_the_right_of_way() -> None:
    way = RightOfWay()
    with pytest.raises(KeyError), way.taken():
        raise KeyError
    way.give()


# --- who is urgent ------------------------------------------------------------------------------------------------


class Keep(torch.autograd.Function):
    """Saves `tensors`, and asks for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad, *[None] * len(ctx.saved_tensors))


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], bool]]:
    """Of each call of `restore`: the bytes of each allocation, and whether it was urgent."""
    log: list[tuple[list[int], bool]] = []
    restore = CpuTransport.restore

    def logged(self: CpuTransport, batches: Sequence[Any], *, urgent: bool = False) -> Any:
        if batches:
            log.append(([sum(one.nbytes for one, _ in batch) for batch in batches], urgent))
        return restore(self, batches, urgent=urgent)

    monkeypatch.setattr(CpuTransport, "restore", logged)
    return log


def sections_of(offloader: lighterage.Offloader, sizes: Sequence[Sequence[int]]) -> list[list[Tensor]]:
    """One section for each row, of a graph for each size; the graphs."""
    x, graphs = torch.ones(1, requires_grad=True), []
    for index, row in enumerate(sizes):
        with offloader.section(f"section {index}"):
            graphs.append([Keep.apply(x, noise(nbytes)) for nbytes in row])
    return graphs


def offloader_of(**policy: Any) -> lighterage.Offloader:
    chosen = {"keep_last": 0, "min_bytes": 1, "release_after": 0, "prefetch_ahead": 1, "tier": "host", **policy}
    return lighterage.offload(nn.ModuleList([nn.Identity()]), **chosen)


def test_a_backward_that_goes_as_the_last_one_did_has_nothing_urgent_but_its_beginning(
    restored: list[tuple[list[int], bool]],
) -> None:
    with offloader_of() as offloader:
        for _ in range(3):
            restored.clear()
            for (graph,) in reversed(sections_of(offloader, [[100], [200], [300], [400]])):
                graph.backward()
            assert restored == [([400], True), ([300], False), ([200], False), ([100], False)]


def test_what_is_asked_for_where_nobody_expected_it_is_urgent_and_comes_first(
    restored: list[tuple[list[int], bool]],
) -> None:
    with offloader_of() as offloader:
        graphs = sections_of(offloader, [[100, 101, 102], [200], [3000]])
        graphs[2][0].backward()  # section 1 is on its way now
        restored.clear()
        graphs[0][1].backward()  # not section 1, and not what section 0 saved last
        for graph in (graphs[0][0], graphs[0][2], graphs[1][0]):
            graph.backward()
        assert [nbytes for sizes, _ in restored for nbytes in sizes] == [101, 102, 100]
        assert all(urgent for _, urgent in restored), "it queues behind what is not needed yet"


def test_what_is_next_in_turn_is_not_urgent_where_the_link_is_behind(restored: list[tuple[list[int], bool]]) -> None:
    with offloader_of() as offloader:
        for _ in range(2):  # the second time backward is known to go this way
            graphs = sections_of(offloader, [[50], [401, 402], [391, 405, 10], [60]])
            graphs[3][0].backward()
            graphs[2][2].backward()
            restored.clear()
            graphs[2][1].backward()  # makes room for 402 in the window
            graphs[1][1].backward()  # 401 is away as backward comes to it, and would be next
            graphs[2][0].backward()  # makes room for it
            graphs[1][0].backward()
            graphs[0][0].backward()
    assert restored == [([402], False), ([401], False), ([50], False)]


def test_what_is_loaded_beside_a_full_window_is_not_urgent_where_it_is_next_in_turn(
    restored: list[tuple[list[int], bool]],
) -> None:
    with offloader_of() as offloader:
        for _ in range(2):  # the second time backward is known to go this way
            graphs = sections_of(offloader, [[50], [401, 402], [391, 405, 10], [60]])
            graphs[3][0].backward()
            graphs[2][2].backward()
            restored.clear()
            graphs[1][1].backward()  # 405 and 391 fill the window
            graphs[1][0].backward()
            for graph in (graphs[2][1], graphs[2][0], graphs[0][0]):
                graph.backward()
    assert restored == [([402], False), ([401], False), ([50], False)]


def test_what_is_loaded_beside_a_full_window_is_urgent_and_what_is_fetched_by_hand_is_not(
    restored: list[tuple[list[int], bool]],
) -> None:
    with offloader_of() as offloader:
        graphs = sections_of(offloader, [[10, 11], [5000], [70]])
        graphs[2][0].backward()
        restored.clear()
        for graph in (graphs[0][0], graphs[0][1], graphs[1][0]):
            graph.backward()
        assert restored == [([10], True), ([11], True)]
        ((graph,),) = sections_of(offloader, [[60]])
        offloader.prefetch(offloader.sections[0])
        graph.backward()
        assert restored[2:] == [([60], False)]
