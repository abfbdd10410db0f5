"""Claims about what a step under a plan asks of the host: what the same moves by hand ask, and no more."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import lighterage
from benchmarks.planner_host import same_moves
from lighterage import Offloader
from lighterage.engine.planning import checks
from lighterage.engine.planning.clock import HostClock
from lighterage.engine.planning.step_log import StepLog
from lighterage.engine.sections import Section
from lighterage.engine.traffic import Traffic
from lighterage.planner.timeline import Timeline
from tests.engine.planned import measured

LAYERS, WIDTH, NUM_MOVED = 6, 32, 3
SOURCE = str(Path(lighterage.__file__).parent)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = x + torch.tanh(x @ self.weight).sin()
        return x


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


def step(model: nn.Module) -> None:
    model(torch.ones(16, WIDTH)).square().mean().backward()


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    model = model_of()
    return measured(model, model, [torch.ones(16, WIDTH)], recompute="never")


def planned(model: nn.Module, timeline: Timeline) -> Offloader:
    offloader = lighterage.offload(model, min_bytes=64, tier="host")
    offloader.use_plan(same_moves(timeline, NUM_MOVED, release_after=1, prefetch_ahead=1), timeline)
    return offloader


def by_hand(model: nn.Module) -> Offloader:
    policy = {"keep_last": LAYERS - NUM_MOVED, "release_after": 1, "prefetch_ahead": 1}
    return lighterage.offload(model, min_bytes=64, tier="host", **policy)


def calls_of(model: nn.Module) -> int:
    """Calls of the package's functions in the thread that steps."""
    count = 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(SOURCE)

    sys.setprofile(watch)
    try:
        step(model)
    finally:
        sys.setprofile(None)
    return count


def test_a_planned_step_makes_about_the_calls_of_the_same_moves_by_hand(timeline: Timeline) -> None:
    ours, theirs = model_of(), model_of()
    with planned(ours, timeline) as offloader, by_hand(theirs) as other:
        for _ in range(4):
            step(ours)
            step(theirs)
        num_planned, num_by_hand = (min(calls_of(model) for _ in range(3)) for model in (ours, theirs))
        assert offloader.stats().bytes_out == other.stats().bytes_out > 0
        num_saves = sum(section.saves for section in offloader.report().sections)
    # At most the plan is asked once a save; what it costs beside that, it spares elsewhere.
    assert num_planned <= num_by_hand + num_saves


def test_an_ordinary_planned_step_records_nothing(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[StepLog] = []
    marks: list[None] = []
    make, mark = StepLog.__init__, HostClock.mark

    def made(self: StepLog, *args: object, **kwargs: object) -> None:
        logs.append(self)
        make(self, *args, **kwargs)  # type: ignore[arg-type]

    def marked(self: HostClock) -> float:
        marks.append(None)
        return mark(self)  # type: ignore[return-value]

    monkeypatch.setattr(StepLog, "__init__", made)
    monkeypatch.setattr(HostClock, "mark", marked)
    monkeypatch.setattr(checks, "CHECK_EVERY", 5)
    model = model_of()
    seen: list[tuple[int, int]] = []
    with planned(model, timeline):
        for _ in range(10):
            logs.clear()
            marks.clear()
            step(model)
            seen.append((len(logs), len(marks)))
    timed = [number for number, (num_logs, _) in enumerate(seen, 1) if num_logs]
    assert timed == [checks.FIRST_CHECK, 5, 10]
    assert all(num_marks > 0 if number in timed else num_marks == 0 for number, (_, num_marks) in enumerate(seen, 1))


def test_what_is_due_of_a_section_is_let_go_of_in_one_call(timeline: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    release = Traffic.release_some

    def released(self: Traffic, section: Section, allocations: list[object]) -> None:
        sizes.append(len(allocations))
        release(self, section, allocations)  # type: ignore[arg-type]

    monkeypatch.setattr(Traffic, "release_some", released)
    model = model_of()
    with planned(model, timeline) as offloader:
        step(model)
        sizes.clear()
        step(model)
        assert offloader.plan is not None
        assert sorted(sizes) == sorted(len(section.moves) for section in offloader.plan.sections if section.moves)
    assert len(sizes) == NUM_MOVED and min(sizes) > 1
