"""The simulator against a second one that knows nothing of events, and against sums done by hand."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from lighterage.planner import lanes
from lighterage.planner.plan import Fetch, Move, Plan, SectionPlan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Phase, SavedAllocation, SectionRecord, Timeline, Use
from tests.planner import oracle

LINK = Link(out_bytes_per_s=100e3, in_bytes_per_s=50e3, both_bytes_per_s=150e3, copy_us=0.0)  # 100 and 50 bytes a ms


def two_layers(**second) -> Timeline:
    """Forward 10 ms each, backward 20 ms each; each saves 1000 bytes after 2 ms, read from 5 to 15 ms of backward."""

    def record(index: int) -> SectionRecord:
        use = Use(section=index, first_ms=5.0, last_ms=15.0)
        allocation = SavedAllocation(save=1, nbytes=1000, held_bytes=1000, born_ms=2.0, uses=(use,), kind="product")
        return SectionRecord(name=f"layers.{index}", allocations=(allocation,), selective_ms=1.0)

    phases = [Phase(direction="forward", section=i, ms=10.0, work_bytes=100) for i in (0, 1)]
    phases += [Phase(direction="backward", section=i, ms=20.0, work_bytes=200) for i in (1, 0)]
    return Timeline(sections=(record(0), record(1)), phases=tuple(phases))


def planned(*sections: SectionPlan, fetches=((), (), (), ())) -> Plan:
    return Plan(sections=sections, fetches=tuple(fetches))


KEEP_0, KEEP_1 = SectionPlan(name="layers.0"), SectionPlan(name="layers.1")


def moving(release_after: int) -> SectionPlan:
    return SectionPlan(name="layers.0", moves=(Move(save=1, release_after=release_after),))


def test_a_plan_that_moves_nothing_takes_no_time_and_frees_nothing():
    seen = simulate(two_layers(), planned(KEEP_0, KEEP_1), LINK)
    assert (seen.step_ms, seen.peak_bytes) == (60.0, 2200)
    assert seen.stalls_ms.total == 0 and seen.bytes_out == seen.bytes_in == 0
    # 1000 from 2 ms, 2000 from 12, 1000 from 35, none from 55; beside it 100 in forward and 200 in backward.
    assert [(ms, b) for ms, b in seen.curve if ms in (2.0, 12.0, 35.0, 55.0)] == [
        (2.0, 1100),
        (12.0, 2100),
        (35.0, 1200),
        (55.0, 200),
    ]


def test_compute_is_slower_beside_copies():
    """Out from 2 to 12 ms, in from 21 to 41: some 8 ms of the first phase, 1 of the second and 20 of the third."""
    link = dataclasses.replace(LINK, compute_slowdown=0.1)
    seen = simulate(two_layers(), planned(moving(1), KEEP_1, fetches=((), (), (Fetch(section=0, save=1),), ())), link)
    # The first phase ends 0.8 ms later, and so of the second 1.2 ms are beside the copy: 0.12 ms.
    slowed = [phase.stalls_ms.slowdown for phase in seen.phases]
    assert slowed == pytest.approx([0.8, 0.12, 2.0, 0.0], abs=1e-9)
    assert seen.stalls_ms.slowdown == seen.stalls_ms.total == pytest.approx(2.92)
    assert seen.step_ms == pytest.approx(62.92)
    # A phase is longer at its end.
    assert [phase.end_ms for phase in seen.phases] == pytest.approx([10.8, 20.92, 42.92, 62.92])


def test_what_is_waited_is_not_slowed():
    """The reload, of which nothing was started, takes 20 ms in which nothing computes."""
    link = dataclasses.replace(LINK, compute_slowdown=0.1)
    seen = simulate(two_layers(), planned(moving(0), KEEP_1), link)
    assert seen.stalls_ms.slowdown == pytest.approx(0.8)  # out, in the first phase
    assert seen.stalls_ms.reload == pytest.approx(20.0)


def with_hooks(timeline: Timeline, forward_ms: float = 3.0, backward_ms: float = 5.0) -> Timeline:
    """The same, with hooks that cost so much in every section."""
    costs = {"hooks_forward_ms": forward_ms, "hooks_backward_ms": backward_ms}
    return dataclasses.replace(
        timeline, sections=tuple(dataclasses.replace(section, **costs) for section in timeline.sections)
    )


def test_a_move_costs_the_host_half_as_it_leaves_and_half_as_it_comes_back():
    link = dataclasses.replace(LINK, move_us=800.0)
    plan = planned(moving(1), KEEP_1, fetches=((), (), (Fetch(section=0, save=1),), ()))
    seen = simulate(two_layers(), plan, link)
    assert [phase.stalls_ms.host for phase in seen.phases] == [0.4, 0.0, 0.0, 0.4]
    assert seen.stalls_ms.host == seen.stalls_ms.total == 0.8
    assert (seen.step_ms, seen.floor_ms) == (60.8, 60.0)
    # A phase is longer at its end, and what is read within it is read no later.
    assert [phase.end_ms for phase in seen.phases] == pytest.approx([10.4, 20.4, 40.4, 60.8])
    assert simulate(two_layers(), planned(KEEP_0, KEEP_1), link).stalls_ms.total == 0


def test_hooks_cost_a_section_of_which_something_leaves_or_is_computed_again():
    timeline = with_hooks(two_layers())
    assert simulate(timeline, planned(KEEP_0, KEEP_1), LINK).stalls_ms.host == 0
    plan = planned(moving(1), KEEP_1, fetches=((), (), (Fetch(section=0, save=1),), ()))
    seen = simulate(timeline, plan, LINK)
    assert [phase.stalls_ms.host for phase in seen.phases] == [3.0, 0.0, 0.0, 5.0]
    seen = simulate(timeline, planned(KEEP_0, SectionPlan(name="layers.1", mode="selective")), LINK)
    assert [phase.stalls_ms.host for phase in seen.phases] == [0.0, 3.0, 5.0, 0.0]
    assert (seen.stalls_ms.recompute, seen.step_ms, seen.floor_ms) == (1.0, 69.0, 60.0)


def test_what_has_to_stay_and_what_is_computed_again_is_no_move():
    """Whatever the plan says of it: it is passed over, and costs the host nothing."""
    timeline, link = two_layers(), dataclasses.replace(LINK, move_us=800.0)
    kept = dataclasses.replace(timeline.sections[0].allocations[0], kept="marked")
    marked = dataclasses.replace(timeline.sections[0], allocations=(kept,))
    timeline = with_hooks(dataclasses.replace(timeline, sections=(marked, timeline.sections[1])))
    assert simulate(timeline, planned(moving(1), KEEP_1), link).stalls_ms.host == 0
    again = SectionPlan(name="layers.0", mode="recompute", moves=(Move(save=1, release_after=1),))
    # Nor do its hooks: what little it saves is its inputs, and what its second forward costs is told with that.
    assert simulate(with_hooks(two_layers()), planned(again, KEEP_1), link).stalls_ms.host == 0


def test_what_computing_again_takes_is_the_forward_or_what_was_measured():
    again = planned(SectionPlan(name="layers.0", mode="recompute"), KEEP_1)
    timeline = two_layers()
    assert simulate(timeline, again, LINK).stalls_ms.recompute == 10.0
    measured = dataclasses.replace(timeline.sections[0], recompute_ms=13.0)
    timeline = dataclasses.replace(timeline, sections=(measured, timeline.sections[1]))
    assert simulate(timeline, again, LINK).stalls_ms.recompute == 13.0


@pytest.mark.parametrize("mode", ["selective", "recompute"])
def test_a_forward_has_what_it_makes_and_does_not_save_until_its_end(mode):
    """Both sections make 1000 bytes; those of the first are gone when the second has made its own."""
    cheap = dataclasses.replace(two_layers().sections[0].allocations[0], kind="pointwise")
    timeline, plan = two_layers(), planned(SectionPlan(name="layers.0", mode=mode), KEEP_1)
    first = dataclasses.replace(timeline.sections[0], allocations=(cheap,))
    timeline = dataclasses.replace(timeline, sections=(first, timeline.sections[1]))
    seen = simulate(timeline, plan, LINK)
    kept = simulate(timeline, planned(KEEP_0, KEEP_1), LINK)
    assert seen.phases[0].peak_bytes == kept.phases[0].peak_bytes
    assert seen.phases[1].peak_bytes < kept.phases[1].peak_bytes


def test_a_section_without_backward_has_hooks_in_its_forward_alone():
    allocation = SavedAllocation(save=1, nbytes=100, held_bytes=100, born_ms=0.0, uses=())
    record = SectionRecord(name="layer", allocations=(allocation,), hooks_forward_ms=3.0, hooks_backward_ms=5.0)
    phases = (Phase(direction="forward", section=0, ms=50.0, work_bytes=0),)
    plan = Plan(sections=(SectionPlan(name="layer", moves=(Move(save=1, release_after=0),)),), fetches=((),))
    link = dataclasses.replace(LINK, move_us=800.0)
    assert simulate(Timeline(sections=(record,), phases=phases), plan, link).stalls_ms.host == pytest.approx(3.4)


def test_a_release_waits_for_its_copy():
    """The copy runs from 2 to 12 ms; the end of the phase is at 10."""
    seen = simulate(two_layers(), planned(moving(0), KEEP_1, fetches=((), (), (Fetch(section=0, save=1),), ())), LINK)
    assert seen.stalls_ms.release == 2.0
    assert seen.step_ms == 62.0
    assert seen.phases[0].end_ms == 12.0


def test_a_release_after_its_copy_is_free():
    plan = planned(moving(1), KEEP_1, fetches=((), (), (Fetch(section=0, save=1),), ()))
    seen = simulate(two_layers(), plan, LINK)
    # Fetched at 20 ms, there at 40, needed at 45.
    assert (seen.step_ms, seen.stalls_ms.total, seen.num_on_demand) == (60.0, 0.0, 0)
    assert [(c.start_ms, c.end_ms) for c in seen.in_copies] == [(20.0, 40.0)]
    assert (seen.bytes_out, seen.bytes_in) == (1000, 1000)
    assert seen.out_busy == pytest.approx(10 / 60) and seen.in_busy == pytest.approx(20 / 60)


def test_what_nobody_fetched_is_waited_for_whole():
    seen = simulate(two_layers(), planned(moving(1), KEEP_1), LINK)
    assert (seen.stalls_ms.reload, seen.step_ms) == (20.0, 80.0)
    assert (seen.num_on_demand, seen.on_demand_bytes) == (1, 1000)
    assert seen.peak_bytes == 2100  # the forward's end; in backward, one at a time


def test_a_late_fetch_is_waited_for_in_part():
    plan = planned(moving(1), KEEP_1, fetches=((), (), (), (Fetch(section=0, save=1),)))
    seen = simulate(two_layers(), plan, LINK)
    assert (seen.stalls_ms.reload, seen.step_ms) == (15.0, 75.0)


def test_what_has_not_left_is_there():
    """Released after the phase in which it is read: nothing is waited for, nothing comes back."""
    plan = planned(moving(9), KEEP_1, fetches=((), (), (Fetch(section=0, save=1),), ()))
    seen = simulate(two_layers(), plan, LINK)
    assert (seen.step_ms, seen.bytes_in, seen.bytes_out) == (60.0, 0, 1000)


def test_both_directions_share_the_link():
    link = Link(out_bytes_per_s=100e3, in_bytes_per_s=100e3, both_bytes_per_s=120e3, copy_us=0.0)
    plan = planned(
        moving(0),
        SectionPlan(name="layers.1", moves=(Move(save=1, release_after=0),)),
        fetches=((), (Fetch(section=0, save=1),), (), ()),
    )
    seen = simulate(two_layers(), plan, link)
    # Out from 2 to 12 and waited for. Then in from 12, alone until 14, 200 bytes; from 14 on 60 a ms each: the 800
    # left take until 27.33. The second copy out has then 800 done, and 200 left at 100 a ms.
    assert seen.in_copies[0].end_ms == pytest.approx(14 + 800 / 60)
    assert seen.out_copies[1].end_ms == pytest.approx(14 + 800 / 60 + 2)


def test_computing_again_takes_the_forward_and_brings_the_bytes_back():
    seen = simulate(two_layers(), planned(SectionPlan(name="layers.0", mode="recompute"), KEEP_1), LINK)
    assert (seen.step_ms, seen.stalls_ms.recompute) == (70.0, 10.0)
    assert seen.peak_bytes == 1200  # one of the two at any time, beside the backward's work
    assert seen.phases[3].peak_bytes == 1200


def test_selective_mode_computes_only_the_cheap_again():
    timeline = two_layers()
    seen = simulate(timeline, planned(SectionPlan(name="layers.0", mode="selective"), KEEP_1), LINK)
    assert (seen.step_ms, seen.stalls_ms.recompute, seen.peak_bytes) == (61.0, 1.0, 2200)


def test_an_urgent_copy_goes_before_the_queue():
    """Of three away, two are queued when the third is asked for: it waits for the one in progress only."""

    def saved(save: int, first_ms: float) -> SavedAllocation:
        use = Use(section=0, first_ms=first_ms, last_ms=90.0)
        return SavedAllocation(save=save, nbytes=1000, held_bytes=1000, born_ms=0.0, uses=(use,))

    record = SectionRecord(name="layer", allocations=(saved(1, 80.0), saved(2, 80.0), saved(3, 5.0)))
    phases = (
        Phase(direction="forward", section=0, ms=50.0, work_bytes=0),
        Phase(direction="backward", section=0, ms=100.0, work_bytes=0),
    )
    moves = tuple(Move(save=save, release_after=0) for save in (1, 2, 3))
    plan = Plan(
        sections=(SectionPlan(name="layer", moves=moves),),
        fetches=((), (Fetch(section=0, save=1), Fetch(section=0, save=2))),
    )
    seen = simulate(Timeline(sections=(record,), phases=phases), plan, LINK)
    assert [(c.save, c.start_ms, c.end_ms, c.on_demand) for c in seen.in_copies] == [
        (1, 50.0, 70.0, False),
        (3, 70.0, 90.0, True),
        (2, 90.0, 110.0, False),
    ]
    assert seen.stalls_ms.reload == 35.0


def one_layer(saved: tuple[tuple[int, float, float], ...], backward_ms: float = 100.0) -> Timeline:
    """One section that saves, at these times, so many bytes, which backward first reads at these times."""
    allocations = tuple(
        SavedAllocation(
            save=save,
            nbytes=nbytes,
            held_bytes=nbytes,
            born_ms=born_ms,
            uses=(Use(section=0, first_ms=first_ms, last_ms=backward_ms),),
        )
        for save, (nbytes, born_ms, first_ms) in enumerate(saved, start=1)
    )
    phases = (
        Phase(direction="forward", section=0, ms=50.0, work_bytes=0),
        Phase(direction="backward", section=0, ms=backward_ms, work_bytes=0),
    )
    return Timeline(sections=(SectionRecord(name="layer", allocations=allocations),), phases=phases)


def test_an_urgent_copy_overtakes_a_large_one_between_its_chunks(monkeypatch):
    """1000 bytes are under way since 50, 50 bytes a ms, when 100 are asked for at 55: they come after the chunk."""
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 400)
    timeline = one_layer(((1000, 0.0, 80.0), (100, 0.0, 5.0)))
    moves = tuple(Move(save=save, release_after=0) for save in (1, 2))
    plan = Plan(sections=(SectionPlan(name="layer", moves=moves),), fetches=((), (Fetch(section=0, save=1),)))
    seen = simulate(timeline, plan, LINK)
    assert [(c.save, c.start_ms, c.end_ms, c.nbytes, c.on_demand) for c in seen.in_copies] == [
        (1, 50.0, 58.0, 400, False),
        (2, 58.0, 60.0, 100, True),
        (1, 60.0, 72.0, 600, False),
    ]
    assert seen.stalls_ms.reload == 5.0
    assert (seen.bytes_in, seen.num_on_demand) == (1100, 1)
    assert oracle.step(timeline, plan, LINK, 400)[0] == pytest.approx(seen.step_ms, abs=0.1)
    # In one piece it would be waited for to its end.
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 1000)
    assert simulate(timeline, plan, LINK).stalls_ms.reload == 17.0


def test_copies_out_give_way_to_an_urgent_copy_between_their_chunks(monkeypatch):
    """Both directions share 60 bytes a ms. 900 bytes are on their way out since 48 when 300 are asked for at 51."""
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 300)
    link = Link(out_bytes_per_s=50e3, in_bytes_per_s=50e3, both_bytes_per_s=60e3, copy_us=0.0)
    timeline = one_layer(((300, 0.0, 1.0), (900, 48.0, 90.0), (200, 49.0, 90.0)))
    moves = (Move(save=1, release_after=0), Move(save=2, release_after=9), Move(save=3, release_after=9))
    plan = Plan(sections=(SectionPlan(name="layer", moves=moves),), fetches=((), ()))
    seen = simulate(timeline, plan, link)
    # The chunk's other 150 bytes leave beside 150 of those that come in, which then have the link to themselves.
    assert [(c.save, c.start_ms, c.end_ms) for c in seen.in_copies] == [(1, 51.0, 59.0)]
    assert [(c.save, c.start_ms, c.end_ms, c.nbytes) for c in seen.out_copies] == [
        (1, 0.0, 6.0, 300),
        (2, 48.0, 56.0, 300),
        (2, 59.0, 71.0, 600),
        (3, 71.0, 75.0, 200),
    ]
    assert oracle.step(timeline, plan, link, 300)[0] == pytest.approx(seen.step_ms, abs=0.1)
    # One that is through before the chunk is leaves the copy in one piece.
    short = one_layer(((100, 0.0, 1.0), (900, 48.0, 90.0), (200, 49.0, 90.0)))
    assert [c.nbytes for c in simulate(short, plan, link).out_copies] == [100, 900, 200]


@pytest.mark.parametrize("compute_slowdown", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [173.3, float("inf")])
@pytest.mark.parametrize("seed", range(120))
def test_it_agrees_with_small_steps_of_time(seed, chunk, compute_slowdown, monkeypatch):
    monkeypatch.setattr(lanes, "CHUNK_BYTES", chunk)
    rng = random.Random(seed)
    timeline, link = oracle.random_timeline(rng), oracle.random_link(rng, compute_slowdown)
    plan = oracle.random_plan(rng, timeline)
    seen = simulate(timeline, plan, link)
    step_ms, peak = oracle.step(timeline, plan, link, chunk)
    assert seen.peak_bytes == peak
    events = 3 * sum(len(record.allocations) for record in timeline.sections) + len(timeline.phases)
    assert seen.step_ms == pytest.approx(step_ms, abs=events * oracle.TICK_MS)


@pytest.mark.parametrize(("compute_slowdown", "chunk"), [(0.0, 173.3), (0.3, float("inf"))])
@pytest.mark.parametrize("move_us", [0.0, 500.0, 3000.0])
@pytest.mark.parametrize("seed", range(40))
def test_it_agrees_with_small_steps_of_time_about_the_host(seed, move_us, chunk, compute_slowdown, monkeypatch):
    monkeypatch.setattr(lanes, "CHUNK_BYTES", chunk)
    rng = random.Random(2000 + seed)
    timeline = oracle.random_hooks(rng, oracle.random_timeline(rng))
    link = oracle.random_link(rng, compute_slowdown, move_us)
    plan = oracle.random_plan(rng, timeline)
    seen = simulate(timeline, plan, link)
    step_ms, peak = oracle.step(timeline, plan, link, chunk)
    assert seen.peak_bytes == peak
    events = 3 * sum(len(record.allocations) for record in timeline.sections) + len(timeline.phases)
    assert seen.step_ms == pytest.approx(step_ms, abs=events * oracle.TICK_MS)
    assert seen.floor_ms == pytest.approx(timeline.step_ms)
    assert sum(phase.stalls_ms.host for phase in seen.phases) == pytest.approx(seen.stalls_ms.host)


def nbytes_of(timeline: Timeline, key: tuple[int, int]) -> int:
    return next(a.nbytes for a in timeline.sections[key[0]].allocations if a.save == key[1])


def test_every_part_of_a_prediction_adds_up(monkeypatch):
    monkeypatch.setattr(lanes, "CHUNK_BYTES", 200)
    for seed in range(40):
        rng = random.Random(1000 + seed)
        timeline, link = oracle.random_timeline(rng), oracle.random_link(rng, 0.1 * (seed % 2))
        seen = simulate(timeline, oracle.random_plan(rng, timeline), link)
        assert seen.floor_ms == pytest.approx(timeline.step_ms)
        assert seen.step_ms == pytest.approx(seen.phases[-1].end_ms)
        assert seen.peak_bytes == max(phase.peak_bytes for phase in seen.phases) == max(b for _, b in seen.curve)
        assert sum(phase.stalls_ms.total for phase in seen.phases) == pytest.approx(seen.stalls_ms.total)
        times = [ms for ms, _ in seen.curve]
        assert times == sorted(times)
        came_back = {(copy.section, copy.save) for copy in seen.in_copies}
        assert seen.bytes_in == sum(nbytes_of(timeline, key) for key in came_back)
        for copies in (seen.out_copies, seen.in_copies):
            assert all(a.end_ms <= b.start_ms + 1e-9 for a, b in itertools.pairwise(copies))


def test_a_plan_for_another_timeline_is_refused():
    timeline = two_layers()
    with pytest.raises(ValueError, match=r"has the sections of its timeline.*Plan again"):
        simulate(timeline, planned(KEEP_0), LINK)
    with pytest.raises(ValueError, match="fetches for each phase; got 1 for 4"):
        simulate(timeline, planned(KEEP_0, KEEP_1, fetches=((),)), LINK)
    unknown = SectionPlan(name="layers.1", moves=(Move(save=7, release_after=0),))
    with pytest.raises(ValueError, match=r"moves save 7 of section 1 \(layers\.1\), and there is none"):
        simulate(timeline, planned(KEEP_0, unknown), LINK)
    again = SectionPlan(name="layers.1", mode="selective")
    untimed = SectionRecord(name="layers.1", allocations=timeline.sections[1].allocations)
    timeline = Timeline(sections=(timeline.sections[0], untimed), phases=timeline.phases)
    with pytest.raises(ValueError, match="its time is not known"):
        simulate(timeline, planned(KEEP_0, again), LINK)
