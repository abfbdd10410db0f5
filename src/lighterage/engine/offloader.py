"""The offloader: opens and closes sections, and tells packing and traffic what the plan says."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import nn

from ..errors import OffloadError
from ..planner.plan import Plan
from ..planner.timeline import Timeline
from ..unseen import Unseen, unseen
from .allocation import Allocation
from .autoplan import Autoplan
from .handles import unpack
from .hooks import Attachment
from .lanes import Wait
from .ledger import Ledger, OffloadStats
from .link import measure_link
from .measure import MeasuringPack, WatchingPack
from .modules import Residents, SectionModules
from .orders import PlannedOrders
from .packing import Packer
from .policy import Policy
from .recompute import SectionCall, run_again_later
from .report import Report, build_report
from .scopes import BetweenSections, Pack, Recorder, entered, why_stand_aside
from .sections import KEEP_LAST, KEEP_SECTION, BackwardOrder, LiveSection, Section
from .stores import Stores
from .traffic import Traffic
from .views import ViewSpec

# Device memory is compared with what was saved in the first steps only: asking costs tens of microseconds.
WATCH_MEMORY_STEPS = 3


SectionPlan = Literal["policy", "manual", "keep"]
"""Who decides what moves of one section: the policy, calls of `evict` and `release`, or nobody: all of it stays."""


class _Waits:
    """Waits of one step, added up as they become known."""

    def __init__(self, waits: Iterable[Wait]) -> None:
        self._unknown = list(waits)
        self._ms = 0.0
        self.settle()

    def settle(self) -> float:
        """Milliseconds in all, as far as is known. Never blocks."""
        unknown = []
        for wait in self._unknown:
            ms = wait.milliseconds()
            if ms is None:
                unknown.append(wait)
            else:
                self._ms += ms
        self._unknown = unknown
        return self._ms


class _Threads(threading.local):
    def __init__(self) -> None:
        self.between: list[BetweenSections] = []


class Offloader:
    """Moves what sections save for backward off the device, and back. Made by `lighterage.offload`.

    Thread-safe. Usable as a context manager, which closes it. Correctness never depends on what is called on it or
    when: every saved tensor can be asked for at any time.
    """

    def __init__(
        self,
        modules: nn.Module | Iterable[nn.Module],
        policy: Policy,
        *,
        before_copies: Callable[[], None] | None = None,
    ) -> None:
        self._policy = policy
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closing = threading.Event()
        self._modules = SectionModules(modules)
        self._residents = Residents(self._modules.all_modules)
        self._stores = Stores(policy, before_copies)
        self._ledger = Ledger()
        self._order = BackwardOrder()
        self._traffic = Traffic(self._lock, self._ledger, only_marked=policy.select == "marked")
        self._packer = Packer(
            self._lock, policy, self._ledger, self._residents, self._stores, self._traffic, self._first_save
        )
        self._threads = _Threads()
        self._live: dict[int, weakref.ref[Section]] = {}
        self._ended: collections.deque[tuple[int, int]] = collections.deque()
        self._unreleased: collections.deque[weakref.ref[Section]] = collections.deque()
        self._num_open = 0
        self._num_passed = 0
        self._settled = False
        self._named: dict[str, None] = {}
        self._kept_names: frozenset[str] | None = None
        self._attachments: list[Attachment] = []
        self._release_waits: collections.deque[Wait] = collections.deque(maxlen=1024)
        self._last_release_waits = _Waits(())
        self._traffic.on_wait = self._waited
        self._auto: Autoplan | None = None if policy.by_hand else self._make_autoplan()
        try:
            self._attach()
            self._packer.prepare()
        except BaseException:
            self.close()
            raise

    def _make_autoplan(self) -> Autoplan:
        device = next(iter(self._residents.accelerators), torch.device("cpu"))
        tier = self._policy.tier
        link = functools.partial(measure_link, device, tier)
        return Autoplan(self._policy, self._traffic, self._modules.module_of, device, link)

    def _waited(self, wait: Wait) -> None:
        self._release_waits.append(wait)
        if self._auto is not None:
            self._auto.waited(wait)

    # --- scopes ---------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        for position, (name, module) in enumerate(self._modules.sections):
            self._attachments.append(Attachment(module, functools.partial(self._module_scope, name, position)))
        if self._modules.root is not None:
            self._attachments.append(Attachment(self._modules.root, self._root_scope))

    def _module_scope(
        self, name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> contextlib.AbstractContextManager[LiveSection | None]:
        return self._scope(name, position, "policy", SectionCall(args, kwargs, compiled))

    @contextlib.contextmanager
    def _scope(
        self,
        name: str,
        position: int | None,
        plan: SectionPlan = "policy",
        call: SectionCall | None = None,
    ) -> Iterator[LiveSection | None]:
        reason = self._why_stand_aside()
        if reason is not None:
            self._stand_aside(name, position, reason)
            yield None
            return
        if self._threads.between:
            self._threads.between[-1].end_stretch(position)
        keep_reason = (
            KEEP_SECTION if plan == "keep" else self._keep_reason(name, position) if plan == "policy" else None
        )
        section, around = self._open_section(name, keep_reason, by_hand=plan == "manual", call=call)
        del call
        before = self._device_bytes()
        live = LiveSection(section)
        pack = self.pack_of(section)
        if isinstance(section.orders, PlannedOrders) and section.orders.mode != "save":
            module = self._modules.module_of(name)
            assert module is not None, "only a module is computed again"
            live.runner = functools.partial(run_again_later, orders=section.orders, pack=pack, name=name, module=module)
        recorder = Recorder(pack, section)
        try:
            with torch.autograd.graph.saved_tensors_hooks(recorder, unpack), entered(recorder), around:
                yield live
        except BaseException:
            self._abandon(section)
            raise
        self._note_growth(section, before)
        self.close_section(section)

    def pack_of(self, section: Section) -> Pack:
        """The pack of a section: one that records, in a step that is measured."""
        log = None if self._auto is None or section.log is None else self._auto.detailed_log
        if log is None and isinstance(section.orders, PlannedOrders) and section.orders.read_twice is not None:
            return WatchingPack(self._packer.pack, section.orders.read_twice)
        return self._packer.pack if log is None else MeasuringPack(self._packer.pack, log, section.log)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _root_scope(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> Iterator[None]:
        del args, kwargs, compiled
        reason = self._why_stand_aside()
        if reason is not None:
            self._ledger.stood_aside[(self._modules.root_name, reason)] += 1
            yield
            return
        if self._auto is not None:
            with self._lock:
                self._tidy()
                self._step_may_begin()
        between = BetweenSections(self)
        self._threads.between.append(between)
        try:
            with torch.autograd.graph.saved_tensors_hooks(between, unpack), entered(between):
                yield
        finally:
            self._threads.between.remove(between)
            between.end_stretch()

    def _why_stand_aside(self) -> str | None:
        if self._closed:
            return "closed"
        if os.getpid() != self._pid:
            return "in a forked process"
        return why_stand_aside()

    def _stand_aside(self, name: str, position: int | None, reason: str) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        self._ledger.stood_aside[(name, reason)] += 1
        between = self._threads.between
        if between and torch._C._current_graph_task_id() == -1:
            between[-1].end_stretch(position)
            with self._lock:
                self._pass_section()

    @unseen
    def section(
        self, name: str, *, plan: SectionPlan = "policy"
    ) -> contextlib.AbstractContextManager[LiveSection | None]:
        """A section around code that is not an nn.Module. Entering gives the section, or None where it stands aside.

        Args:
            name: what the report calls it; the same name for the same code in every step.
            plan: `"policy"`: as the policy says. `"manual"`: nothing is copied out before `evict`, nor let go of before
                `release`. `"keep"`: all that it saves stays on the device.

        Raises:
            TypeError, ValueError: `name` is not a string, or an empty one; no such plan.
            OffloadError: the offloader is closed.
        """
        if not isinstance(name, str):
            raise TypeError(f"a section's name is a string; got {name!r}.")
        if not name:
            raise ValueError('a section needs a name that tells its code: offloader.section("encoder").')
        if plan not in get_args(SectionPlan):
            raise ValueError(f'plan is "policy", "manual" or "keep"; got {plan!r}.')
        if self._closed:
            raise OffloadError(f"section({name!r}) came after close(). Make a new offloader with lighterage.offload.")
        return Unseen(self._scope(name, None, plan), f"offloader.section({name!r})")

    # --- sections -------------------------------------------------------------------------------------------------

    def _keep_reason(self, name: str, position: int | None) -> str | None:
        if self._auto is not None:
            return None
        if self._kept_names is not None:
            return KEEP_LAST if name in self._kept_names else None
        if position is not None and position >= len(self._modules.sections) - self._policy.keep_last:
            return KEEP_LAST
        return None

    def open_gap(self, position: int) -> Section:
        """A section for what is saved after the section at `position` has ended, up to the next one."""
        sections = self._modules.sections
        where = f"after {sections[position][0]}" if position >= 0 else f"before {sections[0][0]}"
        reason = None
        if self._auto is None:
            reason = KEEP_LAST if position + 1 >= len(sections) - self._policy.keep_last else None
            if position + 1 == len(sections):
                reason = "after the last section: backward begins with it"
        return self._open_section(f"{self._modules.root_name}, {where}", reason, gap=True)[0]

    def _open_section(
        self,
        name: str,
        keep_reason: str | None,
        gap: bool = False,
        by_hand: bool = False,
        call: SectionCall | None = None,
    ) -> tuple[Section, contextlib.AbstractContextManager[object]]:
        """A section, and what its forward has to run in."""
        around: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        with self._lock:
            self._tidy()
            if self._auto is not None:
                self._step_may_begin()
            self._num_open += 1
            section = Section(self, name, keep_reason, gap, by_hand)
            if self._auto is not None:
                around = self._auto.opened(section, call)
            return section, around

    def _step_may_begin(self) -> None:
        """If nothing of a step is there yet, one begins."""
        if self._auto is None or self._live or self._num_open or self._ledger.step.rows:
            return
        if not any(between.begun for between in self._threads.between):
            self._auto.step_begins()

    def _first_save(self, section: Section) -> None:
        with self._lock:
            if not self._live:
                self._residents.refresh()
            index = section.index = self._order.created(section.name)
            section.capture = self._packer.capture()
            self._ledger.step.rows.append(section.row)
            self._live[index] = weakref.ref(section, self._when_over(self._ledger.num_steps, index))
            if self._auto is not None:
                self._auto.first_save(section)

    def _when_over(self, step: int, index: int) -> Callable[[object], None]:
        # Finalizers take no lock: they leave a note for `_tidy`. After close() nobody may come by to read it.
        ended, closed, this = self._ended, self._closing, weakref.ref(self)

        def note(_: object) -> None:
            ended.append((step, index))
            owner = this() if closed.is_set() else None
            if owner is not None and os.getpid() == owner._pid:
                threading.Thread(target=owner.close, name="lighterage-close", daemon=True).start()

        return note

    def _abandon(self, section: Section) -> None:
        """An exception ended the section: nothing of it is worth copying."""
        with self._lock:
            section.open = False
            self._num_open -= 1
            self._traffic.forget(section)
            if self._auto is not None:
                self._auto.abandoned()

    def close_section(self, section: Section) -> None:
        """The section's forward has ended: start what is left to copy, and release what has had its time."""
        with self._lock:
            section.open = False
            self._num_open -= 1
            self._traffic.flush()
            if section.index is not None:
                section.ended_at = self._num_passed
                if not section.by_hand and section.orders is None:
                    self._unreleased.append(weakref.ref(section))
                if not section.gap and not self._modules.has(section.name):
                    self._named.pop(section.name, None)
                    self._named[section.name] = None
            if self._auto is not None:
                self._auto.left(section)
            if not section.gap:
                self._pass_section()

    def _pass_section(self) -> None:
        """One more section has passed: release those whose time has come."""
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

    def visit(self, section: Section, asked: Allocation | None = None) -> None:
        """Backward has come to `section`: bring back what it saved, and start on what comes next."""
        with self._lock:
            if section.visited or section.index is None or section.open:
                return  # what forward itself looks at, or differentiates, inside the section, is no visit of backward
            section.visited = True
            self._drop_buried()
            self._traffic.note_unproven(section)
            self._order.visited(section.index)
            if self._auto is not None:
                self._auto.visited(section)
                if section.orders is not None:
                    return
            ahead: list[Section] = []
            # What is measured has its bytes back when it wants them, and not before.
            measures = self._auto is not None and self._auto.measures
            wanted = 0 if measures else self._policy.prefetch_ahead
            if wanted:
                live = {index: s for index, ref in self._live.items() if (s := ref()) is not None}
                for upcoming in self._order.upcoming(section.index, live):
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
                self._auto.reloaded()

    def load(self, allocation: Allocation, spec: ViewSpec) -> torch.Tensor:
        """The saved tensor that `spec` describes over `allocation`, on the device."""
        return self._traffic.load(allocation, spec)

    @property
    def sections(self) -> list[LiveSection]:
        """The live sections, in the order of forward: those of which something saved still waits for backward."""
        with self._lock:
            self._tidy()
            return [LiveSection(section) for ref in self._live.values() if (section := ref()) is not None]

    # --- by hand --------------------------------------------------------------------------------------------------

    def evict(self, section: LiveSection) -> None:
        """Start copying out what `section` saved, if that has not begun. Its tensors stay usable.

        Raises:
            TypeError, ValueError: this is no section, or one of another offloader.
        """
        live = self._check(section)
        with self._lock:
            self._traffic.flush()
            if live is not None:
                self._traffic.decide(live)

    def release(self, section: LiveSection) -> None:
        """Give back the device memory of what `section` saved, ordered after its copies. Evicts first if need be.

        Raises:
            TypeError, ValueError: this is no section, or one of another offloader.
            OffloadError: copies failed (a full disk, an I/O error); those tensors stay on the device.
        """
        live = self._check(section)
        with self._lock:
            self._traffic.flush()
            if live is not None:
                self._traffic.release(live)

    def prefetch(self, section: LiveSection) -> None:
        """Start bringing back what `section` saved.

        Raises:
            TypeError, ValueError: this is no section, or one of another offloader.
        """
        live = self._check(section)
        with self._lock:
            if live is not None:
                self._traffic.reload(live)

    def _check(self, section: LiveSection) -> Section | None:
        if not isinstance(section, LiveSection):
            raise TypeError(f"a section is taken from offloader.sections; got {section!r}.")
        live = section.section
        if live is not None and live.owner is not self:
            raise ValueError(f"section {section.name!r} belongs to another offloader. Call that one's method.")
        return live

    # --- housekeeping ---------------------------------------------------------------------------------------------

    def _drop_buried(self) -> None:
        for transport in self._packer.transports.values():
            if transport is not None:
                transport.tidy()

    def _tidy(self) -> None:
        """Take note of what finalizers left behind: sections that ended, memory that was buried."""
        self._drop_buried()
        while self._ended:
            step, index = self._ended.popleft()
            if step == self._ledger.num_steps:
                self._live.pop(index, None)
        if not self._live and self._num_open == 0:
            if self._ledger.step.rows:
                self._finish_step()
            if self._closed:
                self._shut()

    def _finish_step(self) -> None:
        if not self._settled:
            self._settled = self._stores.settle()
        if self._auto is not None:
            self._auto.step_ended()
        self._last_release_waits = _Waits(self._release_waits)
        self._release_waits.clear()
        self._ledger.finish_step()
        self._order.finish_step()
        self._unreleased.clear()
        self._packer.forget_dead()
        self._traffic.still_alive.finish_step()
        if self._named:
            names = [*(name for name, _ in self._modules.sections), *self._named]
            self._kept_names = frozenset(names[max(0, len(names) - self._policy.keep_last) :])

    def _device_bytes(self) -> int | None:
        if self._ledger.num_steps >= WATCH_MEMORY_STEPS:
            return None
        known = [t.device_bytes() for t in self._packer.transports.values() if t is not None]
        return sum(b for b in known if b is not None) if known and None not in known else None

    def _note_growth(self, section: Section, before: int | None) -> None:
        after = None if before is None else self._device_bytes()
        if before is not None and after is not None:
            section.row.unseen_bytes = max(0, after - before - section.row.unique_bytes)

    @property
    def _closed(self) -> bool:
        return self._closing.is_set()

    @property
    def policy(self) -> Policy:
        """What was asked for."""
        return self._policy

    @property
    def timeline(self) -> Timeline | None:
        """What was measured of a step; None before that, and where the plan is made by hand."""
        with self._lock:
            return None if self._auto is None else self._auto.timeline

    @property
    def plan(self) -> Plan | None:
        """What becomes of each allocation, and when; None before enough was measured, and where it is made by hand."""
        with self._lock:
            return None if self._auto is None else self._auto.plan

    def use_plan(self, plan: Plan, timeline: Timeline) -> None:
        """Carry out `plan`, made for `timeline`, from the next step on, and measure nothing more.

        A plan decides speed and memory alone: one that does not fit the model costs both, and no bit.

        Raises:
            OffloadError: this offloader's plan is made by hand.
            TypeError: this is no plan, or no timeline.
        """
        with self._lock:
            if self._auto is None:
                raise OffloadError(
                    "this offloader's plan is made by hand: its policy names keep_last, release_after or "
                    "prefetch_ahead. Leave them out to use a plan."
                )
            given: tuple[object, object] = (plan, timeline)  # as they came, whatever their types say
            if not (isinstance(given[0], Plan) and isinstance(given[1], Timeline)):
                raise TypeError(
                    "use_plan takes a lighterage.Plan and the lighterage.Timeline that it was made for; got a "
                    f"{type(plan).__name__} and a {type(timeline).__name__}."
                )
            self._auto.use(plan, timeline)

    def stats(self, total: bool = False) -> OffloadStats:
        """Figures of the last finished step, or since the start; the sizes at rest are as they are now.

        A step ends when nothing saved in it is waiting for backward any more.
        """
        with self._lock:
            self._tidy()
            return dataclasses.replace(
                self._ledger.total() if total else self._ledger.last.stats(),
                host_bytes_in_use=self._stores.bytes_in_use,
                disk_bytes_in_use=self._stores.disk_bytes_in_use,
                host_bytes_peak=self._stores.bytes_peak,
                host_bytes_reserved=self._stores.host_bytes_reserved,
            )

    def report(self) -> Report:
        """What happened in the last finished step, section by section; `str(report)` is a table, `.to_json()` data."""
        with self._lock:
            return build_report(
                ledger=self._ledger,
                stats=self.stats(),
                sections_from=self._modules.chosen_from,
                order=self._order,
                policy=self._policy,
                auto=self._auto,
                release_wait_ms=self._last_release_waits.settle(),
            )

    def close(self) -> None:
        """Detach from the modules, and give host memory and files back. Harmless when repeated.

        What was saved before stays usable: a backward that is still to come works, and its room is given back when the
        graph is gone.
        """
        with self._lock:
            if not self._closed:
                self._closing.set()
                for attachment in self._attachments:
                    attachment.detach()
                self._traffic.forget()
            self._tidy()

    def _shut(self) -> None:
        transports, self._packer.transports = self._packer.transports, {}
        for transport in transports.values():
            if transport is not None:
                transport.close()
        self._stores.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "an Offloader belongs to its process and its modules, and cannot be copied or pickled. Save the model, and "
            "call lighterage.offload again on what was loaded."
        )

    def __enter__(self) -> Offloader:
        if self._closed:
            raise OffloadError("this offloader is closed. Make a new one with lighterage.offload.")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._live)} live"
        return f"<lighterage.Offloader: {len(self._modules.sections)} sections, {state}>"
