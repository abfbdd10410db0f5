"""Lanes that are threads: they carry out jobs in order, and stop between chunks while something urgent is copied."""

from __future__ import annotations

import contextlib
import copy
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator

from .. import background
from ..errors import OffloadError
from .lanes import Fence


class _HostWait:
    """A wait of the host, already over."""

    __slots__ = ("_ms",)

    def __init__(self, ms: float) -> None:
        self._ms = ms

    def milliseconds(self) -> float | None:
        return self._ms


class WorkerFence:
    """Set when a worker has finished a job."""

    __slots__ = ("_error", "_finished", "_pid")

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._error: BaseException | None = None
        self._pid = os.getpid()

    def finish(self, error: BaseException | None) -> None:
        self._error = error
        self._finished.set()

    def done(self) -> bool:
        return self._finished.is_set()

    def wait(self) -> None:
        if not self._finished.is_set() and os.getpid() != self._pid:
            raise _forked()
        self._finished.wait()
        if self._error is not None:
            # A copy each time: a raised error holds the frames that it passed through, with all that they name.
            raise copy.copy(self._error) from self._error.__cause__

    def order(self) -> _HostWait | None:
        if self._finished.is_set():
            self.wait()
            return None
        start = time.perf_counter()
        self.wait()
        return _HostWait((time.perf_counter() - start) * 1e3)

    def ordered_on(self, stream: int) -> bool:
        return self._finished.is_set() and self._error is None


def _forked() -> OffloadError:
    return OffloadError(
        "this process was forked from the one that saved these tensors, and the copy lanes stayed there. "
        "Run backward in the process that ran forward, or call forward again in this one."
    )


_Job = tuple[Callable[[], None], tuple[Fence, ...], WorkerFence]


def _await(fences: tuple[Fence, ...]) -> None:
    # A call of its own: the last of them would live until the next job as a variable of the loop.
    for fence in fences:
        # What went wrong with an earlier use of the room is that user's to hear of.
        with contextlib.suppress(Exception):
            fence.wait()


def _work(jobs: queue.SimpleQueue[_Job | None], before_each: Callable[[], None] | None) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        run, after, fence = job
        del job
        error: BaseException | None = None
        try:
            with background.unless_ending() as permitted:
                if not permitted:
                    raise OffloadError("the interpreter is ending, and no copy is begun any more")
                _await(after)
                if before_each is not None:
                    before_each()
                run()
        except BaseException as caught:  # the error belongs to whoever waits for the fence
            error = caught
            link: BaseException | None = caught
            while link is not None:
                link.__traceback__ = None
                link = link.__cause__ or link.__context__
        # Nothing here may hold the job's tensors once the fence is set: release counts on their being free.
        del run, after
        fence.finish(error)
        del fence, error


class WorkerLane:
    """One worker thread that carries out jobs in order.

    `before_each` is called before every job; tests delay copies with it.
    """

    def __init__(self, name: str, before_each: Callable[[], None] | None = None) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=_work, args=(self._jobs, before_each), name=name, daemon=True)
        self._thread.start()

    def check_process(self) -> None:
        """Raise OffloadError in a forked child: the thread stayed with the parent."""
        if os.getpid() != self._pid:
            raise _forked()

    def submit(self, run: Callable[[], None], after: Iterable[Fence] = ()) -> WorkerFence:
        """Queue `run`, to be started after the `after` fences."""
        self.check_process()
        fence = WorkerFence()
        self._jobs.put((run, tuple(after), fence))
        return fence

    def close(self) -> None:
        """Finish the queue and end the thread."""
        self._jobs.put(None)
        if os.getpid() == self._pid and threading.current_thread() is not self._thread:
            self._thread.join()

    def __del__(self) -> None:
        self._jobs.put(None)


class RightOfWay:
    """Lets urgent copies go first: other lanes ask between chunks, and wait for those that they find under way.

    For those only, not for such as begin while they wait: so a lane gets on by a chunk, however many come. While
    it holds the right of way nobody may wait for another lane. Then every wait for it ends.
    """

    def __init__(self) -> None:
        self._num_begun = 0
        self._num_ended = 0
        self._ended = threading.Condition()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Hold it for the block. One thread may: the lane of urgent copies."""
        self._num_begun += 1
        try:
            yield
        finally:
            with self._ended:
                self._num_ended += 1
                self._ended.notify_all()

    def give(self) -> None:
        """Wait for the urgent copy under way, if one is."""
        begun = self._num_begun
        if self._num_ended < begun:
            with self._ended:
                self._ended.wait_for(lambda: self._num_ended >= begun)
