"""What hooks cost where the host is the bound is taken off the times that plans are made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lighterage.engine import offloader as offloader_module
from lighterage.engine.packing import Packer
from lighterage.engine.planning import autoplan
from lighterage.engine.planning.clock import HostClock
from lighterage.engine.sections import Section
from lighterage.planner.timeline import Timeline
from tests.engine.planned import assert_equal, train
from tests.engine.test_plan_made import FAST, offload, rows
from tests.engine.test_plan_pace import CLOCKWORK, USUAL_MS, all_made, models, planned


@pytest.fixture(autouse=True)
def _played_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time is played, and plans are made beside the steps, as on an accelerator."""
    monkeypatch.setattr(HostClock, "mark", lambda _: CLOCKWORK.now_s)
    monkeypatch.setattr("lighterage.engine.offloader.measure_link", lambda *_: FAST)
    monkeypatch.setattr(CLOCKWORK, "pace", 1.0)
    made = offloader_module.Autoplan

    def make(policy: Any, traffic: Any, module_of: Any, device: Any, *rest: Any) -> autoplan.Autoplan:
        return made(policy, traffic, module_of, torch.device("meta"), *rest)

    monkeypatch.setattr(offloader_module, "Autoplan", make)
    monkeypatch.setattr(autoplan, "clock_of", lambda _: HostClock())
    yield
    all_made()


def hooks_take(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = Packer.pack

    def slow(packer: Packer, tensor: Tensor, section: Section) -> Any:
        CLOCKWORK.now_s += seconds
        return pack(packer, tensor, section)

    monkeypatch.setattr(Packer, "pack", slow)


def timeline_of(model: Any, **policy: Any) -> Timeline:
    with offload(model, max_slowdown=1.0, **policy) as offloader:
        planned(model, offloader)
        assert offloader.timeline is not None
        return offloader.timeline


@pytest.mark.parametrize("recompute", ["never", "auto"])
def test_phases_that_wait_for_hooks_are_told_without_them(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models()
    hooks_take(1.0, monkeypatch)
    timeline = timeline_of(model, recompute=recompute)
    assert timeline.step_ms == pytest.approx(USUAL_MS, rel=0.01)
    for section in timeline.sections:
        assert all(0 <= a.born_ms <= 10e3 * 1.001 for a in section.allocations)


def test_what_is_within_the_noise_stays_as_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models()
    hooks_take(0.02, monkeypatch)  # 0.2 s of 10, where a section saves ten times
    timeline = timeline_of(model, recompute="never")
    num_saves = sum(len(section.allocations) for section in timeline.sections)
    assert num_saves > 0
    # Fewer than all saves are allocations of their own; each took a fiftieth of a second.
    assert timeline.step_ms >= USUAL_MS + 20 * num_saves
    assert all(section.hooks_forward_ms == section.hooks_backward_ms == 0.0 for section in timeline.sections)


def test_selective_recomputation_costs_what_it_adds_to_a_backward_without_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, model = models()
    usual = [section.selective_ms for section in timeline_of(model, recompute="auto").sections]
    hooks_take(1.0, monkeypatch)
    slowed = [section.selective_ms for section in timeline_of(model, recompute="auto").sections]
    assert all(ms is not None for ms in usual) and slowed == pytest.approx(usual, rel=0.01)


def test_the_steps_of_the_trial_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = models()
    with offload(model, max_slowdown=1.0, recompute="auto"):
        assert_equal(train(plain, rows(), 8), train(model, rows(), 8))
