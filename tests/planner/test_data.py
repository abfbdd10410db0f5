"""Timelines, plans and links as data: JSON both ways, and what does not fit together is refused."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator

import pytest

from lighterage.errors import BudgetError
from lighterage.planner.choose import plan
from lighterage.planner.goal import Goal
from lighterage.planner.plan import Fetch, Move, Plan, SectionPlan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link, Phase, SavedAllocation, SectionRecord, Timeline, Use
from tests.planner import oracle
from tests.planner.decoder import GIB, LINK, decoder


@pytest.mark.parametrize("seed", range(10))
def test_json_gives_back_what_it_was_given(seed):
    rng = random.Random(seed)
    timeline, link = oracle.random_timeline(rng), oracle.random_link(rng)
    made = oracle.random_plan(rng, timeline)
    assert Timeline.from_json(timeline.to_json()) == timeline
    assert Link.from_json(link.to_json()) == link
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("seed", range(4))
def test_json_keeps_what_the_host_is_said_to_cost(seed):
    rng = random.Random(seed)
    timeline, link = oracle.random_hooks(rng, oracle.random_timeline(rng)), oracle.random_link(rng, move_us=80.0)
    assert any(section.hooks_forward_ms for section in timeline.sections)
    assert Timeline.from_json(timeline.to_json()) == timeline
    assert Link.from_json(link.to_json()) == link


def test_json_without_what_the_host_costs_is_read_as_if_it_cost_nothing():
    """As it was written before there were such fields."""
    timeline, link = json.loads(decoder(2).to_json()), json.loads(LINK.to_json())
    for section in timeline["sections"]:
        del section["hooks_forward_ms"], section["hooks_backward_ms"]
    del link["move_us"]
    assert Timeline.from_json(json.dumps(timeline)) == decoder(2)
    assert Link.from_json(json.dumps(link)) == LINK


def test_json_keeps_what_people_read():
    made = plan(decoder(3), LINK, Goal(device_budget=9 * GIB))
    assert Plan.from_json(made.to_json()) == made
    timeline = dataclasses.replace(decoder(2), device_bytes=80 * GIB, measured_peak_bytes=None)
    assert Timeline.from_json(timeline.to_json()) == timeline


def _changed(text: str, **fields: object) -> str:
    return json.dumps({**json.loads(text), **fields})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged or no JSON"),
        (LINK.to_json()[:-20], "damaged or no JSON"),
        ("[1]", "JSON without"),
        ('{"out_bytes_per_s": 1}', "JSON without"),
        (decoder(1).to_json(), "a link was asked for, and this is a timeline"),
        (_changed(LINK.to_json(), version=9), "version 9, and this lighterage reads version 1"),
        (_changed(LINK.to_json(), speed=1), "has no field 'speed'"),
        (_changed(LINK.to_json(), name=3), r"link\.name is str; got 3"),
        (_changed(LINK.to_json(), out_bytes_per_s=True), r"link\.out_bytes_per_s is float; got true"),
        (_changed(LINK.to_json(), out_bytes_per_s=-1), "carries some bytes each way"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Link.from_json(text)


def test_a_fault_deep_inside_is_named_with_its_place():
    data = json.loads(decoder(2).to_json())
    data["sections"][1]["allocations"][3]["uses"][0]["first_ms"] = "soon"
    with pytest.raises(
        ValueError, match=r"timeline\.sections\[1\]\.allocations\[3\]\.uses\[0\]\.first_ms is float; got"
    ):
        Timeline.from_json(json.dumps(data))
    data = json.loads(decoder(2).to_json())
    del data["phases"][0]["work_bytes"]
    with pytest.raises(ValueError, match=r"timeline\.phases\[0\]: a Phase lacks its field 'work_bytes'"):
        Timeline.from_json(json.dumps(data))


def _timeline(section: SectionRecord, *phases: Phase) -> Timeline:
    return Timeline(sections=(section,), phases=phases)


FORWARD = Phase(direction="forward", section=0, ms=1.0, work_bytes=0)
BACKWARD = Phase(direction="backward", section=0, ms=1.0, work_bytes=0)
SAVED = SavedAllocation(save=1, nbytes=4, held_bytes=8, born_ms=0.0, uses=(Use(section=0, first_ms=0.0, last_ms=1.0),))


@pytest.mark.parametrize(
    ("section", "phases", "message"),
    [
        (SectionRecord(name="a"), (), r"section 0 \(a\) has no forward phase"),
        (SectionRecord(name="a"), (BACKWARD, FORWARD), "backward phase before its forward"),
        (SectionRecord(name="a"), (FORWARD, FORWARD), r"second forward of section 0 \(a\)"),
        (SectionRecord(name="a"), (dataclasses.replace(FORWARD, section=4),), "names section 4, and there are 1"),
        (SectionRecord(name="a"), (dataclasses.replace(FORWARD, ms=-1.0),), "neither is negative"),
        (SectionRecord(name="a"), (dataclasses.replace(FORWARD, section=None),), 'only "other" has no section'),
        (SectionRecord(name="a", allocations=(SAVED,)), (FORWARD,), "used in backward of section 0, which has no such"),
        (SectionRecord(name="a", allocations=(SAVED, SAVED)), (FORWARD, BACKWARD), "two allocations of the same save"),
        (
            SectionRecord(name="a", allocations=(dataclasses.replace(SAVED, nbytes=9),)),
            (FORWARD, BACKWARD),
            "moves 9 of 8 bytes",
        ),
    ],
)
def test_a_timeline_whose_parts_do_not_fit_is_refused(section, phases, message):
    with pytest.raises(ValueError, match=message):
        _timeline(section, *phases)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ({"born_ms": float("nan")}, "born_ms"),
        ({"born_ms": -1.0}, "born_ms"),
        ({"uses": (Use(section=0, first_ms=-1.0, last_ms=1.0),)}, "at no time"),
        ({"uses": (Use(section=0, first_ms=0.0, last_ms=float("inf")),)}, "at no time"),
    ],
)
def test_times_that_are_none_are_told_with_their_save(what, told):
    given = {"save": 1, "nbytes": 8, "held_bytes": 8, "born_ms": 0.0, "uses": (), **what}
    section = SectionRecord(name="L.0", allocations=(SavedAllocation(**given),))
    phases = tuple(Phase(direction=way, section=0, ms=1.0, work_bytes=0) for way in ("forward", "backward"))
    with pytest.raises(ValueError, match=told) as caught:
        Timeline(sections=(section,), phases=phases)
    assert "save 1 of section 0 (L.0)" in str(caught.value)


@pytest.mark.parametrize("ms", [-1000.0, float("nan"), float("inf")])
def test_a_selective_time_that_is_none_is_told(ms):
    phases = (Phase(direction="forward", section=0, ms=1.0, work_bytes=0),)
    with pytest.raises(ValueError, match="selective_ms of section 0"):
        Timeline(sections=(SectionRecord(name="L.0", selective_ms=ms),), phases=phases)


@pytest.mark.parametrize("field", ["hooks_forward_ms", "hooks_backward_ms"])
@pytest.mark.parametrize("ms", [-1.0, 1e16, float("nan"), float("inf")])
def test_hooks_that_cost_no_time_that_there_is_are_told(field, ms):
    phases = (Phase(direction="forward", section=0, ms=1.0, work_bytes=0),)
    with pytest.raises(ValueError, match=rf"{field} of section 0 \(L\.0\) is a time, 0 where hooks cost nothing; got"):
        Timeline(sections=(SectionRecord(name="L.0", **{field: ms}),), phases=phases)


def test_what_a_move_costs_the_host_is_a_number_of_microseconds():
    with pytest.raises(TypeError, match="move_us of a link is a number"):
        dataclasses.replace(LINK, move_us="80")
    with pytest.raises(ValueError, match=r"costs the host, in microseconds, 80\.0 for instance and 0 where the"):
        dataclasses.replace(LINK, move_us=-80.0)


def test_a_rate_that_is_no_number_is_told():
    with pytest.raises(TypeError, match="out_bytes_per_s of a link is a number"):
        Link(out_bytes_per_s="55e9", in_bytes_per_s=1.0, both_bytes_per_s=2.0)


def test_a_word_that_is_none_of_those_allowed_is_told_with_them():
    text = Plan(sections=(SectionPlan(name="L.0"),), fetches=()).to_json().replace('"save"', '"zip"')
    with pytest.raises(ValueError, match='mode is one of "save", "selective", "recompute"; got "zip"'):
        Plan.from_json(text)


def test_a_release_before_the_save_is_told_with_its_save_and_what_to_do():
    with pytest.raises(ValueError, match=r"0 or more phases.*got release_after=-1 for save 7\. Use 0"):
        Move(save=7, release_after=-1)
    text = Plan(sections=(SectionPlan(name="L.0", moves=(Move(save=7, release_after=4),)),), fetches=()).to_json()
    with pytest.raises(ValueError, match="release_after=-4 for save 7"):
        Plan.from_json(text.replace('"release_after": 4', '"release_after": -4').replace(":4", ":-4"))


def test_what_a_plan_says_twice_is_told_with_its_places_and_what_to_do():
    sections = (SectionPlan(name="L.0"), SectionPlan(name="L.1", moves=(Move(save=2, release_after=0),)))
    once, other = Fetch(section=1, save=2), Fetch(section=0, save=2)
    assert Plan(sections=sections, fetches=((once, other), ())).fetches[0] == (once, other)
    for fetches in (((once, other, once), ()), ((), (once,), (other, once))):
        with pytest.raises(ValueError, match=r"comes back once in a step; .* save 2 of section 1 2 times, in phases"):
            Plan(sections=sections, fetches=fetches)
    twice = SectionPlan(name="L.1", moves=(Move(save=2, release_after=0), Move(save=2, release_after=1)))
    with pytest.raises(ValueError, match=r"moves save 2 of section 1 \(L\.1\) twice\. Leave one of the moves out"):
        Plan(sections=(sections[0], twice), fetches=())


@pytest.mark.parametrize(
    "fields",
    [
        {"out_bytes_per_s": 5e-324},
        {"in_bytes_per_s": 10**400},
        {"both_bytes_per_s": float("inf")},
        {"copy_us": 1e308},
        {"copy_us": 10**400},
        {"copy_us": float("nan")},
        {"move_us": -1.0},
        {"move_us": 1e16},
        {"move_us": float("nan")},
    ],
)
def test_a_link_beyond_all_measure_is_refused(fields):
    with pytest.raises(ValueError):
        dataclasses.replace(LINK, **fields)
    with pytest.raises(ValueError):
        Link.from_json(_changed(LINK.to_json(), **fields))


@pytest.mark.parametrize("rate", [1.0, 1e30, 1e300])
@pytest.mark.parametrize("goal", [Goal(max_slowdown=0.1), Goal(device_budget=7 * GIB)])
def test_the_slowest_and_the_fastest_link_are_planned_for(rate, goal):
    link = Link(out_bytes_per_s=rate, in_bytes_per_s=rate, both_bytes_per_s=rate)
    made = plan(decoder(4), link, goal)
    assert simulate(decoder(4), made, link).step_ms < float("inf")


ABSURD = [None, True, -1, 0, 10**18, 10**30, 10**400, 1e308, -1e308, float("nan"), float("inf"), 5e-324, "", [], {}]


def _places(data: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_timeline_says_it_is_refused_or_planned_for(seed):
    rng = random.Random(seed)
    text = oracle.random_timeline(rng).to_json()
    for _ in range(60):
        data = json.loads(text)
        *path, last = rng.choice(list(_places(data)))
        at = data
        for key in path:
            at = at[key]
        if rng.random() < 0.8:
            at[last] = rng.choice(ABSURD)
        else:
            del at[last]
        try:
            timeline = Timeline.from_json(json.dumps(data))
            made = plan(timeline, LINK, Goal(max_slowdown=0.1))
            assert simulate(timeline, made, LINK).step_ms < float("inf")
            plan(timeline, LINK, Goal(device_budget=1 << 20))
        except (ValueError, BudgetError):
            continue


def test_a_number_of_thousands_of_digits_is_no_file():
    with pytest.raises(ValueError, match="this is no link of lighterage but damaged"):
        Link.from_json(_changed(LINK.to_json(), copy_us=0).replace('"copy_us": 0', f'"copy_us": {"9" * 5000}'))
