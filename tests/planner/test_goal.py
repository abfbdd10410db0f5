"""Goals and rules: what was asked for binds the planner."""

from __future__ import annotations

import dataclasses

import pytest

from lighterage.errors import BudgetError
from lighterage.planner.choose import plan
from lighterage.planner.goal import Goal
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Timeline
from tests.planner.decoder import GIB, LINK, SAVES, decoder


def with_modules(timeline: Timeline) -> Timeline:
    """The decoder, whose layers name the module of each save."""
    modules = ["norm1"] * 2 + ["attention"] * 7 + ["norm2"] * 2 + ["mlp.up"] * 2 + ["mlp.down"] * 3
    sections = tuple(
        dataclasses.replace(
            section,
            allocations=tuple(
                dataclasses.replace(a, module=module) for a, module in zip(section.allocations, modules, strict=True)
            ),
        )
        for section in timeline.sections
    )
    return dataclasses.replace(timeline, sections=sections)


def moved(made, section: int) -> set[int]:
    return {move.save for move in made.sections[section].moves}


def test_keep_binds_whole_sections():
    made = plan(decoder(), LINK, Goal(max_slowdown=0.5, rules=(("layers.[01]", "keep"),)))
    assert not made.sections[0].moves and not made.sections[1].moves
    assert made.sections[0].mode == made.sections[1].mode == "save"
    assert made.num_moves > 0


def test_offload_binds_even_where_it_costs():
    """The last layer's bytes are wanted at once; the rule has them leave all the same."""
    made = plan(decoder(4), LINK, Goal(max_slowdown=0.0, rules=(("layers.3", "offload"),)))
    assert made.sections[3].mode == "save"
    assert moved(made, 3) == set(range(1, len(SAVES) + 1))


def test_recompute_binds_even_where_the_planner_may_not():
    made = plan(decoder(4), LINK, Goal(max_slowdown=0.0, recompute="never", rules=(("layers.2", "recompute"),)))
    assert [section.mode for section in made.sections] == ["save", "save", "recompute", "save"]


def test_a_rule_may_name_a_module_inside_or_a_shape():
    timeline = with_modules(decoder())
    made = plan(timeline, LINK, Goal(max_slowdown=0.0, recompute="never", rules=(("*.mlp", "keep"),)))
    assert moved(made, 0) and moved(made, 0) <= set(range(1, 12))
    made = plan(timeline, LINK, Goal(max_slowdown=0.0, recompute="never", rules=(("*", "keep", "(224, *"),)))
    large = {save for save, row in enumerate(SAVES, start=1) if row[0] == 224}
    assert moved(made, 0) and not moved(made, 0) & large


def test_the_first_rule_that_matches_counts():
    rules = (("layers.0", "keep"), ("*", "offload"))
    made = plan(decoder(4), LINK, Goal(max_slowdown=0.0, rules=rules))
    assert not made.sections[0].moves and all(section.moves for section in made.sections[1:])


def test_never_computes_nothing_again():
    for goal in (Goal(max_slowdown=0.5, recompute="never"), Goal(device_budget=10 * GIB, recompute="never")):
        made = plan(decoder(), LINK, goal)
        assert {section.mode for section in made.sections} == {"save"}
        assert simulate(decoder(), made, LINK).stalls_ms.recompute == 0


def test_what_must_stay_stays_and_what_must_not_run_again_does_not():
    timeline = decoder(4)
    first = timeline.sections[0]
    stuck = dataclasses.replace(
        first,
        not_recomputed="its forward changes a buffer",
        allocations=tuple(dataclasses.replace(a, kept="marked") for a in first.allocations),
    )
    timeline = dataclasses.replace(timeline, sections=(stuck, *timeline.sections[1:]))
    made = plan(timeline, LINK, Goal(max_slowdown=2.0))
    assert made.sections[0].mode == "save" and not made.sections[0].moves
    assert made.sections[0].why == "1.28 GiB stay: marked."
    with pytest.raises(ValueError, match="must not be: its forward changes a buffer"):
        plan(timeline, LINK, Goal(max_slowdown=2.0, rules=(("layers.0", "recompute"),)))


def test_what_is_saved_between_sections_is_none_that_a_rule_has_computed_again():
    """The pattern that names all layers matches the gaps between them too."""
    timeline = decoder(4)
    gap = dataclasses.replace(timeline.sections[1], name="Model, after layers.0", gap=True)
    timeline = dataclasses.replace(timeline, sections=(timeline.sections[0], gap, *timeline.sections[2:]))
    made = plan(timeline, LINK, Goal(max_slowdown=0.0, rules=(("*.0", "recompute"), ("*", "keep"))))
    assert [section.mode for section in made.sections] == ["recompute", "save", "save", "save"]
    assert not any(section.moves for section in made.sections[1:])
    with pytest.raises(ValueError, match="matches the rule"):
        plan(timeline, LINK, Goal(max_slowdown=0.0, rules=(("Model, after*", "recompute"),)))


def test_a_rule_over_sections_that_save_nothing_is_followed():
    timeline = decoder(2)
    phases = tuple(dataclasses.replace(phase, work_bytes=0) for phase in timeline.phases)
    empty = tuple(dataclasses.replace(section, allocations=()) for section in timeline.sections)
    goal = Goal(max_slowdown=1.0, rules=(("*", "recompute"),))
    made = plan(dataclasses.replace(timeline, sections=empty, phases=phases), LINK, goal)
    assert [section.mode for section in made.sections] == ["recompute", "recompute"]
    assert "a peak of 0 bytes instead of 0 bytes in" in made.why
    phases = tuple(dataclasses.replace(phase, ms=0.0) for phase in timeline.phases)
    with pytest.raises(BudgetError, match="smallest peak"):
        plan(dataclasses.replace(timeline, phases=phases), LINK, Goal(device_budget=1))


def test_a_rule_that_matches_nothing_names_the_sections():
    with pytest.raises(
        ValueError, match=r"matches the rule \('\*\.mpl', 'keep'\)\. The sections are: layers\.0, layers"
    ):
        plan(decoder(2), LINK, Goal(max_slowdown=0.0, rules=(("*.mpl", "keep"),)))
    with pytest.raises(ValueError, match="names a part of layers"):
        plan(with_modules(decoder(2)), LINK, Goal(max_slowdown=0.0, rules=(("*.mlp", "recompute"),)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Give exactly one"),
        ({"max_slowdown": 0.1, "device_budget": 5}, "Give exactly one"),
        ({"max_slowdown": -0.1}, "0.02 for 2 %"),
        ({"device_budget": 0}, "above 0"),
        ({"max_slowdown": 0.1, "recompute": "always"}, '"auto" or "never"'),
        ({"max_slowdown": 0.1, "rules": (("*", "move"),)}, 'the action "offload", "keep" or "recompute"'),
        ({"max_slowdown": 0.1, "rules": (("*",),)}, "For instance"),
    ],
)
def test_a_goal_that_is_none_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Goal(**fields)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"device_budget": "4GiB"}, TypeError, "whole number of bytes"),
        ({"device_budget": True}, TypeError, "whole number of bytes"),
        ({"device_budget": float("nan")}, TypeError, "whole number of bytes"),
        ({"device_budget": 0}, ValueError, "above 0"),
        ({"max_slowdown": "2%"}, TypeError, "0.02 for 2 %"),
        ({"max_slowdown": float("nan")}, ValueError, "0.02 for 2 %"),
        ({"max_slowdown": 10**400}, ValueError, "0.02 for 2 %"),
        ({"device_budget": 10**400}, ValueError, "as a device has"),
    ],
)
def test_a_goal_that_is_none_is_told(given, error, told):
    with pytest.raises(error, match=told):
        Goal(**given)
