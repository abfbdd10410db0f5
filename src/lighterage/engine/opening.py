"""Opens sections: around the calls of modules, around what is saved between those, and around named code."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, Literal

import torch

from .handles import unpack
from .ledger import Ledger
from .modules import SectionModules
from .planning import Autoplan
from .policy import Policy
from .scopes import BetweenSections, Pack, Recorder, entered, why_stand_aside
from .sections import KEEP_LAST, KEEP_SECTION, LiveSection, Section, SectionCall
from .steps import Steps

# Device memory is compared with what was saved in the first steps only: asking costs tens of microseconds.
WATCH_MEMORY_STEPS = 3


SectionPlan = Literal["policy", "manual", "keep"]
"""Who decides what moves of one section: the policy, calls of `evict` and `release`, or nobody: all of it stays."""


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
    ) -> contextlib.AbstractContextManager[LiveSection | None]:
        """The scope of one call of the module `name`, at `position` among the sections."""
        return self.scope(name, position, "policy", SectionCall(args, kwargs, compiled))

    @contextlib.contextmanager
    def scope(
        self,
        name: str,
        position: int | None,
        plan: SectionPlan = "policy",
        call: SectionCall | None = None,
    ) -> Iterator[LiveSection | None]:
        """The scope of a section; entering gives the section, or None where it stands aside."""
        reason = self._why_stand_aside()
        if reason is not None:
            self._stand_aside(name, position, reason)
            yield None
            return
        if self._threads.between:
            self._threads.between[-1].end_stretch(position)
        keep_reason = (
            KEEP_SECTION if plan == "keep" else self._steps.why_kept(name, position) if plan == "policy" else None
        )
        section, around = self._open_section(name, keep_reason, by_hand=plan == "manual", call=call)
        del call
        before = self._device_bytes()
        live = LiveSection(section)
        pack = self.pack_of(section)
        if self._auto is not None:
            live.runner = self._auto.events.runner_of(section, pack)
        recorder = Recorder(pack, section)
        try:
            with torch.autograd.graph.saved_tensors_hooks(recorder, unpack), entered(recorder), around:
                yield live
        except BaseException:
            with self._lock:
                self._steps.abandon(section)
            raise
        self._note_growth(section, before)
        self._steps.close_section(section)

    @contextlib.contextmanager
    def around_root(self, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> Iterator[None]:
        """The scope of one call of the module that all sections are inside of."""
        del args, kwargs, compiled
        reason = self._why_stand_aside()
        if reason is not None:
            self._ledger.stood_aside[(self._modules.root_name, reason)] += 1
            yield
            return
        if self._auto is not None:
            with self._lock:
                self._steps.tidy()
                self._steps.may_begin(self._threads.between)
        between = BetweenSections(self)
        self._threads.between.append(between)
        try:
            with torch.autograd.graph.saved_tensors_hooks(between, unpack), entered(between):
                yield
        finally:
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
        around: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        with self._lock:
            self._steps.tidy()
            self._steps.may_begin(self._threads.between)
            self._steps.opened()
            section = Section(self._steps, name, keep_reason, gap, by_hand)
            if self._auto is not None:
                around = self._auto.events.opened(section, call)
            return section, around

    def pack_of(self, section: Section) -> Pack:
        """What packs the saves of `section`."""
        pack = self._steps.packer.pack
        return pack if self._auto is None else self._auto.events.pack_of(section, pack)

    def close_section(self, section: Section) -> None:
        """A stretch between two sections has ended."""
        self._steps.close_section(section)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _device_bytes(self) -> int | None:
        if self._ledger.num_steps >= WATCH_MEMORY_STEPS:
            return None
        known = [t.device_bytes() for t in self._steps.packer.transports.values() if t is not None]
        return sum(b for b in known if b is not None) if known and None not in known else None

    def _note_growth(self, section: Section, before: int | None) -> None:
        after = None if before is None else self._device_bytes()
        if before is not None and after is not None:
            section.row.unseen_bytes = max(0, after - before - section.row.unique_bytes)
