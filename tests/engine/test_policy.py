"""Every field of a policy is checked, with an error that says what to do."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lighterage
from lighterage import OffloadError, Policy
from lighterage.engine.policy import parse_bytes
from tests.engine.programs import Layer, batch, bits, mlp_layer, mlp_stack, offloaded, train

NUMBERS = ["keep_last", "min_bytes", "release_after", "prefetch_ahead"]


# --- fields -------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_documented_ones() -> None:
    policy = Policy()
    assert (policy.keep_last, policy.min_bytes, policy.select) == (2, 65536, "unmarked")
    assert (policy.host_budget, policy.tier, policy.disk_dir) == (None, None, None)


def test_a_policy_is_frozen_and_its_fields_go_by_name() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().keep_last = 3  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Policy(2)  # type: ignore[misc]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("wrong", [1.0, "2", None, True, [1]], ids=repr)
def test_a_number_of_another_type_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match=f"{name} is a whole number; got"):
        Policy(**{name: wrong})


@pytest.mark.parametrize("name", NUMBERS)
def test_a_negative_number_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be negative; got -1. 0 is the smallest"):
        Policy(**{name: -1})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, 1, 1 << 40])
def test_every_other_number_is_taken(name: str, value: int) -> None:
    assert getattr(Policy(**{name: value}), name) == value


@pytest.mark.parametrize("wrong", ["all", "", None, 1, "Marked"], ids=repr)
def test_an_unknown_select_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r'select is "unmarked".* or "marked".*mark_offload'):
        Policy(select=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["cpu", "", 1, "Disk"], ids=repr)
def test_an_unknown_tier_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match='tier is "host", "disk" or None'):
        Policy(tier=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["24 parsecs", "GiB", "", "-1GiB", "1e9", "12GiB5"], ids=repr)
def test_a_budget_that_is_no_size_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match='host_budget is a number of bytes or text such as "24GiB"'):
        Policy(host_budget=wrong)


@pytest.mark.parametrize("wrong", [1.5, True, [1], b"1GiB"], ids=repr)
def test_a_budget_of_another_type_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="host_budget is a number of bytes"):
        Policy(host_budget=wrong)  # type: ignore[arg-type]


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"host_budget cannot be negative; got -5. Leave it out for no limit"):
        Policy(host_budget=-5)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("24GiB", 24 << 30),
        ("512 MiB", 512 << 20),
        (" 1.5 kib ", 1536),
        ("2TB", 2 * 10**12),
        ("1GB", 10**9),
        ("7b", 7),
    ],
)
def test_a_budget_is_bytes_or_text(text: int | str, nbytes: int) -> None:
    assert Policy(host_budget=text).budget_bytes == nbytes
    assert parse_bytes(text, name="host_budget") == nbytes


def test_any_number_of_bytes_survives_being_written_as_text() -> None:
    chance = random.Random(1)
    for _ in range(200):
        nbytes = chance.randrange(1 << 40)
        assert parse_bytes(str(nbytes), name="x") == nbytes
        assert parse_bytes(f"{nbytes} B", name="x") == nbytes


@pytest.mark.parametrize("wrong", [3, True, object], ids=repr)
def test_a_disk_dir_that_is_no_path_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="disk_dir is a path"):
        Policy(disk_dir=wrong)  # type: ignore[arg-type]


def test_a_disk_dir_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"disk_dir must be a folder that exists.*Make it first"):
        Policy(disk_dir=tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="disk_dir must be a folder"):
        Policy(disk_dir=tmp_path / "file")


def test_a_disk_dir_beside_the_host_tier_is_refused(tmp_path: Path) -> None:
    """Law 8: an option that would be ignored is an error."""
    with pytest.raises(ValueError, match='Leave disk_dir out, or take tier="disk"'):
        Policy(disk_dir=tmp_path, tier="host")
    assert Policy(disk_dir=tmp_path, tier="disk").disk_dir == tmp_path
    assert Policy(disk_dir=str(tmp_path)).disk_dir == str(tmp_path)


@pytest.mark.parametrize("wrong", [1, "yes", None], ids=repr)
def test_checksums_are_a_yes_or_a_no(wrong: object) -> None:
    with pytest.raises(TypeError, match="disk_checksums is True or False"):
        Policy(disk_checksums=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["keep_last", "release_after", "prefetch_ahead"])
def test_a_policy_that_names_a_part_of_the_plan_is_made_by_hand(name: str) -> None:
    """Also where the number is the default's: the user has said it."""
    default = getattr(Policy(), name)
    assert not Policy().by_hand
    assert not Policy(min_bytes=1, tier="host", select="marked", host_budget=5).by_hand
    assert Policy(**{name: int(default)}).by_hand
    assert dataclasses.replace(Policy(), **{name: 0}).by_hand


# --- the call -----------------------------------------------------------------------------------------------------


def test_any_field_may_be_given_as_a_shorthand(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "keep_last": 1,
        "min_bytes": 10,
        "select": "marked",
        "host_budget": "1GiB",
        "tier": "disk",
        "disk_dir": tmp_path,
        "disk_checksums": True,
        "release_after": 3,
        "prefetch_ahead": 4,
    }
    with lighterage.offload([mlp_layer()], **fields) as offloader:
        assert offloader.policy == Policy(**fields)
    for name, value in fields.items():
        with lighterage.offload([mlp_layer()], **{name: value}) as offloader:
            assert getattr(offloader.policy, name) == value


def test_shorthands_win_over_the_policy() -> None:
    with lighterage.offload([mlp_layer()], Policy(keep_last=5, min_bytes=7), keep_last=1) as offloader:
        assert (offloader.policy.keep_last, offloader.policy.min_bytes) == (1, 7)


def test_an_unknown_shorthand_is_refused_with_the_names_of_all_fields() -> None:
    with pytest.raises(TypeError, match=r"no option 'keep_first'.*keep_last.*tier"):
        lighterage.offload([mlp_layer()], keep_first=2)


def test_a_shorthand_is_checked_like_a_field() -> None:
    with pytest.raises(ValueError, match="keep_last cannot be negative"):
        lighterage.offload([mlp_layer()], keep_last=-1)
    with pytest.raises(ValueError, match="keep_last cannot be negative"):
        lighterage.offload([mlp_layer()], Policy(), keep_last=-1)


@pytest.mark.parametrize("wrong", [{"keep_last": 2}, 2, "default"], ids=repr)
def test_a_policy_that_is_none_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"policy is a lighterage\.Policy; got .*keep_last=2"):
        lighterage.offload([mlp_layer()], wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("empty", [[], (), nn.ModuleList(), nn.Sequential()], ids=repr)
def test_no_modules_at_all_are_refused(empty: Any) -> None:
    with pytest.raises(ValueError, match=r"no module to offload.*Pass model\.layers"):
        lighterage.offload(empty)


@pytest.mark.parametrize("wrong", [[torch.ones(2)], [mlp_layer, 3], "layers", [None]], ids=lambda w: str(type(w)))
def test_what_is_no_module_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"no nn\.Module.*Pass model\.layers"):
        lighterage.offload(wrong)


def test_what_is_not_iterable_is_refused() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module or an iterable of them.*Pass model\.layers"):
        lighterage.offload(3)  # type: ignore[arg-type]


def test_a_refused_call_leaves_the_modules_as_they_were() -> None:
    layers = [mlp_layer(), mlp_layer()]
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="TorchScript"):
        lighterage.offload([*layers, scripted])
    assert [type(layer) for layer in layers] == [Layer, Layer]


@pytest.mark.parametrize("wrong", [None, 3, b"name"], ids=repr)
def test_a_section_name_that_is_no_string_is_refused(wrong: object) -> None:
    with offloaded([mlp_layer()]) as offloader, pytest.raises(TypeError, match="a section's name is a string"):
        offloader.section(wrong)  # type: ignore[arg-type]


def test_an_empty_section_name_is_refused() -> None:
    with offloaded([mlp_layer()]) as offloader, pytest.raises(ValueError, match="needs a name"):
        offloader.section("")


def test_a_section_after_close_is_refused() -> None:
    offloader = lighterage.offload([mlp_layer()])
    offloader.close()
    with pytest.raises(OffloadError, match=r"after close\(\). Make a new offloader"):
        offloader.section("late")


# --- what a policy does -------------------------------------------------------------------------------------------


def test_the_tier_of_cpu_tensors_is_disk_unless_named() -> None:
    model = mlp_stack(3)
    for tier, on_disk in ((None, True), ("disk", True), ("host", False)):
        with lighterage.offload(model.layers, tier=tier, min_bytes=64, keep_last=0, release_after=0) as offloader:
            out = model(batch())
            stats = offloader.stats()
            assert stats.host_bytes_in_use > 0
            assert (stats.disk_bytes_in_use > 0) == on_disk
            del out


@pytest.mark.parametrize("tier", ["disk", "host"])
@pytest.mark.parametrize("budget", [0, 10_000, "16KiB"])
def test_what_finds_no_room_in_the_budget_stays_and_the_report_says_so(tier: str, budget: int | str) -> None:
    model = mlp_stack(4)
    expected = [bits(v) for v in train(batch())(model)]
    with offloaded(model.layers, tier=tier, host_budget=budget) as offloader:
        for _ in range(2):
            assert [bits(v) for v in train(batch())(model)] == expected
            stats = offloader.stats()
            assert stats.host_bytes_peak <= parse_bytes(budget, name="budget")
            assert (stats.bytes_out > 0) == (budget != 0)
            assert any("budget" in reason for section in offloader.report().sections for reason in section.kept)
            assert "budget" in str(offloader.report())


def test_min_bytes_is_of_the_allocation_in_bytes() -> None:
    model = mlp_stack(2)
    nbytes = 32 * 32 * 4
    for min_bytes, moves in ((nbytes, True), (nbytes + 1, False)):
        with offloaded(model.layers, min_bytes=min_bytes) as offloader:
            train(batch())(model)
            assert (offloader.stats().bytes_out > 0) == moves


def test_a_disk_dir_is_where_the_bytes_go_and_nothing_stays_there(tmp_path: Path) -> None:
    model = mlp_stack(2)
    with offloaded(model.layers, disk_dir=tmp_path) as offloader:
        train(batch())(model)
        assert offloader.stats().bytes_out > 0
    assert list(tmp_path.iterdir()) == []


# --- what a plan is to reach -----------------------------------------------------------------------------------------


def test_a_plan_is_made_from_measurement_unless_one_is_made_by_hand() -> None:
    with lighterage.offload([mlp_layer()]) as offloader:
        assert "measured" in str(offloader.report())
    for field in ("keep_last", "release_after", "prefetch_ahead"):
        assert lighterage.Policy(**{field: 1}).by_hand
        with lighterage.offload([mlp_layer()], **{field: 1}) as offloader:
            assert offloader.report().plan is None


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"device_budget": "40GiB", "max_slowdown": 0.02}, ["device_budget='40GiB'", "max_slowdown=0.02"]),
        ({"device_budget": "40GiB", "keep_last": 2}, ["device_budget='40GiB'", "keep_last=2"]),
        ({"max_slowdown": 0.02, "release_after": 3}, ["max_slowdown=0.02", "release_after=3"]),
        ({"max_slowdown": 0.02, "prefetch_ahead": 0}, ["max_slowdown=0.02", "prefetch_ahead=0"]),
        ({"rules": [("*", "keep")], "keep_last": 0}, ["rules", "keep_last=0"]),
    ],
)
def test_two_ways_to_plan_at_once_are_refused_by_both_names(fields: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ValueError, match="Leave one of the two out") as refused:
        lighterage.Policy(**fields)
    for name in names:
        assert name in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"device_budget": "much"}, ValueError, "device_budget is a number of bytes"),
        ({"device_budget": 1.5}, TypeError, "device_budget is a number of bytes"),
        ({"device_budget": 0}, ValueError, "more than 0 bytes"),
        ({"recompute": "auto", "keep_last": 1}, ValueError, "recompute='auto' asks for a plan .* keep_last=1 makes"),
        ({"max_slowdown": -0.1}, ValueError, "not negative"),
        ({"max_slowdown": "2%"}, TypeError, "a part of the step, such as 0.02"),
        ({"max_slowdown": True}, TypeError, "a part of the step, such as 0.02"),
        ({"recompute": "always"}, ValueError, '"auto" or "never"'),
        ({"rules": "*.mlp"}, TypeError, "rules are pairs"),
        ({"rules": ["*.mlp"]}, TypeError, "a rule is a pattern and what becomes of it"),
        ({"rules": [("*.mlp", "move")]}, ValueError, 'a rule says "offload", "keep" or "recompute"'),
        ({"rules": [("*", "recompute", "(8, 8) float32")]}, ValueError, "computed again whole"),
        ({"device_budget": 10**400}, ValueError, "more than any machine has"),
        ({"max_slowdown": 10**400}, ValueError, "such as 0.02"),
    ],
)
def test_what_a_plan_is_to_reach_is_checked(fields: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lighterage.Policy(**fields)


def test_rules_bind_the_plan() -> None:
    model = mlp_stack(4)
    x = batch(1, 256, 32)

    def moved(**policy: Any) -> list[int]:
        with lighterage.offload(model.layers, min_bytes=64, tier="host", max_slowdown=50.0, **policy) as offloader:
            for _ in range(7):
                model(x).square().sum().backward()
            return [section.bytes_out for section in offloader.report().sections]

    assert all(nbytes > 0 for nbytes in moved(rules=[("*", "offload")])[:3])
    kept = moved(rules=[("Layer.1", "keep"), ("*", "offload")])
    assert kept[1] == 0
    assert kept[0] > 0
