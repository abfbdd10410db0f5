"""The command line itself: subcommands, help, wrong use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

import lighterage
from lighterage.cli import main
from lighterage.cli.arguments import join_negatives


def test_python_m_lighterage_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lighterage", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.startswith("lighterage ")


def test_a_checkout_that_was_never_installed_has_its_commands(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lighterage {lighterage.__version__}\n"
    with pytest.raises(SystemExit, match="0"):
        main(["whatif", "--help"])


def test_what_is_installed_tells_its_own_version(monkeypatch, capsys):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"9.9 of {name}")
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == "lighterage 9.9 of lighterage\n"


def test_values_that_begin_with_a_minus_belong_to_their_options():
    given = [
        "whatif",
        "-5.json",
        "--link",
        "-5GB/s",
        "--max-slowdown",
        "-inf",
        "--budget=1",
        "-2",
        "--json",
        "--out",
        "-o",
    ]
    assert join_negatives(given) == [
        "whatif",
        "-5.json",
        "--link=-5GB/s",
        "--max-slowdown=-inf",
        "--budget=1",
        "-2",
        "--json",
        "--out",
        "-o",
    ]


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
        (["--device", "meta"], "runs on cpu and cuda"),
        (["--layers", "99999999"], "Take fewer --layers"),
        (["--seq", "2147483616"], "Take fewer --layers, a smaller --hidden, --seq"),
        (["--layers", "1", "--keep-last", "0", "--hidden", "64", "--batch", "1", "--seq", "4194304"], "--seq 4194304"),
    ],
)
def test_wrong_sizes_say_what_to_do(arguments, remedy, capsys):
    assert main(["demo", "--quick", *arguments]) == 2
    assert remedy in capsys.readouterr().err


def test_a_count_below_its_range_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--layers", "0"])
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-5", "nan", "inf", "1.5", "1e9", "99999999999"])
def test_a_count_that_is_none_is_refused(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--layers", value])
    assert "argument --layers: must be" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["a file", "a file/inside", "/proc/none"])
def test_a_folder_that_cannot_be_made_is_told_before_training(out, tmp_path, capsys):
    (tmp_path / "a file").touch()
    assert main(["demo", "--quick", "--out", str(tmp_path / out)]) == 2
    assert "no folder for the results" in capsys.readouterr().err


def test_a_card_that_is_not_there_is_told_with_how_many_there_are(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["demo", "--device", "cuda:2"]) == 2
    assert "--device cuda:2: there are 2 CUDA devices here" in capsys.readouterr().err
