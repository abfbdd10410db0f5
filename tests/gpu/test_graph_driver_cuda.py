"""What the engine relies on of CUDA's driver while a graph is captured."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from lighterage.engine.cuda import CudaPinner, copy_batches
from lighterage.engine.graph_driver import Deed, GraphDriver, graph_driver
from tests.gpu.graph_models import captured_raw

pytestmark = pytest.mark.gpu

LONG = 100_000_000
"""Cycles: some 50 ms."""


@pytest.fixture
def driver() -> GraphDriver:
    found = graph_driver()
    assert found is not None
    return found


def soon(deed: Deed) -> bool:
    until = time.monotonic() + 5
    while not deed.is_over and time.monotonic() < until:
        time.sleep(0.005)
    return deed.is_over


def test_a_stream_tells_its_capture_and_a_lane_that_joins_it(driver: GraphDriver) -> None:
    stream, lane = torch.cuda.Stream(), torch.cuda.Stream()
    assert driver.capture_of(stream.cuda_stream) is None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = driver.capture_of(stream.cuda_stream)
        assert found is not None and driver.capture_of(lane.cuda_stream) is None
        torch.zeros(1, device="cuda")
        lane.wait_stream(stream)
        assert driver.capture_of(lane.cuda_stream) == found
        stream.wait_stream(lane)
    assert driver.capture_of(stream.cuda_stream) is driver.capture_of(lane.cuda_stream) is None
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again, stream=stream):
        other = driver.capture_of(stream.cuda_stream)
        torch.zeros(1, device="cuda")
    assert other is not None and other[0] != found[0]


def test_a_lane_that_rejoined_leaves_its_copies_as_leaves_that_a_replay_waits_for(driver: GraphDriver) -> None:
    stream, lane = torch.cuda.Stream(), torch.cuda.Stream()
    x, copied = torch.ones(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        x.add_(1)
        lane.wait_stream(stream)
        with torch.cuda.stream(lane):
            torch.cuda._sleep(LONG)
            copied.copy_(x)
        assert driver.rejoin(lane.cuda_stream, stream.cuda_stream)
        torch.zeros(1, device="cuda")
    graph.replay()
    seen = copied.clone()
    assert torch.equal(seen, torch.full_like(seen, 2))


def test_events_and_registrations_of_outside_are_no_business_of_a_capture(driver: GraphDriver) -> None:
    memory = torch.empty(1 << 20, dtype=torch.uint8)
    page = -memory.data_ptr() % 4096
    graph, stream, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    x = torch.ones(4, device="cuda") * 2
    x.fill_(1)
    torch.cuda._sleep(1)  # loading a kernel for the first time may wait for the device
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10 * LONG)
        event = side.record_event()
    with torch.cuda.stream(stream), captured_raw(graph):
        y = x * 2
        with driver.relaxed():
            assert not event.query()
            event.synchronize()
            assert event.query()
        pinner().pin(memory.data_ptr() + page, 64 << 10)
        y = y * 2
    graph.replay()
    assert y.tolist() == [4, 4, 4, 4]
    pinner().unpin(memory.data_ptr() + page)


def pinner() -> CudaPinner:
    return CudaPinner(torch.device("cuda", torch.cuda.current_device()))


def pinned(nbytes: int) -> tuple[Tensor, Tensor]:
    """Registered memory, and what keeps it."""
    memory = torch.empty(nbytes + 4096, dtype=torch.uint8)
    page = -memory.data_ptr() % 4096
    part = memory[page : page + nbytes]
    pinner().pin(part.data_ptr(), nbytes)
    return part, memory


def test_copies_with_registered_memory_are_captured_and_replayed_without_the_host() -> None:
    nbytes = 16 << 20
    host, _kept = pinned(nbytes)
    x = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    back = torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    batches = copy_batches(x.device)
    assert batches is not None
    with torch.cuda.graph(graph):
        torch.cuda._sleep(LONG)
        raw = torch.cuda.current_stream().cuda_stream
        assert batches.copy([host.data_ptr()], [x.data_ptr()], [nbytes], raw)
        assert batches.copy([back.data_ptr()], [host.data_ptr()], [nbytes], raw)
    for value in (3, 4):
        x.fill_(value)
        start = time.perf_counter()
        graph.replay()
        assert time.perf_counter() - start < 0.03
        assert bool((back == value).all()) and bool((host == value).all())
    pinner().unpin(host.data_ptr())


@pytest.mark.parametrize(
    "how", ["reset", "deleted", "never instantiated", pytest.param("failed", marks=pytest.mark.cuda_error)]
)
def test_a_deed_is_over_when_the_graph_and_its_replays_are(driver: GraphDriver, how: str) -> None:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    deed = None
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin()
            found = driver.capture_of(stream.cuda_stream)
            assert found is not None
            deed = driver.own(found[1])
            torch.cuda._sleep(LONG)
            assert deed is not None and not deed.is_over
            if how == "failed":
                stream.synchronize()
            graph.capture_end()
    except RuntimeError:
        assert how == "failed"
        with torch.cuda.stream(stream), pytest.raises(RuntimeError):
            graph.capture_end()
    assert deed is not None
    if how in ("reset", "deleted"):
        time.sleep(0.05)
        assert not deed.is_over
        graph.replay()
        if how == "reset":
            graph.reset()
    del graph
    assert soon(deed)
    deed.wait()
    torch.cuda.synchronize()


def test_events_that_a_replay_records_are_told_from_those_inside(driver: GraphDriver) -> None:
    inside, outside = torch.cuda.Event(), torch.cuda.Event(external=True)
    graph, stream, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        x = torch.zeros(4, device="cuda")
        inside.record(stream)
        side.wait_event(inside)
        stream.wait_stream(side)
        outside.record(stream)
        x.add_(1)
        found = driver.capture_of(stream.cuda_stream)
        assert found is not None
        events = driver.recorded_events(found[1])
    assert events == {outside.cuda_event}
