"""The examples of schedules by hand run as they stand, move bytes, and give the gradients of no offload."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=150).stdout


@pytest.mark.parametrize("stage", [0, 3])
def test_a_1f1b_stage_moves_what_waits_and_the_last_stage_nothing(stage):
    small = ["--layers", "2", "--width", "64", "--tokens", "128", "--microbatches", "5"]
    out = _run("manual_schedule_1f1b.py", "--stages", "4", "--stage", str(stage), *small)
    assert "gradients are those without offload: True" in out
    numbers = re.search(r"MiB out ([\d.]+), MiB in ([\d.]+)", out)
    assert numbers is not None
    assert (float(numbers[1]) > 0) == (float(numbers[2]) > 0) == (stage < 3)


@pytest.mark.parametrize(
    ("schedule", "moved"),
    [
        ("default", 2),
        ("manual", 5),
        pytest.param("graph", 1, marks=pytest.mark.gpu),
    ],  # the graph's input stays: its owner holds it
)
def test_transformer_engines_documented_schedules(schedule, moved):
    arguments = ["--schedule", schedule, "--layers", "5", "--offloaded", "2", "--width", "64"]
    out = _run("transformer_engine_schedules.py", *arguments)
    assert "gradients are those without offload: True" in out
    assert f"{moved} of 5 layers moved" in out
    numbers = re.search(r"moved ([\d.]+) MiB out\nand ([\d.]+) MiB in", out)
    assert numbers is not None and float(numbers[1]) > 0 and float(numbers[2]) > 0
