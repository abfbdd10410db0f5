"""An offloader that plans, in a graph's capture: it measures nothing, says so, and goes on afterwards."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lighterage
from lighterage import Link


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a graph is captured, and by its last element: it is told as CUDA would."""
    state = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[-1])
    return state


def test_in_a_capture_no_link_is_measured_and_what_is_not_planned_is_told(
    capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring waits for the device, which breaks a capture."""
    asked: list[bool] = []

    def measure(*_: object) -> Link:
        asked.append(capturing[-1])
        return Link(out_bytes_per_s=1e9, in_bytes_per_s=1e9, both_bytes_per_s=1e9, copy_us=10.0)

    monkeypatch.setattr("lighterage.engine.offloader.measure_link", measure)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)))
    with lighterage.offload(layers, min_bytes=64) as offloader:
        auto = offloader._auto
        assert auto is not None
        auto._device = torch.device("cuda")
        auto.events._is_cuda = True

        def step() -> None:
            layers(torch.ones(8, 16)).square().mean().backward()

        capturing.append(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning):
                step()  # where warnings are errors, nothing is left open
            step()
        assert offloader.stats(total=True).bytes_out > 0 and not offloader.sections
        auto.events._told_of_capture = False
        with pytest.warns(UserWarning, match="every section moves.*Name keep_last"):
            step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step()  # it is told once
        assert asked == [] and offloader.stats(total=True).bytes_out > 0
        capturing.append(False)
        step()
        assert asked == [False]
