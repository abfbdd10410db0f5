"""Opens sections: around the calls of modules, around what is saved between those, and around named code."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from types import TracebackType
from typing import Any, Literal

import torch

from ..errors import OffloadError
from .handles import unpack
from .hooks import Runner
from .ledger import Ledger
from .modules import SectionModules
from .planning import Autoplan
from .policy import Policy
from .resting import run_at_rest
from .scopes import BetweenSections, HooksPutBy, Pack, Recorder, enter, leave, pop_if_on_top, why_stand_aside
from .sections import KEEP_LAST, KEEP_SECTION, LiveSection, Section, SectionCall
from .steps import Steps

# Device memory is compared with what was saved in the first steps only: asking costs tens of microseconds.
WATCH_MEMORY_STEPS = 3


SectionPlan = Literal["policy", "manual", "keep"]
"""Who decides what moves of one section: the policy, calls of `evict` and `release`, or nobody: all of it stays."""


_NOTHING = contextlib.nullcontext()


class _Threads(threading.local):
    def __init__(self) -> None:
        self.between: list[BetweenSections] = []


class Opener:
    """Makes the scopes of an offloader's sections. Each does nothing, but count itself, where it has to stand aside."""

    def __init__(
        self,
        lock: threading.RLock,
        policy: Policy,
        modules: SectionModules,
        ledger: Ledger,
        steps: Steps,
        auto: Autoplan | None,
    ) -> None:
        self._lock = lock
        self._policy = policy
        self._modules = modules
        self._ledger = ledger
        self._steps = steps
        self._auto = auto
        self._pid = os.getpid()
        self._threads = _Threads()

    # --- scopes ---------------------------------------------------------------------------------------------------

    def around_module(
        self, name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> SectionScope:
        """The scope of one call of the module `name`, at `position` among the sections."""
        call = None if self._auto is None else SectionCall(args, kwargs, compiled)
        return SectionScope(self, name, position, "policy", call)

    def scope(self, name: str, plan: SectionPlan) -> SectionScope:
        """The scope of code that was given a name."""
        return SectionScope(self, name, None, plan, None)

    def around_root(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> RootScope:
        """The scope of one call of the module that all sections are inside of."""
        del args, kwargs, compiled
        return RootScope(self)

    def open_root(self) -> BetweenSections | None:
        """What packs the saves between sections in a call that begins now; None where it stands aside."""
        reason = self._why_stand_aside()
        if reason is not None:
            self._ledger.stood_aside[(self._modules.root_name, reason)] += 1
            return None
        if self._auto is not None:
            with self._lock:
                self._steps.tidy()
                self._steps.may_begin(self._threads.between)
        return BetweenSections(self)

    def enter_root(self, between: BetweenSections) -> None:
        """The calling thread is inside of the call."""
        self._threads.between.append(between)

    def leave_root(self, between: BetweenSections) -> None:
        """The calling thread is inside of the call no more. Harmless when repeated."""
        if between in self._threads.between:
            self._threads.between.remove(between)
        between.end_stretch()

    # --- standing aside -------------------------------------------------------------------------------------------

    def _why_stand_aside(self) -> str | None:
        if self._steps.closed:
            return "closed"
        if os.getpid() != self._pid:
            return "in a forked process"
        return why_stand_aside()

    def _stand_aside(self, name: str, position: int | None, reason: str) -> None:
        if self._steps.closed or os.getpid() != self._pid:
            return
        self._ledger.stood_aside[(name, reason)] += 1
        between = self._threads.between
        if between and torch._C._current_graph_task_id() == -1:
            between[-1].end_stretch(position)
            with self._lock:
                self._steps.pass_section()

    # --- sections -------------------------------------------------------------------------------------------------

    def open(
        self, name: str, position: int | None, plan: SectionPlan, call: SectionCall | None
    ) -> tuple[Section, contextlib.AbstractContextManager[object]] | None:
        """A section that begins now, and what its forward has to run in; None where it stands aside."""
        reason = self._why_stand_aside()
        if reason is not None:
            self._stand_aside(name, position, reason)
            return None
        between = self._threads.between
        if between:
            between[-1].end_stretch(position)
        keep_reason = None
        if plan == "policy":
            keep_reason = self._steps.why_kept(name, position)
        elif plan == "keep":
            keep_reason = KEEP_SECTION
        return self._open_section(name, keep_reason, by_hand=plan == "manual", call=call)

    def open_gap(self, position: int) -> Section:
        """A section for what is saved after the section at `position` has ended, up to the next one."""
        sections = self._modules.sections
        reason = None
        if self._auto is None:
            reason = KEEP_LAST if position + 1 >= len(sections) - self._policy.keep_last else None
            if position + 1 == len(sections):
                reason = "after the last section: backward begins with it"
        return self._open_section(self._modules.gap_name(position), reason, gap=True)[0]

    def _open_section(
        self,
        name: str,
        keep_reason: str | None,
        gap: bool = False,
        by_hand: bool = False,
        call: SectionCall | None = None,
    ) -> tuple[Section, contextlib.AbstractContextManager[object]]:
        """A section, and what its forward has to run in."""
        around: contextlib.AbstractContextManager[object] = _NOTHING
        with self._lock:
            self._steps.tidy()
            self._steps.may_begin(self._threads.between)
            section = Section(self._steps, name, keep_reason, gap, by_hand)
            self._steps.opened(section)
            if self._auto is not None:
                around = self._auto.events.opened(section, call, inside=self._steps.num_open > 1)
            return section, around

    def runner_of(self, section: Section, live: LiveSection, pack: Pack) -> Runner | None:
        """How the section's call is to be made; None: as ever."""
        if self._auto is None:
            return None
        if _rests(section):
            hidden = self._auto.events.cannot_rest
            return functools.partial(run_at_rest, live=live, begin=self._steps.begin, hidden=hidden)
        return self._auto.events.runner_of(section, pack)

    def pack_of(self, section: Section) -> Pack:
        """What packs the saves of `section`."""
        pack = self._steps.packer.pack
        return pack if self._auto is None else self._auto.events.pack_of(section, pack)

    def close_section(self, section: Section) -> None:
        """The section's forward, or a stretch between two sections, has ended."""
        self._steps.close_section(section)

    def abandon(self, section: Section) -> None:
        """An exception ended the section."""
        with self._lock:
            self._steps.abandon(section)

    # --- memory ---------------------------------------------------------------------------------------------------

    def device_bytes(self) -> int | None:
        """What is allocated on the devices now; None where no allocator tells, or where it is no longer asked."""
        if self._ledger.num_steps >= WATCH_MEMORY_STEPS:
            return None
        known = [t.device_bytes() for t in self._steps.packer.transports.values() if t is not None]
        return sum(b for b in known if b is not None) if known and None not in known else None

    def note_growth(self, section: Section, before: int) -> None:
        """A section has ended that began with `before` bytes on the devices: what it took beyond what it saved."""
        after = self.device_bytes()
        if after is not None:
            section.row.unseen_bytes = max(0, after - before - section.row.unique_bytes)


def _rests(section: Section) -> bool:
    return section.orders is not None and section.orders.resting


_Running = tuple[
    Section,
    contextlib.AbstractContextManager[object],
    Recorder,
    torch.autograd.graph.saved_tensors_hooks | HooksPutBy,
    int | None,
]


class SectionScope(contextlib.AbstractContextManager[LiveSection | None]):
    """Around what one section runs; entered once. Entering gives the section, or None where it stands aside.

    A class, not a generator: of what a section costs the host, the frames of nested context managers were a sixth.
    """

    __slots__ = ("_call", "_name", "_opener", "_plan", "_position", "running")

    def __init__(
        self, opener: Opener, name: str, position: int | None, plan: SectionPlan, call: SectionCall | None
    ) -> None:
        self._opener = opener
        self._name = name
        self._position = position
        self._plan = plan
        self._call = call
        self.running: _Running | None = None
        """What `drop` has to undo; None before and after."""

    def __enter__(self) -> LiveSection | None:
        opener = self._opener
        # What it was called with is not held while it runs.
        call, self._call = self._call, None
        opened = opener.open(self._name, self._position, self._plan, call)
        if opened is None:
            return None
        section, around = opened
        before = opener.device_bytes()
        live = LiveSection(section)
        pack = opener.pack_of(section)
        live.runner = opener.runner_of(section, live, pack)
        recorder = Recorder(pack, section)
        hooks = HooksPutBy() if _rests(section) else torch.autograd.graph.saved_tensors_hooks(recorder, unpack)
        self.running = section, around, recorder, hooks, before
        try:
            hooks.__enter__()
            enter(recorder)
            around.__enter__()
        except BaseException:
            self.drop()
            raise
        return live

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.running is None:
            return
        section, around, recorder, hooks, before = self.running
        try:
            around.__exit__(kind, error, traceback)
            if leave(recorder):
                hooks.__exit__()
            elif kind is None:
                raise OffloadError(
                    f"section {section.name!r} is left in another thread than it was entered in, whose saved-tensor "
                    "hooks cannot be taken off here. Enter and leave it in one thread."
                )
            if kind is None:
                if before is not None:
                    self._opener.note_growth(section, before)
                self._opener.close_section(section)
                self.running = None
        finally:
            if self.running is not None:
                self.drop()

    def drop(self) -> None:
        """End the section without copying anything more of it, whatever of its beginning and its end was done."""
        if self.running is None:
            return
        section, around, recorder, hooks, _ = self.running
        if (drop := getattr(around, "drop", None)) is not None:
            drop()
        if isinstance(hooks, HooksPutBy):
            hooks.put_back()
        else:
            pop_if_on_top(hooks)
        leave(recorder)
        self._opener.abandon(section)
        self.running = None  # whoever keeps this object keeps nothing of the section


class RootScope(contextlib.AbstractContextManager[None]):
    """Around one call of the module that all sections are inside of; entered once."""

    __slots__ = ("_opener", "running")

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self.running: tuple[BetweenSections, torch.autograd.graph.saved_tensors_hooks] | None = None
        """What `drop` has to undo; None before and after."""

    def __enter__(self) -> None:
        between = self._opener.open_root()
        if between is None:
            return
        hooks = torch.autograd.graph.saved_tensors_hooks(between, unpack)
        self.running = between, hooks
        try:
            self._opener.enter_root(between)
            enter(between)
            hooks.__enter__()
        except BaseException:
            self.drop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.running is None:
            return
        between, hooks = self.running
        try:
            if leave(between):
                hooks.__exit__()
        finally:
            self.drop()

    def drop(self) -> None:
        """End the call, whatever of its beginning and its end was done."""
        if self.running is None:
            return
        between, hooks = self.running
        pop_if_on_top(hooks)
        leave(between)
        self._opener.leave_root(between)
        self.running = None
