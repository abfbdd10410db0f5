"""`lighterage whatif`: the table, the picture, the plan, and wrong use."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re

import pytest

from lighterage.cli import main
from lighterage.planner.links import NAMED, link_named
from lighterage.planner.pareto import pareto
from lighterage.planner.plan import Plan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Timeline
from tests.planner.decoder import GIB, LINK, decoder


@pytest.fixture
def timeline_file(tmp_path):
    path = tmp_path / "timeline.json"
    path.write_text(decoder(4).to_json())
    return path


def test_it_prints_the_curve_and_draws_it(timeline_file, tmp_path, capsys):
    picture = tmp_path / "curve.png"
    arguments = ["whatif", str(timeline_file), "--link", "450GB/s", "--link", "pcie4", "--out", str(picture)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "4 sections" in text and "450 GB/s out" in text and "PCIe 4 x16" in text
    assert text.count("recomputed") == 2
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_with_a_goal_it_gives_a_plan_that_can_be_read_back(timeline_file, tmp_path, capsys):
    file = tmp_path / "plan.json"
    arguments = [
        "whatif",
        str(timeline_file),
        "--budget",
        "8GiB",
        "--plan",
        str(file),
        "--out",
        str(tmp_path / "c.png"),
    ]
    assert main(arguments) == 0
    assert "To be within 8.00 GiB" in capsys.readouterr().out
    timeline = Timeline.from_json(timeline_file.read_text())
    assert simulate(timeline, Plan.from_json(file.read_text()), LINK).peak_bytes <= 8 * GIB


def test_a_budget_that_cannot_be_met_is_a_failure_that_names_the_least(timeline_file, tmp_path, capsys):
    picture = tmp_path / "c.png"
    assert main(["whatif", str(timeline_file), "--budget", "4GiB", "--out", str(picture)]) == 1
    assert "the smallest peak that was found is" in capsys.readouterr().out
    assert picture.exists()


def test_a_measured_link_may_be_given(timeline_file, tmp_path, capsys):
    link = tmp_path / "link.json"
    link.write_text(LINK.to_json())
    arguments = ["whatif", str(timeline_file), "--link", str(link), "--recompute", "never", "--max-slowdown", "0.02"]
    assert main([*arguments, "--out", str(tmp_path / "c.png")]) == 0
    assert "computed again" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--link", "carrier pigeon"], "a link is one of pcie4, pcie5, nvlink-c2c, or a rate"),
        (["--budget", "much"], '"30GiB"'),
        (["--budget", "9GiB", "--max-slowdown", "0.1"], "Give exactly one"),
        (["--plan", "p.json"], "--plan needs a goal"),
        (["--link", "-5GB/s"], "a link is one of pcie4, pcie5, nvlink-c2c, or a rate"),
        (["--link", "0GB/s"], "a link is one of pcie4"),
        (["--link", "infGB/s"], "a link is one of pcie4"),
        (["--link", ""], "a link is one of pcie4"),
        (["--link", "1MB/s", "--link", "9" * 40 + "GB/s"], "a link carries from 1e+03 to 1e+18 bytes"),
        (["--link", "9" * 400 + "GB/s"], "a link carries"),
        (["--link", "0.0001KB/s"], "a link carries from 1e+03"),
        (["--link", "none.json"], "none.json: No such file"),
        (["--budget", "-5GiB"], '"30GiB"'),
        (["--budget", "nan"], '"30GiB"'),
        (["--budget", "0"], "a number of bytes above 0"),
        (["--budget", "9" * 30 + "GiB"], "more than any device has"),
        (["--budget", "9" * 400 + "GiB"], "more than any device has"),
        (["--max-slowdown", "-1"], "0.02 for 2 %"),
        (["--max-slowdown", "-inf"], "0.02 for 2 %"),
        (["--max-slowdown", "nan"], "0.02 for 2 %"),
        (["--max-slowdown", "1e300"], "0.02 for 2 %"),
        (["--out", "missing/c.png"], "there is no folder missing. Make it first."),
        (["--out", "c.txt"], "ends in .png or .svg"),
        (["--out", "c"], "ends in .png"),
        (["--out", ""], "ends in .png"),
        (["--out", "/proc/version/c.png"], "there is no folder /proc/version"),
        (["--out", "9" * 300 + ".png"], "File name too long"),
        (["--budget", "9GiB", "--plan", "missing/p.json"], "--plan missing/p.json: there is no folder"),
        (["--budget", "9GiB", "--plan", "p.txt"], "--plan names a file that ends in .json"),
        (["--link", "pcie4", "--link", "pcie5", "--plan", "p.json", "--budget", "9GiB"], "Give one --link"),
    ],
)
def test_wrong_use_says_what_to_do(arguments, remedy, timeline_file, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["whatif", str(timeline_file), *arguments]) == 2
    seen = capsys.readouterr()
    assert remedy in seen.err and len(seen.err) < 600
    assert seen.out == "", "nothing is worked out before what was asked for is known to be right"
    assert list(tmp_path.joinpath("here").iterdir()) == []


def test_files_that_cannot_be_written_are_told_before_the_work(timeline_file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "curve.png"
    folder.mkdir()
    assert main(["whatif", str(timeline_file), "--out", str(folder)]) == 2
    assert "is a folder. Name a file in it." in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a folder of somebody else's; root may write anywhere
    assert main(["whatif", str(timeline_file), "--out", str(tmp_path / "c.png")]) == 2
    assert "cannot be written here" in capsys.readouterr().err


def test_the_timeline_is_not_written_over(timeline_file, capsys):
    before = timeline_file.read_bytes()
    arguments = ["--budget", "9GiB", "--plan", str(timeline_file), "--out", str(timeline_file.with_suffix(".png"))]
    assert main(["whatif", str(timeline_file), *arguments]) == 2
    assert "is the timeline itself" in capsys.readouterr().err
    assert timeline_file.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: "", "damaged or no JSON"),
        (lambda text: text[: len(text) // 2], "damaged or no JSON"),
        (lambda text: "[" * 100_000, "damaged or no JSON"),
        (lambda text: "\0" * 1000, "damaged or no JSON"),
        (
            lambda text: text.replace('"version": 1', '"version": 7'),
            "has version 7, and this lighterage",
        ),
        (lambda text: re.sub('"ms": [0-9.]*', '"ms": 1e400', text, count=1), "cannot take inf ms"),
        (lambda text: re.sub('"ms": [0-9.]*', '"ms": NaN', text, count=1), "cannot take nan ms"),
        (lambda text: re.sub('"ms": [0-9.]*', '"ms": 1e300', text, count=1), "beyond measure"),
        (lambda text: re.sub('"ms": [0-9.]*', '"ms": 1e13', text, count=1), "there is no such device"),
        (lambda text: re.sub('"held_bytes": [0-9]*', '"held_bytes": 1' + 40 * "0", text), "which no machine has"),
        (lambda text: re.sub('"held_bytes": [0-9]*', f'"held_bytes": {1 << 62}', text), "there is no such device"),
        (lambda text: re.sub('"work_bytes": [0-9]*', '"work_bytes": 1' + 40 * "0", text), "beyond measure"),
        (lambda text: re.sub('"work_bytes": [0-9]*', f'"work_bytes": {1 << 62}', text), "there is no such device"),
        (lambda text: re.sub('"work_bytes": [0-9]*', '"work_bytes": ' + 5000 * "9", text), "4300 digits"),
        (lambda text: re.sub('"nbytes": [0-9]*', '"nbytes": -5', text, count=1), "moves -5 of"),
    ],
)
def test_a_damaged_timeline_is_told(damage, told, timeline_file, tmp_path, capsys):
    timeline_file.write_text(damage(timeline_file.read_text()))
    assert main(["whatif", str(timeline_file), "--out", str(tmp_path / "c.png")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    "change", [{"out_bytes_per_s": 0.0}, {"in_bytes_per_s": float("nan")}, {"both_bytes_per_s": float("inf")}]
)
def test_a_link_that_carries_nothing_is_told(change, timeline_file, tmp_path, capsys):
    file = tmp_path / "link.json"
    file.write_text(json.dumps(json.loads(LINK.to_json()) | change))
    arguments = ["--link", str(file), "--out", str(tmp_path / "c.png")]
    assert main(["whatif", str(timeline_file), *arguments]) == 2
    assert "a link carries some bytes each way" in capsys.readouterr().err
    assert main(["whatif", str(timeline_file), "--link", str(timeline_file), *arguments[2:]]) == 2
    assert "a link was asked for, and this is a timeline" in capsys.readouterr().err


def test_the_slowest_link_and_a_name_that_looks_like_a_formula_are_drawn(timeline_file, tmp_path):
    file = tmp_path / "link.json"
    slow = dataclasses.replace(LINK, name=r"$\frac{", out_bytes_per_s=1e3, in_bytes_per_s=1e3, both_bytes_per_s=1e3)
    file.write_text(slow.to_json())
    assert main(["whatif", str(timeline_file), "--link", str(file), "--out", str(tmp_path / "c.png")]) == 0


def test_a_foreign_file_and_a_missing_one_are_named(tmp_path, capsys):
    file = tmp_path / "foreign.json"
    file.write_text(json.dumps({"a": 1}))
    assert main(["whatif", str(file)]) == 2
    assert "this is no timeline of lighterage" in capsys.readouterr().err
    assert main(["whatif", str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    file.write_bytes(b"\x89PNG\xff")
    assert main(["whatif", str(file)]) == 2
    capsys.readouterr()
    assert main(["whatif", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(timeline_file, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["whatif", str(timeline_file)]) == 2
    assert "pip install 'lighterage[demo]'" in capsys.readouterr().err


def test_help_lists_the_links(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["whatif", "--help"])
    text = capsys.readouterr().out
    for name in (*NAMED, "--budget", "--max-slowdown", "--recompute"):
        assert name in text


def test_the_curve_is_one_and_each_point_is_a_plan():
    timeline = decoder(4)
    curve = pareto(timeline, LINK, most_points=8)
    assert 3 <= len(curve) <= 8
    assert [p.step_ms for p in curve] == sorted(p.step_ms for p in curve)
    assert [p.peak_bytes for p in curve] == sorted((p.peak_bytes for p in curve), reverse=True)
    for point in curve:
        seen = simulate(timeline, point.plan, LINK)
        assert seen.peak_bytes <= point.peak_bytes
        assert seen.step_ms == pytest.approx(point.step_ms, rel=0.01)


def test_a_faster_link_is_never_worse():
    timeline = decoder(4)
    slow, fast = (pareto(timeline, link_named(name), recompute="never") for name in ("pcie4", "nvlink-c2c"))
    assert fast[0].peak_bytes < slow[0].peak_bytes
    assert fast[-1].step_ms < slow[-1].step_ms


def test_a_timeline_of_nothing_is_told(tmp_path, capsys):
    file = tmp_path / "empty.json"
    file.write_text(Timeline(sections=(), phases=()).to_json())
    assert main(["whatif", str(file), "--out", str(tmp_path / "c.png")]) == 2
    assert "is of a step that takes no time" in capsys.readouterr().err


def test_a_timeline_of_a_step_without_memory_is_told(tmp_path, capsys):
    """Such is that of a small model on the CPU, all of whose tensors are under `min_bytes`."""
    timeline = decoder(2)
    phases = tuple(dataclasses.replace(phase, work_bytes=0) for phase in timeline.phases)
    sections = tuple(dataclasses.replace(section, allocations=()) for section in timeline.sections)
    file = tmp_path / "small.json"
    file.write_text(dataclasses.replace(timeline, phases=phases, sections=sections).to_json())
    assert main(["whatif", str(file), "--out", str(tmp_path / "c.png")]) == 2
    assert "takes no memory" in capsys.readouterr().err
