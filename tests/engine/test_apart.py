"""A plan from a process of its own is the one that would be made here, and whatever fails there is made up for here."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lighterage import Policy
from lighterage.engine.planning import apart, making
from lighterage.engine.planning.apart import NotApart, made_apart
from lighterage.engine.planning.making import PRICE_CAUTION, Planning, begin, goal_of
from lighterage.errors import BudgetError
from lighterage.plan_worker import BOOT, Asked, Made, sources
from lighterage.planner.choose import plan
from lighterage.planner.goal import Goal
from lighterage.planner.simulate import simulate
from tests.engine.planned import assert_equal, train
from tests.engine.test_plan_made import offload, rows
from tests.engine.test_plan_pace import _played, beside, models, planned  # noqa: F401
from tests.planner.decoder import LINK, decoder

TIMELINE = decoder(8)
SMALL = decoder(2)
GOAL = Goal(max_slowdown=0.03)
RUN_BESIDE = Planning.run_beside  # the suite's other tests make plans in their own process


@pytest.fixture(autouse=True)
def _plans_are_made_apart(_plans_are_made_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planning, "run_beside", RUN_BESIDE)


def planning(goal: Goal = GOAL) -> Planning:
    return Planning(SMALL, LINK, goal, agree=False)


def here(job: Planning) -> Any:
    """What would be planned here."""
    return plan(SMALL, job.link, GOAL, caution=PRICE_CAUTION)


@pytest.mark.parametrize("goal", [GOAL, Goal(max_slowdown=0.01, recompute="never"), Goal(device_budget=9 << 30)])
def test_it_is_the_plan_that_is_made_here(goal: Goal) -> None:
    made = made_apart(TIMELINE, LINK, goal, PRICE_CAUTION)
    assert made.plan == plan(TIMELINE, LINK, goal, caution=PRICE_CAUTION)
    assert made.prediction == simulate(TIMELINE, made.plan, LINK)
    assert made.ms > 0


def test_it_brings_neither_torch_nor_what_lies_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataclasses.py").write_text("raise SystemExit('not mine')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made_apart(SMALL, LINK, GOAL, PRICE_CAUTION)
    told = BOOT.replace(".main()", "; print(*sys.modules)")
    command = [sys.executable, "-I", "-S", "-c", told, apart._NAME, os.fspath(apart._PACKAGE), "0"]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "lighterage.planner.choose" in modules
    assert not {"torch", "numpy", "lighterage.engine", "site"} & set(modules)


def test_what_it_is_asked_holds_neither_torch_nor_the_engine() -> None:
    """The other process could not read it."""
    pickled = pickle.dumps(Asked(TIMELINE, LINK, GOAL, PRICE_CAUTION, sources()))
    assert b"torch" not in pickled and b"lighterage.engine" not in pickled


def test_values_of_classes_that_it_does_not_know_are_plain_in_what_it_is_asked() -> None:
    class Text(str):
        pass

    class Number(float):
        pass

    for slowdown in (np.float64(0.03), Number(0.03)):
        policy = Policy(max_slowdown=slowdown, rules=[(Text("*"), "keep"), [np.str_("layers.0"), np.str_("offload")]])  # type: ignore[list-item]
        goal = goal_of(policy)
        assert goal.rules == (("*", "keep"), ("layers.0", "offload"))
        assert type(goal.max_slowdown) is float and {type(part) for rule in goal.rules for part in rule} == {str}


def test_a_package_that_lies_in_another_plans_there(tmp_path: Path) -> None:
    folder = tmp_path / "vendor" / "lighterage"
    shutil.copytree(apart._PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder.parent / "__init__.py").write_text("")
    text = """
from vendor.lighterage.engine.planning.apart import made_apart
from vendor.lighterage.planner.timeline import Link, Timeline
from vendor.lighterage.planner.goal import Goal
import sys
timeline = Timeline.from_json(sys.stdin.read())
link = Link(out_bytes_per_s=5e10, in_bytes_per_s=5e10, both_bytes_per_s=1e11)
print(type(made_apart(timeline, link, Goal(max_slowdown=0.03), 0.9).plan).__module__)
"""
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, input=SMALL.to_json(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "vendor.lighterage.planner.plan\n", done.stderr


# --- what comes to harm -----------------------------------------------------------------------------------------------


def script(folder: Path, text: str) -> str:
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("exit 1", "ended without a word"),
        ("kill -9 $$", "ended without a word"),
        ("echo nonsense", "ended without a word"),
        ("cat > /dev/null; exit 0", "ended without a word"),
        ("echo some trouble >&2; echo 'no room for it' >&2; exit 3", "no room for it"),
        ("exec sleep 60", "longer than 1 s"),
        (f"exec {sys.executable} -c 'import pickle, sys; sys.stdout.buffer.write(pickle.dumps([1]))'", r"\[1\]"),
    ],
)
def test_a_process_that_comes_to_harm_is_made_up_for_and_told(
    text: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "_PATIENCE_S", 1.0)
    monkeypatch.setattr(sys, "executable", script(tmp_path, text))
    job, begun = planning(), time.monotonic()
    job.run_beside()
    assert time.monotonic() - begun < 30
    assert job.error is None and job.plan == here(job)
    assert job.in_thread is not None and why.replace("\\", "") in job.in_thread
    assert not apart._running


@pytest.mark.parametrize(
    "executable", [None, "", "/nonexistent/python3", "/usr/bin/env", "/bin/uwsgi", "/opt/PythonTrainer", "/bin/ipython"]
)
def test_a_program_that_is_no_interpreter_is_not_run(executable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    if executable != "/nonexistent/python3":
        monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(NotApart, match=r"no Python interpreter|No such file"):
        made_apart(SMALL, LINK, GOAL, PRICE_CAUTION)


@pytest.mark.parametrize(
    "name", ["python", "python3", "Python", "python3.13t", "PYTHON.EXE", "pythonw.exe", "pypy3.11"]
)
def test_interpreters_are_told_by_their_names(name: str) -> None:
    assert apart._is_python(f"/usr/bin/{name}")


def test_a_frozen_program_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(NotApart):
        made_apart(SMALL, LINK, GOAL, PRICE_CAUTION)


def test_what_is_refused_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "make_plan", lambda *_, **__: pytest.fail("it was asked again here"))
    job = planning(Goal(device_budget=1 << 20))
    job.run_beside()
    assert isinstance(job.error, BudgetError) and job.error.smallest_bytes > 1 << 20 and job.fault is None
    assert "the smallest peak" in str(job.error)
    job = planning(Goal(max_slowdown=0.03, rules=(("no.such.section", "keep"),)))
    job.run_beside()
    assert isinstance(job.error, ValueError) and "no section or allocation matches" in str(job.error)
    assert job.fault is None


def test_a_budget_error_can_be_pickled() -> None:
    error = BudgetError("too small", smallest_bytes=7)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is BudgetError and str(again) == "too small" and again.smallest_bytes == 7


def test_files_that_changed_since_the_program_began_are_not_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another version makes may be another plan, or none that can be read."""
    monkeypatch.setattr(apart, "_SOURCES", sources().replace("choose.py", "choose2.py"))
    job = planning()
    job.run_beside()
    assert job.plan == here(job) and job.in_thread is not None and "have changed" in job.in_thread


def test_a_fault_of_the_planners_is_found_here_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, "echo 'ZeroDivisionError: of the planner' >&2; exit 1"))
    monkeypatch.setattr(making, "make_plan", lambda *_, **__: 1 / 0)
    job = planning()
    job.run_beside()
    assert job.fault is not None and isinstance(job.error, ZeroDivisionError)


# --- beside other processes -------------------------------------------------------------------------------------------


def soon(is_so: Callable[[], object], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not come to be"
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_of_a_data_loader_that_begin_meanwhile_hold_up_no_plan() -> None:
    """A fork while the process is begun would have a copy of the pipe that tells that it runs."""
    for _ in range(6):
        loader = torch.utils.data.DataLoader(range(8), num_workers=4, persistent_workers=True)  # type: ignore[arg-type]
        job = planning()
        begin(job)
        batches = iter(loader)
        assert job.done.wait(20) and job.plan is not None
        del batches, loader


def test_a_fork_waits_until_a_process_has_begun() -> None:
    entered, may, forked = threading.Event(), threading.Event(), threading.Event()

    def begins() -> None:
        with apart._starting:
            entered.set()
            assert may.wait(20)

    def forks() -> None:
        child = os.fork()
        if child == 0:
            os._exit(0 if apart._starting.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0, "the child can begin processes of its own"
        forked.set()

    threads = [threading.Thread(target=one) for one in (begins, forks)]
    threads[0].start()
    assert entered.wait(20)
    threads[1].start()
    assert not forked.wait(0.2)
    may.set()
    for thread in threads:
        thread.join(20)
    assert forked.is_set()


def test_it_is_in_a_group_of_its_own_and_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is for the program alone, and a session of its own would take half of a processor that both run on."""
    told = tmp_path / "told"
    monkeypatch.setattr(sys, "executable", script(tmp_path, f"cut -d' ' -f5,6 /proc/$$/stat > {told}; exit 1"))
    with pytest.raises(NotApart):
        made_apart(SMALL, LINK, GOAL, PRICE_CAUTION)
    group, session = map(int, told.read_text().split())
    assert group != os.getpgid(0) and session == os.getsid(0)


ENDS = """
import os, signal, sys, threading, time
sys.path[:0] = {path!r}
from lighterage.engine.planning import apart
from lighterage.engine.planning.making import Planning, begin
from lighterage.planner.goal import Goal
from tests.planner.decoder import LINK, decoder
apart.BOOT = {boot!r}
begin(Planning(decoder(2), LINK, Goal(max_slowdown=0.03), agree=False))
while not apart._running:
    time.sleep(0.01)
print(*[process.pid for process in apart._running], flush=True)
{last}
"""


@pytest.mark.parametrize("last", ["", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_it_ends_with_the_program(last: str) -> None:
    """Which does not wait for it."""
    slow = BOOT.replace(
        'importlib.import_module(f"{name}.plan_worker").main()',
        'worker = importlib.import_module(f"{name}.plan_worker")\n'
        "worker.plan = lambda *_, **__: __import__('time').sleep(60)\nworker.main()",
    )
    assert slow != BOOT
    text = ENDS.format(path=[os.getcwd(), os.fspath(apart._PACKAGE.parent)], boot=slow, last=last)
    program = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert program.stdout is not None and program.stderr is not None
    pid, begun = int(program.stdout.readline()), time.monotonic()
    program.stdout.close()
    told = program.stderr.read()
    program.stderr.close()
    program.wait(30)
    assert time.monotonic() - begun < 8 and told == ""
    soon(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_pipe_that_nobody_reads_ends_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", script(tmp_path, "exec <&-; exit 1"))
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with pytest.raises(NotApart):
            made_apart(decoder(60), LINK, GOAL, PRICE_CAUTION)
    finally:
        signal.signal(signal.SIGPIPE, before)


def test_no_bytecode_is_written_where_none_is_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def fails(command: list[str], **_: Any) -> Any:
        seen.append(command)
        raise OSError("no process")

    monkeypatch.setattr(subprocess, "Popen", fails)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", "/elsewhere")
    with pytest.raises(NotApart, match="OSError: no process"):
        made_apart(SMALL, LINK, GOAL, PRICE_CAUTION)
    assert seen[0][1:4] == ["-X", "pycache_prefix=/elsewhere", "-B"]


# --- beside steps -----------------------------------------------------------------------------------------------------


def test_here_it_is_made_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "made_apart", lambda *_: pytest.fail("it was made apart"))
    job = planning()
    job.run()
    assert job.plan is not None and job.in_thread is None


@pytest.mark.usefixtures("beside")
def test_steps_beside_which_it_is_made_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no plan is made in this process, whose steps would wait for the interpreter."""
    monkeypatch.setattr(making, "make_plan", lambda *_, **__: pytest.fail("it was made here"))
    plain, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        assert offloader.plan is not None and offloader.plan.num_moves
        assert offloader.report().planned_in_thread is None and "in a thread" not in str(offloader.report())
        assert_equal(train(plain, rows(), 6), train(model, rows(), 6))


@pytest.mark.usefixtures("beside")
def test_the_report_says_why_it_was_made_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> Made:
        raise NotApart("processes are forbidden here")

    monkeypatch.setattr(making, "made_apart", made)
    _, model = models()
    with offload(model, recompute="never", max_slowdown=0.1) as offloader:
        planned(model, offloader)
        assert offloader.report().planned_in_thread == "processes are forbidden here"
        assert "in no process: processes are forbidden here" in str(offloader.report())
