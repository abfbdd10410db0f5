"""The benchmark of grouped experts runs, and its arithmetic is right."""

from __future__ import annotations

import json

import pytest

from benchmarks import moe_stack, moe_stack_report
from benchmarks.moe_stack_model import Rates, StackShape, limit_ms, saved_bytes_by_formula

SHAPE = StackShape(name="s", layers=6, experts=64, tokens=32768, hidden=4096, features=2048)


def test_bytes_by_the_formula() -> None:
    h = 2 * 2 * 2048
    assert saved_bytes_by_formula(SHAPE, "bf16") == 32768 * (2 * 4096 + h)
    assert saved_bytes_by_formula(SHAPE, "fp8_block") == 32768 * (4096 * (1 + 4 / 128) + h)
    assert saved_bytes_by_formula(SHAPE, "mxfp8") == 32768 * (4096 * (1 + 1 / 32) + h)


def test_the_limit_is_arithmetic_or_bytes() -> None:
    def limit(name: str, copy: float, flops: float) -> float:
        rates = Rates(copy_bytes_per_s=copy, product_flops=flops, weight_gradient_flops=flops)
        return limit_ms(SHAPE, name, rates)

    arithmetic = 6 * 3 * 2 * 32768 * 4096 * 3 * 2048 / 1e15 * 1e3
    assert limit("fp8_block", 1e30, 1e15) == pytest.approx(arithmetic)
    assert limit("bf16", 1e30, 1e15) == pytest.approx(arithmetic)
    # Weights alone: read in bf16 and written as codes both ways, each way read once, a gradient written in bf16.
    weights = 6 * 64 * 3 * 4096 * 2048 * (2 + 2 + 1 + 1 + 2) / 3e12 * 1e3
    assert weights < limit("fp8_block", 3e12, 1e30) < 1.5 * weights


def test_the_stack_runs_to_the_end(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    arguments = ["--device", "cpu", "--tiny", "--recipes", "fp8_block", "bf16", "--out", str(tmp_path)]
    assert moe_stack.main(arguments) == 0
    results = json.loads((tmp_path / "moe_stack.json").read_text())
    moved = [row for row in results["steps"] if row["mode"] == "offload"]
    assert len(moved) == 2 and all(row["stats"]["bytes_out"] > 0 for row in moved)
    (host,) = results["host"]
    lower, upper = host["added_us_a_layer_quartiles"]
    assert host["num_pairs"] == 4 and lower <= host["added_us_a_layer"] <= upper and host["copies_out"] > 0
    assert "python -m benchmarks.moe_stack" in (tmp_path / "moe_stack.md").read_text()


def test_targets_tell_reached_from_missed() -> None:
    def row(experts: int, mode: str, ms: float, **more: object) -> dict[str, object]:
        times = {"median": ms, "min": ms, "max": ms, "num": 1}
        return {"experts": experts, "recipe": "fp8_block", "mode": mode, "device": times, "limit_ms": 60.0, **more}

    found = moe_stack_report.targets(
        {
            "steps": [
                row(8, "none", 45.0, launches=100),
                row(64, "none", 79.0, launches=100),
                row(
                    64,
                    "offload",
                    80.0,
                    layers_moved=4,
                    held_bytes=1,
                    freed_bytes=98,
                    saved_by_them_bytes=100,
                    copies_a_layer=2.0,
                ),
            ],
            "launches": {"8": 9, "64": 9},
            "host": [{"shape": {"experts": 64}, "added_us_a_layer": 250.0}],
        }
    )
    assert [line[3] for line in found] == ["**missed**", *["reached"] * 4, "**missed**"]
