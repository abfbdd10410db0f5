"""Sections of one class run in the ways that a plan may choose, and what each takes is told apart."""

from __future__ import annotations

import collections
import itertools
import time
from typing import Any

import pytest
import torch

from lighterage.engine.ledger import Row
from lighterage.engine.planning import derived
from lighterage.engine.planning import trial as trial_module
from lighterage.engine.planning.clock import Gauge, HostClock
from lighterage.engine.planning.section_log import SectionLog
from lighterage.engine.planning.step_log import StepLog
from lighterage.engine.planning.timelines import waiting_phases
from lighterage.engine.planning.trial import TRIAL_STEPS, Costs, Trial, _costs
from lighterage.engine.sections import Section
from lighterage.engine.traffic import HELD_ELSEWHERE, Traffic
from lighterage.planner.timeline import Phase, SavedAllocation, SectionRecord, Timeline, Use
from tests.engine.planned import assert_equal, train
from tests.engine.test_bare_trial import _played_beside_the_steps, hooks_take, offload  # noqa: F401
from tests.engine.test_derived import everywhere
from tests.engine.test_plan_made import rows
from tests.engine.test_plan_pace import CLOCKWORK, Takes, models, planned


def timeline(count: int) -> Timeline:
    sections = tuple(
        SectionRecord(
            name=f"layer.{index}",
            allocations=(
                SavedAllocation(
                    save=1,
                    nbytes=8,
                    held_bytes=8,
                    born_ms=0.0,
                    uses=(Use(section=index, first_ms=0.0, last_ms=1.0),),
                ),
            ),
        )
        for index in range(count)
    )
    forward = [Phase(direction="forward", section=index, ms=1.0, work_bytes=0) for index in range(count)]
    backward = [Phase(direction="backward", section=index, ms=2.0, work_bytes=0) for index in reversed(range(count))]
    return Timeline(sections=sections, phases=(*forward, *backward))


def chosen(count: int, *, able: bool = True, limited: bool = False, on_host: bool = False) -> Trial:
    trial = Trial(on_host=on_host)
    able_to = range(count) if able else ()
    trial.choose(dict.fromkeys(range(count), "layer"), able_to, able_to, limited=limited)
    return trial


def roles(count: int, **how: bool) -> list[dict[int, str]]:
    """Of each step."""
    return [dict(step) for step in chosen(count, **how)._roles]


# --- roles ------------------------------------------------------------------------------------------------------------


def test_every_way_is_tried_in_each_step_and_by_every_section_in_some() -> None:
    steps = roles(9)
    assert len(steps) == TRIAL_STEPS
    assert all(set(step.values()) == {"moved", "selective", "bare", "hooked", "again"} for step in steps)
    for index in range(8):
        assert len({step[index] for step in steps}) >= 3, "places do not speak for ways"
    assert {role for step in roles(9, able=False) for role in step.values()} == {"moved", "bare", "hooked"}


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("count", range(1, 14))
def test_the_last_section_is_left_alone_and_none_moves_late(count: int, able: bool, limited: bool) -> None:
    steps = roles(count, able=able, limited=limited)
    found = {role for step in steps for role in step.values()}
    for step in steps:
        assert count - 1 not in step
        assert all(2 * index < count for index, role in step.items() if role == "moved")
    assert able or not {"selective", "again"} & found
    assert not (limited and {"bare", "hooked"} & found), "what is kept takes room"
    if count >= 3 and not limited:
        assert {"bare", "hooked"} <= found, "there is something to compare with"
    if count >= 3 and limited and able:
        assert "again" in found


def test_on_a_cpu_nothing_but_computing_again_is_tried() -> None:
    assert [set(step.values()) for step in roles(9, on_host=True)] == [{"selective"}]
    assert roles(9, on_host=True, able=False) == []
    assert chosen(9, on_host=True, able=False).num_steps == 0


@pytest.mark.parametrize("step", range(TRIAL_STEPS))
def test_the_plan_of_the_trial_waits_for_nothing(step: int) -> None:
    trial, steps = chosen(9), timeline(9)
    plan = trial.plan(steps, step)
    moved = [index for index, section in enumerate(plan.sections) if section.moves]
    assert moved == sorted(index for index, role in trial._roles[step].items() if role == "moved")
    for index in moved:
        assert index + plan.sections[index].moves[0].release_after == 8, "let go of as the last forward ends"
    assert [fetch.section for fetch in plan.fetches[9]] == moved[::-1], "asked for as backward begins, by need"
    assert sum(map(len, plan.fetches)) == len(moved)


# --- what is recorded -------------------------------------------------------------------------------------------------


class Asked(Gauge):
    """An allocator that counts questions."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.num_asked = 0

    def peak(self) -> int:
        self.num_asked += 1
        return 1000 * self.num_asked


class Behind(HostClock):
    """The clock of a device that has not begun what was issued last."""

    def passed(self, mark: object) -> bool:
        return False


@pytest.mark.parametrize("detailed", [False, True])
def test_an_allocator_is_asked_at_each_boundary_only_where_every_phase_has_a_peak(detailed: bool) -> None:
    gauge = Asked()
    log = StepLog(HostClock(), gauge, detailed=detailed)
    before = gauge.num_asked
    for name in ("one", "two"):
        section = SectionLog(name, False, Row(name, False))
        log.entered(section)
        log.left(section)
    assert gauge.num_asked - before == (4 if detailed else 0)
    log._backward_ended()
    assert gauge.num_asked - before == (5 if detailed else 1)
    assert log.boundaries[-1].peak_bytes == 1000 * gauge.num_asked, "the step's, or its last phase's"


@pytest.mark.parametrize(("clock", "waits"), [(HostClock(), True), (Behind(), False)])
def test_a_device_waits_for_its_host_where_it_has_begun_what_is_not_yet_issued(clock: HostClock, waits: bool) -> None:
    log = StepLog(clock, Asked(), detailed=False)
    section = SectionLog("one", False, Row("one", False))
    section.index = 0
    log.entered(section)
    log.left(section)
    assert waiting_phases(log) == {("forward", 0): waits}


# --- costs ------------------------------------------------------------------------------------------------------------

USUAL = (10.0, 20.0)
WAITS, FORWARD_WAITS, COMPUTES = (True, True), (True, False), (False, False)


def test_where_nothing_differs_nothing_costs() -> None:
    seen = {"bare": (9.9, 19.8), "hooked": (10.0, 20.1), "moved": (10.1, 20.2), "selective": (10.0, 20.7)}
    assert _costs(seen, USUAL, WAITS, 12) == Costs(selective=pytest.approx(0.7), num_moves=12)


def test_hooks_moves_and_what_is_computed_again_are_told_apart() -> None:
    seen = {"bare": (8.0, 16.0), "hooked": (9.0, 17.0), "moved": (10.0, 18.5), "selective": (9.5, 17.25)}
    found = _costs(seen | {"again": (8.0, 25.0)}, USUAL, WAITS, 10)
    assert found.parts == pytest.approx((0.8, 0.8))
    assert found.hooks == pytest.approx((1.0, 1.0))
    assert found.moves == pytest.approx(2.5)
    assert found.selective == pytest.approx(0.75)
    assert found.again == pytest.approx(9.0)


def test_where_the_device_does_not_wait_for_its_host_what_differs_is_noise() -> None:
    seen = {"bare": (8.0, 18.0), "hooked": (9.0, 19.0), "moved": (10.0, 21.0), "selective": (11.0, 20.25)}
    assert _costs(seen, USUAL, COMPUTES, 10) == Costs(selective=pytest.approx(1.25), num_moves=10)
    found = _costs(seen, USUAL, FORWARD_WAITS, 10)
    assert found.parts == pytest.approx((0.8, 1.0))
    assert found.hooks == pytest.approx((1.0, 0.0))
    assert found.moves == pytest.approx(1.0)
    assert found.selective == pytest.approx(2.0 + 1.25)
    # What a whole section takes is then its forward, as the timeline has it.
    assert _costs({"again": (12.0, 29.0), "bare": USUAL}, USUAL, COMPUTES, 0).again is None


def test_deriving_that_was_timed_by_itself_is_not_looked_for_in_what_phases_differ() -> None:
    seen = {"bare": (8.0, 16.0), "hooked": (9.0, 17.0), "selective": (8.5, 16.9)}
    assert _costs(seen, USUAL, COMPUTES, 0, 1.5).selective == 1.5
    assert _costs(seen, USUAL, WAITS, 0, 1.5).selective == 1.5, "a forward that took less costs nothing less"
    seen["selective"] = (9.75, 16.9)
    assert _costs(seen, USUAL, FORWARD_WAITS, 0, 1.5).selective == pytest.approx(0.75 + 1.5)
    assert _costs(seen, USUAL, COMPUTES, 0, 1e-6).selective == pytest.approx(0.02 * 10.0), "it takes some time"


def test_under_a_budget_what_is_computed_again_tells_what_is_bare() -> None:
    found = _costs({"again": (8.0, 25.0), "moved": (9.5, 21.5)}, USUAL, WAITS, 10)
    assert found.parts == pytest.approx((0.8, 1.0))
    assert found.hooks == pytest.approx((0.5, 0.5))
    assert found.moves == pytest.approx(2.0)
    assert found.again == pytest.approx(5.0)
    # The second forward may be hidden behind what the device has yet to do, and the first may take longer than usual.
    found = _costs({"again": (12.0, 25.0)}, USUAL, WAITS, 10)
    assert found.parts == (1.0, 1.0)
    assert found.again == pytest.approx(7.0)


def test_with_nothing_at_rest_times_are_as_they_were_measured() -> None:
    assert _costs({"moved": (9.0, 17.0), "selective": (10.0, 21.0)}, USUAL, WAITS, 3) == Costs(
        selective=1.0, num_moves=3
    )
    assert _costs({}, USUAL, WAITS, 0) == Costs()


# --- in steps ---------------------------------------------------------------------------------------------------------


def moves_take(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = Traffic.gather

    def slow(traffic: Traffic, allocation: Any, section: Section, *rest: Any) -> None:
        CLOCKWORK.now_s += seconds
        gather(traffic, allocation, section, *rest)

    monkeypatch.setattr(Traffic, "gather", slow)


def test_what_hooks_and_moves_take_in_steps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models(num_layers=9)
    hooks_take(1.0, monkeypatch)
    moves_take(0.5, monkeypatch)
    with offload(model, max_slowdown=10.0, recompute="never") as offloader:
        planned(model, offloader)
        saves = offloader.report().sections[1].saves
        steps, link = offloader.timeline, offloader._opener._auto.link
        assert steps is not None and link is not None
    # The first section saves less than the others, and sections of one class are taken to be alike.
    hooks = steps.sections[1].hooks_forward_ms / 1e3
    assert hooks == pytest.approx(saves, rel=0.1)
    assert all(section.hooks_forward_ms == pytest.approx(1e3 * hooks) for section in steps.sections)
    assert all(section.hooks_backward_ms == 0.0 for section in steps.sections)
    assert steps.step_ms == pytest.approx(9 * 30e3, rel=0.02)
    assert link.move_us == pytest.approx(0.5e6, rel=0.1)


def deriving_takes(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    func = derived.Derivation.unpack

    def slow(derivation: derived.Derivation) -> Any:
        CLOCKWORK.now_s += seconds if derivation._kept is None else 0.0
        return func(derivation)

    monkeypatch.setattr(derived.Derivation, "unpack", slow)


@pytest.mark.parametrize("unquiet_s", [0.0, 3.0])
def test_what_deriving_takes_is_found_whatever_else_backward_waits_for(
    unquiet_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section derives one tensor, for its second product."""
    _, model = models(num_layers=9)
    deriving_takes(0.25, monkeypatch)
    backward, count = Takes.backward, itertools.count()

    def unquiet(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        CLOCKWORK.now_s += unquiet_s * (next(count) % 3)
        return backward(ctx, grad)

    monkeypatch.setattr(Takes, "backward", staticmethod(unquiet))
    with offload(model, max_slowdown=10.0, recompute="auto") as offloader:
        planned(model, offloader)
        steps = offloader.timeline
        assert steps is not None
    assert {section.selective_ms for section in steps.sections} == {250.0}


@pytest.mark.parametrize("times", [1, 5])
def test_backward_that_comes_again_over_one_graph_is_not_counted_again(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = []
    took = derived.Stopwatch.took
    monkeypatch.setattr(derived.Stopwatch, "took", lambda self, start: marks.append(self) or took(self, start))
    _, model = models(num_layers=9)
    deriving_takes(0.25, monkeypatch)
    with offload(model, max_slowdown=10.0, recompute="auto") as offloader:
        until = time.monotonic() + 30
        while offloader.plan is None and time.monotonic() < until:
            loss = model(rows()[0]).square().mean()
            for _ in range(times - 1):
                loss.backward(retain_graph=True)
            loss.backward()
            del loss
            time.sleep(0.002)
        steps = offloader.timeline
        assert steps is not None
    assert {section.selective_ms for section in steps.sections} == {250.0}
    assert collections.Counter(map(id, marks)).most_common(1)[0][1] <= 2, "one for each handle, whoever asks again"


def test_steps_under_a_plan_take_no_time_of_deriving(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = []
    monkeypatch.setattr(derived.Stopwatch, "mark", lambda self: marks.append(self) or 0.0)
    _, model = models(num_layers=9)
    with offload(model, max_slowdown=10.0, recompute="auto") as offloader:
        planned(model, offloader)
        during, steps = len(marks), offloader.timeline
        assert steps is not None
        offloader.use_plan(everywhere(steps), steps)
        train(model, rows(), 3)
        assert {section.mode for section in everywhere(steps).sections} == {"selective"}
    assert during and len(marks) == during


def test_what_the_trial_finds_held_by_somebody_else_is_not_planned_to_move() -> None:
    """The caller holds what the first section is given: to move it would free nothing."""
    _, model = models(num_layers=9)
    with offload(model, max_slowdown=10.0, recompute="never") as offloader:
        planned(model, offloader)
        steps, plan = offloader.timeline, offloader.plan
        assert steps is not None and plan is not None
    held = {(i, a.save) for i, section in enumerate(steps.sections) for a in section.allocations if a.kept is not None}
    first = next(a for a in steps.sections[0].allocations if a.kind == "input")
    assert held == {(0, first.save)} and first.kept == HELD_ELSEWHERE
    moves = {(i, move.save) for i, section in enumerate(plan.sections) for move in section.moves}
    assert moves and not moves & held


def test_where_the_device_is_never_waiting_hooks_and_moves_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = trial_module.waiting_phases
    monkeypatch.setattr(trial_module, "waiting_phases", lambda log: dict.fromkeys(waiting(log), False))
    _, model = models(num_layers=9)
    hooks_take(1.0, monkeypatch)
    moves_take(0.5, monkeypatch)
    with offload(model, max_slowdown=10.0, recompute="never") as offloader:
        planned(model, offloader)
        steps, link = offloader.timeline, offloader._opener._auto.link
        assert steps is not None and link is not None
    assert link.move_us == 0
    assert all(section.hooks_forward_ms == 0 for section in steps.sections)
    assert steps.step_ms > 9 * 30e3, "as it was measured"


@pytest.mark.parametrize("policy", [{"max_slowdown": 1.0}, {"device_budget": "500KiB"}])
def test_steps_of_the_trial_have_the_same_bits(policy: dict[str, Any]) -> None:
    plain, model = models(num_layers=9)
    with offload(model, recompute="auto", **policy):
        assert_equal(train(plain, rows(), 10), train(model, rows(), 10))
