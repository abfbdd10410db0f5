"""The offloader: what a program holds of the engine, and may ask of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NoReturn, get_args

import torch
from torch import nn

from ..errors import OffloadError
from ..planner.plan import Plan
from ..planner.timeline import Timeline
from ..unseen import Unseen, unseen
from .hooks import Attachment
from .ledger import Ledger, OffloadStats
from .link import measure_link
from .modules import Residents, SectionModules
from .opening import Opener, SectionPlan
from .planned_device import planned_device
from .planning import Autoplan
from .policy import Policy
from .report import Report, build_report
from .rules import check_rules
from .sections import LiveSection, Section
from .steps import Steps
from .stores import Stores
from .traffic import Traffic

_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
"""Those of all offloaders."""


def _begin_anew() -> None:
    """In a forked child none of the threads is there that may have held a lock."""
    for lock in list(_locks):
        lock._at_fork_reinit()  # type: ignore[attr-defined]


os.register_at_fork(after_in_child=_begin_anew)


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
        _locks.add(self._lock)
        self._modules = SectionModules(modules)
        check_rules(policy, self._modules, stacklevel=3)
        self._residents = Residents(self._modules.all_modules)
        device = planned_device(policy, self._residents.accelerators, stacklevel=3)
        self._stores = Stores(policy, before_copies)
        self._ledger = Ledger()
        self._traffic = Traffic(self._lock, self._ledger, only_marked=policy.select == "marked")
        self._auto: Autoplan | None = None if policy.by_hand else self._make_autoplan(device)
        self._steps = Steps(
            self._lock,
            policy,
            self._modules,
            self._residents,
            self._stores,
            self._ledger,
            self._traffic,
            self._auto,
        )
        self._opener = Opener(self._lock, policy, self._modules, self._ledger, self._steps, self._auto)
        self._attachments: list[Attachment] = []
        try:
            self._attach()
            self._steps.packer.prepare()
        except BaseException:
            self.close()
            raise

    def _make_autoplan(self, device: torch.device) -> Autoplan:
        tier = self._policy.tier
        link = functools.partial(measure_link, device, tier, self._policy.disk_dir)
        stores, refusals = self._stores, self._ledger.refusals
        return Autoplan(
            self._policy,
            self._traffic,
            self._modules.module_of,
            device,
            link,
            lambda: stores.host_bytes_reserved + sum(refusals.values()),
            self._ledger.settle_waits,
        )

    def _attach(self) -> None:
        opener = self._opener
        for position, (name, module) in enumerate(self._modules.sections):
            self._attachments.append(Attachment(module, functools.partial(opener.around_module, name, position)))
        if self._modules.root is not None:
            self._attachments.append(Attachment(self._modules.root, opener.around_root))

    # --- sections -------------------------------------------------------------------------------------------------

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
        return Unseen(self._opener.scope(name, plan), f"offloader.section({name!r})")

    @property
    def sections(self) -> list[LiveSection]:
        """The live sections, in the order of forward: those of which something saved still waits for backward."""
        with self._lock:
            self._steps.tidy()
            return [LiveSection(section) for section in self._steps.live]

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
        if live is not None and live.owner is not self._steps:
            raise ValueError(f"section {section.name!r} belongs to another offloader. Call that one's method.")
        return live

    # --- plans ------------------------------------------------------------------------------------------------------

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

    # --- figures ----------------------------------------------------------------------------------------------------

    def stats(self, total: bool = False) -> OffloadStats:
        """Figures of the last finished step, or since the start; the sizes at rest are as they are now.

        A step ends when nothing saved in it is waiting for backward any more.
        """
        with self._lock:
            self._steps.tidy()
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
                order=self._steps.order,
                policy=self._policy,
                auto=self._auto,
                release_wait_ms=self._steps.release_wait_ms,
            )

    def close(self) -> None:
        """Detach from the modules, and give host memory and files back. Harmless when repeated.

        What was saved before stays usable: a backward that is still to come works, and its room is given back when the
        graph is gone.
        """
        with self._lock:
            for attachment in self._attachments:
                attachment.detach()
            self._attachments.clear()
            self._steps.close()

    @property
    def _closed(self) -> bool:
        return self._steps.closed

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
        state = "closed" if self._closed else f"{self._steps.num_live} live"
        return f"<lighterage.Offloader: {len(self._modules.sections)} sections, {state}>"
