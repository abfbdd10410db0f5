"""Threads that nobody waits for while the program runs, and an end of the interpreter that they survive."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

_PATIENCE_S = 10.0
"""For so long the end of the interpreter waits for threads that are about to end."""

# Note [The interpreter's end]
# A daemon thread that asks for the interpreter's lock after the interpreter has ended is ended there and then, by
# unwinding its stack. Where that stack goes through PyTorch's or the driver's bindings, which forbid it, the whole
# process is aborted, after the program did all its work. So what a daemon thread does inside such calls has to be over
# before the interpreter ends: threads that end by themselves are waited for, and those that wait for something
# endless enter `unless_ending` when it comes. Threads that are not daemons would not do: the interpreter waits for
# them before it lets go of what they wait for.

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_working = threading.Condition()
_num_working = 0
_is_ending = False


def start(run: Callable[[], object], name: str) -> None:
    """Call `run`, which ends by itself, in a thread; the end of the interpreter waits for it, and starts none."""
    if _is_ending:
        return
    thread = threading.Thread(target=run, name=name, daemon=True)
    _threads.add(thread)
    thread.start()


@contextlib.contextmanager
def unless_ending() -> Iterator[bool]:
    """Tells whether there is time for the block's work; the end of the interpreter waits for the block then."""
    global _num_working
    with _working:
        permitted = not _is_ending
        _num_working += permitted
    try:
        yield permitted
    finally:
        with _working:
            _num_working -= permitted
            if _is_ending:
                _working.notify_all()


def _end() -> None:
    global _is_ending
    until = time.monotonic() + _PATIENCE_S
    with _working:
        _is_ending = True
        _working.wait_for(lambda: not _num_working, timeout=_PATIENCE_S)
    for thread in list(_threads):
        thread.join(max(0.0, until - time.monotonic()))


def _begin_anew() -> None:
    """In a forked child none of the threads is there, and the lock may have been held."""
    global _working, _num_working
    _working, _num_working = threading.Condition(), 0
    _threads.clear()


atexit.register(_end)
os.register_at_fork(after_in_child=_begin_anew)
