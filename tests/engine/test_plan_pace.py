"""What is foreseen follows the pace of steps under the plan, and a plan for another pace is made anew beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lighterage import Offloader, Policy, background
from lighterage.engine import offloader as offloader_module
from lighterage.engine.ledger import Row
from lighterage.engine.planning import autoplan, checks, making
from lighterage.engine.planning.budget import Budget
from lighterage.engine.planning.clock import HostClock
from lighterage.engine.planning.pace import MOST_REMADE, SETTLED
from lighterage.engine.planning.step_log import StepLog
from lighterage.engine.stores import Stores, _ArenaStore
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Timeline
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, train
from tests.engine.test_plan_made import FAST, WIDTH, Model, offload, pair, rows


class Clockwork:
    """Time as it is played: each layer takes `pace` times ten seconds forward, and twice that backward.

    Waits for copies are of the real time, and next to nothing beside these.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pace = 1.0


CLOCKWORK = Clockwork()


class Takes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        CLOCKWORK.now_s += 10.0 * CLOCKWORK.pace
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        CLOCKWORK.now_s += 20.0 * CLOCKWORK.pace
        return grad


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + Takes.apply(self.down(torch.tanh(self.up(x)).sin()))


USUAL_MS = 5 * 30e3


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(HostClock, "mark", lambda _: CLOCKWORK.now_s)
    monkeypatch.setattr("lighterage.engine.offloader.measure_link", lambda *_: FAST)
    monkeypatch.setattr(CLOCKWORK, "pace", 1.0)
    yield
    all_made()  # what it calls may be played in the next test


def all_made() -> None:
    """Nothing is in the making any more."""
    for thread in list(background._threads):
        thread.join(30)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made beside the steps, as on an accelerator."""
    made = offloader_module.Autoplan

    def make(policy: Any, traffic: Any, module_of: Any, device: Any, *rest: Any) -> autoplan.Autoplan:
        return made(policy, traffic, module_of, torch.device("meta"), *rest)

    monkeypatch.setattr(offloader_module, "Autoplan", make)
    monkeypatch.setattr(autoplan, "clock_of", lambda _: HostClock())


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> list[StepLog]:
    """Those of steps that were recorded."""
    seen: list[StepLog] = []
    init = StepLog.__init__

    def made(self: StepLog, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(StepLog, "__init__", made)
    return seen


def models(num_layers: int = 5) -> tuple[Model, Model]:
    return pair(*[Layer() for _ in range(num_layers)])


def planned(model: Model, offloader: Offloader) -> None:
    """Until the plan was made, and one step has carried it out."""
    soon(model, lambda: offloader.plan is not None)


def soon(model: Model, is_so: Callable[[], bool], num_rows: int = 64) -> None:
    """Steps until it is so."""
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        train(model, rows(num_rows), 1)
        time.sleep(0.002)


def step_ms(timeline: Timeline | None) -> float:
    assert timeline is not None
    return timeline.step_ms


# --- what is foreseen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pace", [1.06, 0.7, 1.02])
def test_what_is_foreseen_follows_the_pace_of_planned_steps(pace: float) -> None:
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        before = offloader.plan
        assert step_ms(offloader.timeline) == pytest.approx(USUAL_MS, rel=0.01)
        CLOCKWORK.pace = pace
        assert_equal(train(plain, rows(), SETTLED + 2), train(model, rows(), SETTLED + 2))
        report = offloader.report()
        assert step_ms(offloader.timeline) == pytest.approx(pace * USUAL_MS, rel=0.01)
        assert report.predicted_ms == pytest.approx(report.measured_ms, rel=0.01)
        assert report.times_scaled == pytest.approx(pace, rel=0.01)
        assert f"times scaled by {report.times_scaled:.3f}" in str(report)
        assert offloader.plan is before, "a CPU's steps would wait for another"
        assert report.plan_settled


def test_one_step_that_was_held_up_changes_nothing() -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        before = offloader.timeline
        CLOCKWORK.pace = 1.2
        train(model, rows(), 1)  # the second, which is timed
        CLOCKWORK.pace = 1.0
        train(model, rows(), SETTLED)
        assert offloader.timeline is before
        assert offloader.report().times_scaled == 1.0


def test_only_the_second_step_and_the_eighth_are_timed_and_the_next_where_one_is_far_off(logs: list[StepLog]) -> None:
    def timed(pace: float) -> list[int]:
        _, model = models()
        CLOCKWORK.pace = 1.0
        with offload(model, recompute="never", max_slowdown=1.0) as offloader:
            planned(model, offloader)
            CLOCKWORK.pace = pace
            seen = []
            for number in range(2, 20):
                logs.clear()
                train(model, rows(), 1)
                seen += [number] * len(logs)
        return seen

    assert timed(1.0) == [checks.FIRST_CHECK, SETTLED]
    assert timed(1.1) == [checks.FIRST_CHECK, checks.FIRST_CHECK + 1, SETTLED]


def test_a_step_that_was_not_the_planned_one_says_nothing_of_the_pace() -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        before = offloader.timeline
        for _ in range(2):  # both would be timed, and are one layer short
            x = rows()[0]
            for layer in list(model.layers)[:4]:
                x = layer(x)
            x.square().mean().backward()
        train(model, rows(), 1)
        assert offloader.timeline is before
        assert offloader.report().measured_ms is not None


def test_smaller_steps_say_nothing_of_the_pace() -> None:
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        assert offloader.plan is not None and offloader.plan.num_moves
        before = offloader.timeline
        CLOCKWORK.pace = 0.5
        assert_equal(train(plain, rows(32), SETTLED + 2), train(model, rows(32), SETTLED + 2))
        assert offloader.timeline is before
        assert offloader.report().times_scaled == 1.0
        CLOCKWORK.pace = 1.0
        train(model, rows(), 20)
        assert offloader.report().drifts == 0


def test_a_step_that_was_far_off_is_forgotten_where_none_can_be_compared_with_it(logs: list[StepLog]) -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        train(model, rows(), SETTLED - 2)
        CLOCKWORK.pace = 1.1
        train(model, rows(), 1)
        CLOCKWORK.pace = 0.5
        logs.clear()
        train(model, rows(32), 20)
        assert 0 < len(logs) < 5, "a step is timed now and then, and not each"
        assert offloader.report().times_scaled == 1.0


def test_a_clock_that_tells_no_time_says_nothing_of_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        before = offloader.timeline
        for told in (float("nan"), 5.0):
            monkeypatch.setattr(HostClock, "mark", lambda _, told=told: told)
            assert_equal(train(plain, rows(), SETTLED), train(model, rows(), SETTLED))
        assert offloader.timeline is before
        assert offloader.report().times_scaled == 1.0


def test_a_step_that_waited_for_host_memory_says_nothing_of_the_pace(
    monkeypatch: pytest.MonkeyPatch, logs: list[StepLog]
) -> None:
    reserved, growing = [0], [False]

    def host_bytes_reserved(_: Stores) -> int:
        reserved[0] += growing[0]
        return reserved[0]

    monkeypatch.setattr(Stores, "host_bytes_reserved", property(host_bytes_reserved))
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        before = offloader.timeline
        CLOCKWORK.pace, growing[0] = 1.1, True
        train(model, rows(), SETTLED + 1)
        assert offloader.timeline is before
        offloader.stats()  # the last step is over
        growing[0] = False
        logs.clear()
        train(model, rows(), 4)
        assert len(logs) == 2, "one in the place of the eighth, and one that says the same"
        assert offloader.report().times_scaled == pytest.approx(1.1, rel=0.01)


@pytest.mark.parametrize(("ready_after", "is_told"), [(3, False), (100, True)])
def test_a_step_that_kept_what_found_no_host_memory_does_not_break_the_budget(
    ready_after: int, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory at rest is still being made ready in the first steps under a plan: what was to leave stays in them."""
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        assert offloader.timeline is not None
        assert offloader.plan is not None
        peak = simulate(offloader.timeline, offloader.plan, FAST).peak_bytes
        everything = sum(a.held_bytes for section in offloader.timeline.sections for a in section.allocations)
    tightened: list[int] = []
    tighter, acquire, num_steps = Budget.tighter, _ArenaStore.acquire, 0

    def noted(self: Budget, peak_bytes: int, *rest: Any) -> Any:
        tightened.append(peak_bytes)
        return tighter(self, peak_bytes, *rest)

    def unready(self: _ArenaStore, nbytes: int) -> Any:
        return acquire(self, nbytes) if num_steps >= ready_after else None

    monkeypatch.setattr(Budget, "tighter", noted)
    with offload(model, recompute="never", device_budget=(2 * peak + everything) // 3) as offloader:
        planned(model, offloader)
        monkeypatch.setattr(_ArenaStore, "acquire", unready)
        while num_steps < 8:
            assert_equal(train(plain, rows(), 1), train(model, rows(), 1))
            num_steps += 1
    assert bool(tightened) == is_told, "where it lasts"


def test_waits_for_reloads_are_known_when_a_step_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else asks for them before later steps have ended."""
    read: list[tuple[Row, float]] = []

    def compute_ms(log: StepLog) -> float:
        read.extend((section.row, section.row.late_ms) for section in log.sections)
        return usual(log)

    usual = checks.compute_ms
    monkeypatch.setattr(checks, "compute_ms", compute_ms)
    _, model = models()
    policy = Policy(min_bytes=64, tier="host", recompute="never", max_slowdown=1.0)
    with Offloader(model.layers, policy, before_copies=lambda: time.sleep(0.005)) as offloader:
        planned(model, offloader)
        train(model, rows(), 2)
        offloader.stats(total=True)  # all that is known by now
        assert sum(late_ms for _, late_ms in read) > 0
        assert [row.late_ms for row, _ in read] == [late_ms for _, late_ms in read]


# --- drift ------------------------------------------------------------------------------------------------------------


def test_what_is_slower_by_more_than_a_quarter_is_measured_anew_and_not_taken_for_the_pace() -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace = 1.4
        train(model, rows(), 6)
        assert offloader.report().drifts == 1
        assert offloader.report().times_scaled == 1.0
        train(model, rows(), STEPS_TO_PLAN)
        assert step_ms(offloader.timeline) == pytest.approx(1.4 * USUAL_MS, rel=0.01)


def test_slowness_that_comes_little_by_little_is_measured_anew_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECK_EVERY", 4)
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        for pace in (1.15, 1.32):
            assert offloader.report().drifts == 0
            CLOCKWORK.pace = pace
            train(model, rows(), 12)
        assert offloader.report().drifts == 1


# --- plans made anew --------------------------------------------------------------------------------------------------


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Timeline], threading.Event]:
    """The timelines that plans are made of; from the second on, a plan is made when the event is set."""
    made_of: list[Timeline] = []
    may = threading.Event()
    make_plan = making.make_plan

    def made(timeline: Timeline, *rest: Any, **caution: Any) -> Any:
        made_of.append(timeline)
        if len(made_of) > 1:
            assert may.wait(20)
        return make_plan(timeline, *rest, **caution)

    monkeypatch.setattr(making, "make_plan", made)
    return made_of, may


def test_a_price_is_not_foreseen_to_be_spent_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan, part = making.make_plan, []

    def made(*given: Any, caution: float) -> Any:
        part.append(caution)
        return make_plan(*given, caution=caution)

    monkeypatch.setattr(making, "make_plan", made)
    _, model = models()
    with offload(model, max_slowdown=0.02) as offloader:
        planned(model, offloader)
        assert "at most 2.0% slower" in str(offloader.report()) or "Everything stays" in str(offloader.report())
    assert part == [making.PRICE_CAUTION] and 0.5 < part[0] < 1


@pytest.mark.usefixtures("beside")
def test_a_plan_for_another_pace_is_made_anew_beside_steps_that_carry_out_the_old_one(
    plans: tuple[list[Timeline], threading.Event], logs: list[StepLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECK_EVERY", 10**6)  # else one step in 50 is timed in any case
    made_of, may = plans
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        old = offloader.plan
        CLOCKWORK.pace = 1.1
        soon(model, lambda: len(made_of) == 2)
        assert step_ms(made_of[1]) == pytest.approx(1.1 * USUAL_MS, rel=0.01)
        logs.clear()
        expected = train(plain, rows(), 1)
        for _ in range(10):
            assert_equal(expected, train(model, rows(), 1))
            assert offloader.plan is old
            assert offloader.stats().bytes_out > 0, "a step ran without the plan"
        assert logs == [], "nothing is measured anew"
        assert not offloader.report().plan_settled
        may.set()
        soon(model, lambda: offloader.plan is not old)
        assert_equal(expected, train(model, rows(), 1))
        assert offloader.stats().bytes_out > 0
        report = offloader.report()
        assert report.plans_remade == 1
        assert report.drifts == 0
        assert report.predicted_ms == pytest.approx(1.1 * USUAL_MS, rel=0.01)
        assert "made anew from them 1 times" in str(report)
        soon(model, lambda: offloader.report().plan_settled)
        assert len(made_of) == 2, "the pace is that of the plan now"


@pytest.mark.usefixtures("beside")
def test_where_no_thread_is_to_be_had_plans_are_made_in_the_step(
    plans: tuple[list[Timeline], threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    made_of, may = plans
    may.set()
    monkeypatch.setattr(background, "start", start)
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace = 1.1
        soon(model, lambda: offloader.report().plans_remade == 1)
        assert_equal(train(plain, rows(), 1), train(model, rows(), 1))
        soon(model, lambda: offloader.report().plan_settled)
    assert len(made_of) == 2


@pytest.mark.usefixtures("beside")
def test_a_plan_is_made_anew_so_often_and_then_only_foreseen(plans: tuple[list[Timeline], threading.Event]) -> None:
    made_of, may = plans
    may.set()
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        for number in range(1, MOST_REMADE + 2):
            CLOCKWORK.pace = 1 - 0.1 * number
            soon(model, lambda: step_ms(offloader.timeline) == pytest.approx(CLOCKWORK.pace * USUAL_MS, rel=0.01))
            soon(model, lambda: offloader.report().plan_settled)
        assert len(made_of) == 1 + MOST_REMADE
        assert offloader.report().plans_remade == MOST_REMADE
        assert offloader.report().predicted_ms == pytest.approx(CLOCKWORK.pace * USUAL_MS, rel=0.01)


@pytest.mark.usefixtures("beside")
def test_no_plan_is_made_anew_before_the_step_that_says_whether_is_read(
    plans: tuple[list[Timeline], threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of, may = plans
    may.set()
    passed = [True]
    monkeypatch.setattr(HostClock, "passed", lambda *_: passed[0])
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace = 1.1
        train(model, rows(), SETTLED - 2)
        assert offloader.report().times_scaled == pytest.approx(1.1, rel=0.01)
        CLOCKWORK.pace = 1.0
        train(model, rows(), 1)
        passed[0] = False  # the device is behind
        train(model, rows(), 5)
        passed[0] = True
        soon(model, lambda: offloader.report().plan_settled)
        assert offloader.report().times_scaled == pytest.approx(1.0, rel=0.01)
        assert len(made_of) == 1


@pytest.mark.usefixtures("beside")
def test_what_is_in_the_making_is_of_no_use_once_steps_are_measured_anew(
    plans: tuple[list[Timeline], threading.Event],
) -> None:
    made_of, may = plans
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace = 1.1
        soon(model, lambda: len(made_of) == 2)
        assert_equal(train(plain, rows(256), 1), train(model, rows(256), 1))
        train(model, rows(256), 1)
        assert offloader.report().drifts == 1
        old = offloader.plan
        may.set()
        all_made()
        soon(model, lambda: offloader.plan is not old, 256)
        assert offloader.timeline is not None
        assert offloader.timeline.sections[1].allocations[0].nbytes == 4 * 64 * WIDTH * 4
        assert offloader.report().times_scaled == 1.0
        assert offloader.report().plans_remade == 0


@pytest.mark.usefixtures("beside")
def test_a_step_does_not_wait_for_what_is_foreseen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECK_EVERY", 3)
    may, simulate, count = threading.Event(), making.simulate, [0]

    def simulated(*given: Any) -> Any:
        count[0] += 1
        assert count[0] == 1 or may.wait(20)
        return simulate(*given)

    monkeypatch.setattr(making, "simulate", simulated)
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        before = offloader.timeline
        CLOCKWORK.pace = 1.03
        soon(model, lambda: count[0] == 2)
        train(model, rows(), 8)
        assert offloader.timeline is before
        assert count[0] == 2, "one at a time"
        may.set()
        soon(model, lambda: offloader.timeline is not before)
        assert offloader.report().predicted_ms == pytest.approx(1.03 * USUAL_MS, rel=0.01)


@pytest.mark.usefixtures("beside")
def test_ranks_that_planned_together_do_not_plan_apart(
    plans: tuple[list[Timeline], threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_of, may = plans
    may.set()
    monkeypatch.setattr(making, "agreed", lambda timeline, link: (timeline, link, 2))
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        before = offloader.timeline
        CLOCKWORK.pace = 1.1
        soon(model, lambda: offloader.report().plan_settled)
        train(model, rows(), 5)
        assert len(made_of) == 1
        assert offloader.timeline is before, "it is the ranks' own together"
        assert offloader.report().predicted_ms == pytest.approx(1.1 * USUAL_MS, rel=0.01)


@pytest.mark.usefixtures("beside")
def test_a_plan_that_cannot_be_made_anew_leaves_the_one_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plan, failed = making.make_plan, threading.Event()
    count = [0]

    def made(*given: Any, **caution: Any) -> Any:
        count[0] += 1
        if count[0] > 1:
            failed.set()
            raise ValueError("boom")
        return make_plan(*given, **caution)

    monkeypatch.setattr(making, "make_plan", made)
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        old = offloader.plan
        CLOCKWORK.pace = 1.1
        soon(model, failed.is_set)
        assert_equal(train(plain, rows(), 5), train(model, rows(), 5))
        assert offloader.plan is old
        assert offloader.report().plans_remade == 0


@pytest.mark.usefixtures("beside")
def test_a_given_plan_is_never_replaced(plans: tuple[list[Timeline], threading.Event]) -> None:
    made_of, may = plans
    may.set()
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        given, timeline = offloader.plan, offloader.timeline
        assert given is not None and timeline is not None
        CLOCKWORK.pace = 1.1
        train(model, rows(), 3)
        offloader.use_plan(given, timeline)
        train(model, rows(), 3 * SETTLED)
        assert offloader.plan is given
        assert offloader.timeline is timeline
        assert offloader.report().predicted_ms is None
        assert len(made_of) == 1


def test_nothing_that_was_told_of_the_plan_before_is_told_of_a_given_one() -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        given, timeline = offloader.plan, offloader.timeline
        assert given is not None and timeline is not None
        CLOCKWORK.pace = 1.1
        train(model, rows(), SETTLED + 2)
        assert offloader.report().times_scaled == pytest.approx(1.1, rel=0.01)
        offloader.use_plan(given, timeline)
        train(model, rows(), 2)
        report = offloader.report()
        assert report.times_scaled == 1.0 and "times scaled" not in str(report)
        assert report.planning_ms is None and report.agreed_with == 1


def test_a_step_under_the_plan_before_says_nothing_of_one_that_was_given_in_the_midst_of_it() -> None:
    _, model = models()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        planned(model, offloader)
        loss = model(rows()[0]).square().mean()  # of the second step, which is timed
        assert offloader.plan is not None and offloader.timeline is not None
        offloader.use_plan(offloader.plan, offloader.timeline)
        loss.backward()
        del loss
        train(model, rows(), 1)
        assert offloader.report().measured_ms is None


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pace", "by"), [(0.7, 0.7), (1.4, 1.0)])
def test_a_plan_for_less_is_made_at_the_pace_of_the_step_that_took_too_much(
    pace: float, by: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Timeline] = []
    tighter, broken = Budget.tighter, [False]

    def seen(self: Budget, peak_bytes: int, timeline: Timeline, link: Link, foreseen: Any) -> Any:
        asked.append(timeline)
        broken[0] = False
        return tighter(self, peak_bytes, timeline, link, foreseen)

    monkeypatch.setattr(Budget, "tighter", seen)
    monkeypatch.setattr(Budget, "broken_by", lambda *_: broken[0])
    _, model = models()
    with offload(model, recompute="never", device_budget=10**9) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace, broken[0] = pace, True
        old = offloader.plan
        train(model, rows(), 2)
        assert [step_ms(timeline) for timeline in asked] == [pytest.approx(by * USUAL_MS, rel=0.01)]
        assert offloader.plan is not old
        assert offloader.report().times_scaled == pytest.approx(by, rel=0.01)
        assert step_ms(offloader.timeline) == pytest.approx(by * USUAL_MS, rel=0.01)


def test_a_step_that_took_too_much_where_no_plan_for_less_is_found_is_not_counted_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Budget, "tighter", lambda *_: None)
    monkeypatch.setattr(Budget, "broken_by", lambda *_: True)
    _, model = models()
    with offload(model, recompute="never", device_budget=10**9) as offloader:
        planned(model, offloader)
        CLOCKWORK.pace = 0.9
        train(model, rows(), SETTLED + 2)
        assert offloader.report().times_scaled == pytest.approx(0.9, rel=0.01)
        assert offloader.report().predicted_ms == pytest.approx(0.9 * USUAL_MS, rel=0.01)
