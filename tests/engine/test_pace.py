"""The pace of steps: what scaling changes of a timeline, what a step took, and when a plan is asked for."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from lighterage.engine.planning.clock import HostClock
from lighterage.engine.planning.pace import (
    LEAST,
    MOST,
    MOST_REMADE,
    NEAR,
    SETTLED,
    Pace,
    compute_ms,
    foreseen_compute_ms,
    scaled,
)
from lighterage.planner.choose import plan
from lighterage.planner.goal import Goal
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Phase, SavedAllocation, SectionRecord, Timeline, Use

LINK = Link(out_bytes_per_s=1e6, in_bytes_per_s=1e6, both_bytes_per_s=2e6, copy_us=0.0)


def timeline_of(ms: float = 1.0) -> Timeline:
    def section(index: int) -> SectionRecord:
        return SectionRecord(
            name=f"s{index}",
            allocations=(
                SavedAllocation(
                    save=1,
                    nbytes=8000,
                    held_bytes=9000,
                    born_ms=2 * ms,
                    kind="pointwise",
                    uses=(Use(section=index, first_ms=3 * ms, last_ms=5 * ms),),
                ),
            ),
            selective_ms=None if index == 0 else 4 * ms,
        )

    return Timeline(
        sections=tuple(section(index) for index in range(3)),
        phases=(
            *(Phase(direction="forward", section=index, ms=6 * ms, work_bytes=100) for index in range(3)),
            Phase(direction="other", section=None, ms=ms, work_bytes=50),
            *(Phase(direction="backward", section=index, ms=11 * ms, work_bytes=200) for index in (2, 1, 0)),
        ),
        measured_peak_bytes=27200,
    )


def test_all_times_are_scaled_and_nothing_else() -> None:
    assert scaled(timeline_of(), 2.0) == timeline_of(2.0)
    assert scaled(timeline_of(), 1.0) == timeline_of()
    hooked, longer = (
        dataclasses.replace(timeline_of(ms).sections[0], hooks_forward_ms=0.5 * ms, hooks_backward_ms=0.7 * ms)
        for ms in (1.0, 2.0)
    )
    timeline = timeline_of()
    timeline = dataclasses.replace(timeline, sections=(hooked, *timeline.sections[1:]))
    assert scaled(timeline, 2.0).sections[0] == longer


def test_what_is_foreseen_of_a_scaled_timeline_computes_so_much_longer() -> None:
    for goal in (Goal(max_slowdown=0.5), Goal(device_budget=20000)):
        made = plan(timeline_of(), LINK, goal)
        before, after = (simulate(scaled(timeline_of(), factor), made, LINK) for factor in (1.0, 1.5))
        assert made.num_moves or before.stalls_ms.recompute
        assert foreseen_compute_ms(after) == pytest.approx(1.5 * foreseen_compute_ms(before))


def test_what_a_step_computed_is_without_its_waits() -> None:
    rows = [SimpleNamespace(late_ms=3.0), SimpleNamespace(late_ms=0.5)]
    log = SimpleNamespace(
        clock=HostClock(),
        boundaries=[SimpleNamespace(at=at) for at in (1.0, 1.04, 1.1)],
        waits=[(0, SimpleNamespace(milliseconds=lambda: 7.0)), (1, SimpleNamespace(milliseconds=lambda: None))],
        sections=[SimpleNamespace(row=rows[0]), SimpleNamespace(row=rows[1]), SimpleNamespace(row=rows[0])],
    )
    assert compute_ms(log) == pytest.approx(100.0 - 7.0 - 3.5)  # type: ignore[arg-type]


def test_what_is_foreseen_to_compute_is_without_waits() -> None:
    slow = dataclasses.replace(LINK, out_bytes_per_s=1e5, in_bytes_per_s=1e5, both_bytes_per_s=2e5)
    seen = simulate(timeline_of(), plan(timeline_of(), slow, Goal(device_budget=20000, recompute="never")), slow)
    assert seen.stalls_ms.reload + seen.stalls_ms.release > 0
    assert foreseen_compute_ms(seen) == pytest.approx(timeline_of().step_ms)


def test_what_is_near_counts_at_once_and_what_is_next_to_nothing_not_at_all() -> None:
    pace = Pace()
    assert pace.seen(1.03) == pytest.approx(1.03)
    assert pace.seen(1.001) is None
    assert not pace.doubts


@pytest.mark.parametrize(
    ("first", "second", "counts"), [(1.1, 1.08, 1.08), (1.5, 1.0, None), (1.08, 1.2, 1.08), (0.7, 0.8, 0.8)]
)
def test_what_is_far_off_is_seen_twice_and_the_nearer_counts(first: float, second: float, counts: float | None) -> None:
    pace = Pace()
    assert pace.seen(first) is None
    assert pace.doubts
    factor = pace.seen(second)
    assert factor is None if counts is None else factor == pytest.approx(counts)
    assert not pace.doubts


def test_times_stay_within_reach_of_what_was_measured() -> None:
    pace = Pace()
    for _ in range(5):
        pace.scale(pace.within(1.2))
    assert pace.since_measured == pytest.approx(MOST)
    for _ in range(5):
        pace.scale(pace.within(0.7))
    assert pace.since_measured == pytest.approx(LEAST)


def test_a_plan_is_asked_for_when_clocks_have_settled_and_the_pace_is_another() -> None:
    pace = Pace()
    pace.scale(1 + 2 * NEAR)
    assert not pace.asks_for_a_plan(SETTLED - 1)
    assert pace.asks_for_a_plan(SETTLED)
    pace.planned()
    assert not pace.asks_for_a_plan(SETTLED)
    pace.scale(1 - NEAR / 2)
    assert not pace.asks_for_a_plan(SETTLED)
    pace.scale(1 - NEAR)
    assert pace.asks_for_a_plan(SETTLED), "what was scaled since the plan was made adds up"
    pace.num_tried = MOST_REMADE
    assert not pace.asks_for_a_plan(SETTLED)
    pace.measured()
    pace.scale(0.5)
    assert pace.asks_for_a_plan(SETTLED)


def test_slowness_cannot_hide_in_many_small_steps() -> None:
    pace = Pace()
    foreseen_ms = 100.0
    for _ in range(3):
        pace.scale(1.07)
        foreseen_ms *= 1.07
    assert pace.as_measured(foreseen_ms) == pytest.approx(100.0)
    pace.measured()
    pace.scale(0.6)
    assert pace.as_measured(60.0) == 60.0
