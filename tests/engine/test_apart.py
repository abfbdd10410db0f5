"""A plan from a process of its own is the one that would be made here, and whatever fails there is made up for here."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lighterage.engine.planning import apart, making
from lighterage.engine.planning.apart import made_apart
from lighterage.engine.planning.making import PRICE_CAUTION, Planning
from lighterage.errors import BudgetError
from lighterage.planner.choose import plan
from lighterage.planner.goal import Goal
from lighterage.planner.simulate import simulate
from lighterage.planner.worker import BOOT, Asked
from tests.engine.planned import assert_equal, train
from tests.engine.test_plan_made import offload, rows
from tests.engine.test_plan_pace import _played, beside, models, planned  # noqa: F401
from tests.planner.decoder import LINK, decoder

TIMELINE = decoder(8)
ASKED = Asked(TIMELINE, LINK, Goal(max_slowdown=0.03), PRICE_CAUTION)


def planning(goal: Goal = ASKED.goal) -> Planning:
    return Planning(TIMELINE, LINK, goal, agree=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the plan was had, each time another process was asked for one."""
    told: list[bool] = []

    def spied(asked: Asked) -> Any:
        made = made_apart(asked)
        told.append(made is not None)
        return made

    monkeypatch.setattr(making, "made_apart", spied)
    return told


@pytest.mark.parametrize("goal", [ASKED.goal, Goal(max_slowdown=0.01, recompute="never"), Goal(device_budget=8 << 30)])
def test_it_is_the_plan_that_is_made_here(goal: Goal) -> None:
    made = made_apart(ASKED._replace(goal=goal))
    assert made is not None
    assert made.plan == plan(TIMELINE, LINK, goal, caution=PRICE_CAUTION)
    assert made.prediction == simulate(TIMELINE, made.plan, LINK)
    assert made.ms > 0


def test_it_brings_neither_torch_nor_what_lies_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataclasses.py").write_text("raise SystemExit('not mine')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert made_apart(ASKED) is not None
    told = BOOT.replace("main()", "print(*sys.modules)")
    command = [sys.executable, "-I", "-S", "-c", told, os.fspath(apart._PACKAGE)]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "lighterage.planner.choose" in modules
    assert not {"torch", "numpy", "lighterage.engine", "site"} & set(modules)


def test_what_it_is_asked_holds_neither_torch_nor_the_engine() -> None:
    """The other process could not read it."""
    assert b"torch" not in pickle.dumps(ASKED) and b"lighterage.engine" not in pickle.dumps(ASKED)


def script(folder: Path, text: str) -> str:
    path = folder / "python-like"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "text",
    [
        "exit 1",
        "kill -9 $$",
        "echo nonsense",
        "cat > /dev/null; exit 0",
        "exec sleep 60",
        f"exec {sys.executable} -c 'import pickle, sys; sys.stdout.buffer.write(pickle.dumps([1]))'",
    ],
)
def test_a_process_that_comes_to_harm_is_made_up_for(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[bool]
) -> None:
    monkeypatch.setattr(apart, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(sys, "executable", script(tmp_path, text))
    job, begin = planning(), time.monotonic()
    job.run_beside()
    assert time.monotonic() - begin < 30
    assert asked == [False]
    assert job.error is None and job.plan == plan(TIMELINE, job.link, ASKED.goal, caution=PRICE_CAUTION)


@pytest.mark.parametrize("executable", [None, "", "/nonexistent/python3", "/usr/bin/env", "/bin/uwsgi"])
def test_a_program_that_is_no_interpreter_is_not_run(executable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    if executable != "/nonexistent/python3":
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    assert made_apart(ASKED) is None


def test_a_frozen_program_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was run"))
    assert made_apart(ASKED) is None


def test_an_interrupt_of_the_program_does_not_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "session"
    monkeypatch.setattr(sys, "executable", script(tmp_path, f"cut -d' ' -f6 /proc/$$/stat > {told}; exit 1"))
    made_apart(ASKED)
    assert int(told.read_text()) != os.getsid(0)


def test_what_is_refused_is_refused_here(asked: list[bool]) -> None:
    job = planning(Goal(device_budget=1 << 20))
    job.run_beside()
    assert asked == [False]
    assert isinstance(job.error, BudgetError) and job.error.smallest_bytes > 1 << 20 and job.fault is None
    job = planning(Goal(max_slowdown=0.03, rules=(("no.such.section", "keep"),)))
    job.run_beside()
    assert isinstance(job.error, ValueError) and job.fault is None


def test_here_it_is_made_without(asked: list[bool]) -> None:
    job = planning()
    job.run()
    assert job.plan is not None and not asked


@pytest.mark.usefixtures("beside")
def test_steps_beside_which_it_is_made_give_the_same_bits(asked: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """And no plan is made in this process, whose steps would wait for the interpreter."""
    monkeypatch.setattr(making, "make_plan", lambda *_, **__: pytest.fail("it was made here"))
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        assert asked == [True]
        assert offloader.plan is not None and offloader.plan.num_moves
        assert_equal(train(plain, rows(), 6), train(model, rows(), 6))
    assert not [thread for thread in threading.enumerate() if thread.name == "lighterage-plan"]
