"""A price is seen to be kept by steps at rest in turn with planned ones, and a plan that breaks it is replaced."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lighterage
from lighterage import Offloader, background
from lighterage.engine.planning import autoplan, making
from lighterage.engine.planning.clock import Gauge, HostClock
from lighterage.engine.planning.pace import SETTLED
from lighterage.engine.planning.price import DIFFERS, GIVE, IN_A_ROW, LEAST_ROWS, MOST_CORRECTED, MOST_MISSED, MOST_ROWS
from lighterage.engine.planning.run import Run
from lighterage.engine.traffic import Traffic
from tests.engine.planned import assert_equal, train
from tests.engine.test_plan_made import Model, offload, pair, rows
from tests.engine.test_plan_pace import (  # noqa: F401
    CLOCKWORK,
    USUAL_MS,
    _played,
    all_made,
    beside,
    models,
    planned,
    soon,
    step_ms,
)

pytestmark = pytest.mark.usefixtures("beside")

LEAST_STEPS = IN_A_ROW * (2 * LEAST_ROWS + 1)


class Moves:
    """What carrying a plan out takes, as it is played."""

    def __init__(self) -> None:
        self.section_s = 0.0
        """Each section that something is let go of."""
        self.step_s: Iterator[float] = itertools.repeat(0.0)
        """Each step in which something is, the first time."""


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Moves:
    played = Moves()
    release, begins = Traffic.release_some, Run.__init__
    first = [True]

    def released(self: Traffic, section: Any, allocations: Any) -> None:
        CLOCKWORK.now_s += played.section_s + (next(played.step_s) if first[0] else 0.0)
        first[0] = False
        release(self, section, allocations)

    def begun(self: Run, *given: Any) -> None:
        first[0] = True
        begins(self, *given)

    monkeypatch.setattr(Traffic, "release_some", released)
    monkeypatch.setattr(Run, "__init__", begun)
    return played


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each step under a plan carried out: the plan, or that all stays."""
    told: list[str] = []
    ended = autoplan.Autoplan._end

    def end(self: autoplan.Autoplan, log: Any, run: Run | None) -> None:
        if run is not None and self._stage is autoplan.Stage.PLANNED:
            told.append("plan" if run.course is self._course else "rest")
        ended(self, log, run)

    monkeypatch.setattr(autoplan.Autoplan, "_end", end)
    return told


def settled(model: nn.Module, offloader: Offloader) -> None:
    soon(model, lambda: offloader.report().plan_settled)


def moved_of(offloader: Offloader) -> int:
    assert offloader.plan is not None
    return offloader.plan.num_moves


# --- a price that is kept ---------------------------------------------------------------------------------------------


def test_steps_in_which_all_stays_run_in_turn_with_planned_ones_and_give_the_same_bits(ran: list[str]) -> None:
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        ran.clear()
        num_steps = 2 * LEAST_STEPS + SETTLED
        assert_equal(train(plain, rows(), num_steps), train(model, rows(), num_steps))
        report = offloader.report()
        assert report.plan_settled
        assert report.measured_slowdown == pytest.approx(0.0, abs=0.001)
        assert "steps at rest in turn with them" in str(report)
        assert report.plans_corrected == 0 and "broke its price" not in str(report)
        assert moved_of(offloader)
        assert offloader._auto is not None
        seen = offloader._auto.price._rows
        assert len(seen) == 2 * LEAST_ROWS + 1 and all(0.1 < row.host_ms < 1000 for row in seen)
        first = ran.index("rest")
        assert first >= SETTLED - 1
        turns = [(what, len(list(steps))) for what, steps in itertools.groupby(ran[first:])]
        assert turns[: 2 * LEAST_ROWS] == [("rest", IN_A_ROW), ("plan", IN_A_ROW)] * LEAST_ROWS
        assert turns[2 * LEAST_ROWS] == ("rest", IN_A_ROW)
        assert [what for what, _ in turns[2 * LEAST_ROWS + 1 :]] == ["plan"], (
            "once it is known, all steps carry the plan out"
        )


def test_once_it_is_seen_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 7: while it is seen, the device is waited for between rows."""
    waits = [0]

    def catch_up(_: HostClock) -> None:
        waits[0] += 1

    monkeypatch.setattr(HostClock, "catch_up", catch_up)
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        assert waits[0] == 0
        settled(model, offloader)
        assert waits[0] == 2 * LEAST_ROWS + 2, "before each row, and to read the last"
        train(model, rows(), 120)
        assert waits[0] == 2 * LEAST_ROWS + 2


def test_what_is_told_is_what_steps_took_longer(moves: Moves) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        moves.section_s = 0.05 * USUAL_MS / 1e3 / moved_sections(offloader)
        settled(model, offloader)
        report = offloader.report()
        assert report.measured_slowdown == pytest.approx(0.05, rel=0.05)
        give = f"give or take {DIFFERS * GIVE / LEAST_ROWS:.1%}"
        assert f"Steps under it took 5.0% longer ({give}) than steps at rest in turn with them." in str(report)
        assert report.plans_corrected == 0


def test_a_machine_that_is_slower_breaks_no_price(moves: Moves) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.05) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace = 1.1
        settled(model, offloader)
        assert offloader.report().plans_corrected == 0
        assert offloader.report().measured_slowdown == pytest.approx(0.0, abs=0.001)


def test_a_machine_that_becomes_slower_in_between_breaks_none_either() -> None:
    """A planned row is compared with rows at rest on both its sides."""
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.05) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)
        for _ in range(LEAST_STEPS):
            CLOCKWORK.pace *= 1.004
            train(model, rows(), 1)
        settled(model, offloader)
        assert offloader.report().plans_corrected == 0
        assert offloader.report().measured_slowdown == pytest.approx(0.0, abs=0.002)


# --- a price that is broken -------------------------------------------------------------------------------------------


def test_a_plan_that_breaks_its_price_is_replaced_by_one_that_keeps_it(moves: Moves) -> None:
    plain, model = models(8)
    with offload(model, recompute="never", max_slowdown=0.03) as offloader:
        planned(model, offloader)
        before, usual_ms = moved_sections(offloader), 8 * 30e3
        assert before >= 4
        moves.section_s = 0.01 * usual_ms / 1e3
        for _ in range(300):
            assert_equal(train(plain, rows(), 1), train(model, rows(), 1))
            if offloader.report().plan_settled:
                break
            all_made()
        report = offloader.report()
        assert report.plan_settled
        assert report.plans_corrected >= 1 and "since steps under the plan broke its price" in str(report)
        assert report.measured_slowdown is not None and report.measured_slowdown <= 0.03
        assert 0 < moved_sections(offloader) < before, "what fits the price still leaves"
        train(model, rows(), 2)
        assert offloader.stats().bytes_out > 0
        assert report.plans_remade == 0 and report.drifts == 0
        assert report.times_scaled == pytest.approx(1.0, rel=0.01), "the pace is that of steps at rest"


def test_where_any_move_breaks_the_price_everything_stays(moves: Moves) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.02) as offloader:
        planned(model, offloader)
        assert moved_of(offloader)
        moves.step_s = itertools.repeat(0.2 * USUAL_MS / 1e3)
        settled(model, offloader)
        assert not moved_of(offloader)
        assert "Everything stays" in str(offloader.report())
        assert offloader.report().plans_corrected <= MOST_CORRECTED


@pytest.mark.parametrize(("num_layers", "slowdown", "cost"), [(8, 0.03, 0.06), (16, 0.01, 0.025), (8, 0.03, 0.045)])
def test_a_cost_that_is_the_same_however_little_moves_ends_with_all_staying(
    num_layers: int, slowdown: float, cost: float, moves: Moves
) -> None:
    _, model = models(num_layers)
    with offload(model, recompute="never", max_slowdown=slowdown) as offloader:
        planned(model, offloader)
        moves.step_s = itertools.repeat(cost * num_layers * 30)
        settled(model, offloader)
        assert not moved_of(offloader)
        assert offloader.report().plans_corrected <= MOST_CORRECTED
        assert "Everything stays" in str(offloader.report())
        assert "Steps under other plans took longer than that price." in str(offloader.report())


def test_where_rules_leave_no_other_plan_it_is_told(moves: Moves, ran: list[str]) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.02, rules=[("*", "offload")]) as offloader:
        planned(model, offloader)
        moves.step_s = itertools.repeat(0.2 * USUAL_MS / 1e3)
        settled(model, offloader)
        report = offloader.report()
        assert moved_of(offloader)
        assert "20.0% longer" in str(report)
        assert "no plan that keeps to it was found. Raise max_slowdown" in str(report)
        assert 1 <= report.plans_corrected <= MOST_CORRECTED
        assert step_ms(offloader.timeline) == pytest.approx(USUAL_MS, rel=0.02), "that of steps at rest"
        assert report.predicted_ms == pytest.approx(1.2 * USUAL_MS, rel=0.02)
        ran.clear()
        train(model, rows(), 100)
        assert set(ran) == {"plan"}, "it is not asked again"


def test_the_time_that_steps_took_is_foreseen_of_the_plan_in_its_place(moves: Moves) -> None:
    _, model = models(8)
    with offload(model, recompute="never", max_slowdown=0.03) as offloader:
        planned(model, offloader)
        moves.section_s = 0.01 * 8 * 30e3 / 1e3
        settled(model, offloader)
        train(model, rows(), 60)
        report = offloader.report()
        assert report.predicted_ms == pytest.approx(report.measured_ms, rel=0.02)


def test_chance_breaks_no_price(moves: Moves) -> None:
    _, model = models(8)
    with offload(model, recompute="never", max_slowdown=0.03) as offloader:
        planned(model, offloader)
        before = moved_sections(offloader)
        per_row = [0.035, 0.08, 0.06, *[0.0] * 1000]
        until_rest(model, offloader)
        moves.step_s = (part * 8 * 30 for part in per_row for _ in range(IN_A_ROW))
        settled(model, offloader)
        assert offloader.report().plans_corrected == 0
        assert moved_sections(offloader) == before


def test_rows_are_added_until_it_is_known(moves: Moves, ran: list[str]) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.03) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)
        broken, kept = 0.3, 0.0
        per_row = [broken, kept, broken, kept, *[kept] * 1000]
        moves.step_s = (part * 5 * 30 for part in per_row for _ in range(IN_A_ROW))
        settled(model, offloader)
        assert offloader.report().plans_corrected == 0
        assert ran.count("rest") == IN_A_ROW * (MOST_ROWS + 1)


def test_what_plans_were_found_to_cost_is_known_to_those_of_a_new_measurement(moves: Moves) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.02) as offloader:
        planned(model, offloader)
        moves.step_s = itertools.repeat(0.2 * USUAL_MS / 1e3)
        settled(model, offloader)
        old = offloader.plan
        assert not moved_of(offloader)
        del model.layers[4]
        train(model, rows(), 2)
        assert offloader.report().drifts == 1
        soon(model, lambda: offloader.plan is not old)
        assert not moved_of(offloader), "what each section was charged with is not forgotten"


# --- where it is not seen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [{"device_budget": 10**9}, {"device_budget": 10**6}])
def test_under_a_budget_no_step_keeps_what_the_plan_moves(policy: dict[str, Any], ran: list[str]) -> None:
    _, model = models()
    with offload(model, recompute="never", **policy) as offloader:
        planned(model, offloader)
        train(model, rows(), 60)
        assert set(ran) == {"plan"}
        assert offloader.report().measured_slowdown is None


def test_after_drift_no_step_takes_more_than_the_plan_before(ran: list[str]) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        settled(model, offloader)
        train(model, rows(256), 2)
        assert offloader.report().drifts == 1
        soon(model, lambda: offloader.plan is not None and offloader._auto._stage is autoplan.Stage.PLANNED, 256)  # type: ignore[union-attr]
        assert offloader.report().measured_slowdown is None, "it was another plan's"
        ran.clear()
        train(model, rows(256), 60)
        assert set(ran) == {"plan"}
        assert offloader.report().plan_settled


def test_a_plan_that_was_given_is_carried_out_in_each_step(ran: list[str]) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)
        assert offloader.plan is not None and offloader.timeline is not None
        loss = model(rows()[0]).square().mean()  # of a step at rest
        offloader.use_plan(offloader.plan, offloader.timeline)
        loss.backward()
        del loss
        train(model, rows(), 1)
        ran.clear()
        train(model, rows(), 60)
        assert set(ran) == {"plan"}
        assert offloader.report().plan_settled, "nothing is asked of it"


def test_where_all_stays_there_is_nothing_to_see(ran: list[str]) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1, rules=[("*", "keep")]) as offloader:
        planned(model, offloader)
        train(model, rows(), 60)
        assert set(ran) == {"plan"} and offloader.report().plan_settled
        assert offloader.report().measured_slowdown is None


def test_no_step_keeps_what_the_device_has_no_room_for(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        monkeypatch.setattr(Gauge, "now", lambda _: 0)
        monkeypatch.setattr(Gauge, "peak", lambda _: 0)
        monkeypatch.setattr(Gauge, "total", lambda _: 1 << 20)
        monkeypatch.setattr(Gauge, "room", lambda _: (1 << 20) // 20)
        train(model, rows(), SETTLED + 2 * MOST_MISSED)
        assert set(ran) == {"plan"}
        assert offloader.report().plan_settled and offloader.report().measured_slowdown is None


def test_steps_that_are_not_the_planned_one_are_not_compared(ran: list[str]) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)
        train(model, rows(), IN_A_ROW)
        train(model, rows(32), MOST_MISSED)
        assert not offloader.report().plan_settled
        train(model, rows(32), 2)
        assert offloader.report().plan_settled, "it is given up"
        assert offloader.report().measured_slowdown is None
        ran.clear()
        train(model, rows(), 20)
        assert set(ran) == {"plan"}


@pytest.mark.parametrize("told", [float("nan"), 5.0])
def test_a_clock_that_tells_no_time_tells_no_price(monkeypatch: pytest.MonkeyPatch, told: float) -> None:
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)
        monkeypatch.setattr(HostClock, "mark", lambda _: told)
        assert_equal(train(plain, rows(), 60), train(model, rows(), 60))
        assert offloader.report().plan_settled and offloader.report().measured_slowdown is None


def test_where_backward_runs_on_another_stream_it_is_given_up(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    """What was waited for tells nothing of it, and nobody waits for more."""
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)
        passed = [False]
        monkeypatch.setattr(HostClock, "passed", lambda *_: passed[0])
        train(model, rows(), IN_A_ROW * (MOST_MISSED + 2))
        passed[0] = True
        ran.clear()
        train(model, rows(), 20)
        assert set(ran[1:]) == {"plan"}
        assert offloader.report().plan_settled and offloader.report().measured_slowdown is None


def test_evaluation_and_steps_without_backward_are_no_steps_of_a_row() -> None:
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)
        for _ in range(IN_A_ROW + 2):
            with torch.no_grad():
                model(rows()[0])
            model(rows()[0])  # no backward comes
            assert_equal(train(plain, rows(), 1), train(model, rows(), 1))
        settled(model, offloader)
        assert offloader.report().measured_slowdown == pytest.approx(0.0, abs=0.001)


class Local(nn.Module):
    """A layer that learns from a loss of its own, and hands on what has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.inner(x)).sin()
        self.loss = y.square().mean()
        return y.detach()


def test_where_no_section_can_be_seen_at_rest_plans_are_carried_out(ran: list[str]) -> None:
    _, model = pair(*[Local() for _ in range(5)])

    def step() -> None:
        model(rows()[0])
        torch.stack([layer.loss for layer in model.layers]).sum().backward()  # type: ignore[misc]

    with offload(model, recompute="never", max_slowdown=0.1, rules=[("*", "offload")]) as offloader:
        for _ in range(200):
            step()
            all_made()
        report = offloader.report()
        assert ran.count("plan") > 100
        assert offloader.stats().bytes_out > 0 and report.drifts == 0 and report.plan_settled


class Opaque(nn.Module):
    """A layer that returns what nobody can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Any) -> Any:
        return SimpleNamespace(y=torch.tanh(self.inner(x.y)).sin())


def test_sections_that_cannot_rest_are_no_drift(ran: list[str]) -> None:
    _, model = pair(*[Opaque() for _ in range(5)])

    def step() -> None:
        model(SimpleNamespace(y=rows()[0])).y.square().mean().backward()

    with offload(model, recompute="never", max_slowdown=0.1, rules=[("*", "offload")]) as offloader:
        for _ in range(120):
            step()
            all_made()
        report = offloader.report()
        assert report.drifts == 0 and report.plan_settled
        assert offloader.stats().bytes_out > 0


def test_batches_of_many_sizes_break_no_price() -> None:
    for seed in range(3):
        chance, (_, model) = random.Random(seed), models()
        with offload(model, recompute="never", max_slowdown=0.1) as offloader:
            planned(model, offloader)
            before = moved_of(offloader)
            for _ in range(150):
                num_rows = chance.choice((64, 40))
                CLOCKWORK.pace = num_rows / 64
                train(model, rows(num_rows), 1)
            assert offloader.report().plans_corrected == 0 and moved_of(offloader) == before


@pytest.mark.parametrize("pace", [1.0, 1.1])
def test_where_no_other_plan_can_be_made_the_one_that_there_is_stays_as_it_was(
    moves: Moves, pace: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.02) as offloader:
        planned(model, offloader)
        before = offloader.plan
        moves.step_s = itertools.repeat(0.1 * USUAL_MS / 1e3)
        CLOCKWORK.pace = pace
        monkeypatch.setattr(making, "make_plan", lambda *_, **__: 1 / 0)
        settled(model, offloader)
        train(model, rows(), 60)
        report = offloader.report()
        assert offloader.plan is before
        assert report.plans_corrected == 0 and report.drifts == 0
        assert report.measured_slowdown == pytest.approx(0.1 / pace, rel=0.02)
        assert report.predicted_ms == pytest.approx((pace + 0.1) * USUAL_MS, rel=0.02)
        assert "no plan that keeps to it was found" in str(report)


def test_interrupts_as_plans_are_asked_for_leave_them_to_be_asked_for(
    moves: Moves, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, interrupts = background.start, [0]

    def interrupted(*given: Any) -> None:
        interrupts[0] += 1
        if interrupts[0] % 2:
            raise KeyboardInterrupt
        start(*given)

    def through(is_so: Callable[[], bool]) -> None:
        for _ in range(20):
            try:
                soon(model, is_so)
            except KeyboardInterrupt:
                continue
            return

    monkeypatch.setattr(background, "start", interrupted)
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.02) as offloader:
        through(lambda: offloader.plan is not None)
        moves.step_s = itertools.repeat(0.2 * USUAL_MS / 1e3)
        through(lambda: offloader.report().plan_settled)
        assert offloader.report().plans_corrected == 1 and not moved_of(offloader)
        assert interrupts[0] >= 4


def test_no_memory_for_a_step_at_rest_is_no_reason_for_another(moves: Moves) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        until_rest(model, offloader)

        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError("on purpose")

        handle = model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(rows()[0])
        handle.remove()
        train(model, rows(), 2)
        assert offloader.stats().bytes_out > 0 and offloader.report().drifts == 0
        assert offloader.report().plan_settled and offloader.report().measured_slowdown is None


def test_an_exception_in_backward_of_a_step_at_rest_is_the_end_of_it(ran: list[str]) -> None:
    """It may be want of memory, and tells nothing of what steps take."""
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        before = offloader.plan
        until_rest(model, offloader)
        failing, fails = [True], [0]

        def fail(grad: torch.Tensor) -> None:
            if failing[0] and ran_at_rest(offloader):
                fails[0] += 1
                raise torch.OutOfMemoryError("on purpose")

        handle = model.layers[2].up.weight.register_hook(fail)  # type: ignore[union-attr]
        for _ in range(60):
            try:
                train(model, rows(), 1)
            except torch.OutOfMemoryError:
                torch.ones(1, requires_grad=True).sum().backward()  # what was queued of the other is dropped
        handle.remove()
        assert fails[0] == 1
        assert offloader.plan is before and offloader.report().plans_corrected == 0
        assert offloader.stats().bytes_out > 0


def test_what_a_plan_cost_is_known_though_drift_comes_before_the_next_plan(
    moves: Moves, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = models()
    may, make_plan, count = threading.Event(), making.make_plan, [0]

    def made(*given: Any, **caution: Any) -> Any:
        count[0] += 1
        assert count[0] != 2 or may.wait(20)
        return make_plan(*given, **caution)

    monkeypatch.setattr(making, "make_plan", made)
    with offload(model, recompute="never", max_slowdown=0.02) as offloader:
        planned(model, offloader)
        moves.step_s = itertools.repeat(0.2 * USUAL_MS / 1e3)
        soon(model, lambda: count[0] == 2)
        old = offloader.plan
        train(model, rows(256), 2)
        may.set()
        assert offloader.report().drifts == 1
        assert offloader._auto is not None and not offloader._auto.price.is_broken, "that plan is no more"
        soon(model, lambda: offloader.plan is not old, 256)
        assert not moved_of(offloader)


def test_sparse_inputs_are_none_that_count() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.sparse.mm(edges, self.inner(x)))

    layers = nn.ModuleList(Graph() for _ in range(4))
    edges = torch.eye(32).to_sparse()
    with offload_layers(layers, max_slowdown=0.1) as offloader:
        for _ in range(12):
            x = torch.randn(32, 64)
            for layer in layers:
                x = layer(x, edges)
            x.square().mean().backward()
            all_made()
        assert offloader.plan is not None


# --- helpers ----------------------------------------------------------------------------------------------------------


def offload_layers(layers: nn.ModuleList, **policy: Any) -> Offloader:
    return lighterage.offload(layers, min_bytes=64, tier="host", **policy)


def ran_at_rest(offloader: Offloader) -> bool:
    """Whether the step under way is at rest."""
    assert offloader._auto is not None
    run = offloader._auto.events._run
    return run is not None and run.course is not offloader._auto._course


def moved_sections(offloader: Offloader) -> int:
    assert offloader.plan is not None
    return sum(bool(section.moves) for section in offloader.plan.sections)


def until_rest(model: Model, offloader: Offloader) -> None:
    """Until the next step is the first that is to be compared."""
    assert offloader._auto is not None
    for _ in range(3 * SETTLED):
        if offloader._auto._steps >= SETTLED and offloader._auto.price.is_due and not offloader._auto.checks.pending:
            return
        train(model, rows(), 1)
    raise AssertionError("there is nothing to see")
