"""Claims about host memory: blocks, fences, budget, pins, and what is left behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lighterage
from lighterage.engine import arena as arena_module
from lighterage.engine import host_memory, prefault, stores
from lighterage.engine.arena import Arena, Block, growth_step
from lighterage.engine.fenced_space import PendingFences
from lighterage.engine.units import GIB, KIB, MIB
from lighterage.errors import OffloadError


class ManualFence:
    """A fence that finishes when the test says so."""

    def __init__(self, finished: bool = False, error: Exception | None = None) -> None:
        self.finished, self.error, self.num_waits = finished, error, 0

    def done(self) -> bool:
        return self.finished

    def wait(self) -> None:
        self.num_waits += 1
        self.finished = True
        if self.error is not None:
            raise self.error

    def order(self) -> None:
        self.wait()


class FakePinner:
    """Remembers what is pinned, and refuses more than `limit` bytes in all."""

    def __init__(self, limit: int = 1 << 60) -> None:
        self.limit, self.pinned, self.num_calls = limit, dict[int, int](), 0

    def pin(self, address: int, nbytes: int) -> None:
        self.num_calls += 1
        assert address % os.sysconf("SC_PAGE_SIZE") == 0 and nbytes % os.sysconf("SC_PAGE_SIZE") == 0
        if sum(self.pinned.values()) + nbytes > self.limit:
            raise OSError(12, "the driver has no more")
        assert all(address + nbytes <= start or start + size <= address for start, size in self.pinned.items())
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]


def address(block: Block) -> int:
    return block.parts[0].data_ptr()


def must(block: Block | None) -> Block:
    assert block is not None
    return block


programs = st.lists(
    st.one_of(
        st.tuples(st.just("acquire"), st.integers(0, 9000)),
        st.tuples(st.just("retire"), st.integers(0, 50)),
        st.tuples(st.just("finish"), st.integers(0, 50)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(programs, st.booleans())
def test_blocks_are_disjoint_aligned_and_carry_every_unfinished_fence(
    program: list[tuple[str, int]], pinned: bool
) -> None:
    pinner = FakePinner() if pinned else None
    arena = Arena(pinner=pinner, budget=None, capacity=4 * MIB)
    live: list[Block] = []
    guarded: list[tuple[int, int, ManualFence]] = []  # every fence ever, with the bytes that it guards
    for action, number in program:
        if action == "acquire":
            block = must(arena.acquire(number))
            lo, hi = block.offset, block.offset + number
            assert lo % 512 == 0 and sum(part.numel() for part in block.parts) == number == block.nbytes
            assert all(hi <= other.offset or other.offset + other.nbytes <= lo for other in live)
            due = {id(fence) for start, end, fence in guarded if start < hi and lo < end and not fence.finished}
            assert due <= {id(fence) for fence in block.fences}, "the new user waits for every earlier copy"
            assert not any(fence.done() for fence in block.fences)
            live.append(block)
        elif action == "retire" and live:
            block = live.pop(number % len(live))
            fence = ManualFence()
            guarded.append((block.offset, block.offset + block.nbytes, fence))
            block.retire([fence])
        elif action == "finish" and guarded:
            guarded[number % len(guarded)][2].finished = True
        assert arena.bytes_in_use == sum(block.nbytes for block in live)
        assert arena.bytes_in_use <= arena.bytes_peak
        assert arena._space.size <= arena.bytes_reserved
    for block in live:
        block.retire()
    assert arena.bytes_in_use == 0
    assert len(arena._space._free.free_ranges()) <= 1
    arena.close()
    assert all(fence.finished for _, _, fence in guarded)
    assert pinner is None or not pinner.pinned


def test_parts_are_the_bytes_of_the_block_and_nobody_elses() -> None:
    arena = Arena(pinner=None, budget=MIB)
    one, two = must(arena.acquire(700)), must(arena.acquire(513))
    one.parts[0].fill_(1)
    two.parts[0].fill_(2)
    assert one.parts[0].sum() == 700 and two.parts[0].sum() == 2 * 513
    assert arena.bytes_reserved == 1024 + 1024


def test_a_block_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        block = must(Arena(pinner=None, budget=MIB).acquire(512))
    block.parts[0].copy_(torch.ones(512, dtype=torch.uint8))
    assert not block.parts[0].is_inference()


def test_fences_of_coalesced_neighbours_stay_with_their_own_bytes() -> None:
    arena = Arena(pinner=None, budget=None, capacity=MIB)
    fences = [ManualFence() for _ in range(3)]
    blocks = [must(arena.acquire(1024)) for _ in fences]
    for block, fence in zip(blocks, fences, strict=True):
        block.retire([fence])
    first, middle = must(arena.acquire(512)), must(arena.acquire(1024))
    assert first.fences == (fences[0],)
    assert middle.fences == (fences[0], fences[1])
    assert must(arena.acquire(1536)).fences == (fences[1], fences[2])


def test_a_block_retired_unused_hands_its_earlier_fences_on() -> None:
    arena = Arena(pinner=None, budget=None, capacity=MIB)
    fence = ManualFence()
    must(arena.acquire(512)).retire([fence])
    must(arena.acquire(512)).retire()
    assert must(arena.acquire(512)).fences == (fence,)


def test_finished_fences_are_forgotten() -> None:
    pending = PendingFences()
    for at in range(5000):
        fence = ManualFence()
        pending.add(at * 512, at * 512 + 512, [fence])
        fence.finished = True
        assert len(pending) <= 64


def test_retire_twice_gives_back_once() -> None:
    arena = Arena(pinner=None, budget=None, capacity=MIB)
    block = must(arena.acquire(512))
    block.retire()
    block.retire()
    again = must(arena.acquire(512))
    block.retire([ManualFence()])
    assert arena.bytes_in_use == 512
    again.retire()
    assert arena.bytes_in_use == 0


def test_retire_takes_no_lock_so_a_destructor_may_run_while_it_is_held() -> None:
    arena = Arena(pinner=None, budget=None, capacity=MIB)

    class Owner:
        def __init__(self) -> None:
            self.block, self.itself = must(arena.acquire(4096)), self

        def __del__(self) -> None:
            self.block.retire([ManualFence(finished=True)])

    def collect_under_the_lock() -> None:
        Owner()
        with arena._space._lock:
            gc.collect()

    thread = threading.Thread(target=collect_under_the_lock, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "retire deadlocked"
    assert arena.bytes_in_use == 0


def test_many_threads_share_one_arena() -> None:
    arena = Arena(pinner=None, budget=None, capacity=64 * MIB)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for nbytes in range(1, 1500, 7):
            part = must(block := arena.acquire(nbytes)).parts[0]
            part.fill_(mark)
            if not bool((part == mark).all()):
                wrong.append(mark)
            must(block).retire()

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert arena.bytes_in_use == 0
    assert len(arena._space._free.free_ranges()) == 1


@pytest.mark.parametrize("pinned", [False, True])
def test_the_budget_is_honoured_and_the_refusal_says_so(pinned: bool) -> None:
    arena = Arena(pinner=FakePinner() if pinned else None, budget=MIB)
    block = must(arena.acquire(600 * KIB))
    assert arena.refusal is None
    assert arena.acquire(600 * KIB) is None
    assert arena.refusal == "host budget of 1.0 MiB is spent"
    must(arena.acquire(400 * KIB)).retire()
    assert arena.bytes_reserved <= MIB
    block.retire()
    assert arena.acquire(MIB) is not None, "the whole budget is usable"


def test_a_full_range_is_told_from_a_spent_budget() -> None:
    arena = Arena(pinner=None, budget=None, capacity=MIB)
    assert arena.acquire(2 * MIB) is None
    assert arena.refusal == "host memory range of 1.0 MiB is full"


def test_a_machine_that_is_nearly_full_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_LOOK_AGAIN_S", 0.0)
    arena = Arena(pinner=None, budget=None, capacity=64 * MIB)
    kept = must(arena.acquire(MIB))
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 513 * MIB)
    monkeypatch.setattr(host_memory, "total_bytes", lambda: 8 * GIB)
    assert arena.acquire(2 * MIB) is None
    assert arena.refusal is not None and arena.refusal.startswith("host memory is nearly full: 513.0 MiB are available")
    kept.retire()
    assert arena.acquire(MIB) is not None, "what is there already is still handed out"


def test_a_failed_pin_leaves_an_arena_that_serves_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pinner = FakePinner(limit=8 * MIB)
    arena = Arena(pinner=pinner, budget=None, capacity=256 * MIB)
    kept = must(arena.acquire(6 * MIB))
    assert arena.acquire(64 * MIB) is None
    assert arena.refusal == "pinning 64.0 MiB failed: [Errno 12] the driver has no more"
    assert arena.bytes_reserved == 6 * MIB
    assert arena.acquire(MIB) is not None, "a smaller growth is still tried"
    num_calls = pinner.num_calls
    assert arena.acquire(64 * MIB) is None
    assert pinner.num_calls > num_calls, "the success in between makes a large one worth another try"
    num_calls = pinner.num_calls
    assert arena.acquire(64 * MIB) is None
    assert pinner.num_calls == num_calls, "what just failed is not tried again at once"
    monkeypatch.setattr(arena_module, "_PIN_RETRY_S", 0.0)
    pinner.limit = 1 << 60
    assert arena.acquire(64 * MIB) is not None
    kept.retire()
    arena.close()
    assert not pinner.pinned


def test_a_generous_growth_that_fails_is_tried_again_at_the_exact_size() -> None:
    pinner = FakePinner(limit=129 * MIB)
    arena = Arena(pinner=pinner, budget=None, capacity=256 * MIB)
    must(arena.acquire(128 * MIB))
    assert arena.acquire(MIB) is not None
    assert arena.bytes_reserved == 129 * MIB


def test_an_interrupt_while_pinning_loses_nothing() -> None:
    class Interrupted(FakePinner):
        def pin(self, address: int, nbytes: int) -> None:
            super().pin(address, nbytes)
            if self.num_calls == 1:
                raise KeyboardInterrupt

    pinner = Interrupted()
    arena = Arena(pinner=pinner, budget=None, capacity=64 * MIB)
    with pytest.raises(KeyboardInterrupt):
        arena.acquire(4 * MIB)
    assert arena.acquire(4 * MIB) is not None
    assert pinner.num_calls == 1 and arena.bytes_reserved == 4 * MIB
    arena.close()
    assert not pinner.pinned


def test_a_block_over_two_segments_has_a_part_in_each() -> None:
    pinner = FakePinner()
    arena = Arena(pinner=pinner, budget=None, capacity=64 * MIB)
    must(arena.acquire(2 * MIB)).retire()
    block = must(arena.acquire(5 * MIB + 300))
    assert [part.numel() for part in block.parts] == [2 * MIB, 3 * MIB + 300]
    assert [part.data_ptr() for part in block.parts] == list(pinner.pinned)
    assert len(must(arena.acquire(512)).parts) == 1


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1 * MIB, 40 * MIB), min_size=20, max_size=40))
def test_reserved_memory_stays_within_five_percent_of_the_peak(sizes: list[int]) -> None:
    reserved = peak = 0
    for nbytes in sizes:
        peak += nbytes
        if peak > reserved:
            reserved += growth_step(peak - reserved, reserved, 1 << 60)
        assert reserved <= 1.05 * peak + 2 * MIB


def test_identical_steps_reserve_once_and_within_five_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "MADV_POPULATE_WRITE", 9999)  # unknown to the kernel: touch no memory
    pinner = FakePinner()
    arena = Arena(pinner=pinner, budget=None, capacity=4 * GIB)
    reserved = []
    for _ in range(3):
        blocks = [must(arena.acquire(nbytes * 1001)) for nbytes in range(1, 1200, 3)]
        for block in reversed(blocks):
            block.retire()
        reserved.append(arena.bytes_reserved)
    assert reserved[0] == reserved[1] == reserved[2]
    assert reserved[0] <= 1.05 * arena.bytes_peak


def test_memory_is_committed_ahead_of_growths_and_given_back_when_the_needs_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arena_module, "_AHEAD", 64 * MIB)
    monkeypatch.setattr(arena_module, "_AT_ONCE", 8 * MIB)
    pinner = FakePinner()
    arena = Arena(pinner=pinner, budget=None, capacity=512 * MIB)
    arena.prepare()
    frontier = arena._frontier
    assert frontier is not None and frontier.committed_or_under_way == 0 and not pinner.pinned
    block = must(arena.acquire(40 * MIB))
    assert frontier.committed_or_under_way >= 104 * MIB and arena.bytes_reserved == 40 * MIB
    for part in block.parts:
        part.fill_(3)
    committed = _resident_bytes(arena)
    assert committed is None or committed >= 40 * MIB
    arena.settle()
    left = _resident_bytes(arena)
    assert left is None or 40 * MIB <= left <= 42 * MIB
    assert all(bool((part == 3).all()) for part in block.parts)
    assert must(arena.acquire(100 * MIB)).nbytes == 100 * MIB
    arena.close()
    assert not pinner.pinned


def test_close_before_the_needs_are_known_leaves_live_tensors_as_they_are() -> None:
    """An offloader may be closed between the first forward and its backward."""
    arena = Arena(pinner=FakePinner(), budget=None, capacity=64 * MIB)
    arena.prepare()
    block = must(arena.acquire(4 * MIB))
    for part in block.parts:
        part.fill_(7)
    arena.close()
    assert all(bool((part == 7).all()) for part in block.parts)


def test_memory_stays_mapped_while_it_is_being_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, touched = threading.Event(), []
    memory: list[weakref.ref[torch.Tensor]] = []

    def slowly(address: int, nbytes: int, advice: int) -> int:
        go_on.wait(10)
        touched.append(memory[0]() is not None)
        return 0

    monkeypatch.setattr(prefault, "_madvise", lambda: slowly)
    arena = Arena(pinner=FakePinner(), budget=None, capacity=64 * MIB)
    monkeypatch.setattr(arena_module, "_AT_ONCE", 0)
    arena.prepare()
    assert arena.acquire(60 * MIB, lambda: True) is None and not arena.settle()
    assert arena._frontier is not None
    memory.append(weakref.ref(arena._frontier._memory))
    num_chunks = len(arena._frontier._chunks)
    del arena
    gc.collect()
    go_on.set()
    eventually(lambda: len(touched) == num_chunks and memory[0]() is None)
    assert num_chunks == 8 and all(touched)


def eventually(claim: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < until
        time.sleep(0.01)
        gc.collect()


def test_who_can_do_without_is_not_made_to_wait_for_memory_that_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_AT_ONCE", 8 * MIB)
    go_on = threading.Event()
    monkeypatch.setattr(prefault, "_madvise", lambda: lambda *_: go_on.wait(10))
    arena = Arena(pinner=FakePinner(), budget=None, capacity=256 * MIB)
    arena.prepare()
    frontier = arena._frontier
    assert frontier is not None
    assert must(arena.acquire(4 * MIB, lambda: go_on.set() or True)).nbytes == 4 * MIB, (
        "so much is no wait worth the name"
    )
    go_on.clear()
    for _ in range(2):
        assert arena.acquire(32 * MIB, lambda: True) is None and "made ready" in (arena.refusal or "")
    assert frontier.committed_or_under_way <= 8 * MIB, "nothing is committed beside a step that can do without"
    assert not arena.settle(), "what was declined will be needed"
    assert 68 * MIB <= frontier.committed_or_under_way <= 80 * MIB, "just that is made ready then"
    assert arena.acquire(128 * MIB, lambda: True) is None, "that much is not even under way"
    threading.Timer(0.1, go_on.set).start()
    assert must(arena.acquire(64 * MIB, lambda: True)).nbytes == 64 * MIB, "it has waited for that"
    assert go_on.is_set() and not arena.settle()
    assert must(arena.acquire(128 * MIB, lambda: True)).nbytes == 128 * MIB
    assert arena.settle()


def test_what_a_step_did_without_is_made_ready_by_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of many microbatches asks for the same bytes many times over."""
    monkeypatch.setattr(arena_module, "_AT_ONCE", 0)
    monkeypatch.setattr(arena_module, "_AT_FIRST", 16 * MIB)
    monkeypatch.setattr(prefault, "_madvise", lambda: lambda *_: 0)
    arena = Arena(pinner=FakePinner(), budget=None, capacity=1024 * MIB)
    arena.prepare()
    frontier = arena._frontier
    assert frontier is not None
    ready = []
    for _ in range(3):
        for _ in range(40):
            arena.acquire(16 * MIB, lambda: True)
        assert not arena.settle()
        frontier.reach(frontier.committed_or_under_way)
        ready.append(frontier.committed_or_under_way // MIB)
    assert ready == [16, 32, 64]


def test_nothing_is_committed_ahead_where_the_machine_cannot_spare_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: host_memory.spare_bytes() + 8 * MIB)
    arena = Arena(pinner=FakePinner(), budget=None, capacity=64 * MIB)
    arena.prepare()
    monkeypatch.setattr(arena_module, "_AT_ONCE", 0)
    assert arena._frontier is not None
    assert must(arena.acquire(4 * MIB, lambda: False)).nbytes == 4 * MIB
    assert arena._frontier.committed_or_under_way <= 8 * MIB


def _resident_bytes(arena: Arena) -> int | None:
    """Bytes of the arena's range that lie in memory, where the kernel says."""
    if sys.platform != "linux":
        return None
    resident, start = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field = line.split()
        if "-" in field[0] and len(field) > 4:
            start = int(field[0].split("-")[0], 16)
        elif field[0] == "Rss:" and arena._address <= start + 2 * MIB and start < arena._address + arena._limit:
            resident += int(field[1]) * 1024
    return resident


def test_a_small_arena_pins_small_pages() -> None:
    arena = Arena(pinner=FakePinner(), budget=None, capacity=64 * MIB)
    must(arena.acquire(5000))
    assert arena.bytes_reserved == 8192


def test_close_waits_unpins_and_leaves_live_tensors_readable() -> None:
    pinner = FakePinner()
    arena = Arena(pinner=pinner, budget=None, capacity=64 * MIB)
    fence = ManualFence(error=OffloadError("the copy failed"))
    must(arena.acquire(MIB)).retire([fence])
    block = must(arena.acquire(4 * MIB))
    for part in block.parts:
        part.fill_(7)
    arena.close()
    arena.close()
    assert fence.num_waits == 1, "also of a range that is in use again"
    assert not pinner.pinned
    gc.collect()
    assert all(bool((part == 7).all()) for part in block.parts)
    block.retire()
    assert arena.bytes_in_use == 0 and arena.bytes_reserved == 0
    assert arena.acquire(1) is None and arena.refusal == "the arena is closed"


def test_the_memory_goes_with_the_last_tensor() -> None:
    def mapped_kib() -> int:
        return int(
            next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line).split()[1]
        )

    arena = Arena(pinner=None, budget=None, capacity=4 * GIB)
    part = must(arena.acquire(MIB)).parts[0]
    arena.close()
    before = mapped_kib()
    del part
    gc.collect()
    assert before - mapped_kib() >= 4 * GIB // KIB


def test_a_dropped_arena_unpins_itself() -> None:
    pinner = FakePinner()
    arena = Arena(pinner=pinner, budget=None, capacity=64 * MIB)
    must(arena.acquire(MIB)).retire()
    del arena
    gc.collect()
    assert not pinner.pinned


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_that_the_arena_is_its_parents() -> None:
    pinner = FakePinner()
    arena = Arena(pinner=pinner, budget=None, capacity=64 * MIB)
    block = must(arena.acquire(512))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            arena.acquire(512)
        except OffloadError as error:
            block.retire()
            arena.close()
            code = 0 if "belongs to the parent process" in str(error) and len(pinner.pinned) == 1 else 2
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert arena.bytes_in_use == 512


def test_host_memory_is_counted_and_a_control_group_limits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < (host_memory.available_bytes() or 0) <= host_memory.total_bytes()
    for name, text in {
        "memory.max": str(512 * MIB),
        "memory.current": str(100 * MIB),
        "memory.stat": f"anon 5\ninactive_file {30 * MIB}\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_memory, "_memory_folders", lambda: (tmp_path,))
    assert host_memory.total_bytes() == 512 * MIB
    assert host_memory.available_bytes() == 442 * MIB


def test_an_arena_that_a_later_step_opens_gets_to_know_what_is_needed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step may have had nothing to move: a batch to warm up, or modules that went to the device later."""
    made: list[Arena] = []

    def pinned_arena(*, pinner: object, budget: int | None) -> Arena:
        made.append(Arena(pinner=FakePinner(), budget=budget, capacity=64 * MIB))
        return made[-1]

    monkeypatch.setattr(stores, "Arena", pinned_arena)
    layer = torch.nn.Linear(16, 16)
    with lighterage.offload([layer], tier="host", keep_last=0, min_bytes=4096) as offloader:
        layer(torch.randn(2, 16).requires_grad_()).sum().backward()
        assert offloader.stats().num_sections == 1 and not made
        layer(torch.randn(256, 16).requires_grad_()).sum().backward()
        assert offloader.stats().bytes_out > 0
        (arena,) = made
        assert arena._frontier is None, "it would decline for ever what is more than it has"
