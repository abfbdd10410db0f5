"""The benchmarks run, and their arithmetic is right."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import decoder, decoder_report, overhead, planner, planner_report
from benchmarks.decoder_links import overlap
from benchmarks.decoder_model import CheckpointedDecoder, build, inputs, twin
from benchmarks.decoder_modes import parse_policy
from benchmarks.moe_block_model import TINY_BLOCKS, Blocks
from benchmarks.planner_bench import LayersBench
from benchmarks.shapes import TINY


def test_overlap_counts_bytes_only_while_both_directions_are_busy():
    # 100 bytes out over [0, 10) µs, 300 in over [5, 15): together 5 µs with 50 + 150 bytes.
    found = overlap([(0.0, 10.0, 100, False), (5.0, 15.0, 300, True)])
    assert found["both_busy_ms"] == pytest.approx(0.005)
    assert found["both_busy_gb_s"] == pytest.approx(200 / 5e3)
    assert found["overall_gb_s"] == pytest.approx(400 / 15e3)


def test_overlap_of_one_direction_is_none():
    assert overlap([(0.0, 10.0, 100, False), (5.0, 15.0, 300, False)])["both_busy_gb_s"] is None


def test_a_twin_shares_weights_but_not_hooks():
    model = build(TINY, torch.device("cpu"))
    other = twin(model, CheckpointedDecoder)
    assert [id(p) for p in model.parameters()] == [id(p) for p in other.parameters()]
    assert not set(model.modules()) & set(other.modules())
    x, probe = inputs(TINY, torch.device("cpu"))
    loss = model(x, probe)
    loss.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    other.zero_grad(set_to_none=True)
    again = other(x, probe)
    again.backward()
    assert torch.equal(loss, again)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), wanted, strict=True))


def test_a_policy_is_read_and_nonsense_refused():
    assert parse_policy("keep_last=2,release_after=1") == {"keep_last": 2, "release_after": 1}
    with pytest.raises(ValueError, match="name=number"):
        parse_policy("everything")


def test_targets_tell_reached_from_missed():
    def row(mode, ms, gib, **stats):
        steps = {"median": ms, "min": ms, "max": ms, "num": 1}
        found = {"mode": mode, "device": steps, "wall": steps, "peak_bytes": int(gib * 2**30)}
        return {**found, "stats": stats} if stats else found

    moved = {"bytes_out": 10**10, "bytes_in": 10**10}
    results = {
        "links": {"out_gb_s": 50.0, "in_gb_s": 50.0, "both_gb_s": 90.0},
        "steps": [
            row("none", 100.0, 14.0),
            row("keep_last=6", 104.0, 11.5, **moved),
            row("keep_last=1", 500.0, 8.0, **moved),
        ],
    }
    verdicts = {line[0]: line[3] for line in decoder_report.targets(results)}
    assert verdicts == {
        "step × none, 2.50 GiB under none (keep_last=6)": "reached",
        "step ms, all but the last layer (keep_last=1)": "**missed**",
        "its peak, GiB": "reached",
    }


@pytest.mark.slow
def test_the_decoder_benchmark_runs_to_the_end(tmp_path, capsys):
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--peers", "none", "checkpoint"]
    assert decoder.main([*arguments, "--cases", "links", "steps", "host", "lanes", "sizes", "bits"]) == 0
    results = json.loads((tmp_path / "decoder.json").read_text())
    assert all(row["equal"] for row in results["bits"])
    assert all(row["stats"]["bytes_out"] > 0 for row in results["steps"] if "stats" in row)
    assert "python -m benchmarks.decoder" in (tmp_path / "decoder.md").read_text()
    assert "bitwise equal | reached" in capsys.readouterr().out


def test_the_overhead_benchmark_runs_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "SIZES", {"1 KiB": 1024})
    threads = torch.get_num_threads()
    try:
        assert overhead.main(["--rounds", "2", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "save_on_cpu" in (tmp_path / "overhead.md").read_text()


def test_plans_are_measured_beside_checkpointing(tmp_path, capsys):
    cases = ["goals", "curve", "checkpoint", "host", "bits"]
    assert planner.main(["--device", "cpu", "--tiny", "--quick", "--out", str(tmp_path), "--cases", *cases]) == 0
    results = json.loads((tmp_path / "planner.json").read_text())
    assert results["goals"][0]["mode"] == "max_slowdown=0.01, recompute=never"
    assert all(row["planned"] for row in results["goals"])
    assert all(row["equal"] for row in results["bits"])
    assert len(results["checkpoint"]) == TINY.layers + 1
    host = results["host"]
    assert set(host["host_ms"]) == {"none", "by hand", "planned", "timed again"} and host["planning_ms"]["num"] == 3
    assert host["bytes_out"]["planned"] == pytest.approx(host["bytes_out"]["by hand"], rel=0.05)
    assert host["copies_out"]["planned"] > 0
    assert set(results["seconds"]) == set(cases)
    told = capsys.readouterr()
    assert "peak ≤ 12.1 GiB" in told.out and "faster than all at its peak or less" in told.out
    assert all(f"{case}: " in told.err for case in cases)
    assert (tmp_path / "timeline-0.json").exists()


@pytest.mark.parametrize(
    ("case", "recipe"),
    [
        ("block", "bf16"),
        pytest.param("block", "fp8_block", marks=pytest.mark.slow),
        pytest.param("stack", "fp8_block", marks=pytest.mark.slow),
    ],
)
def test_models_of_experts_are_planned_beside_checkpointing(case, recipe, tmp_path, capsys):
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--recipes", recipe, "--cases", case]
    assert planner.main(arguments) == 0
    rows = json.loads((tmp_path / "planner.json").read_text())[case]
    assert [row["mode"] for row in rows[:3]] == [f"{num} layers checkpointed" for num in (0, 1, 3)]
    ours = [row for row in rows if row.get("ours")]
    assert len(ours) == 3 and all(row["planned"] for row in ours), rows
    assert max(row["bytes_out"] for row in ours) > 0
    assert f"{rows[0]['model']}\n" in capsys.readouterr().out and rows[0]["model"].endswith(recipe)


def test_twins_of_blocks_share_weights_and_take_the_same_step():
    bench = LayersBench(Blocks(TINY_BLOCKS, None, torch.device("cpu")))
    bench.plain.step(bench.x, bench.probe)
    wanted = [p.grad.clone() for p in bench.model.parameters()]
    counts = []
    for num in range(TINY_BLOCKS.layers + 1):
        mode = bench.mode("checkpointed", num_checkpointed=num)
        assert not set(mode.model.modules()) & set(bench.model.modules())
        saved = []
        bench.model.zero_grad(set_to_none=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(0) or tensor, lambda t: t
        ):
            y = mode.model(bench.x)
        y.backward(bench.probe)
        counts.append(len(saved))
        assert all(torch.equal(p.grad, g) for p, g in zip(bench.model.parameters(), wanted, strict=True))
    assert sorted(set(counts), reverse=True) == counts, "each layer that is checkpointed saves less"


def test_a_run_that_is_killed_keeps_its_rows(tmp_path, monkeypatch):
    def killed(bench, chosen, rounds, out=None):
        yield {"mode": "first", "failed": "x"}
        raise KeyboardInterrupt

    monkeypatch.setattr(planner.cases, "goals", killed)
    with pytest.raises(KeyboardInterrupt):
        planner.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--cases", "curve"])
    assert json.loads((tmp_path / "planner.json").read_text())["curve"] == [{"mode": "first", "failed": "x"}]
    assert "| first | x |" in (tmp_path / "planner.md").read_text()


def test_dominance_is_being_faster_than_all_at_the_same_peak_or_less():
    def row(mode, ratio, gib, **more):
        return {"mode": mode, "ratio": ratio, "peak_bytes": int(gib * 2**30), **more}

    rivals = [row("none", 1.0, 14), row("half", 1.1, 10), row("all", 1.3, 8), {"mode": "trl", "failed": "no"}]
    assert planner_report.beaten_by(row("ours", 1.05, 10, ours=True), rivals) == []
    assert planner_report.beaten_by(row("ours", 1.2, 10, ours=True), rivals) == ["half"]
    assert planner_report.beaten_by(row("ours", 1.4, 10, ours=True), rivals) == ["half", "all"]
    assert planner_report.beaten_by(row("ours", 1.25, 7.95, ours=True), rivals) == [], "within a per cent, and faster"
    assert planner_report.beaten_by(row("ours", 9.0, 7, ours=True), rivals) == []
