"""The planner: close to the best there is, within what was asked for, and always the same."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time

import pytest

from lighterage.errors import BudgetError, OffloadError
from lighterage.planner.choose import find, nothing, plan
from lighterage.planner.goal import Goal, choices
from lighterage.planner.plan import Plan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Phase, SavedAllocation, SectionRecord, Timeline, Use
from tests.planner import brute, oracle
from tests.planner.decoder import GIB, LINK, decoder


def frontier_of(timeline: Timeline, link: Link, recompute: str = "auto"):
    return find(timeline, link, choices(timeline, Goal(max_slowdown=1.0, recompute=recompute))).frontier


def _kept(timeline: Timeline) -> int:
    return simulate(timeline, nothing(timeline), LINK).peak_bytes


def worst_ratio(frontier, best: list[tuple[int, float]]) -> float:
    """How much slower than the best of the same peak, at the worst."""
    points = [(frontier.within(peak), ms) for peak, ms in best]
    return max(point.ms / ms if point else float("inf") for point, ms in points)


def small_case(seed: int) -> tuple[Timeline, Link]:
    """Three sections of one or two allocations, four in all at most: few enough for every plan to be tried."""
    rng = random.Random(seed)
    while True:
        timeline = oracle.random_timeline(rng, num_sections=3, most=2)
        if sum(len(s.allocations) for s in timeline.sections) <= 4 and brute.count(timeline) < 5000:
            return timeline, oracle.random_link(rng)


@pytest.mark.parametrize("compute_slowdown", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_within_two_percent_of_every_plan_there_is(seed, compute_slowdown):
    timeline, link = small_case(seed)
    link = dataclasses.replace(link, compute_slowdown=compute_slowdown)
    best = brute.frontier(timeline, link, brute.every_plan(timeline, recompute=False))
    assert worst_ratio(frontier_of(timeline, link, "never"), best) <= 1.02


@pytest.mark.parametrize("seed", range(4))
def test_it_is_within_two_percent_of_every_plan_with_recomputation(seed):
    rng = random.Random(seed)
    timeline, link = oracle.random_timeline(rng, num_sections=3, most=1), oracle.random_link(rng)
    best = brute.frontier(timeline, link, brute.every_plan(timeline, recompute=True))
    assert worst_ratio(frontier_of(timeline, link), best) <= 1.02


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_of_many_beats_it_by_two_percent(seed):
    rng = random.Random(seed)
    timeline, link = oracle.random_timeline(rng), oracle.random_link(rng)
    best = brute.frontier(timeline, link, brute.many_plans(timeline, rng, 1500))
    assert worst_ratio(frontier_of(timeline, link), best) <= 1.02


@pytest.mark.parametrize("compute_slowdown", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(12))
def test_what_was_found_is_what_the_simulator_says(seed, compute_slowdown):
    """And what the slow simulator says of the plan's peak."""
    rng = random.Random(seed)
    timeline, link = oracle.random_timeline(rng), oracle.random_link(rng, compute_slowdown)
    found = find(timeline, link, choices(timeline, Goal(max_slowdown=1.0)))
    for point in found.frontier:
        made, ms = found.plan_of(point)
        seen = simulate(timeline, made, link)
        # A copy that nothing waits for is left out of the plan, which can only leave more of the link to others.
        assert seen.peak_bytes == point.peak_bytes
        assert seen.step_ms == pytest.approx(point.ms, rel=0.02)
        assert ms == point.ms
        assert oracle.step(timeline, made, link)[1] == seen.peak_bytes
    points = list(found.frontier)
    assert [p.ms for p in points] == sorted(p.ms for p in points)
    assert [p.peak_bytes for p in points] == sorted((p.peak_bytes for p in points), reverse=True)


def larger_is_never_worse(rng, timeline, link):
    """A larger budget gives no slower plan, a larger price no larger peak, and both are kept."""
    peaks = [point.peak_bytes for point in frontier_of(timeline, link)]
    last = float("inf")
    for budget in sorted({rng.randint(min(peaks), max(peaks) + 100) for _ in range(4)} | {min(peaks)}):
        seen = simulate(timeline, plan(timeline, link, Goal(device_budget=budget)), link)
        assert seen.peak_bytes <= budget
        assert seen.step_ms <= last + 1e-6
        last = seen.step_ms
    last = float("inf")
    for price in (0.0, 0.05, 0.5):
        seen = simulate(timeline, plan(timeline, link, Goal(max_slowdown=price)), link)
        assert seen.step_ms <= timeline.step_ms * (1 + price) + 1e-6
        assert seen.peak_bytes <= last
        last = seen.peak_bytes


@pytest.mark.parametrize("seed", range(10))
def test_a_larger_budget_never_gives_a_slower_plan(seed):
    rng = random.Random(seed)
    timeline, link = oracle.random_timeline(rng), oracle.random_link(rng)
    larger_is_never_worse(rng, timeline, link)


def blocks(count: int = 8) -> Timeline:
    """Blocks of experts in bf16 on an H100, whose gradients grow through backward: 1 GiB a block, 0.4 of gradients."""
    mibs = [64, 64, 192, 64, 64, 64, 129, 257, 129] + [0.0625] * 10
    sections = []
    for index in range(count):
        allocations = tuple(
            SavedAllocation(
                save=save,
                nbytes=round(mib * (1 << 20)),
                held_bytes=round(mib * (1 << 20)),
                born_ms=0.25 * save,
                uses=(Use(section=index, first_ms=8.5 - 0.4 * save, last_ms=8.6 - 0.4 * save),),
                kind="input" if save == 1 else "pointwise" if save in (2, 4) else "product",
            )
            for save, mib in enumerate(mibs, start=1)
        )
        costs = {"selective_ms": 0.18, "recompute_ms": 5.67}
        sections.append(SectionRecord(name=f"blocks.{index}", allocations=allocations, **costs))
    forward = [Phase(direction="forward", section=i, ms=5.6, work_bytes=round(3.8 * GIB)) for i in range(count)]
    backward = [
        Phase(direction="backward", section=i, ms=8.8, work_bytes=round((4.36 + 0.415 * (count - 1 - i)) * GIB))
        for i in reversed(range(count))
    ]
    return Timeline(sections=tuple(sections), phases=(*forward, *backward))


@pytest.mark.parametrize("move_us", [0.0, 60.0])
def test_near_the_floor_some_move_some_are_computed_again_and_some_stay(move_us):
    timeline, link = blocks(), dataclasses.replace(LINK, move_us=move_us)
    for budget, price in ((7.6, 1.43), (8.05, 1.32), (8.3, 1.13)):
        made = plan(timeline, link, Goal(device_budget=round(budget * GIB)))
        assert simulate(timeline, made, link).step_ms <= price * timeline.step_ms


@pytest.mark.parametrize(("count", "price"), [(16, 1.31), (24, 1.29), (32, 1.27)])
def test_near_the_floor_many_sections_are_mixed_too(count, price):
    """The smallest peak that is found; a little effort is spread over all mixes."""
    timeline = blocks(count)
    smallest = list(frontier_of(timeline, LINK))[-1]
    made = plan(timeline, LINK, Goal(device_budget=smallest.peak_bytes))
    assert simulate(timeline, made, LINK).step_ms <= price * timeline.step_ms


@pytest.mark.parametrize("caution", [-0.1, 1.1, float("nan"), "1", True, None])
def test_a_caution_that_is_no_part_is_refused(caution):
    with pytest.raises(ValueError, match=r"caution is the part of a price .* from 0 to 1"):
        plan(decoder(2), LINK, Goal(max_slowdown=0.03), caution=caution)


def test_with_caution_part_of_a_price_is_not_spent():
    timeline = decoder(8)
    bold, careful = (plan(timeline, LINK, Goal(max_slowdown=0.03), caution=part) for part in (1.0, 0.5))
    for made, part in ((bold, 1.0), (careful, 0.5)):
        assert simulate(timeline, made, LINK).step_ms <= timeline.step_ms * (1 + part * 0.03) + 1e-6
        assert made.why.startswith("To be at most 3.0% slower")
    assert simulate(timeline, bold, LINK).step_ms > timeline.step_ms * 1.015
    budget = Goal(device_budget=10 * GIB)
    assert plan(timeline, LINK, budget, caution=0.5) == plan(timeline, LINK, budget), "a budget is what it is"


def test_what_moves_is_worth_what_compute_loses_by_it():
    """With a free link everything may move for nothing; where compute pays for it, a plan moves what it needs."""
    timeline, free = decoder(8), LINK
    dear = dataclasses.replace(LINK, compute_slowdown=0.02)
    budget = Goal(device_budget=_kept(timeline) - (1 << 30))
    moved = [simulate(timeline, plan(timeline, link, budget), link) for link in (free, dear)]
    assert moved[1].bytes_out < 1.25 * (1 << 30) <= moved[0].bytes_out
    price = Goal(max_slowdown=0.01, recompute="never")
    seen = simulate(timeline, plan(timeline, dear, price), dear)
    assert seen.step_ms <= 1.01 * timeline.step_ms
    assert seen.stalls_ms.slowdown > 0.005 * timeline.step_ms
    blind = simulate(timeline, plan(timeline, free, price), dear)
    assert blind.step_ms > 1.01 * timeline.step_ms


def small_copies(sections: int, each: int) -> Timeline:
    """So many sections that save so many allocations of up to 4 MiB each."""
    rng = random.Random(0)
    records = []
    for index in range(sections):
        allocations = []
        for save in range(1, each + 1):
            nbytes = rng.randint(1, 64) << 16
            need = 10 * (1 - save / each)
            uses = (Use(section=index, first_ms=need, last_ms=need + 0.1),)
            born_ms = 5 * save / each
            allocations.append(SavedAllocation(save=save, nbytes=nbytes, held_bytes=nbytes, born_ms=born_ms, uses=uses))
        records.append(SectionRecord(name=f"layers.{index}", allocations=tuple(allocations)))
    phases = [Phase(direction="forward", section=i, ms=5.0, work_bytes=GIB) for i in range(sections)]
    phases += [Phase(direction="backward", section=i, ms=10.0, work_bytes=GIB) for i in reversed(range(sections))]
    return Timeline(sections=tuple(records), phases=tuple(phases))


@pytest.mark.parametrize("copy_us", [5.0, 50.0, 5000.0])
@pytest.mark.parametrize("price", [0.0, 0.01, 0.03])
def test_a_price_is_kept_where_every_copy_costs_something_and_there_are_many(price, copy_us):
    """They are planned in groups, and a group is as many copies as it has members."""
    timeline = small_copies(16, 150)
    link = dataclasses.replace(LINK, copy_us=copy_us)
    made = plan(timeline, link, Goal(max_slowdown=price, recompute="never"))
    seen = simulate(timeline, made, link)
    assert seen.step_ms <= (1 + price) * timeline.step_ms + 1e-6
    if price and copy_us < 50:
        assert seen.peak_bytes < 0.95 * simulate(timeline, nothing(timeline), link).peak_bytes


def test_equal_arguments_give_equal_plans():
    goal = Goal(max_slowdown=0.02)
    assert plan(decoder(4), LINK, goal) == plan(decoder(4), LINK, goal)


@pytest.mark.parametrize(
    ("goal", "peak_gib", "slowdown"),
    [
        ({"max_slowdown": 0.01, "recompute": "never"}, 12.1, 1.01),
        ({"max_slowdown": 0.03, "recompute": "never"}, 11.4, 1.03),
        ({"max_slowdown": 0.03}, 10.0, 1.03),
        ({"device_budget": int(8.2 * GIB)}, 8.2, 1.10),
    ],
)
def test_a_decoder_of_eight_layers_reaches_its_marks(goal, peak_gib, slowdown):
    timeline = decoder()
    assert simulate(timeline, plan_of_nothing(timeline), LINK).peak_bytes == pytest.approx(14.24 * GIB, rel=0.002)
    seen = simulate(timeline, plan(timeline, LINK, Goal(**goal)), LINK)
    assert seen.peak_bytes <= peak_gib * GIB
    assert seen.step_ms <= slowdown * timeline.step_ms + 1e-6


def plan_of_nothing(timeline: Timeline) -> Plan:
    return plan(timeline, LINK, Goal(max_slowdown=0.0, rules=(("*", "keep"),)))


def test_a_budget_under_the_floor_is_refused_and_the_floor_can_be_met():
    timeline = decoder()
    with pytest.raises(BudgetError, match=r"device_budget=7\.00 GiB; the smallest peak that was found is") as caught:
        plan(timeline, LINK, Goal(device_budget=7 * GIB))
    assert isinstance(caught.value, OffloadError)
    floor = caught.value.smallest_bytes
    assert 7 * GIB < floor < 7.6 * GIB
    assert simulate(timeline, plan(timeline, LINK, Goal(device_budget=floor)), LINK).peak_bytes <= floor
    with pytest.raises(BudgetError):
        plan(timeline, LINK, Goal(device_budget=floor - 1))


def test_it_says_no_where_nothing_is_gained():
    timeline = decoder(2)
    slow = Link(out_bytes_per_s=1e6, in_bytes_per_s=1e6, both_bytes_per_s=1e6)
    made = plan(timeline, slow, Goal(max_slowdown=0.01, recompute="never"))
    assert made.num_moves == 0 and {section.mode for section in made.sections} == {"save"}
    assert made.why.startswith("Everything stays") and "nothing lowers the peak" in made.why
    roomy = plan(timeline, LINK, Goal(device_budget=80 * GIB))
    assert roomy.num_moves == 0 and roomy.why.startswith("Everything stays") and "within 80.00 GiB" in roomy.why


def test_every_section_says_why_in_a_sentence_with_figures():
    made = plan(decoder(), LINK, Goal(max_slowdown=0.03))
    assert len({section.mode for section in made.sections}) > 1
    for section in made.sections:
        assert (section.why.endswith(".") and "GiB" in section.why) or "MiB" in section.why
    assert "leave the device" in made.sections[0].why
    assert made.sections[-1].why.endswith("backward needs them at once.")
    assert "14.23 GiB" in made.why


def test_an_early_birth_and_a_late_use_go_first():
    """Each layer alike: what leaves is what lies idle longest, in the order of forward."""
    made = plan(decoder(), LINK, Goal(max_slowdown=0.0, recompute="never"))
    counts = [len(section.moves) for section in made.sections]
    assert counts == sorted(counts, reverse=True) and counts[0] == 16 and counts[-1] == 0
    last = next(index for index, count in enumerate(counts) if 0 < count < 16)
    moved = {move.save for move in made.sections[last].moves}
    starts = {a.save: a.uses[0].first_ms - a.born_ms for a in decoder().sections[last].allocations}
    assert min(starts[save] for save in moved) >= sorted(starts.values(), reverse=True)[len(moved)] - 0.5


def test_reloads_begin_as_late_as_they_may_and_none_is_late():
    timeline = decoder()
    made = plan(timeline, LINK, Goal(max_slowdown=0.01, recompute="never"))
    seen = simulate(timeline, made, LINK)
    assert seen.stalls_ms.reload == 0 and seen.num_on_demand == 0 and seen.bytes_in > GIB
    backward = [index for index, phase in enumerate(timeline.phases) if phase.direction == "backward"]
    assert not any(made.fetches[index] for index in range(backward[0] + 2))
    # All of them a phase later: some would be.
    rows = [*made.fetches]
    late = dataclasses.replace(made, fetches=((), *rows[:-1]))
    assert simulate(timeline, late, LINK).stalls_ms.reload > 0


@pytest.mark.parametrize("goal", [Goal(max_slowdown=0.02), Goal(device_budget=40 * GIB)])
def test_ten_thousand_allocations_are_planned_in_under_a_second(goal):
    timeline = many_allocations(num_sections=100, each=100)
    times = []
    for _ in range(3):
        start = time.process_time()
        made = plan(timeline, LINK, goal)
        times.append(time.process_time() - start)
        if times[-1] < 1:
            break
    assert min(times) < 1.0
    seen = simulate(timeline, made, LINK)
    if goal.device_budget is not None:
        assert seen.peak_bytes <= goal.device_budget
    else:
        assert seen.step_ms <= 1.02 * timeline.step_ms
        assert seen.peak_bytes < 0.7 * simulate(timeline, plan_of_nothing(timeline), LINK).peak_bytes
    assert statistics.median(len(section.moves) for section in made.sections if section.moves) > 1


def many_allocations(num_sections: int, each: int) -> Timeline:
    rng = random.Random(0)
    sections = []
    for index in range(num_sections):
        allocations = []
        for save in range(1, each + 1):
            place, nbytes = rng.random() * 10, rng.randrange(1 << 16, 1 << 24)
            use = Use(section=index, first_ms=10 - place, last_ms=min(10.0, 10.5 - place))
            allocations.append(
                SavedAllocation(
                    save=save,
                    nbytes=nbytes,
                    held_bytes=nbytes,
                    born_ms=place / 2,
                    uses=(use,),
                    kind=rng.choice(("input", "product", "pointwise")),
                )
            )
        sections.append(SectionRecord(name=f"layers.{index}", allocations=tuple(allocations), selective_ms=0.5))
    phases = [Phase(direction="forward", section=s, ms=5.0, work_bytes=GIB) for s in range(num_sections)]
    phases += [Phase(direction="backward", section=s, ms=10.0, work_bytes=GIB) for s in reversed(range(num_sections))]
    return Timeline(sections=tuple(sections), phases=tuple(phases))
