"""The packs of sections that are recorded or watched: their handles tell when they are read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..scopes import Pack, Unpackable
from ..sections import Section
from .section_log import READ_TWICE, SaveLog, SectionLog
from .step_log import StepLog


class MeasuringPack:
    """The pack of a section in a step that is measured."""

    __slots__ = ("_log", "_pack", "_section")

    def __init__(self, pack: Pack, log: StepLog, section: SectionLog) -> None:
        self._pack = pack
        self._log = log
        self._section = section

    def __call__(self, tensor: torch.Tensor, section: Section) -> Unpackable:
        section.row.last_kept = None
        handle = self._pack(tensor, section)
        read = self._log.saved(tensor, section, self._section, handle)
        return Measured(handle, self._log, self._section, read) if read else handle


class Measured:
    """A handle in a step that is measured: tells when it is read."""

    __slots__ = ("_handle", "_log", "_saves", "_section", "_task")

    def __init__(self, handle: Unpackable, log: StepLog, section: SectionLog, saves: list[SaveLog]) -> None:
        self._handle = handle
        self._log = log
        self._section = section
        self._saves = saves
        self._task = -1

    @property
    def inner(self) -> Unpackable:
        """The handle itself: reading that tells nothing."""
        return self._handle

    def unpack(self) -> torch.Tensor:
        task = torch._C._current_graph_task_id()
        if task == self._task and task != -1:
            self._section.not_recomputed = READ_TWICE
        self._task = task
        tensor = self._handle.unpack()
        self._log.used(self._saves)
        return tensor


class WatchingPack:
    """The pack of a section that may be computed again later, if its backward reads each saved tensor once."""

    __slots__ = ("_pack", "_twice")

    def __init__(self, pack: Pack, twice: Callable[[], None]) -> None:
        self._pack = pack
        self._twice = twice

    def __call__(self, tensor: torch.Tensor, section: Section) -> Unpackable:
        return Once(self._pack(tensor, section), self._twice)


class Once:
    """A handle of a section that may be computed again later: tells if it is read twice in one backward."""

    __slots__ = ("_handle", "_task", "_twice")

    def __init__(self, handle: Unpackable, twice: Callable[[], None]) -> None:
        self._handle = handle
        self._twice = twice
        self._task = -1

    def unpack(self) -> torch.Tensor:
        task = torch._C._current_graph_task_id()
        if task == self._task and task != -1:
            self._twice()
        self._task = task
        return self._handle.unpack()
