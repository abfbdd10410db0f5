"""On the CPU the peak is what is saved and alive: what was computed again is there again, and counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lighterage
from lighterage.planner.links import NAMED
from lighterage.planner.plan import Mode, Plan, SectionPlan


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(nn.functional.gelu(self.wide(x)))


def backward(layers: nn.Sequential, steps: int) -> None:
    for _ in range(steps):
        (layers(torch.randn(128, 64, requires_grad=True) * 1.0)).square().sum().backward()


@pytest.mark.parametrize("mode", ["save", "selective", "recompute"])
def test_the_measured_peak_is_the_foreseen_one_in_every_mode(mode: Mode) -> None:
    layers = nn.Sequential(*(Layer() for _ in range(4)))
    policy = {"min_bytes": 64, "tier": "host", "max_slowdown": 50.0}
    with lighterage.offload(layers, **policy) as offloader:
        backward(layers, 10)
        timeline = offloader.timeline
    assert timeline is not None
    plan = Plan(
        sections=tuple(SectionPlan(name=section.name, mode=mode) for section in timeline.sections),
        fetches=((),) * len(timeline.phases),
    )
    with lighterage.offload(layers, **policy) as offloader:
        offloader.use_plan(plan, timeline)
        backward(layers, 5)
        report = offloader.report()
    foreseen = lighterage.simulate(timeline, plan, NAMED["pcie5"]).peak_bytes
    assert report.measured_peak_bytes == pytest.approx(foreseen, rel=0.1)
    inputs = sum(one.held_bytes for section in timeline.sections for one in section.allocations if one.kind == "input")
    saved = sum(one.held_bytes for section in timeline.sections for one in section.allocations)
    if mode == "recompute":
        assert inputs < report.measured_peak_bytes < 0.6 * saved
