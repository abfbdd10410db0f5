"""Steps keep to a price though moves cost the host what no plan foresees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lighterage.engine import offloader as offloader_module
from lighterage.engine.planning import autoplan, checks
from lighterage.engine.planning.clock import HostClock
from lighterage.engine.planning.price import MOST_COUNTED
from lighterage.engine.traffic import Traffic
from lighterage.planner.timeline import Link
from tests.engine.planned import assert_equal, train
from tests.engine.test_plan_made import offload, rows
from tests.engine.test_plan_pace import CLOCKWORK, USUAL_MS, all_made, models, planned, soon

LINK = Link(out_bytes_per_s=7e3, in_bytes_per_s=7e3, both_bytes_per_s=14e3, copy_us=0.0, compute_slowdown=0.0)
"""Some two of the layers can leave beside the others."""
HOST_TAKES = [0.0]
"""Seconds of each allocation that leaves, beyond what is foreseen."""


@pytest.fixture(autouse=True)
def _played_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time is played, and plans are made beside the steps, as on an accelerator."""
    monkeypatch.setattr(HostClock, "mark", lambda _: CLOCKWORK.now_s)
    monkeypatch.setattr("lighterage.engine.offloader.measure_link", lambda *_: LINK)
    monkeypatch.setattr(checks, "CHECK_EVERY", 5)
    monkeypatch.setattr(CLOCKWORK, "pace", 1.0)
    made, gather = offloader_module.Autoplan, Traffic.gather

    def make(policy: Any, traffic: Any, module_of: Any, device: Any, *rest: Any) -> autoplan.Autoplan:
        return made(policy, traffic, module_of, torch.device("meta"), *rest)

    def gathered(self: Traffic, *given: Any) -> None:
        CLOCKWORK.now_s += HOST_TAKES[0]
        gather(self, *given)

    monkeypatch.setattr(offloader_module, "Autoplan", make)
    monkeypatch.setattr(autoplan, "clock_of", lambda _: HostClock())
    monkeypatch.setattr(Traffic, "gather", gathered)
    HOST_TAKES[0] = 0.0
    yield
    all_made()


def after(model: Any, offloader: Any, num: int) -> float:
    """What a step takes beside one without offload, `num` steps later."""
    for _ in range(num):
        train(model, rows(), 1)
        all_made()
    start = CLOCKWORK.now_s
    train(model, rows(), 1)
    return (CLOCKWORK.now_s - start) * 1e3 / USUAL_MS - 1


@pytest.mark.parametrize("pace", [1.0, 1.1])
def test_a_price_that_is_broken_by_the_host_s_work_is_kept_to(pace: float) -> None:
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=0.05) as offloader:
        planned(model, offloader)
        first = offloader.plan
        assert first is not None and first.num_moves > 4
        HOST_TAKES[0] = 4.0
        CLOCKWORK.pace = pace
        assert after(model, offloader, 3) > 0.1
        cost = (1 + after(model, offloader, 40)) / pace - 1
        assert cost <= 0.06
        assert offloader.plan is not None and offloader.plan.num_moves < first.num_moves
        report = offloader.report()
        assert "longer than without moves" in str(report) and report.plan_settled
        plain.zero_grad()
        assert_equal(train(plain, rows(), 2), train(model, rows(), 2))


def test_a_price_that_is_kept_to_and_a_device_that_has_become_slower_change_no_plan() -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.05) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace = 1.035
        after(model, offloader, 20)
        assert "without moves" not in str(offloader.report())


@pytest.mark.parametrize("held_up", range(6, 11))
def test_one_step_that_was_held_up_changes_no_plan(held_up: int) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.05) as offloader:
        planned(model, offloader)
        for number in range(30):
            HOST_TAKES[0] = 2.0 if number == held_up else 0.0
            train(model, rows(), 1)
            all_made()
        assert "without moves" not in str(offloader.report())


def test_a_budget_has_no_price() -> None:
    _, model = models()
    with offload(model, recompute="never", device_budget=1 << 40) as offloader:
        planned(model, offloader)
        HOST_TAKES[0] = 2.0
        after(model, offloader, 20)
        assert "without moves" not in str(offloader.report())


def test_a_price_that_cannot_be_kept_to_is_lowered_so_often_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models()
    with offload(model, rules=[("*", "offload")], recompute="never", max_slowdown=0.05) as offloader:
        planned(model, offloader)
        HOST_TAKES[0] = 2.0
        made: list[None] = []
        remake = autoplan.Calibration.remake

        def counted(self: Any, job: Any) -> None:
            made.append(None)
            remake(self, job)

        monkeypatch.setattr(autoplan.Calibration, "remake", counted)
        after(model, offloader, 60)
        assert 0 < len(made) <= MOST_COUNTED + 2
        soon(model, lambda: offloader.report().plan_settled)
