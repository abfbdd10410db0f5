"""What `stats` and `report` say is what happened."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lighterage
from lighterage import OffloadStats, mark_not_offload
from tests.engine.programs import (
    WIDTH,
    Layer,
    Save,
    Stack,
    batch,
    both_tiers,
    mlp_layer,
    mlp_stack,
    offloaded,
    train,
)

N = WIDTH * WIDTH * 4
FIELDS = [
    "saved_bytes",
    "unique_bytes",
    "bytes_out",
    "bytes_in",
    "copies_out",
    "copies_in",
    "kept_bytes",
    "still_alive_bytes",
    "late_reloads",
    "late_ms",
    "num_sections",
    "host_bytes_in_use",
    "disk_bytes_in_use",
    "host_bytes_peak",
    "host_bytes_reserved",
]


def saving(*shapes: int) -> Layer:
    """A layer that saves tensors of its own, of so many rows each."""

    def fn(x: Tensor) -> Tensor:
        return Save.apply(x, [], *[torch.ones(rows, WIDTH) for rows in shapes])

    return Layer(fn)


# --- stats --------------------------------------------------------------------------------------------------------


def test_the_stats_have_the_documented_fields_and_are_frozen() -> None:
    with offloaded([mlp_layer()]) as offloader:
        stats = offloader.stats()
    assert isinstance(stats, OffloadStats)
    assert {field.name for field in dataclasses.fields(stats)} >= set(FIELDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.bytes_out = 1  # type: ignore[misc]


def test_before_the_first_step_everything_is_zero() -> None:
    with offloaded([mlp_layer()]) as offloader:
        assert offloader.stats() == offloader.stats(total=True) == OffloadStats()


@both_tiers
def test_every_figure_of_a_step_is_exact(tier: str) -> None:
    stack = Stack([saving(32, 64), saving(8), saving(1, 32)])
    with offloaded(stack.layers, tier=tier, keep_last=1, min_bytes=1024) as offloader:
        train(batch())(stack)
        stats = offloader.stats()
    row = WIDTH * 4
    assert stats.num_sections == 3
    assert stats.saved_bytes == stats.unique_bytes == (32 + 64 + 8 + 1 + 32) * row
    assert stats.bytes_out == stats.bytes_in == (32 + 64 + 8) * row
    assert stats.copies_out == stats.copies_in == 3
    assert stats.kept_bytes == (1 + 32) * row
    assert stats.still_alive_bytes == 0
    assert stats.host_bytes_peak == (32 + 64 + 8) * row


def test_a_view_counts_as_saved_each_time_and_as_unique_once() -> None:
    def fn(x: Tensor) -> Tensor:
        saved = x.detach().clone()
        return Save.apply(x, [], saved, saved.t(), saved[3:], saved)

    with offloaded([Layer(fn)]) as offloader:
        stack = Stack([Layer(fn)])
        with offloader.section("views"):
            out = stack(batch())
        out.sum().backward()
        del out
        stats = offloader.stats()
    assert stats.saved_bytes == 4 * N - 3 * WIDTH * 4
    assert stats.unique_bytes == stats.bytes_out == N


@pytest.mark.parametrize("policy", [{"min_bytes": 1 << 30}, {"keep_last": 9}, {"select": "marked"}], ids=str)
def test_every_saved_byte_is_moved_or_kept(policy: dict[str, Any]) -> None:
    model = mlp_stack(3)
    with offloaded(model.layers, **policy) as offloader:
        train(batch())(model)
        stats = offloader.stats()
    assert stats.kept_bytes == stats.unique_bytes > 0
    assert stats.bytes_out == 0


def test_what_is_kept_and_what_is_moved_add_up_to_what_is_unique() -> None:
    model = mlp_stack(4)
    for policy in ({}, {"keep_last": 2}, {"min_bytes": N}, {"host_budget": 3 * N}):
        with offloaded(model.layers, **policy) as offloader:
            for _ in range(3):
                train(batch())(model)
                stats = offloader.stats()
                assert stats.kept_bytes + stats.bytes_out == stats.unique_bytes
                assert stats.unique_bytes <= stats.saved_bytes


def test_a_step_ends_when_the_last_handle_is_gone() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers) as offloader:
        first, second = model(batch(1)), model(batch(2))
        first.sum().backward()
        del first
        assert offloader.report().steps == 0
        assert offloader.stats().num_sections == 0
        second.sum().backward()
        del second
        assert offloader.report().steps == 1
        assert offloader.stats().num_sections == 4


def test_the_total_is_the_sum_of_the_steps() -> None:
    model = mlp_stack(3)
    with offloaded(model.layers) as offloader:
        steps = []
        for count in (1, 2, 1, 3, 1):
            losses = [model(batch(seed) + 1).sum() for seed in range(count)]
            sum(losses[1:], losses[0]).backward()
            losses.clear()
            steps.append(offloader.stats())
        total = offloader.stats(total=True)
    for name in FIELDS[: FIELDS.index("num_sections") + 1]:
        assert getattr(total, name) == pytest.approx(sum(getattr(step, name) for step in steps)), name
    assert [step.num_sections for step in steps] == [3, 6, 3, 9, 3]


def test_evaluation_is_no_step() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers) as offloader:
        train(batch())(model)
        before = offloader.stats()
        with torch.no_grad():
            model(batch())
        with torch.inference_mode():
            model(batch())
        assert offloader.stats() == before
        assert offloader.report().steps == 1


def test_asking_changes_nothing() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers) as offloader:
        out = model(batch())
        for _ in range(3):
            assert offloader.stats() == offloader.stats()
            str(offloader.report()), offloader.report().to_json(), repr(offloader), repr(offloader.sections)
        out.sum().backward()
        del out
        first = offloader.stats(total=True)
        assert offloader.stats(total=True) == first


# --- report -------------------------------------------------------------------------------------------------------


def test_the_report_has_the_figures_by_section_and_they_add_up() -> None:
    model = mlp_stack(4)
    with offloaded(model.layers, keep_last=1) as offloader:
        train(batch(1), batch(2))(model)
        losses = [model(batch(seed)).sum() for seed in (1, 2)]
        sum(losses).backward()
        losses.clear()
        report = offloader.report()
    assert [section.name for section in report.sections] == ["Layer.0", "Layer.1", "Layer.2", "Layer.3"]
    assert [section.runs for section in report.sections] == [2, 2, 2, 2]
    for name in ("saved_bytes", "unique_bytes", "bytes_out", "bytes_in", "copies_out", "copies_in", "late_reloads"):
        assert sum(getattr(section, name) for section in report.sections) == getattr(report.stats, name), name
    assert sum(sum(section.kept.values()) for section in report.sections) == report.stats.kept_bytes
    assert report.stats == dataclasses.replace(report.stats)


REASONS = {
    "parameter": {},
    "under min_bytes": {"min_bytes": 1 << 20},
    "keep_last": {"keep_last": 9},
    "not marked": {"select": "marked"},
    "budget": {"host_budget": 0},
}


@pytest.mark.parametrize("reason", REASONS, ids=str)
def test_each_reason_for_what_was_kept_is_named(reason: str) -> None:
    model = mlp_stack(2)
    with offloaded(model.layers, **REASONS[reason]) as offloader:
        train(batch())(model)
        report = offloader.report()
    for section in report.sections:
        assert any(reason in given for given in section.kept), section.kept
    assert reason in str(report)


def test_a_mark_is_named_as_a_reason() -> None:
    def fn(x: Tensor) -> Tensor:
        saved = x.detach().clone()
        mark_not_offload(saved)
        return Save.apply(x, [], saved)

    stack = Stack([Layer(fn)])
    with offloaded(stack.layers) as offloader:
        train(batch())(stack)
        (section,) = offloader.report().sections
    assert section.kept == {"mark_not_offload": N}


def test_a_buffer_is_named_as_a_reason() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.ones(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    stack = Stack([Table()])
    with offloaded(stack.layers) as offloader:
        train(batch())(stack)
        (section,) = offloader.report().sections
    assert section.kept == {"buffer": N}


def test_what_stood_aside_is_reported_with_the_reason() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers) as offloader:
        x = batch()
        checkpoint(model.layers[0], x, use_reentrant=False).sum().backward()
        torch.func.grad(lambda v: model.layers[1](v).sum())(batch().detach())
        report = offloader.report()
    reasons = {(name, reason) for name, reason, _ in report.stood_aside}
    assert ("Layer.0", "inside torch.utils.checkpoint") in reasons
    assert ("Layer.1", "inside a torch.func transform") in reasons
    assert "stood aside" in str(report) and "torch.func" in str(report)


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (lambda: nn.ModuleList([mlp_layer()]), "the members of the ModuleList that was given"),
        (lambda: nn.Sequential(mlp_layer()), "the members of the Sequential that was given"),
        (lambda: [mlp_layer()], "the modules that were given"),
        (lambda: iter([mlp_layer()]), "the modules that were given"),
        (lambda: mlp_stack(2), "'layers' of the Stack, its longest ModuleList"),
        (lambda: nn.Linear(2, 2), "the Linear itself, which holds no ModuleList or Sequential"),
    ],
)
def test_the_report_says_where_the_sections_come_from(modules: Any, expected: str) -> None:
    with lighterage.offload(modules()) as offloader:
        assert offloader.report().sections_from == expected
        assert expected in str(offloader.report())


def test_the_longest_list_of_a_model_gives_its_sections() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
            self.trunk = nn.ModuleDict({"blocks": nn.ModuleList([mlp_layer() for _ in range(3)])})

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.trunk["blocks"]:
                x = block(x)
            return x

    model = Model()
    with offloaded(model) as offloader:
        train(batch())(model)
        report = offloader.report()
    assert report.sections_from == "'trunk.blocks' of the Model, its longest ModuleList"
    named = [section.name for section in report.sections if section.name.startswith("trunk")]
    assert named == ["trunk.blocks.0", "trunk.blocks.1", "trunk.blocks.2"]


def test_the_json_holds_what_the_report_holds() -> None:
    model = mlp_stack(3)
    with offloaded(model.layers, tier="host") as offloader:
        train(batch())(model)
        report = offloader.report()
        data = json.loads(report.to_json())
        assert json.loads(report.to_json(indent=2)) == data
    assert data["stats"] == dataclasses.asdict(report.stats)
    assert [section["name"] for section in data["sections"]] == [section.name for section in report.sections]
    assert data["steps"] == 1
    assert data["policy"]["tier"] == "host" and data["policy"]["keep_last"] == 0


def test_the_table_has_a_line_for_each_section_and_one_for_all() -> None:
    model = mlp_stack(3)
    with offloaded(model.layers) as offloader:
        assert "No step has finished yet" in str(offloader.report())
        train(batch())(model)
        lines = str(offloader.report()).splitlines()
    for name in ("Layer.0", "Layer.1", "Layer.2", "all"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    table = [line for line in lines if line.startswith(("section ", "Layer.", "all "))]
    assert len({len(line) for line in table}) == 1


def test_a_step_that_moved_nothing_says_what_to_try() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers, keep_last=2) as offloader:
        train(batch())(model)
        assert "nothing was moved" in str(offloader.report()) and "keep_last=0" in str(offloader.report())


def test_the_order_of_backward_is_learned_and_the_hits_are_counted() -> None:
    model = mlp_stack(4)
    with offloaded(model.layers, prefetch_ahead=2) as offloader:
        for _ in range(4):
            train(batch())(model)
        report = offloader.report()
        assert report.prefetch_misses == 0
        assert report.prefetch_hits == 4 * 3
        foreseen = []
        for _ in range(2):  # an order that no guess foresees, and then again
            outs = [layer(batch()) for layer in model.layers]
            for index in (1, 3, 0, 2):
                outs[index].sum().backward()
            outs.clear()
            foreseen.append(offloader.report().prefetch_misses)
        assert foreseen[0] == foreseen[1] > 0


def test_reprs_can_be_read() -> None:
    model = mlp_stack(2)
    with offloaded(model.layers) as offloader:
        out = model(batch())
        assert repr(offloader) == "<lighterage.Offloader: 2 sections, 2 live>"
        assert "'Layer.0' #0, waiting" in repr(offloader.sections[0])
        out.sum().backward()
        del out
    assert repr(offloader) == "<lighterage.Offloader: 2 sections, closed>"
