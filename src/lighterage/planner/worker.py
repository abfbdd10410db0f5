"""Makes one plan in a process of its own: what it is to be made from comes in, pickled, and the plan goes out."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from typing import NamedTuple

from .choose import plan
from .goal import Goal
from .plan import Plan
from .prediction import Prediction
from .simulate import simulate
from .timeline import Link, Timeline

# The package is named without being run: it would bring torch along, and with that seconds and memory.
BOOT = """
import sys, types
package = types.ModuleType("lighterage")
package.__path__ = [sys.argv[1]]
sys.modules["lighterage"] = package
from lighterage.planner.worker import main
main()
"""
"""What an interpreter runs to be a worker; its argument is the folder of the package."""


class Asked(NamedTuple):
    """What a plan is to be made from; see `planner.choose.plan`."""

    timeline: Timeline
    link: Link
    goal: Goal
    caution: float


class Made(NamedTuple):
    """A plan, and what it will do."""

    plan: Plan
    prediction: Prediction
    ms: float
    """What it took to make it."""


def main() -> None:
    """Be a worker: read what is asked from the standard input, write what was made to the standard output."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)  # whatever computes on this machine comes first
    asked: Asked = pickle.load(sys.stdin.buffer)
    start = time.perf_counter()
    chosen = plan(asked.timeline, asked.link, asked.goal, caution=asked.caution)
    prediction = simulate(asked.timeline, chosen, asked.link)
    pickle.dump(Made(chosen, prediction, (time.perf_counter() - start) * 1e3), sys.stdout.buffer)
    sys.stdout.buffer.flush()
