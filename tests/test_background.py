"""A program ends as it means to, whatever daemon threads are doing then."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

BUSY = """
    import threading, torch
    from lighterage import background

    x, y = torch.randn(3000, 3000), torch.empty(3000, 3000)

    def work(times):
        for _ in range(times):
            y.copy_(x)
            x.mm(x[:, :8])
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    source = textwrap.dedent(BUSY) + textwrap.dedent(script)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)"])
def test_threads_that_end_are_waited_for(end: str) -> None:
    done = run(f"background.start(lambda: (work(30), print('through')), 'busy')\n{end}")
    assert (done.returncode, done.stdout, done.stderr) == (0 if end == "pass" else 3, "through\n", "")


def test_work_that_has_begun_is_waited_for_and_none_begins_later() -> None:
    done = run("""
        import atexit, time

        begun, woken = threading.Event(), threading.Event()

        def wait_and_work():
            with background.unless_ending() as permitted:
                begun.set()
                if permitted:
                    work(30)
                    print("through", flush=True)
            woken.wait()  # for what comes when it is too late
            with background.unless_ending() as permitted:
                print("too late" if permitted else "left alone", flush=True)

        atexit.unregister(background._end)
        atexit.register(lambda: (woken.set(), time.sleep(0.2)))
        atexit.register(background._end)  # before the line above: last registered, first called
        threading.Thread(target=wait_and_work, daemon=True).start()
        begun.wait()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "through\nleft alone\n", "")


def test_a_program_may_end_while_lanes_copy() -> None:
    done = run("""
        from lighterage.engine.workers import WorkerLane

        lane, begun = WorkerLane("lane"), threading.Event()
        first = lane.submit(lambda: (begun.set(), work(30), print("through", flush=True)))
        second = lane.submit(lambda: print("begun too late", flush=True))
        begun.wait()
        kept = lane, first, second
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "through\n", "")
