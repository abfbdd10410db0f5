"""Has a plan made in a process of its own, which holds no step up."""

from __future__ import annotations

import atexit
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO

from ...errors import BudgetError
from ...plan_worker import BOOT, Asked, Made, sources
from ...planner.goal import Goal
from ...planner.timeline import Link, Timeline

# Note [Planning apart]
# A plan is a second of pure Python. In a thread beside the steps it takes the interpreter's lock from them: each
# operator lets go of the lock, and has it back after the switch interval. Even with a short one a step of a stack of
# experts went from 40 to 110 ms while a plan was made, with some 2500 switches of threads in each, for two seconds. A
# process of its own, which needs no torch and starts in a tenth of a second, costs the steps nothing. Where there can
# be none, or it fails, the plan is made in the thread, and the report says why.
# A fork at the wrong moment (workers of a DataLoader, say) would leave a copy of the pipe by which `Popen` hears that
# the process runs, and `Popen` would wait for as long as the fork lives; so no process is forked in that moment. What
# is asked goes through a file: to write into a pipe that nobody reads ends a program that lets SIGPIPE do so. A group
# of its own keeps Ctrl-C from it; a session of its own would do so too, but where the scheduler groups by session, as
# Linux does on desktops, it has half of a processor that both run on, however nice it is.

_PATIENCE_S = 120.0
"""A process that takes longer has come to harm."""

_PACKAGE = Path(__file__).parents[2]
_NAME = __name__.removesuffix(".engine.planning.apart")
_SOURCES = sources()

_starting = threading.Lock()
_running: set[subprocess.Popen[bytes]] = set()
_is_ending = False


class NotApart(Exception):
    """Why there is no plan from a process of its own."""


def made_apart(timeline: Timeline, link: Link, goal: Goal, caution: float) -> Made:
    """The plan, from a process of its own.

    Raises:
        NotApart: that cannot be had, for whatever reason.
        BudgetError, ValueError: as `planner.choose.plan` does.
    """
    if not _is_python(sys.executable):
        raise NotApart(f"sys.executable is {sys.executable!r}, which is no Python interpreter")
    try:
        with tempfile.TemporaryFile() as request:
            pickle.dump(Asked(timeline, link, goal, caution, _SOURCES), request)
            request.seek(0)
            reply, told = _run(request)
    except subprocess.TimeoutExpired:
        raise NotApart(f"a process took longer than {_PATIENCE_S:.0f} s") from None
    except Exception as error:  # whatever keeps this program from running another
        raise NotApart(f"{type(error).__name__}: {error}") from None
    try:
        made = pickle.loads(reply)
    except Exception:
        lines = told.decode(errors="replace").strip().splitlines()
        raise NotApart(lines[-1] if lines else "a process ended without a word") from None
    if isinstance(made, (BudgetError, ValueError)):
        raise made
    if not isinstance(made, Made):
        raise NotApart(str(made))
    return made


def _run(request: IO[bytes]) -> tuple[bytes, bytes]:
    """What a process that reads `request` writes, and what it says of errors."""
    # Neither the folder that the program runs in nor its environment may stand in the way of the standard library.
    command = [sys.executable, "-I", "-S", "-c", BOOT, _NAME, os.fspath(_PACKAGE), str(os.getpid())]
    if sys.dont_write_bytecode:
        command.insert(1, "-B")
    if sys.pycache_prefix is not None:
        command[1:1] = ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    with _starting:
        if _is_ending:
            raise RuntimeError("the program ends")
        process = subprocess.Popen(
            command, stdin=request, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
        )
        _running.add(process)
    try:
        return process.communicate(timeout=_PATIENCE_S)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    finally:
        _running.discard(process)


def _is_python(executable: str | None) -> bool:
    """Whether it takes an interpreter's arguments: a program that embeds Python, or is frozen, may not."""
    name = Path(executable or "").name.lower()
    return not getattr(sys, "frozen", False) and re.fullmatch(r"(python|pypy)[\d.]*[tdw]*(\.exe)?", name) is not None


def _end() -> None:
    """The program ends: nobody wants a plan any more."""
    global _is_ending
    with _starting:
        _is_ending = True
        for process in list(_running):
            process.kill()


def _begin_anew() -> None:
    """In a forked child the processes are none of its own."""
    global _starting
    _starting = threading.Lock()
    _running.clear()


atexit.register(_end)
os.register_at_fork(
    before=lambda: _starting.acquire(), after_in_parent=lambda: _starting.release(), after_in_child=_begin_anew
)
