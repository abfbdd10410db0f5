"""Makes one plan in a process of its own: what it is to be made from comes in, pickled, and the plan goes out."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from .errors import BudgetError
from .planner.choose import plan
from .planner.goal import Goal
from .planner.plan import Plan
from .planner.prediction import Prediction
from .planner.simulate import simulate
from .planner.timeline import Link, Timeline

# The package is named without being run: it would bring torch along, and with that seconds and memory.
BOOT = """
import importlib, sys, types
name, path = sys.argv[1:3]
outer = ""
for part in name.split("."):
    outer = f"{outer}.{part}" if outer else part
    sys.modules[outer] = types.ModuleType(outer)
    sys.modules[outer].__path__ = [path] if outer == name else []
importlib.import_module(f"{name}.plan_worker").main()
"""
"""What an interpreter runs to be a worker; its arguments are the package's name and folder, and who asks."""

_NICE = 5
"""Whatever computes on this machine comes first, by three to one."""

_LOOK_S = 0.5
"""So often a worker looks whether whoever asked is still there."""


class Asked(NamedTuple):
    """What a plan is to be made from; see `planner.choose.plan`."""

    timeline: Timeline
    link: Link
    goal: Goal
    caution: float
    sources: str
    """What `sources` told whoever asks."""


class Made(NamedTuple):
    """A plan, and what it will do."""

    plan: Plan
    prediction: Prediction
    ms: float
    """What it took to make it."""


class OtherSources(Exception):
    """The planner's files have changed since whoever asks has read them: its plans may be others, or not to be read."""


def sources() -> str:
    """Sizes and times of the planner's files, as they lie there now."""
    folder = Path(__file__).parent
    found = [*folder.glob("planner/*.py*"), *folder.glob("errors.py*"), *folder.glob("plan_worker.py*")]
    return repr(sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found))


def main() -> None:
    """Be a worker: read what is asked from the standard input, write what was made to the standard output."""
    threading.Thread(target=_leave_with, args=[int(sys.argv[3])], daemon=True).start()
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICE)
    made: Made | Exception
    asked: Asked = pickle.load(sys.stdin.buffer)
    start = time.perf_counter()
    try:
        if asked.sources != sources():
            raise OtherSources("the library's files have changed since this program read them")
        chosen = plan(asked.timeline, asked.link, asked.goal, caution=asked.caution)
        prediction = simulate(asked.timeline, chosen, asked.link)
        made = Made(chosen, prediction, (time.perf_counter() - start) * 1e3)
    except (BudgetError, ValueError, OtherSources) as refused:
        made = refused.with_traceback(None)
    pickle.dump(made, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _leave_with(asking: int) -> None:
    """End with the process that asks: nobody else wants the plan."""
    while os.getppid() == asking:
        time.sleep(_LOOK_S)
    os._exit(1)
