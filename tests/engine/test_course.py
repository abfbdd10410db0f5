"""A plan made ready to be carried out: what is small is let go of with the large copy that it leaves with."""

from __future__ import annotations

from lighterage.engine.planning.course import Course
from lighterage.engine.traffic import GATHER_BYTES
from lighterage.planner.plan import Fetch, Move, Plan, SectionPlan
from lighterage.planner.timeline import Phase, SavedAllocation, SectionRecord, Timeline, Use

LARGE, SMALL = GATHER_BYTES, GATHER_BYTES // 8


def course_of(sizes: list[int], releases: dict[int, int], fetches: dict[int, int] | None = None) -> Course:
    """Of one section that saves so much, and three phases after its forward; by save, when what leaves is let go of,
    and the phase in which it starts to come back."""
    uses = (Use(section=0, first_ms=0.5, last_ms=0.6),)
    allocations = tuple(
        SavedAllocation(save=save, nbytes=nbytes, held_bytes=nbytes, born_ms=0.1, uses=uses)
        for save, nbytes in enumerate(sizes, start=1)
    )
    phases = (
        Phase(direction="forward", section=0, ms=1.0, work_bytes=0),
        *(Phase(direction="other", section=None, ms=1.0, work_bytes=0) for _ in range(3)),
        Phase(direction="backward", section=0, ms=1.0, work_bytes=0),
    )
    timeline = Timeline(sections=(SectionRecord(name="layer", allocations=allocations),), phases=phases)
    moves = tuple(Move(save=save, release_after=after) for save, after in releases.items())
    rows = tuple(
        tuple(Fetch(section=0, save=save) for save, at in (fetches or {}).items() if at == phase)
        for phase in range(len(phases))
    )
    plan = Plan(sections=(SectionPlan(name="layer", moves=moves),), fetches=rows)
    return Course(plan, timeline, {})


def due(course: Course) -> dict[int, int]:
    """By save: the phase at whose end it is let go of."""
    return {save: phase for phase, rows in course.due.items() for _, saves in rows for save in saves}


def test_what_is_small_is_let_go_of_with_the_large_one_that_follows() -> None:
    found = due(course_of([LARGE, SMALL, SMALL, LARGE, LARGE], {1: 0, 2: 0, 3: 1, 4: 2, 5: 3}))
    assert found == {1: 0, 2: 2, 3: 2, 4: 2, 5: 3}


def test_what_stays_is_in_no_batch_and_many_small_ones_are_one() -> None:
    assert due(course_of([SMALL, LARGE, SMALL], {1: 0, 3: 1})) == {1: 0, 3: 1}
    assert due(course_of([SMALL] * 9, dict.fromkeys(range(1, 8), 0) | {8: 2, 9: 1})) == dict.fromkeys(
        range(1, 9), 2
    ) | {9: 1}


def test_a_large_one_does_not_wait_for_a_small_one_before_it() -> None:
    assert due(course_of([SMALL, LARGE], {1: 3, 2: 1})) == {1: 3, 2: 1}


def test_what_comes_back_before_the_large_one_leaves_does_not_wait_for_it() -> None:
    # Let go of at the end of phase 2, it would be there when phase 2 begins, and not be brought back after that.
    found = due(course_of([SMALL, SMALL, LARGE], {1: 0, 2: 0, 3: 2}, {1: 2, 2: 3, 3: 4}))
    assert found == {1: 0, 2: 2, 3: 2}
