"""Plans where the host works for each move, and for each section whose saves are seen."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time

import pytest

from lighterage.planner.choose import find, nothing, plan
from lighterage.planner.coarse import coarsen
from lighterage.planner.goal import Goal, choices
from lighterage.planner.plan import Plan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Phase, SavedAllocation, SectionRecord, Timeline, Use
from tests.planner import brute, oracle
from tests.planner.decoder import GIB, LINK, MIB, decoder
from tests.planner.test_plan import (
    frontier_of,
    larger_is_never_worse,
    many_allocations,
    small_case,
    small_copies,
    worst_ratio,
)

COSTS = [(500.0, False), (0.0, True), (500.0, True), (3000.0, True)]
"""Microseconds for each move, and whether hooks cost something."""


def with_hooks(timeline: Timeline, forward_ms: float, backward_ms: float) -> Timeline:
    """The same, with hooks that cost so much in every section."""
    costs = {"hooks_forward_ms": forward_ms, "hooks_backward_ms": backward_ms}
    sections = tuple(dataclasses.replace(section, **costs) for section in timeline.sections)
    return dataclasses.replace(timeline, sections=sections)


def dear(timeline: Timeline, link: Link, seed: int, move_us: float, hooks: bool) -> tuple[Timeline, Link]:
    if hooks:
        timeline = oracle.random_hooks(random.Random(seed), timeline)
    return timeline, dataclasses.replace(link, move_us=move_us)


def experts(num_sections: int, small: int = 60) -> Timeline:
    """Blocks that save three large allocations, of 96, 64 and 48 MiB, and so many of some hundred KiB."""
    rng = random.Random(0)
    sections = []
    for index in range(num_sections):
        sizes = [96 * MIB, 64 * MIB, 48 * MIB] + [rng.randint(1, 9) << 16 for _ in range(small)]
        rng.shuffle(sizes)
        allocations = tuple(
            SavedAllocation(
                save=save,
                nbytes=nbytes,
                held_bytes=nbytes,
                born_ms=4 * save / len(sizes),
                uses=(Use(section=index, first_ms=9 - 8 * save / len(sizes), last_ms=9.5 - 8 * save / len(sizes)),),
            )
            for save, nbytes in enumerate(sizes, start=1)
        )
        sections.append(SectionRecord(name=f"blocks.{index}", allocations=allocations))
    phases = [Phase(direction="forward", section=i, ms=5.0, work_bytes=GIB) for i in range(num_sections)]
    phases += [Phase(direction="backward", section=i, ms=10.0, work_bytes=GIB) for i in reversed(range(num_sections))]
    return Timeline(sections=tuple(sections), phases=tuple(phases))


def moved_bytes(timeline: Timeline, made: Plan) -> list[int]:
    """Of each move."""
    return [
        next(a.nbytes for a in timeline.sections[index].allocations if a.save == move.save)
        for index, section in enumerate(made.sections)
        for move in section.moves
    ]


@pytest.mark.parametrize(("move_us", "hooks"), COSTS)
@pytest.mark.parametrize("seed", range(8))
def test_it_is_within_two_percent_of_every_plan_there_is(seed, move_us, hooks):
    timeline, link = dear(*small_case(seed), seed, move_us, hooks)
    best = brute.frontier(timeline, link, brute.every_plan(timeline, recompute=False))
    assert worst_ratio(frontier_of(timeline, link, "never"), best) <= 1.02


@pytest.mark.parametrize(("move_us", "hooks"), COSTS)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_within_two_percent_of_every_plan_with_recomputation(seed, move_us, hooks):
    rng = random.Random(seed)
    timeline, link = oracle.random_timeline(rng, num_sections=3, most=1), oracle.random_link(rng)
    timeline, link = dear(timeline, link, seed, move_us, hooks)
    best = brute.frontier(timeline, link, brute.every_plan(timeline, recompute=True))
    assert worst_ratio(frontier_of(timeline, link), best) <= 1.02


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_of_many_beats_it_by_two_percent(seed):
    rng = random.Random(seed)
    timeline, link = dear(oracle.random_timeline(rng), oracle.random_link(rng), seed, 500.0, True)
    best = brute.frontier(timeline, link, brute.many_plans(timeline, rng, 1500))
    assert worst_ratio(frontier_of(timeline, link), best) <= 1.02


@pytest.mark.parametrize(("move_us", "hooks"), COSTS)
@pytest.mark.parametrize("seed", range(6))
def test_what_was_found_is_what_the_simulator_says(seed, move_us, hooks):
    rng = random.Random(seed)
    timeline, link = dear(oracle.random_timeline(rng), oracle.random_link(rng, 0.05), seed, move_us, hooks)
    found = find(timeline, link, choices(timeline, Goal(max_slowdown=1.0)))
    for point in found.frontier:
        made, ms = found.plan_of(point)
        seen = simulate(timeline, made, link)
        # What is never let go of is left out of the plan, and the host's work for it.
        assert seen.peak_bytes <= point.peak_bytes
        assert seen.step_ms <= ms + 1e-6 <= point.ms + 2e-6
        assert oracle.step(timeline, made, link)[1] == seen.peak_bytes


@pytest.mark.parametrize("seed", range(8))
def test_a_larger_budget_or_price_never_gives_a_worse_plan(seed):
    rng = random.Random(seed)
    timeline, link = dear(oracle.random_timeline(rng), oracle.random_link(rng), seed, 500.0, True)
    larger_is_never_worse(rng, timeline, link)


def test_where_backward_ends_with_the_peak_the_last_sections_are_not_computed_again_in_vain():
    """Their saves are gone by then. As good as the best of all ways to compute whole sections again, none moved."""
    count, grads = 8, 200 * MIB
    sections = []
    for index in range(count):
        large = [64, 33, 192, 1, 64, 64, 64, 2, 133, 257]
        sizes = {save: mib * MIB for save, mib in enumerate(large, start=1)}
        sizes |= dict.fromkeys(range(len(large) + 1, 20), 1 << 16)
        allocations = tuple(
            SavedAllocation(
                save=save,
                nbytes=nbytes,
                held_bytes=nbytes,
                born_ms=0.2 * save,
                uses=(Use(section=index, first_ms=8.0 - 0.4 * save, last_ms=8.0 - 0.4 * save),),
                kind="input" if save == 1 else "pointwise" if save in (5, 6) else "other",
            )
            for save, nbytes in sizes.items()
        )
        costs = {"hooks_forward_ms": 0.8, "selective_ms": 9.6, "recompute_ms": 4.7}
        sections.append(SectionRecord(name=f"blocks.{index}", allocations=allocations, **costs))
    phases = [Phase(direction="forward", section=i, ms=5.0, work_bytes=4 * GIB) for i in range(count)]
    phases += [
        Phase(direction="backward", section=i, ms=8.3, work_bytes=6 * GIB + (count - i) * grads)
        for i in reversed(range(count))
    ]
    timeline = Timeline(sections=tuple(sections), phases=tuple(phases))
    link = dataclasses.replace(LINK, move_us=100.0)
    kept = nothing(timeline)
    for budget in (8.45, 8.7, 9.0):
        best_ms = float("inf")
        for modes in itertools.product(("save", "recompute"), repeat=count):
            again = tuple(dataclasses.replace(s, mode=mode) for s, mode in zip(kept.sections, modes, strict=True))
            seen = simulate(timeline, dataclasses.replace(kept, sections=again), link)
            if seen.peak_bytes <= budget * GIB:
                best_ms = min(best_ms, seen.step_ms)
        made = plan(timeline, link, Goal(device_budget=round(budget * GIB)))
        assert simulate(timeline, made, link).step_ms <= best_ms < float("inf")


@pytest.mark.parametrize(
    ("num_layers", "goal", "decided", "peak", "step_ms"),
    [
        (8, {"max_slowdown": 0.01, "recompute": "never"}, (42, 0, 0), 12081818500, 171.468379),
        (8, {"max_slowdown": 0.03}, (35, 6, 0), 8898677304, 174.537564),
        (8, {"device_budget": 8804682956}, (28, 7, 0), 8752925240, 177.830135),
        (3, {"max_slowdown": 0.1}, (9, 2, 0), 6578598050, 69.845135),
    ],
)
def test_where_the_host_costs_nothing_plans_are_what_they_were(num_layers, goal, decided, peak, step_ms):
    """Before there was anything to say of it: moves, and sections computed again in part and whole."""
    timeline = with_hooks(decoder(num_layers), 0.0, 0.0)
    link = dataclasses.replace(LINK, move_us=0.0)
    made = plan(timeline, link, Goal(**goal))
    modes = [section.mode for section in made.sections]
    assert (made.num_moves, modes.count("selective"), modes.count("recompute")) == decided
    seen = simulate(timeline, made, link)
    assert seen.peak_bytes == peak and seen.step_ms == pytest.approx(step_ms, abs=1e-6)
    assert seen.stalls_ms.host == 0


@pytest.mark.parametrize("num_sections", [2, 12])
def test_a_price_buys_few_large_moves_of_few_sections(num_sections):
    """In groups or one by one."""
    timeline, link = with_hooks(experts(num_sections), 0.1, 0.1), dataclasses.replace(LINK, move_us=100.0)
    kept = simulate(timeline, nothing(timeline), link)
    price = Goal(max_slowdown=0.6 / timeline.step_ms, recompute="never")  # hooks of one section, and four moves
    made = plan(timeline, link, price)
    seen = simulate(timeline, made, link)
    assert seen.step_ms <= timeline.step_ms + 0.6 + 1e-6
    assert sum(bool(section.moves) for section in made.sections) == 1
    assert {96 * MIB, 64 * MIB} <= set(moved_bytes(timeline, made)) and made.num_moves <= 4
    assert seen.peak_bytes <= kept.peak_bytes - 160 * MIB
    # A plan that knows of neither moves many, and breaks it.
    blind = plan(with_hooks(timeline, 0.0, 0.0), LINK, price)
    assert blind.num_moves > 20
    assert simulate(timeline, blind, link).step_ms > timeline.step_ms + 2.0


@pytest.mark.parametrize("num_sections", [2, 12])
def test_a_budget_is_met_with_the_large_ones(num_sections):
    timeline, link = with_hooks(experts(num_sections), 0.1, 0.1), dataclasses.replace(LINK, move_us=100.0)
    budget = simulate(timeline, nothing(timeline), link).peak_bytes - 150 * MIB
    made = plan(timeline, link, Goal(device_budget=budget, recompute="never"))
    seen = simulate(timeline, made, link)
    assert seen.peak_bytes <= budget
    # 96 and 64 MiB suffice: two moves and the hooks of a section.
    assert seen.step_ms <= timeline.step_ms + 0.6


def test_moves_that_cost_nothing_go_to_few_sections_where_hooks_do():
    timeline = with_hooks(decoder(8), 1.0, 1.5)
    made = plan(timeline, LINK, Goal(device_budget=simulate(timeline, nothing(timeline), LINK).peak_bytes - GIB))
    assert sum(bool(section.moves) or section.mode != "save" for section in made.sections) == 1
    assert simulate(timeline, made, LINK).step_ms <= timeline.step_ms + 2.6


@pytest.mark.parametrize("price", [0.005, 0.01, 0.03])
@pytest.mark.parametrize("move_us", [20.0, 100.0, 300.0])
def test_a_price_is_kept_where_many_are_planned_in_groups(price, move_us):
    timeline = with_hooks(small_copies(16, 150), 0.2, 0.2)
    link = dataclasses.replace(LINK, move_us=move_us, compute_slowdown=0.016)
    made = plan(timeline, link, Goal(max_slowdown=price, recompute="never"))
    seen = simulate(timeline, made, link)
    assert seen.step_ms <= (1 + price) * timeline.step_ms + 1e-6
    assert made.num_moves * move_us / 1e3 <= price * timeline.step_ms
    if price == 0.03:
        assert made.num_moves


def test_groups_are_alike_in_size_and_the_largest_are_in_small_ones():
    timeline = experts(4)
    free = choices(timeline, Goal(max_slowdown=0.1))
    coarse = coarsen(timeline, free, move_ms=0.1)
    assert sum(coarse.members) == sum(len(section.allocations) for section in timeline.sections)
    assert len(coarse.members) == sum(len(section.allocations) for section in coarse.timeline.sections)
    for index, section in enumerate(timeline.sections):
        for allocation in section.allocations:
            if allocation.nbytes >= 48 * MIB:
                assert coarse.members[coarse.places[index, allocation.save]] == 1
    assert max(coarse.members) > 1


def test_a_move_that_has_to_be_is_carried_out_whatever_it_costs():
    timeline, link = with_hooks(decoder(4), 5.0, 5.0), dataclasses.replace(LINK, move_us=5000.0)
    made = plan(timeline, link, Goal(max_slowdown=2.0, recompute="never", rules=(("layers.1", "offload"),)))
    assert len(made.sections[1].moves) == len(timeline.sections[1].allocations)
    assert simulate(timeline, made, link).stalls_ms.host >= 10 + 16 * 5


@pytest.mark.parametrize("goal", [Goal(max_slowdown=0.02), Goal(device_budget=40 * GIB)])
def test_ten_thousand_allocations_are_planned_in_about_a_second(goal):
    timeline = with_hooks(many_allocations(num_sections=100, each=100), 0.2, 0.3)
    link = dataclasses.replace(LINK, move_us=50.0)
    times = []
    for _ in range(3):
        start = time.process_time()
        made = plan(timeline, link, goal)
        times.append(time.process_time() - start)
        if times[-1] < 1.2:
            break
    assert min(times) < 1.2
    seen = simulate(timeline, made, link)
    if goal.device_budget is not None:
        assert seen.peak_bytes <= goal.device_budget
    else:
        assert seen.step_ms <= 1.02 * timeline.step_ms


def test_thousands_of_sections_and_no_time_at_all_are_planned_for():
    timeline = with_hooks(many_allocations(num_sections=400, each=2), 0.2, 0.3)
    link = dataclasses.replace(LINK, move_us=1e15)
    assert plan(timeline, link, Goal(max_slowdown=0.02, recompute="never")).num_moves == 0
    still = dataclasses.replace(timeline, phases=tuple(dataclasses.replace(p, ms=0.0) for p in timeline.phases))
    assert plan(still, link, Goal(max_slowdown=0.02)).num_moves == 0


def test_equal_arguments_give_equal_plans():
    timeline, link = with_hooks(experts(6), 0.1, 0.1), dataclasses.replace(LINK, move_us=100.0)
    assert plan(timeline, link, Goal(max_slowdown=0.03)) == plan(timeline, link, Goal(max_slowdown=0.03))


def test_reasons_tell_what_the_host_has_to_do_with_it():
    timeline, link = with_hooks(experts(12), 0.1, 0.1), dataclasses.replace(LINK, move_us=100.0)
    made = plan(timeline, link, Goal(max_slowdown=0.6 / timeline.step_ms, recompute="never"))
    host_ms = simulate(timeline, made, link).stalls_ms.host
    assert f"{host_ms:.1f} ms of it the host's work for that." in made.why
    moving = next(section for section in made.sections if section.moves)
    assert f"the host's work for that takes {host_ms:.2f} ms." in moving.why
    resting = next(section for section in made.sections if not section.moves)
    assert "or cost more than it may, 6.50 ms of the host's work for all of them." in resting.why
    stays = plan(timeline, link, Goal(max_slowdown=0.0, recompute="never"))
    assert "with 100 µs of the host's work for each move, nothing lowers the peak" in stays.why
    again = plan(with_hooks(decoder(4), 0.1, 0.1), LINK, Goal(max_slowdown=0.1, rules=(("layers.0", "recompute"),)))
    assert "the host's work for that takes 0.20 ms" in again.sections[0].why
    assert not any("host" in section.why for section in plan(decoder(4), LINK, Goal(max_slowdown=0.1)).sections)
