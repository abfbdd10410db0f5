"""The step under way: which sections live, when what they saved is let go of, and when all of it is over."""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Callable, Sequence

from .. import background
from ..errors import OffloadError
from ..planner.plan import Plan
from .allocation import Allocation
from .backward_order import BackwardOrder
from .lanes import Wait
from .ledger import Ledger
from .modules import Residents, SectionModules
from .packing import Packer
from .planning import Autoplan
from .policy import Policy
from .scopes import BetweenSections
from .sections import KEEP_LAST, Section
from .stores import Stores
from .traffic import Traffic
from .waits import Waits


class Steps:
    """Follows the sections of each step from their first save to the end of the last one. Sections know it as owner.

    `begin`, `visit`, `close_section` and `close` take the offloader's lock themselves; all else is called with it held.
    """

    def __init__(
        self,
        lock: threading.RLock,
        policy: Policy,
        modules: SectionModules,
        residents: Residents,
        stores: Stores,
        ledger: Ledger,
        traffic: Traffic,
        auto: Autoplan | None,
    ) -> None:
        self._lock = lock
        self._policy = policy
        self._modules = modules
        self._residents = residents
        self._stores = stores
        self._ledger = ledger
        self._traffic = traffic
        self._auto = auto
        self._pid = os.getpid()
        self._closing = threading.Event()
        self._live: dict[int, weakref.ref[Section]] = {}
        self._ended: collections.deque[tuple[int, int]] = collections.deque()
        self._unreleased: collections.deque[weakref.ref[Section]] = collections.deque()
        self._open: dict[int, weakref.ref[Section]] = {}
        self._num_passed = 0
        self._prepared_for: Plan | None = None
        self._named: dict[str, None] = {}
        self._kept_names: frozenset[str] | None = None
        self._release_waits: collections.deque[Wait] = collections.deque(maxlen=1024)
        self._last_release_waits = Waits(())
        self.order = BackwardOrder()
        self.packer = Packer(lock, policy, ledger, residents, stores, traffic, self.begin)
        traffic.on_wait = self._waited

    def _waited(self, wait: Wait) -> None:
        self._release_waits.append(wait)
        if self._auto is not None:
            self._auto.events.waited(wait)

    # --- forward --------------------------------------------------------------------------------------------------

    def may_begin(self, between: Sequence[BetweenSections]) -> None:
        """If nothing of a step is there yet, one begins. `between`: the scopes that the calling thread is inside of."""
        if self._auto is None or self._live or self._any_open() or self._ledger.step.rows:
            return
        if not any(one.begun for one in between):
            self._auto.step_begins()
            if self._auto.plan is not self._prepared_for:
                self._prepared_for = self._auto.plan
                self._stores.prepare()

    def opened(self, section: Section) -> None:
        """One more section is open."""
        self._open[id(section)] = weakref.ref(section)

    @property
    def num_open(self) -> int:
        """How many sections are open. One that is gone is not: an error may have ended it before it began."""
        return sum(ref() is not None for ref in self._open.values())

    def _any_open(self) -> bool:
        """Whether a section is open. One that is gone is not: an interrupt may have ended it before it began."""
        # An id outlives its object, but each object that is opened takes the place of a dead one under its id.
        if self._open and all(ref() is None for ref in list(self._open.values())):
            self._open.clear()
        return bool(self._open)

    def why_kept(self, name: str, position: int | None) -> str | None:
        """Why a section stays on the device, if it is one of the last; `position`: its place among the modules."""
        if self._auto is not None:
            return None
        if self._kept_names is not None:
            return KEEP_LAST if name in self._kept_names else None
        if position is not None and position >= len(self._modules.sections) - self._policy.keep_last:
            return KEEP_LAST
        return None

    def begin(self, section: Section) -> None:
        """Give the section its place in the step: it saves something, or is about to. Takes the lock."""
        with self._lock:
            if not self._live:
                self._residents.refresh()
            index = section.index = self.order.created(section.name)
            section.capture = self.packer.capture()
            self._ledger.step.rows.append(section.row)
            self._live[index] = weakref.ref(section, self._when_over(self._ledger.num_steps, index))
            if self._auto is not None:
                self._auto.events.first_save(section)

    def _when_over(self, step: int, index: int) -> Callable[[object], None]:
        # Finalizers take no lock: they leave a note for `tidy`. After close() nobody may come by to read it.
        ended, closed, this = self._ended, self._closing, weakref.ref(self)

        def note(_: object) -> None:
            ended.append((step, index))
            steps = this() if closed.is_set() else None
            if steps is not None and os.getpid() == steps._pid:
                background.start(steps.close, "lighterage-close")

        return note

    def abandon(self, section: Section) -> None:
        """An exception ended the section: nothing of it is worth copying. Harmless when repeated."""
        was_open, section.open = section.open, False
        self._open.pop(id(section), None)
        self._traffic.forget(section)
        if self._auto is not None and was_open:
            self._auto.events.abandoned()

    def close_section(self, section: Section) -> None:
        """The section's forward has ended: start what is left to copy, and release what has had its time."""
        with self._lock:
            section.open = False
            self._open.pop(id(section), None)
            self._traffic.flush()
            if section.index is not None:
                section.ended_at = self._num_passed
                if not section.by_hand and section.orders is None:
                    self._unreleased.append(weakref.ref(section))
                if not section.gap and not self._modules.has(section.name):
                    self._named.pop(section.name, None)
                    self._named[section.name] = None
            if self._auto is not None:
                self._auto.events.left(section)
            if not section.gap:
                self.pass_section()

    def pass_section(self) -> None:
        """One more section has passed: release those whose time has come.

        Raises:
            OffloadError: copies failed; what they were of stays on the device.
        """
        self._num_passed += 1
        failure: OffloadError | None = None
        while self._unreleased:
            section = self._unreleased[0]()
            if section is not None and self._num_passed - section.ended_at <= self._policy.release_after:
                break
            self._unreleased.popleft()
            if section is not None and not section.visited:
                try:
                    self._traffic.release(section)
                except OffloadError as error:
                    failure = failure or error
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # its traceback holds this frame

    # --- backward -------------------------------------------------------------------------------------------------

    def visit(self, section: Section, asked: Allocation | None = None) -> None:
        """Backward has come to `section`: bring back what it saved, and start on what comes next."""
        with self._lock:
            if section.visited or section.index is None or section.open:
                return  # what forward itself looks at, or differentiates, inside the section, is no visit of backward
            section.visited = True
            self._drop_buried()
            self._traffic.note_unproven(section)
            self.order.visited(section.index)
            if self._auto is not None:
                self._auto.events.visited(section)
                if section.orders is not None:
                    return
            ahead: list[Section] = []
            # What is measured has its bytes back when it wants them, and not before.
            measures = self._auto is not None and self._auto.events.measures
            wanted = 0 if measures else self._policy.prefetch_ahead
            if wanted:
                for upcoming in self.order.upcoming(section.index, self._live):
                    if upcoming.orders is not None:
                        continue
                    if upcoming.capture != section.capture:
                        continue  # its bytes are there only after a replay of another graph
                    ahead.append(upcoming)
                    wanted -= not upcoming.gap
                    if not wanted:
                        break
            self._traffic.come_back_for(section, ahead, asked)
            if self._auto is not None and measures:
                self._auto.events.reloaded()

    @property
    def live(self) -> list[Section]:
        """The sections of which something saved still waits for backward, in the order of forward."""
        return [section for ref in self._live.values() if (section := ref()) is not None]

    @property
    def num_live(self) -> int:
        return len(self._live)

    # --- the end --------------------------------------------------------------------------------------------------

    def _drop_buried(self) -> None:
        for transport in self.packer.transports.values():
            if transport is not None:
                transport.tidy()

    def tidy(self) -> None:
        """Take note of what finalizers left behind: sections that ended, memory that was buried."""
        self._drop_buried()
        while self._ended:
            step, index = self._ended[0]
            if step == self._ledger.num_steps:
                self._live.pop(index, None)
            self._ended.popleft()  # last: a note that an interrupt comes upon is read again
        if self._live and next(iter(self._live.values()))() is None:
            # Python swallows a Ctrl-C that comes within a finalizer, and the note is lost.
            self._live = {index: ref for index, ref in self._live.items() if ref() is not None}
        if not self._live and not self._any_open():
            if self._ledger.step.rows:
                self._finish()
            if self.closed:
                self._shut()

    def _finish(self) -> None:
        self._stores.settle()
        if self._auto is not None:
            self._auto.step_ended()
        self._last_release_waits = Waits(self._release_waits)
        self._release_waits.clear()
        self._ledger.finish_step()
        self.order.finish_step()
        self._unreleased.clear()
        self.packer.forget_dead()
        self._traffic.still_alive.finish_step()
        if self._named:
            names = [*(name for name, _ in self._modules.sections), *self._named]
            self._kept_names = frozenset(names[max(0, len(names) - self._policy.keep_last) :])

    @property
    def release_wait_ms(self) -> float:
        """What the last finished step waited for copies out, as far as is known."""
        return self._last_release_waits.settle()

    @property
    def closed(self) -> bool:
        return self._closing.is_set()

    def close(self) -> None:
        """Copy nothing more; once nothing that was saved waits for backward, give host memory and files back."""
        with self._lock:
            if not self.closed:
                self._closing.set()
                self._traffic.forget()
            self.tidy()

    def _shut(self) -> None:
        transports, self.packer.transports = self.packer.transports, {}
        for transport in transports.values():
            if transport is not None:
                transport.close()
        self._stores.close()
