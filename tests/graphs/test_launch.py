"""The order in which a replay, its event and the caller's stream are issued, on a device that only writes it down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lighterage.graphs.replaying import Launch
from lighterage.graphs.shared_memory import SharedMemory

Line = tuple[Any, ...]


class Stream:
    def __init__(self, device: int, name: str, log: list[Line]) -> None:
        self.device, self.name, self._log = device, name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append((self.name, "waits for", other.name))

    def wait_event(self, event: Event) -> None:
        self._log.append((self.name, "waits for the event"))

    def __repr__(self) -> str:
        return self.name


class Event:
    cuda_event = 7

    def __init__(self, log: list[Line]) -> None:
        self._log = log

    def record(self, stream: Stream) -> None:
        self._log.append(("event on", stream.name))


class Machine:
    """Two devices, of which the first is the current one; setting a stream makes its device current, as in PyTorch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Line] = []
        self.current = 0
        self.main = [Stream(index, f"main {index}", self.log) for index in range(2)]
        self.streams = list(self.main)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.streams[self.current])
        monkeypatch.setattr(torch.cuda, "set_stream", self._set)
        monkeypatch.setattr(torch.cuda, "device", self._device)

    def _set(self, stream: Stream) -> None:
        self.current = stream.device
        self.streams[stream.device] = stream

    @contextlib.contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_s_stream_is_that_of_the_graph_s_device(machine: Machine, index: int, fails: bool) -> None:
    side, log = Stream(index, "side", machine.log), machine.log
    launch = Launch(torch.device("cuda", index), side, None)  # type: ignore[arg-type]
    with contextlib.suppress(KeyError), launch.order(frozenset(), SharedMemory()):
        log.append(("replay on", torch.cuda.current_stream()))
        if fails:
            raise KeyError("stop")
    expected: list[Line] = [("side", "waits for", f"main {index}"), ("replay on", side)]
    assert log == (expected if fails else [*expected, (f"main {index}", "waits for", "side")])
    assert machine.current == 0 and machine.streams == machine.main


def test_the_event_comes_after_the_replay_unless_the_graph_records_it(machine: Machine) -> None:
    side, log = Stream(0, "side", machine.log), machine.log
    launch = Launch(torch.device("cuda", 0), side, Event(log))  # type: ignore[arg-type]
    for inside in (frozenset[int](), frozenset({7})):
        log.clear()
        with launch.order(inside, SharedMemory()):
            log.append(("replay",))
        after = [] if inside else [("event on", "side")]
        assert log == [("side", "waits for", "main 0"), ("replay",), *after, ("main 0", "waits for the event")]


def test_without_a_stream_the_caller_s_own_is_used_and_nothing_waits(machine: Machine) -> None:
    launch = Launch(torch.device("cuda", 1), None, Event(machine.log))  # type: ignore[arg-type]
    with launch.order(frozenset(), SharedMemory()):
        machine.log.append(("replay on", torch.cuda.current_stream()))
    assert machine.log == [("replay on", machine.main[1]), ("event on", "main 1")]
    assert machine.current == 0


def test_the_next_replay_in_the_same_memory_waits_for_the_last_one_on_whichever_stream(machine: Machine) -> None:
    """An event inside a graph lets the caller's stream go on while the graph still uses its memory."""
    side, other, log = Stream(0, "side", machine.log), Stream(0, "other", machine.log), machine.log
    memory, device = SharedMemory(), torch.device("cuda", 0)
    waits: list[list[Line]] = []
    for stream in (side, side, None, other):
        log.clear()
        with Launch(device, stream, Event(log)).order(frozenset({7}), memory):  # type: ignore[arg-type]
            waits.append(log.copy())
    assert waits == [
        [("side", "waits for", "main 0")],
        [("side", "waits for", "main 0")],
        [("main 0", "waits for", "side")],
        [("other", "waits for", "main 0"), ("other", "waits for", "main 0")],
    ]
