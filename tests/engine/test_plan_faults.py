"""Where the planner itself fails training goes on without a plan, and says so; what it refuses is refused as ever."""

from __future__ import annotations

import time
import traceback
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from lighterage import BudgetError, Offloader
from lighterage.engine import offloader as offloader_module
from lighterage.engine.planning import autoplan, making
from lighterage.engine.planning.clock import HostClock
from lighterage.engine.planning.room import Room
from lighterage.engine.planning.step_log import StepLog
from lighterage.engine.traffic import HELD_ELSEWHERE
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, train
from tests.engine.test_plan_made import FAST, Model, offload, pair, rows

NO_PLAN = "no plan could be made"
MAKE_PLAN = making.make_plan


@pytest.fixture(autouse=True)
def _link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lighterage.engine.offloader.measure_link", lambda *_: FAST)


@pytest.fixture(params=["at once", "beside"])
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made in the step, as on a CPU, or beside the steps, as on an accelerator."""
    if request.param == "at once":
        return
    made = offloader_module.Autoplan

    def make(policy: Any, traffic: Any, module_of: Any, device: Any, *rest: Any) -> autoplan.Autoplan:
        return made(policy, traffic, module_of, torch.device("meta"), *rest)

    monkeypatch.setattr(offloader_module, "Autoplan", make)
    monkeypatch.setattr(autoplan, "clock_of", lambda _: HostClock())


class Failing:
    """A planner that fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.num_calls = 0
        self.local: weakref.ref[Any] | None = None

    def __call__(self, *_: object, **caution: object) -> NoReturn:
        self.num_calls += 1
        local = torch.empty(1)
        self.local = weakref.ref(local)
        raise self.error


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    planner = Failing(RuntimeError("boom"))
    monkeypatch.setattr(making, "make_plan", planner)
    return planner


def compare(plain: Model, model: Model, is_so: Callable[[], bool], num_more: int = 6) -> None:
    """Steps with the same bits until it is so, and some more."""
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        assert_equal(train(plain, rows(), 1), train(model, rows(), 1))
        time.sleep(0.002)
    assert_equal(train(plain, rows(), num_more), train(model, rows(), num_more))


def told(offloader: Offloader) -> str:
    return offloader.report().plan or ""


def failed(offloader: Offloader) -> Callable[[], bool]:
    return lambda: "failed" in told(offloader)


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), MemoryError(), AssertionError(), ValueError("min() arg is an empty sequence")]
)
def test_training_goes_on_with_the_same_bits_where_the_planner_fails_and_one_warning_says_what_to_do(
    error: Exception, failing: Failing
) -> None:
    failing.error = error
    what = traceback.format_exception_only(error)[0].strip()
    plain, model = pair()
    with offload(model) as offloader:
        with pytest.warns() as caught:
            compare(plain, model, failed(offloader))
        report, plan, timeline = offloader.report(), offloader.plan, offloader.timeline
        assert offloader.sections == []
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"the planner failed ({what}), and steps go on without a plan." in text
    assert "What sections save stays on the device" in text
    assert "Name keep_last, release_after or prefetch_ahead" in text
    assert "Traceback" in text and "test_plan_faults.py" in text and text.endswith(what)
    assert failing.num_calls == 1, "it is not asked again"
    assert plan is None
    assert timeline is not None, "there is something to report"
    assert f"plan: none: the planner failed ({what})" in str(report) and "Traceback" not in str(report)
    assert not report.plan_settled and report.predicted_ms is None


@pytest.mark.usefixtures("failing", "_where")
def test_steps_after_a_fault_keep_all_and_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logs: list[StepLog] = []
    init = StepLog.__init__

    def made(self: StepLog, *args: Any, **kwargs: Any) -> None:
        logs.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(StepLog, "__init__", made)
    plain, model = pair()
    with offload(model) as offloader:
        with pytest.warns(match="the planner failed"):
            compare(plain, model, failed(offloader))
        logs.clear()
        before = offloader.stats(total=True).bytes_out  # of the trial
        assert_equal(train(plain, rows(), 60), train(model, rows(), 60))
        assert not logs
        assert offloader.stats(total=True).bytes_out == before
        sections = offloader.report().sections
        assert len(sections) == 5
        assert all(section.kept[NO_PLAN] > 0 for section in sections)
        # What the trial has moved, and freed nothing, is told as that.
        assert {reason for section in sections for reason in section.kept} <= {NO_PLAN, HELD_ELSEWHERE, "parameter"}


@pytest.mark.usefixtures("_where")
def test_steps_of_other_sizes_and_numbers_of_sections_ask_for_no_plan_after_a_fault(failing: Failing) -> None:
    plain, model = pair()
    with offload(model) as offloader:
        with pytest.warns(match="the planner failed"):
            compare(plain, model, failed(offloader))
        for inputs in (rows(256), rows() * 2, rows()):
            assert_equal(train(plain, inputs, 8), train(model, inputs, 8))
        assert offloader.plan is None and failed(offloader)()
        assert offloader.report().drifts == 0
    assert failing.num_calls == 1


@pytest.mark.usefixtures("failing", "_where")
@pytest.mark.parametrize("room", [[False], [True, False], [False, True, True]])
def test_sections_that_find_no_room_move_after_a_fault(room: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair()
    with offload(model) as offloader:
        with pytest.warns(match="the planner failed"):
            compare(plain, model, failed(offloader))
        answers = iter(room * 1000)
        monkeypatch.setattr(Room, "for_one_more", lambda *_: next(answers))
        assert_equal(train(plain, rows(), 6), train(model, rows(), 6))
        report = offloader.report()
        moved = [section.bytes_out > 0 for section in report.sections]
        assert any(moved) and all(moved) == (room == [False])
        assert [NO_PLAN in section.kept for section in report.sections] == [not one for one in moved]
        assert offloader.sections == []


@pytest.mark.usefixtures("failing", "_where")
def test_a_budget_has_all_move_after_a_fault_where_no_allocator_tells_of_room() -> None:
    plain, model = pair()
    with offload(model, device_budget="1GiB") as offloader:
        with pytest.warns(match="no room for them within device_budget='1GiB'") as caught:
            compare(plain, model, failed(offloader))
        assert len(caught) == 1
        assert all(section.bytes_out > 0 for section in offloader.report().sections)
        assert "device_budget='1GiB'" in told(offloader)


@pytest.mark.usefixtures("failing", "_where")
def test_where_warnings_are_errors_a_fault_ends_one_step_and_no_other() -> None:
    plain, model = pair()
    with offload(model) as offloader:
        with pytest.raises(UserWarning, match="the planner failed"):
            compare(plain, model, failed(offloader))
        assert_equal(train(plain, rows(), 6), train(model, rows(), 6))
        assert offloader.plan is None
        assert offloader.sections == []


@pytest.mark.usefixtures("_where")
def test_a_fault_holds_nothing_of_the_planner(failing: Failing) -> None:
    plain, model = pair()
    with offload(model) as offloader:
        with pytest.warns(match="the planner failed"):
            compare(plain, model, failed(offloader))
        assert failing.local is not None and failing.local() is None


def test_a_fault_is_told_where_there_is_no_memory_for_its_traceback(
    failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.error = MemoryError("the heap")
    monkeypatch.setattr(making.traceback, "format_exception", Failing(MemoryError()))
    plain, model = pair()
    with offload(model) as offloader, pytest.warns(match=r"failed \(MemoryError: the heap\)(.|\n)*\n\nMemoryError"):
        compare(plain, model, failed(offloader))


@pytest.mark.usefixtures("_where")
def test_a_rank_that_cannot_agree_with_the_others_goes_on_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "agreed", Failing(ValueError("another version's words")))
    plain, model = pair()
    with offload(model) as offloader:
        with pytest.warns(match=r"failed \(ValueError: another version's words\)"):
            compare(plain, model, failed(offloader))
        assert offloader.report().agreed_with == 1


# --- what comes after -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("failing")
def test_an_offloader_that_is_made_after_a_fault_makes_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair()
    with offload(model, max_slowdown=1.0) as offloader, pytest.warns(match="the planner failed"):
        compare(plain, model, failed(offloader))
    monkeypatch.setattr(making, "make_plan", MAKE_PLAN)
    with offload(model, max_slowdown=1.0) as offloader:
        compare(plain, model, lambda: offloader.plan is not None)
        assert offloader.stats().bytes_out > 0
        assert "failed" not in told(offloader)


@pytest.mark.usefixtures("failing")
def test_a_plan_that_is_given_after_a_fault_is_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = pair()
    with offload(model, max_slowdown=1.0) as offloader:
        with pytest.warns(match="the planner failed"):
            compare(plain, model, failed(offloader))
        timeline = offloader.timeline
        assert timeline is not None
        made = MAKE_PLAN(timeline, FAST, making.goal_of(offloader.policy))
        offloader.use_plan(made, timeline)
        assert_equal(train(plain, rows(), 4), train(model, rows(), 4))
        assert offloader.plan is made
        assert offloader.stats().bytes_out > 0
        assert told(offloader) == made.why


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize(
    ("policy", "kind", "match"),
    [
        ({"device_budget": 1000}, BudgetError, "smallest peak"),
        ({"rules": [("Layer.1", "offload", "(3, 3) float64")]}, ValueError, "no section or allocation matches"),
    ],
)
def test_what_the_user_asked_for_and_cannot_have_is_refused_in_each_step(
    policy: dict[str, Any], kind: type[Exception], match: str
) -> None:
    plain, model = pair()
    with offload(model, **policy) as offloader, warnings.catch_warnings(record=True) as caught:
        with pytest.raises(kind, match=match):
            compare(plain, model, failed(offloader))
        for _ in range(2):
            with pytest.raises(kind, match=match):
                train(model, rows(), STEPS_TO_PLAN)
        assert offloader.plan is None and not failed(offloader)()
        assert not caught
