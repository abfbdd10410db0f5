"""Several devices, as far as a machine without any can tell: which one is current, what is planned, who pins."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import lighterage
from lighterage.engine import cuda
from lighterage.engine.modules import Residents
from lighterage.engine.packing import Packer
from lighterage.engine.planned_device import planned_device
from lighterage.engine.policy import Policy
from lighterage.engine.streams import Streams

DEVICES = {torch.device("cuda", index) for index in (2, 0, 1)}


class Played:
    """The accelerator as PyTorch documents it: making a stream the current one changes the current device."""

    def __init__(self) -> None:
        self.device = 0
        self.by_device = {0: "main 0", 1: "main 1"}

    def set_stream(self, stream: tuple[int, str]) -> None:
        self.device = stream[0]
        self.by_device[stream[0]] = stream[1]

    @contextlib.contextmanager
    def device_index(self, index: int) -> Iterator[None]:
        before, self.device = self.device, index
        try:
            yield
        finally:
            self.device = before


def streams_of(played: Played, index: int) -> Streams:
    streams = object.__new__(Streams)
    streams.device = torch.device("cuda", index)
    streams.before_copies = None
    streams.capturing = lambda: False
    streams._current_device = lambda: played.device
    return streams


@pytest.mark.parametrize("fails", [False, True])
def test_a_lane_of_another_device_leaves_the_current_device_as_it_was(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played()
    monkeypatch.setattr(torch.accelerator, "set_stream", played.set_stream)
    monkeypatch.setattr(torch.accelerator, "device_index", played.device_index)
    for index in (0, 1):
        streams = streams_of(played, index)
        with contextlib.suppress(RuntimeError), streams.on((index, "lane"), (index, f"main {index}")):  # type: ignore[arg-type]
            assert (played.device, played.by_device[index]) == (index, "lane")
            if fails:
                raise RuntimeError
        assert played.device == 0
        assert played.by_device == {0: "main 0", 1: "main 1"}


def test_memory_is_pinned_by_way_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, object]] = []
    now: list[object] = [0]

    @contextlib.contextmanager
    def device(one: object) -> Iterator[None]:
        now.append(one)
        yield
        now.pop()

    driver = types.SimpleNamespace(
        cudaHostRegister=lambda *_: seen.append(("pin", now[-1])) or 0,
        cudaHostUnregister=lambda _: seen.append(("unpin", now[-1])),
    )
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(cuda, "graph_driver", lambda: None)
    pinner = cuda.CudaPinner(torch.device("cuda", 1))
    pinner.pin(4096, 4096)
    pinner.unpin(4096)
    assert seen == [("pin", torch.device("cuda", 1)), ("unpin", torch.device("cuda", 1))]
    assert now == [0]


def test_steps_are_measured_on_the_first_of_several_devices_and_that_is_told() -> None:
    with pytest.warns(UserWarning, match="on cuda:0 and cuda:1 and cuda:2, and a plan is made .* here cuda:0") as told:
        assert planned_device(Policy(max_slowdown=0.1), DEVICES, stacklevel=0) == torch.device("cuda", 0)
    assert "an offload() of their own" in str(told[0].message)


def test_a_plan_by_hand_or_one_device_is_nothing_to_tell() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planned_device(Policy(keep_last=0), DEVICES, stacklevel=0) == torch.device("cuda", 0)
        assert planned_device(Policy(), {torch.device("cuda", 1)}, stacklevel=0) == torch.device("cuda", 1)
        assert planned_device(Policy(device_budget=5), (), stacklevel=0) == torch.device("cpu")


@pytest.fixture
def on_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules lie on two devices, as far as they are asked."""
    refresh = Residents.refresh

    def on_two(self: Residents) -> None:
        refresh(self)
        self.accelerators = {torch.device("cuda", 1), torch.device("cuda", 0)}

    monkeypatch.setattr(Residents, "refresh", on_two)
    monkeypatch.setattr(Packer, "prepare", lambda self: None)  # it would open their lanes


@pytest.mark.usefixtures("on_two_devices")
def test_the_call_is_where_several_devices_are_told_of() -> None:
    with pytest.warns(UserWarning, match="on cuda:0 and cuda:1, and a plan is made") as told:
        lighterage.offload(nn.Sequential(nn.Linear(2, 2))).close()
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.usefixtures("on_two_devices")
def test_a_budget_for_modules_on_several_devices_is_refused_at_the_call() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    kind = type(model[0])
    with pytest.raises(ValueError, match=r"device_budget='1GiB' is of one device, .* cuda:0 and cuda:1\. Give the"):
        lighterage.offload(model, device_budget="1GiB")
    assert type(model[0]) is kind
