"""Claims about the worker lanes of the CPU backend: order, errors, what a set fence promises, and how lanes end."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lighterage import OffloadError, Policy
from lighterage.engine.cpu import CpuTransport
from lighterage.engine.disk import DiskStore
from lighterage.engine.stores import Stores
from lighterage.engine.workers import WorkerFence, WorkerLane


class Gate:
    """Holds every job back until it is opened; counts the jobs that came to it."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self.num_arrived = 0

    def __call__(self) -> None:
        self.num_arrived += 1
        assert self._open.wait(10)

    def open(self) -> None:
        self._open.set()


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def in_child(work: object) -> int:
    """The exit code of a forked child that ends with what `work()` returns."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()  # type: ignore[operator]
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the forked child hangs")


def test_jobs_run_in_the_order_of_their_submission() -> None:
    lane = WorkerLane("ordered")
    seen: list[int] = []
    fences = [lane.submit(lambda i=i: seen.append(i)) for i in range(200)]
    fences[-1].wait()
    assert seen == list(range(200))
    assert all(fence.done() for fence in fences)
    lane.close()


def test_a_job_starts_only_after_the_fences_that_it_was_given() -> None:
    gate, seen = Gate(), []
    slow, quick = WorkerLane("slow", gate), WorkerLane("quick")
    earlier = slow.submit(lambda: seen.append("earlier"))
    later = quick.submit(lambda: seen.append("later"), [earlier])
    time.sleep(0.02)
    assert seen == [] and not later.done()
    gate.open()
    later.order()
    assert seen == ["earlier", "later"]
    slow.close()
    quick.close()


def test_a_wait_tells_how_long_it_took() -> None:
    lane = WorkerLane("late", lambda: time.sleep(0.03))
    fence = lane.submit(lambda: None)
    wait = fence.order()
    assert wait is not None and 1 < (wait.milliseconds() or 0) < 10_000
    assert fence.order() is None, "what has finished is not waited for"
    lane.close()


def test_an_error_reaches_whoever_waits_and_nobody_else() -> None:
    lane = WorkerLane("erring")

    def fail() -> None:
        raise OffloadError("the disk is gone")

    bad, good = lane.submit(fail), lane.submit(lambda: None)
    after = lane.submit(lambda: None, [bad])
    good.wait()
    after.wait()
    for _ in range(3):
        with pytest.raises(OffloadError, match="the disk is gone"):
            bad.wait()
        with pytest.raises(OffloadError, match="the disk is gone"):
            bad.order()
    assert bad.done()
    lane.close()


def test_an_interrupt_inside_a_job_does_not_end_the_lane() -> None:
    lane = WorkerLane("interrupted")

    def interrupt() -> None:
        raise KeyboardInterrupt

    bad = lane.submit(interrupt)
    lane.submit(lambda: None).wait()
    with pytest.raises(KeyboardInterrupt):
        bad.wait()
    lane.close()


def test_a_failing_delay_is_an_error_of_the_job() -> None:
    def refuse() -> None:
        raise ValueError("before")

    lane = WorkerLane("refusing", refuse)
    with pytest.raises(ValueError, match="before"):
        lane.submit(lambda: None).wait()
    lane.close()


@pytest.mark.parametrize("fails", [False, True])
def test_tensors_are_let_go_of_before_the_fence_is_set(fails: bool) -> None:
    lane = WorkerLane("letting go")
    for _ in range(200):
        tensor = torch.ones(100)
        alive = StorageWeakRef(tensor.untyped_storage())

        def job(tensor: torch.Tensor = tensor) -> None:
            tensor.sum()
            if fails:
                raise OffloadError("no")

        fence = lane.submit(job)
        del tensor, job
        if fails:
            with pytest.raises(OffloadError):
                fence.wait()
        else:
            fence.wait()
        assert alive.expired()
    lane.close()


def test_an_error_that_was_raised_does_not_hold_on_to_those_who_saw_it() -> None:
    lane = WorkerLane("remembering")

    class Local:
        pass

    def fail() -> None:
        raise OffloadError("no")

    fence = lane.submit(fail)

    def see() -> weakref.ref[Local]:
        local = Local()
        with pytest.raises(OffloadError):
            fence.wait()
        return weakref.ref(local)

    gc.disable()
    try:
        assert see()() is None, "the frames that an error passed through stay with the fence"
    finally:
        gc.enable()
    lane.close()


def test_an_error_from_the_disk_does_not_hold_on_to_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", refused)
    transport = CpuTransport(DiskStore(None, budget=None))
    tensor = torch.ones(1000)
    storage, alive = tensor.untyped_storage(), StorageWeakRef(tensor.untyped_storage())
    resting = transport.evict([(storage, 0, 4000)])[0]
    assert resting is not None
    del tensor, storage
    with pytest.raises(OffloadError, match="Input/output error"):
        resting.left.wait()
    assert alive.expired(), "a fence that failed keeps the device memory that it was to free"
    resting.retire()
    transport.close()


def test_close_finishes_the_queue_and_ends_the_thread() -> None:
    gate, seen = Gate(), []
    lane = WorkerLane("closing", gate)
    for i in range(20):
        lane.submit(lambda i=i: seen.append(i))
    assert len(threads_of("closing")) == 1 and threads_of("closing")[0].daemon
    closer = threading.Thread(target=lane.close)
    closer.start()
    closer.join(0.03)
    assert closer.is_alive(), "close returned while jobs were queued"
    gate.open()
    closer.join(10)
    assert seen == list(range(20)) and threads_of("closing") == []
    lane.close()


def test_a_dropped_lane_ends_its_thread_after_the_queue() -> None:
    gate, seen = Gate(), []
    lane = WorkerLane("dropped", gate)
    (thread,) = threads_of("dropped")
    fence = lane.submit(lambda: seen.append(1))
    del lane
    gate.open()
    thread.join(10)
    assert not thread.is_alive() and seen == [1] and fence.done()


def test_a_lane_can_be_closed_from_its_own_job() -> None:
    lane = WorkerLane("closing itself")
    (thread,) = threads_of("closing itself")
    lane.submit(lane.close).wait()
    thread.join(10)
    assert not thread.is_alive()


def test_many_threads_submit_and_wait() -> None:
    lane, totals = WorkerLane("shared"), []

    def work() -> None:
        mine: list[int] = []
        for i in range(100):
            lane.submit(lambda i=i: mine.append(i)).wait()
        totals.append(mine == list(range(100)))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert totals == [True] * 8
    lane.close()


def test_a_forked_child_is_told_that_the_lane_stayed_with_its_parent() -> None:
    lane = WorkerLane("parent's")
    finished = lane.submit(lambda: None)
    finished.wait()

    def child() -> int:
        finished.wait()  # what has finished is finished here too
        try:
            lane.submit(lambda: None)
        except OffloadError as error:
            lane.close()  # does not wait for a thread that is not there
            return 0 if "forked" in str(error) else 2
        return 1

    assert in_child(child) == 0
    lane.submit(lambda: None).wait()
    lane.close()


def test_a_forked_child_does_not_wait_for_ever_for_its_parents_copies() -> None:
    gate = Gate()
    lane = WorkerLane("slow parent's", gate)
    fence = lane.submit(lambda: None)

    def child() -> int:
        told = 0
        for wait in (fence.wait, fence.order):
            try:
                wait()
            except OffloadError as error:
                told += "fork" in str(error)
        return 0 if told == 2 else 1

    assert in_child(child) == 0
    gate.open()
    fence.wait()
    lane.close()


# --- the transport ------------------------------------------------------------------------------------------------


def transport_of(tier: str, **policy: object) -> CpuTransport:
    transport = Stores(Policy(tier=tier, **policy)).open(torch.device("cpu"))  # type: ignore[arg-type]
    assert isinstance(transport, CpuTransport)
    return transport


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_bytes_come_back_as_they_went_and_the_newest_wins_where_ranges_overlap(tier: str) -> None:
    transport = transport_of(tier)
    memory = torch.arange(256, dtype=torch.uint8)
    whole, middle = memory.clone(), (255 - memory)
    first = transport.evict([(whole.untyped_storage(), 0, 256)])[0]
    second = transport.evict([(middle.untyped_storage(), 64, 128)])[0]
    assert first is not None and second is not None
    back = torch.zeros(256, dtype=torch.uint8)
    (fence,) = transport.restore([[(first, back), (second, back[64:128])]])
    fence.wait()
    expected = memory.clone()
    expected[64:128] = middle[64:128]
    assert torch.equal(back, expected)
    first.retire([fence])
    second.retire([fence])
    transport.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_room_is_written_again_only_after_it_was_read(tier: str) -> None:
    delays = iter([0.0, 0.05] + [0.0] * 10)
    stores = Stores(Policy(tier=tier, host_budget=4096), lambda: time.sleep(next(delays)))  # type: ignore[arg-type]
    transport = stores.open(torch.device("cpu"))
    assert transport is not None
    old, new, back = (torch.full((4096,), value, dtype=torch.uint8) for value in (1, 2, 0))
    first = transport.evict([(old.untyped_storage(), 0, 4096)])[0]
    assert first is not None
    assert transport.evict([(new.untyped_storage(), 0, 4096)]) == [None] and "budget" in (transport.refusal or "")
    (fence,) = transport.restore([[(first, back)]])
    first.retire([fence])
    second = transport.evict([(new.untyped_storage(), 0, 4096)])[0]
    assert second is not None
    second.left.wait()
    assert fence.done() and bool((back == 1).all())
    second.retire()
    transport.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_room_that_nobody_holds_any_more_is_written_again_only_after_it_was_read(tier: str) -> None:
    delays = iter([0.0, 0.05] + [0.0] * 10)
    stores = Stores(Policy(tier=tier, host_budget=4096), lambda: time.sleep(next(delays)))  # type: ignore[arg-type]
    transport = stores.open(torch.device("cpu"))
    assert transport is not None
    old, new, back = (torch.full((4096,), value, dtype=torch.uint8) for value in (1, 2, 0))
    first = transport.evict([(old.untyped_storage(), 0, 4096)])
    assert first[0] is not None
    (fence,) = transport.restore([[(first[0], back)]])
    first.clear()
    assert stores.bytes_in_use == 0, "what is being read holds a room that nobody wants"
    second = transport.evict([(new.untyped_storage(), 0, 4096)])[0]
    assert second is not None
    second.left.wait()
    assert fence.done() and bool((back == 1).all())
    transport.close()


def test_what_failed_on_its_way_out_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, tensor, back = transport_of("disk"), torch.ones(10, dtype=torch.uint8), torch.zeros(10).to(torch.uint8)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        lost = transport.evict([(tensor.untyped_storage(), 0, 10)])[0]
        assert lost is not None
        with pytest.raises(OffloadError, match="No space left"):
            lost.left.wait()
    following = transport.evict([(torch.ones(1000, dtype=torch.uint8).untyped_storage(), 0, 1000)])[0]
    assert following is not None
    following.left.wait()  # the file now reaches past the hole
    (fence,) = transport.restore([[(lost, back)]])
    with pytest.raises(OffloadError, match="No space left"):
        fence.wait()
    transport.close()


def test_a_fence_names_no_error_of_an_earlier_user_of_the_room() -> None:
    lane, bad = WorkerLane("innocent"), WorkerFence()
    bad.finish(OffloadError("not mine"))
    lane.submit(lambda: None, [bad]).wait()
    lane.close()
