"""Has a plan made in a process of its own, which holds no step up."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

from ...planner.worker import BOOT, Asked, Made

# Note [Planning apart]
# A plan is a second of pure Python. In a thread beside the steps it takes the interpreter's lock from them: each
# operator lets go of the lock, and has it back after the switch interval. Even with a short one a step of a stack of
# experts went from 40 to 110 ms while a plan was made, with some 2500 switches of threads in each, for two seconds. A
# process of its own, which needs no torch and starts in a tenth of a second, costs the steps nothing. Where there can
# be none, or it fails at whatever, the plan is made in the thread as ever, and errors are found there.

_PATIENCE_S = 60.0
"""A process that takes longer has come to harm."""

_PACKAGE = Path(__file__).parents[2]


def made_apart(asked: Asked) -> Made | None:
    """The plan, from a process of its own; None where that cannot be had, for whatever reason."""
    if not _is_python(sys.executable):
        return None
    # Ctrl-C is for this process; a session of its own is not interrupted with it.
    command = [sys.executable, "-I", "-S", "-c", BOOT, os.fspath(_PACKAGE)]
    try:
        done = subprocess.run(
            command,
            input=pickle.dumps(asked),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE_S,
            start_new_session=True,
            check=False,  # what did not come to its end has written no whole plan
        )
        made = pickle.loads(done.stdout)
    except Exception:  # the plan is made here instead, which tells of errors that are its own
        return None
    return made if isinstance(made, Made) else None


def _is_python(executable: str | None) -> bool:
    """Whether it takes an interpreter's arguments: a program that embeds Python, or is frozen, may not."""
    return bool(executable) and not getattr(sys, "frozen", False) and "python" in Path(str(executable)).name.lower()
