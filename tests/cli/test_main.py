"""The command line itself: subcommands, help, wrong use."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from lighterage.cli import main


def test_python_m_lighterage_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lighterage", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("lighterage ")


def test_no_subcommand_is_wrong_use(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_demo_help_shows_sizes_and_seed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    for word in (
        "--steps",
        "--seed",
        "--keep-last",
        "--tier",
        "--model",
        "--recipe",
        "nvfp4",
        "dense",
        "quick",
        "gpu",
        "256",
        "seed, unless given: 0",
    ):
        assert word in text


def test_a_missing_extra_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install 'lighterage[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--hidden", "100"], "multiple of 64"),
        (["--steps", "2"], "at least 3"),
        (["--seq", "10", "--batch", "1"], "multiple of 32"),
        (["--experts", "2", "--top-k", "3"], "more than the 2 --experts"),
        (["--model", "dense", "--recipe", "mxfp8"], "of --model moe"),
        (["--layers", "2", "--keep-last", "2"], "Keep fewer"),
        (["--device", "tpu9"], "--device tpu9"),
    ],
)
def test_wrong_sizes_say_what_to_do(arguments, remedy, capsys):
    assert main(["demo", "--quick", *arguments]) == 2
    assert remedy in capsys.readouterr().err


def test_a_count_below_its_range_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--layers", "0"])
    assert "at least 1" in capsys.readouterr().err
