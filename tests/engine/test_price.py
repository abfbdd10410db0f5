"""What is charged to a plan that breaks its price, and when that is known."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lighterage import Policy
from lighterage.engine.planning.clock import Gauge
from lighterage.engine.planning.course import Course
from lighterage.engine.planning.making import PRICE_CAUTION
from lighterage.engine.planning.pace import MOST, Pace, scaled
from lighterage.engine.planning.price import (
    DIFFERS,
    GIVE,
    HELD_UP,
    IN_A_ROW,
    LEAST_ROWS,
    MOST_BEGUN,
    MOST_CORRECTED,
    MOST_MISSED,
    MOST_ROWS,
    Price,
)
from lighterage.engine.planning.room import Room
from lighterage.engine.planning.step_log import StepLog
from lighterage.planner.choose import plan
from lighterage.planner.goal import Goal
from lighterage.planner.plan import Plan, SectionPlan
from lighterage.planner.simulate import simulate
from tests.planner.decoder import LINK, decoder

TIMELINE = decoder(8)
SLOWDOWN = 0.03
ALL = frozenset(range(8))
LEAST_GIVE = DIFFERS * GIVE / LEAST_ROWS
"""Of the fewest rows that are all alike."""


class Device:
    """A clock of a device, with how often it was waited for."""

    def __init__(self) -> None:
        self.num_waits = 0

    def mark(self) -> float:
        return 0.0

    def passed(self, mark: object) -> bool:
        return True

    def catch_up(self) -> None:
        self.num_waits += 1

    def ms(self, start: Any, end: Any) -> float:
        return float(end - start)


def price_of(
    made: Plan,
    slowdown: float | None = SLOWDOWN,
    device: str = "meta",
    clock: Device | None = None,
    **given: Any,
) -> Price:
    policy = Policy(**given) if slowdown is None else Policy(max_slowdown=slowdown, **given)
    room = Room(Gauge(torch.device("cpu")), policy)
    price = Price(policy, torch.device(device), clock or Device(), room)
    price.follow(made)
    return price


def see(
    price: Price,
    made: Plan,
    planned_ms: Iterable[float],
    rest_ms: float | Iterable[float] = 100.0,
    host_ms: tuple[float, float] = (0.0, 0.0),
) -> int:
    """Take turns until it is known, rows as long as those; how many rows were taken.

    `host_ms`: what the host takes at rest, and under the plan.
    """
    course, rows = Course(made, TIMELINE, {}), 0
    at_rest = itertools.repeat(rest_ms) if isinstance(rest_ms, float) else iter(rest_ms)
    planned = iter(planned_ms)
    while True:
        is_planned = rows % 2 == 1
        row_ms = next(planned if is_planned else at_rest, 0.0)
        for number in range(IN_A_ROW):
            turn = price.turn(course, TIMELINE, ALL)
            if turn is None:
                return rows
            assert (turn is course) == is_planned
            held_up = 10.0 if number < 2 else 1.0  # the first of a row does not count, and one is held up
            assert price.took(log_of(held_up * row_ms, held_up * host_ms[is_planned]), turn, fits=True)
        rows += 1


def log_of(ms: float, host_ms: float = 0.0) -> StepLog:
    log = SimpleNamespace(readable=True, clock=Device(), input_bytes=1000, host_ms=host_ms)
    log.boundaries = [SimpleNamespace(at=0.0), SimpleNamespace(at=ms)]
    return cast(StepLog, log)


@pytest.fixture(scope="module")
def made() -> Plan:
    made = plan(TIMELINE, LINK, Goal(max_slowdown=SLOWDOWN), caution=PRICE_CAUTION)
    assert made.num_moves
    return made


@pytest.mark.parametrize(
    ("planned_ms", "num_rows", "is_broken", "measured"),
    [
        ([101, 102, 101.5, 101], LEAST_ROWS, False, 0.0125),
        ([102.55] * MOST_ROWS, 7, False, 0.0255),
        ([103] * MOST_ROWS, MOST_ROWS, False, 0.03),
        ([103.2] * MOST_ROWS, MOST_ROWS, False, 0.032),
        ([103.45] * MOST_ROWS, 7, True, 0.0345),
        ([103.8] * MOST_ROWS, LEAST_ROWS, True, 0.038),
        ([110, 108, 112, 109], LEAST_ROWS, True, 0.095),
        ([100, 130, 101, 100.5, 100, 100, 100, 100], MOST_ROWS, False, 0.0),
        ([110, 100, 110, 100, 100, 100, 100, 100], MOST_ROWS, False, 0.0),
        ([103, 100, 106, 101, 105, 103, 100, 106], MOST_ROWS, False, 0.03),
    ],
)
def test_rows_are_added_until_what_they_differ_by_does_not_matter(
    made: Plan, planned_ms: list[float], num_rows: int, is_broken: bool, measured: float
) -> None:
    price = price_of(made)
    assert see(price, made, planned_ms) == 2 * num_rows + 1
    assert price.is_broken == price.asks_for_a_plan == is_broken
    assert price.measured == pytest.approx(measured)
    assert not price.is_due
    assert ("more than that price" in price.told) == is_broken


@pytest.mark.parametrize("slowdown", [0.01, 0.03])
@pytest.mark.parametrize("part", [0.96, 1.0])
def test_chance_does_not_break_a_price_that_is_spent_whole(made: Plan, slowdown: float, part: float) -> None:
    """Where rows differ by a percent a sixth of such plans is taken to break it at most, and those that cost much more
    are found out."""
    chance = random.Random(0)

    def num_broken(cost: float) -> int:
        count = 0
        for _ in range(200):
            price = price_of(made, slowdown)
            rest = (chance.gauss(100.0, 0.8) for _ in itertools.count())
            planned = (chance.gauss(100.0 * (1 + cost), 0.8) for _ in itertools.count())
            see(price, made, planned, rest)
            count += price.is_broken
        return count

    assert num_broken(part * slowdown) <= 200 / 6
    assert num_broken(slowdown + 0.03) >= 190


def test_rows_at_rest_that_something_held_up_are_not_compared_with(made: Plan) -> None:
    for held_up, measured in ((100.0 * HELD_UP - 0.1, 0.0), (120.0, 0.01)):
        price = price_of(made)
        see(price, made, [101.0] * MOST_ROWS, [100.0, *[held_up] * 2, *[100.0] * 8])
        assert price.measured == pytest.approx(measured, abs=0.01 if not measured else 1e-6)
    price = price_of(made)
    rest = [*[100.0] * 9]
    rest[1::2] = [130.0] * 4
    assert see(price, made, [101.0] * MOST_ROWS, rest) == 2 * LEAST_ROWS + 1
    assert price.measured == pytest.approx(0.01)


@pytest.mark.parametrize("held_up", [(0, 1, 2, 3), (3, 4, 5, 6), (5, 6, 7, 8), (0, 2, 4, 6)])
def test_whichever_rows_are_held_up_it_becomes_known(made: Plan, held_up: tuple[int, ...]) -> None:
    price = price_of(made)
    rest = [300.0 + row if row in held_up else 100.0 for row in range(MOST_ROWS + 1)]
    rows = see(price, made, [101.0] * MOST_ROWS, rest)
    assert rows <= 2 * MOST_ROWS + 1 and not price.is_due
    assert price.measured is not None and price.measured <= 0.01 + 1e-9


@pytest.mark.parametrize(
    ("host_ms", "is_broken", "part"),
    [
        ((50.0, 60.0), False, None),  # far ahead
        ((85.0, 93.0), False, None),  # a tenth more is 2.3 % beyond the device
        ((85.0, 95.0), True, 0.045),
        ((85.0, 110.0), True, 0.21),
        ((120.0, 122.0), False, None),  # the device waits for it in any case
        ((120.0, 126.0), True, 0.05),
        ((100.0, 100.0), False, None),  # both were held up by a device with no more room for launches
    ],
)
def test_a_host_that_breaks_the_price_if_it_loses_a_tenth_breaks_it(
    made: Plan, host_ms: tuple[float, float], is_broken: bool, part: float | None
) -> None:
    price = price_of(made)
    see(price, made, [101.0] * MOST_ROWS, host_ms=host_ms)
    assert price.is_broken == is_broken
    assert price.measured == pytest.approx(0.01), "what steps took is told as it was"
    if part is not None:
        give = f"give or take {LEAST_GIVE:.1%}"
        assert f"1.0% longer ({give}) than steps at rest in turn with them, and would" in price.told
        assert f"would take {part:.1%} longer if their host" in price.told
        assert price._least == pytest.approx(part - LEAST_GIVE, abs=0.0005), "that is what is charged"
    else:
        assert "if their host" not in price.told


def test_a_host_that_waits_for_the_device_in_most_steps_of_a_row_takes_what_the_others_take(made: Plan) -> None:
    """It is ahead of the device by as many launches as that has room for, and then is held up by it."""
    price, course = price_of(made), Course(made, TIMELINE, {})
    for row in range(2 * MOST_ROWS + 1):
        for number in range(IN_A_ROW):
            turn = price.turn(course, TIMELINE, ALL)
            if turn is None:
                break
            own_ms = 70.0 if row % 2 else 50.0
            price.took(log_of(101.0 if row % 2 else 100.0, own_ms if number == 0 else 108.0), turn, fits=True)
    assert not price.is_due and not price.is_broken and price.measured == pytest.approx(0.01)


def test_steps_that_are_faster_under_the_plan_took_no_longer(made: Plan) -> None:
    price = price_of(made)
    see(price, made, [99, 98, 98, 98])
    assert f"took no longer (give or take {LEAST_GIVE:.1%}) than steps at rest" in price.told


@pytest.mark.parametrize("mode", ["save", "selective", "recompute"])
@pytest.mark.parametrize("num_changed", [1, 4, 8])
@pytest.mark.parametrize("rest_ms", [0.9, 1.1])
def test_what_was_not_foreseen_is_foreseen_of_the_same_plan_from_then_on(
    mode: Any, num_changed: int, rest_ms: float, made: Plan
) -> None:
    sections = [
        SectionPlan(name=one.name, mode=mode if index < num_changed else "save", moves=other.moves)
        for index, (one, other) in enumerate(zip(TIMELINE.sections, made.sections, strict=True))
    ]
    changed = Plan(sections=tuple(sections), fetches=made.fetches)
    before = simulate(TIMELINE, changed, LINK)
    foreseen = before.step_ms / TIMELINE.step_ms - 1
    price, pace = price_of(changed, slowdown=max(SLOWDOWN, foreseen / PRICE_CAUTION)), Pace()
    at_rest, took = rest_ms * TIMELINE.step_ms, 1.5 + foreseen
    see(price, changed, [(took + LEAST_GIVE) * at_rest] * MOST_ROWS, at_rest)
    timeline = price.corrected(TIMELINE, before, pace)
    assert pace.since_measured == 1.0, "the plan is not there yet"
    price.replaced(pace)
    assert timeline.step_ms == pytest.approx(at_rest)
    assert pace.since_measured == pytest.approx(rest_ms)
    after = simulate(timeline, changed, LINK)
    stalls = [one.stalls_ms.release + one.stalls_ms.reload for one in (before, after)]
    assert after.step_ms - stalls[1] == pytest.approx(took * at_rest - rest_ms * stalls[0], rel=0.01)
    nothing = Plan(sections=tuple(SectionPlan(name=s.name) for s in TIMELINE.sections), fetches=made.fetches)
    assert simulate(timeline, nothing, LINK).step_ms == pytest.approx(at_rest), "what rests costs nothing"


def test_a_plan_that_broke_its_price_is_not_within_it_again(made: Plan) -> None:
    """Even one of which it was foreseen that it breaks the price, for it was made for another pace."""
    price = price_of(made)
    see(price, made, [104.0] * MOST_ROWS)
    foreseen = simulate(scaled(TIMELINE, 0.8), made, LINK)
    timeline = price.corrected(scaled(TIMELINE, 0.8), foreseen, Pace())
    again = simulate(timeline, made, LINK)
    assert again.step_ms > (1 + PRICE_CAUTION * SLOWDOWN) * timeline.step_ms


def test_times_are_brought_to_the_pace_of_steps_at_rest_within_reach(made: Plan) -> None:
    price, pace = price_of(made), Pace()
    see(price, made, [200.0 * TIMELINE.step_ms] * MOST_ROWS, 100.0 * TIMELINE.step_ms)
    price.corrected(TIMELINE, simulate(TIMELINE, made, LINK), pace)
    price.replaced(pace)
    assert pace.since_measured == pytest.approx(MOST)


def test_a_new_measurement_is_charged_with_all_that_was_found(made: Plan) -> None:
    price = price_of(made)
    assert price.charged(TIMELINE) is TIMELINE
    extra = []
    for _ in range(2):
        price.stop()
        price.follow(made)
        see(price, made, [150.0] * MOST_ROWS)
        corrected = price.corrected(TIMELINE, simulate(TIMELINE, made, LINK), Pace())
        if not extra:  # the second is asked for in vain: steps are measured anew before it is there
            price.replaced(Pace())
        extra.append(corrected.sections[0].hooks_forward_ms - TIMELINE.sections[0].hooks_forward_ms)
    price.stop()
    charged = price.charged(TIMELINE)
    for section, was in zip(charged.sections, TIMELINE.sections, strict=True):
        assert section.hooks_forward_ms == pytest.approx(was.hooks_forward_ms + sum(extra))
    assert price.charged(TIMELINE) == charged, "each is charged once"
    assert price.num_corrected == 1


@pytest.mark.parametrize(
    ("slowdown", "device", "is_due"), [(None, "meta", True), (0.03, "cpu", False), (0.03, "meta", True)]
)
def test_it_is_looked_at_where_there_is_one_and_a_device(
    made: Plan, slowdown: float | None, device: str, is_due: bool
) -> None:
    assert price_of(made, slowdown, device).is_due == is_due


def test_under_a_budget_there_is_none(made: Plan) -> None:
    assert not price_of(made, None, device_budget="1GiB").is_due


def test_among_ranks_it_is_not_looked_at(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, is_due in ((1, True), (2, False)):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda size=size: size)
        assert price_of(made).is_due == is_due


def test_once_there_are_other_ranks_it_is_looked_at_no_more(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    price = price_of(made)
    assert price.is_due
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert not price.is_due


def test_evaluation_is_no_step(made: Plan) -> None:
    device = Device()
    price, course = price_of(made, clock=device), Course(made, TIMELINE, {})
    with torch.no_grad():
        for _ in range(2 * MOST_BEGUN):
            assert price.turn(course, TIMELINE, ALL) is None
    assert price.is_due and device.num_waits == 0
    for _ in range(10):  # sections that save nothing come before the first that does
        assert price.turn(course, TIMELINE, ALL) is not None
    assert device.num_waits == 1


def test_the_device_is_waited_for_between_rows_and_not_within(made: Plan) -> None:
    """A host that is ahead of it would hide what a plan costs the host."""
    device = Device()
    price, course = price_of(made, clock=device), Course(made, TIMELINE, {})
    for row in range(2 * LEAST_ROWS + 1):
        for number in range(IN_A_ROW):
            before = device.num_waits
            turn = price.turn(course, TIMELINE, ALL)
            assert turn is not None
            assert (device.num_waits > before) == (number == 0), (row, number)
            price.took(log_of(100.0), turn, fits=True)
    assert price.turn(course, TIMELINE, ALL) is None and not price.is_due
    waits = device.num_waits
    price.turn(course, TIMELINE, ALL)
    assert device.num_waits == waits


def test_a_row_that_the_device_has_not_come_past_is_taken_again(made: Plan) -> None:
    """Its backward ran on a stream that was not waited for."""
    price, course = price_of(made), Course(made, TIMELINE, {})
    for number in range(IN_A_ROW):
        turn = price.turn(course, TIMELINE, ALL)
        assert turn is not None and turn is not course
        log = log_of(100.0)
        log.readable = number > 0  # type: ignore[misc]
        price.took(log, turn, fits=True)
    assert see(price, made, [100.0] * MOST_ROWS) == 2 * LEAST_ROWS + 1


def test_of_a_plan_in_which_all_stays_nothing_is_due() -> None:
    sections = tuple(SectionPlan(name=s.name) for s in TIMELINE.sections)
    assert not price_of(Plan(sections=sections, fetches=((),) * len(TIMELINE.phases))).is_due


def test_where_the_same_plan_is_made_again_nothing_more_is_seen_of_it(made: Plan) -> None:
    """Rules leave no other, say: it would be charged for the same again and again."""
    price = price_of(made)
    see(price, made, [110.0] * MOST_ROWS)
    price.corrected(TIMELINE, simulate(TIMELINE, made, LINK), Pace())
    price.replaced(Pace())
    for is_last in (False, True):
        price.follow(dataclasses.replace(made, why="for another reason"))
        assert not price.is_due and price.is_broken and price.asks_for_a_plan == (not is_last)
        assert price.measured == pytest.approx(0.1)
        assert ("no plan that keeps to it was found. Raise max_slowdown" in price.told) == is_last
        if not is_last:
            pace = Pace()
            assert price.corrected(TIMELINE, simulate(TIMELINE, made, LINK), pace) is TIMELINE, "that was done before"
            assert price.corrected_goal(Goal(max_slowdown=SLOWDOWN)).rules == (("*", "keep"),)
            price.replaced(pace)
            assert pace.since_measured == 1.0


def test_at_the_last_try_all_stays_that_no_rule_moves(made: Plan) -> None:
    """What a plan costs may not become less with what it moves."""
    price, goal = price_of(made), Goal(max_slowdown=SLOWDOWN, rules=(("layers.0", "offload"),))
    timeline, current = TIMELINE, made
    for number in range(1, MOST_CORRECTED + 1):
        see(price, current, [110.0] * MOST_ROWS)
        timeline = price.corrected(timeline, simulate(timeline, current, LINK), Pace())
        tried = price.corrected_goal(goal)
        assert (tried == goal) == (number < MOST_CORRECTED)
        price.replaced(Pace())
        if number < MOST_CORRECTED:  # as if each still moved something
            sections = tuple(
                dataclasses.replace(section, moves=section.moves if index < MOST_CORRECTED - number else ())
                for index, section in enumerate(made.sections)
            )
            current = dataclasses.replace(made, sections=sections)
        else:
            current = plan(timeline, LINK, tried)
        price.follow(current)
    assert [bool(section.moves) for section in current.sections] == [True] + [False] * 7
    assert all(section.mode == "save" for section in current.sections[1:])
    nothing_left = plan(timeline, LINK, dataclasses.replace(tried, rules=tried.rules[1:]))
    price.follow(nothing_left)
    assert not nothing_left.num_moves and not price.is_due


def test_where_all_stays_for_the_price_it_is_told(made: Plan) -> None:
    price = price_of(made)
    see(price, made, [110.0] * MOST_ROWS)
    price.replaced(Pace())
    stays = Plan(sections=tuple(SectionPlan(name=s.name) for s in TIMELINE.sections), fetches=made.fetches)
    price.follow(stays)
    assert price.told == " Steps under other plans took longer than that price."
    price.stop()
    price.follow(stays)
    assert price.told == "", "it is another measurement's plan"


def test_steps_whose_size_nobody_can_tell_are_not_compared(made: Plan) -> None:
    """Their sections are given objects that tensors lie in."""
    price, course = price_of(made), Course(made, TIMELINE, {})
    turn = price.turn(course, TIMELINE, ALL)
    assert turn is not None
    log = log_of(100.0)
    log.input_bytes = 0
    assert price.took(log, turn, fits=True)
    assert not price.is_due and price.turn(course, TIMELINE, ALL) is None


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 10, 12, 16])
def test_steps_that_are_slow_in_turn_break_no_price(made: Plan, period: int) -> None:
    """What a program does every so many steps is not always in rows under the plan."""
    for phase in range(period):
        for num_slow in (1, 2 if period < 8 else 1):
            price, course, number = price_of(made, 0.01), Course(made, TIMELINE, {}), phase
            while (turn := price.turn(course, TIMELINE, ALL)) is not None:
                price.took(log_of(106.0 if number % period < num_slow else 100.0), turn, fits=True)
                number += 1
            assert not price.is_broken, (phase, num_slow, price.measured)


def test_plans_are_asked_for_so_often_and_then_it_is_told(made: Plan) -> None:
    price = price_of(made)
    for number in range(MOST_CORRECTED):
        see(price, made, [110.0] * MOST_ROWS)
        assert price.asks_for_a_plan and "Raise" not in price.told
        price.corrected(TIMELINE, simulate(TIMELINE, made, LINK), Pace())
        price.replaced(Pace())
        assert price.num_corrected == number + 1
        price.stop()
        price.follow(made)
    see(price, made, [110.0] * MOST_ROWS)
    assert not price.asks_for_a_plan and "Raise max_slowdown" in price.told


def test_a_plan_in_the_place_of_one_that_keeps_to_its_price_is_none_of_its_corrections(made: Plan) -> None:
    price, pace = price_of(made), Pace()
    see(price, made, [100.0] * MOST_ROWS)
    price.replaced(pace)
    assert price.num_corrected == 0 and pace.since_measured == 1.0


def test_what_is_foreseen_to_be_paid_is_not_charged(made: Plan) -> None:
    """A plan that rules make dear costs what was foreseen of it."""
    foreseen = simulate(TIMELINE, made, LINK)
    price = price_of(made, slowdown=0.0)
    part = 1 + (foreseen.step_ms / TIMELINE.step_ms - 1)
    assert part > 1.005
    see(price, made, [part * 100.0] * MOST_ROWS)
    timeline = price.corrected(TIMELINE, foreseen, Pace())
    assert timeline.sections[0].hooks_forward_ms == pytest.approx(TIMELINE.sections[0].hooks_forward_ms, abs=1e-9)


def test_noise_breaks_no_price_of_zero(made: Plan) -> None:
    price = price_of(made, slowdown=0.0)
    see(price, made, [100.05] * MOST_ROWS)
    assert not price.is_broken and price.measured == pytest.approx(0.0005)


def test_an_exception_in_a_step_at_rest_ends_it(made: Plan) -> None:
    """For want of memory, perhaps, that the plan would have left."""
    price, course = price_of(made), Course(made, TIMELINE, {})
    turn = price.turn(course, TIMELINE, ALL)
    assert turn is not None and turn is not course
    assert price.took(None, turn, fits=True)
    assert not price.is_due and price.turn(course, TIMELINE, ALL) is None


def test_steps_that_are_given_other_sizes_are_not_compared(made: Plan) -> None:
    price, course = price_of(made), Course(made, TIMELINE, {})
    for _ in range(IN_A_ROW):
        turn = price.turn(course, TIMELINE, ALL)
        assert turn is not None and price.took(log_of(100.0), turn, fits=True)
    for input_bytes, is_read in (
        (1000, True),
        (600, False),
        (1010, True),
        (1100, False),
        (1000, True),
        (995, True),
        (1000, True),
    ):
        assert price.turn(course, TIMELINE, ALL) is course
        log = log_of(100.0)
        log.input_bytes = input_bytes
        before = len(price._row)
        assert price.took(log, course, fits=True)
        assert len(price._row) - before == is_read
    assert price.turn(course, TIMELINE, ALL) is not course, "the row is over"


def test_steps_that_never_end_are_given_up(made: Plan) -> None:
    price, course = price_of(made), Course(made, TIMELINE, {})
    for _ in range(MOST_BEGUN):
        assert price.turn(course, TIMELINE, ALL) is not None
    assert price.turn(course, TIMELINE, ALL) is None
    assert not price.is_due
    price.follow(made)
    assert price.turn(course, TIMELINE, ALL) is not None, "the next plan's may"


def test_a_step_of_odd_size_before_all_others_is_left_out(made: Plan) -> None:
    price, course = price_of(made), Course(made, TIMELINE, {})
    for number in range(IN_A_ROW + 1):
        turn = price.turn(course, TIMELINE, ALL)
        assert turn is not None and turn is not course
        log = log_of(100.0)
        log.input_bytes = 1000 if number else 300
        price.took(log, turn, fits=True)
    assert price.turn(course, TIMELINE, ALL) is course, "the row is over"


def test_where_the_host_waits_for_copies_its_time_is_not_its_own(made: Plan) -> None:
    for tier, is_broken in (("disk", False), ("host", True)):
        price = price_of(made, tier=tier)
        see(price, made, [101.0] * MOST_ROWS, host_ms=(50.0, 100.9))
        assert price.is_broken == is_broken and price.measured == pytest.approx(0.01)


def test_where_nobody_may_wait_for_the_device_it_is_given_up(made: Plan) -> None:
    class Forbidden(Device):
        def catch_up(self) -> None:
            raise RuntimeError("called a synchronizing CUDA operation")

    price = price_of(made, clock=Forbidden())
    assert price.turn(Course(made, TIMELINE, {}), TIMELINE, ALL) is None
    assert not price.is_due


def test_nothing_is_held_once_it_is_over(made: Plan) -> None:
    for planned_ms in ([100.0] * MOST_ROWS, [110.0] * MOST_ROWS):
        price = price_of(made)
        see(price, made, planned_ms)
        assert not price._row and price._at_rest is None
    price, course = price_of(made), Course(made, TIMELINE, {})
    for number in range(MOST_MISSED + 3):
        turn = price.turn(course, TIMELINE, ALL)
        assert turn is not None
        price.took(log_of(100.0), turn, fits=number < 2)
    assert not price.is_due and not price._row and price._at_rest is None


@pytest.mark.parametrize("used", [10, 50, 60, 70])
def test_room_is_asked_for_what_a_step_takes_beyond_its_beginning(used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else has come to be on the device since."""
    monkeypatch.setattr(Gauge, "now", lambda _: used)
    monkeypatch.setattr(Gauge, "total", lambda _: 80)
    monkeypatch.setattr(Gauge, "room", lambda _: 80 - used)
    room = Room(Gauge(torch.device("cpu")), Policy())
    boundaries = [SimpleNamespace(peak_bytes=peak) for peak in (None, 24, 20)]
    room.seen(cast(StepLog, SimpleNamespace(boundaries=boundaries, used_bytes=10, sections=[])))
    assert room.has_for_step() == (80 - used > 14 * 1.25 + 4)


def test_a_new_plan_is_seen_from_the_first_row_on(made: Plan) -> None:
    price, course = price_of(made), Course(made, TIMELINE, {})
    for _ in range(IN_A_ROW + 1):
        turn = price.turn(course, TIMELINE, ALL)
        assert turn is not None
        price.took(log_of(100.0), turn, fits=True)
    price.follow(made)
    assert not price.took(log_of(100.0), course, fits=True), "the step began under another plan"
    assert see(price, made, [100.0] * MOST_ROWS) == 2 * LEAST_ROWS + 1
