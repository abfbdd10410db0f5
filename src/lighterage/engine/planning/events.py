"""What a section's events mean to its step: they are recorded, where it is measured, and the plan is carried out."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch
from torch import nn

from ..allocation import Allocation
from ..hooks import Runner, class_of
from ..lanes import Wait
from ..orders import Orders
from ..policy import Policy
from ..scopes import Pack
from ..sections import Section, SectionCall
from ..traffic import Traffic
from .derived import Stopwatch
from .proofs import Proof, ProvingPack
from .recompute import run_again_later
from .recording import MeasuringPack, WatchingPack
from .repeatable import Repeatable, why_never
from .room import Room
from .run import PlannedOrders, Run
from .section_log import MEASURED, Role, SectionLog
from .step_log import StepLog
from .tracing import DerivingPack, Tracer

NOTHING = contextlib.nullcontext()
"""What a forward runs in of which nothing is to be told. One serves all: it has no state."""


class Events:
    """The step under way. All methods are called with the offloader's lock held, but for the contexts they give."""

    def __init__(
        self,
        policy: Policy,
        traffic: Traffic,
        module_of: Callable[[str], nn.Module | None],
        device: torch.device,
        room: Room,
    ) -> None:
        self._policy = policy
        self._traffic = traffic
        self._module_of = module_of
        self._is_cuda = device.type == "cuda"
        self._room = room
        self._repeatable = Repeatable()
        self._log: StepLog | None = None
        self._run: Run | None = None
        self._first = self._trial = self._told_of_capture = False
        self._proofs: dict[object, Proof] = {}
        """By kinds of sections, whether what they derive is what they save."""
        self._restless: set[str] = set()
        """Sections that returned nothing by which backward could be seen."""

    # --- steps ------------------------------------------------------------------------------------------------------

    def step_begins(
        self, log: StepLog | None = None, run: Run | None = None, *, first: bool = False, trial: bool = False
    ) -> None:
        """A step begins that is recorded in `log`, if anywhere, and has the plan of `run`, if there is one.

        Args:
            first: whether it is asked, too, what can be computed again.
            trial: whether `run` tries what computing again costs; what it does not name may then move.
        """
        self._log, self._run, self._first, self._trial = log, run, first, trial
        self._proofs = {}
        self._repeatable.step_begins()

    def captured(self) -> None:
        """A graph is captured: warns, once, that nothing is planned for it."""
        if not self._told_of_capture:
            self._told_of_capture = True
            warnings.warn(
                "a graph is captured under an offloader that plans from what it measures, and in a capture nothing can "
                "be measured: every section moves, without budgets, rules or computing again. Name keep_last, "
                "release_after or prefetch_ahead to say what moves.",
                stacklevel=3,
            )

    def step_ended(self) -> tuple[StepLog | None, Run | None]:
        """What the step saved is gone; its log and its run."""
        log, self._log = self._log, None
        run, self._run = self._run, None
        self._repeatable.step_ended(log)
        return log, run

    # --- sections ---------------------------------------------------------------------------------------------------

    def opened(
        self, section: Section, call: SectionCall | None, *, inside: bool
    ) -> contextlib.AbstractContextManager[object]:
        """A section begins: gives it its orders. The context is for its forward.

        `inside`: whether another section is open.
        """
        if self._is_cuda and torch.cuda.is_current_stream_capturing():
            self.abandoned()
            self._run = None
            return NOTHING
        log = self._log
        around: contextlib.AbstractContextManager[object] = NOTHING
        if _is_asked_for(section):
            orders = section.orders = self._orders(section)
            if isinstance(orders, PlannedOrders):  # see Note [Sections at rest]
                may = orders.course.at_rest is not None and not inside
                orders.resting = may and self._may_rest(section, call)
                if orders.resting and self._run is not None:
                    self._carry_out(*self._run.approached(orders.course.index))
            if isinstance(orders, PlannedOrders) and orders.mode != "save":
                module = self._module_of(section.name)
                if not orders.course.derived:
                    around = self._repeatable.check(orders, section.name, module, call)
                elif why_never(module, call) is not None:
                    orders.mode = "save"
                else:
                    around = orders.tracer = Tracer()
        if log is None:
            return around
        one = section.log = SectionLog(section.name, section.gap, section.row)
        log.entered(one)
        log.called_with(() if call is None else call.tensors)
        if not self._first or section.gap:
            return around
        module = self._module_of(section.name)
        one.kind = class_of(module)
        may = self._policy.may_compute_again(section.name)
        one.not_recomputed = why_never(module, call) if may else 'recompute="never"'
        if module is None or call is None:
            return around
        for position, tensor in enumerate(call.tensors):
            if tensor.layout is torch.strided and type(tensor) is torch.Tensor:
                one.input_keys.setdefault(tensor.untyped_storage()._cdata, position)
        tracer: Tracer | None = None
        if one.not_recomputed is None:
            tracer = Tracer()
            proof = one.proof = self._proofs.setdefault(one.kind, Proof(self._room.has))
            one.prover = lambda pack: ProvingPack(pack, tracer, one, proof)
        return self._repeatable.told(
            one,
            module,
            call,
            lambda: section.row.saves,
            with_modules=bool(self._policy.rules) and not call.compiled,
            tracer=tracer,
        )

    def _may_rest(self, section: Section, call: SectionCall | None) -> bool:
        """Whether a section of which nothing leaves may run without hooks: see Note [Sections at rest]."""
        if call is None or call.compiled or not torch.is_grad_enabled():
            return False
        return (self._log is None or not self._log.detailed) and section.name not in self._restless

    def cannot_rest(self, section: Section) -> None:
        """A section that rests returned nothing by which backward could be seen."""
        self._restless.add(section.name)

    def _orders(self, section: Section) -> Orders | None:
        run = self._run
        if run is None:
            return Orders(MEASURED) if self._room.for_one_more(self._log) else None
        orders = run.orders_for(section)
        if orders is None:
            stays = self._room.for_one_more(self._log)
            return Orders("its step is not the one that was planned for") if stays else None
        if self._trial and orders.mode == "save":
            # Little room is for those that are tried.
            moves = orders.course.at_rest is None and self._room.is_limited
            if moves or not self._room.for_one_more(self._log):
                return None
        return orders

    def pack_of(self, section: Section, pack: Pack) -> Pack:
        """What packs the saves of `section`: `pack`, or one that records or watches what becomes of them."""
        log = self._log
        one, orders = section.log, section.orders
        if isinstance(one, SectionLog) and log is not None and log.detailed:
            pack = MeasuringPack(pack, log, one)
            if one.prover is not None:
                pack = one.prover(pack)
                one.prover = None  # it holds what was saved, and is the forward's alone
        elif isinstance(orders, PlannedOrders) and orders.read_twice is not None:
            return WatchingPack(pack, orders.read_twice)
        if isinstance(orders, PlannedOrders) and orders.tracer is not None:
            stopwatch: Stopwatch | None = None
            if self._trial and isinstance(one, SectionLog) and log is not None:
                stopwatch = one.stopwatch = Stopwatch(log.clock)
            pack = DerivingPack(pack, orders.tracer, orders.course.derived, stopwatch)
            orders.tracer = None
        return pack

    def runner_of(self, section: Section, pack: Pack) -> Runner | None:
        """How the section's module is to be called, where it is computed again in backward; None: as ever."""
        orders = section.orders
        if not isinstance(orders, PlannedOrders) or orders.mode == "save" or orders.derives:
            return None
        module = self._module_of(section.name)
        assert module is not None, "only a module is computed again"
        return functools.partial(run_again_later, orders=orders, pack=pack, name=section.name, module=module)

    def abandoned(self) -> None:
        """An exception ended a section: the step tells nothing."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def first_save(self, section: Section) -> None:
        """A section has saved something, so that it has its place in the step."""
        if isinstance(section.log, SectionLog) and self._log is not None:
            section.log.index = section.index
            self._log.sections.append(section.log)
        orders = section.orders
        if isinstance(orders, PlannedOrders) and self._run is not None:
            self._carry_out(*self._run.begins("forward", orders.course.index))
        elif self._run is not None and _is_asked_for(section):
            self._run.unplanned += 1

    def left(self, section: Section) -> None:
        """A section's forward has ended."""
        orders, run = section.orders, self._run
        if isinstance(section.log, SectionLog) and self._log is not None:
            section.log.role, section.log.num_moved = _role(section), _num_moved(section)
            self._log.left(section.log)
            self._log.settle_marks(
                section.log, self._policy.select == "marked", "it is moved by hand" if section.by_hand else None
            )
        if isinstance(orders, PlannedOrders) and run is not None:
            if section.index is None:
                run.taken_back(section)
            else:
                at_rest = orders.course.at_rest
                if orders.resting and at_rest is not None and not section.row.saves:
                    section.row.note_at_rest(*at_rest)
                self._carry_out(*run.forward_ended(orders.course.index))
        elif run is not None and section.index is None and _is_asked_for(section):
            run.taken_back(section)

    def visited(self, section: Section) -> None:
        """Backward has come to a section."""
        log = section.log if isinstance(section.log, SectionLog) else None
        self._repeatable.visited(section.orders, log)
        if log is not None and self._log is not None:
            orders = section.orders
            self._log.visited(log, orders.course.again_bytes if isinstance(orders, PlannedOrders) else 0)
        if isinstance(section.orders, PlannedOrders) and self._run is not None:
            self._carry_out(*self._run.begins("backward", section.orders.course.index))

    def _carry_out(self, release: list[tuple[PlannedOrders, list[int]]], back: list[Allocation]) -> None:
        if release:
            try:
                for orders, saves in release:
                    section = orders.section
                    if section is not None:
                        self._traffic.release_some(section, orders.allocations(saves))
            finally:
                if back:
                    self._traffic.fetch(back)
        elif back:
            self._traffic.fetch(back)

    def waited(self, wait: Wait) -> None:
        """The compute stream was made to wait for a copy out."""
        if self._log is not None:
            self._log.waited(wait)

    @property
    def measures(self) -> bool:
        """Whether what this step shows is taken for what a step is."""
        return self._log is not None and self._run is None

    def reloaded(self) -> None:
        """What a section saved, and was away, is on its way back as its backward begins."""
        if self._log is not None:
            self._log.settle_live()


def _role(section: Section) -> Role:
    orders = section.orders
    if isinstance(orders, PlannedOrders):
        if orders.resting:
            return "bare"
        if orders.mode != "save":
            return "selective" if orders.mode == "selective" else "again"
    return "moved" if section.allocations else "hooked"


def _num_moved(section: Section) -> int:
    """How many of its allocations leave that no section before it saved."""
    return sum(allocation.saved_at[0][0] == section.name for allocation in section.live_allocations())


def _is_asked_for(section: Section) -> bool:
    """Whether a plan is asked what becomes of `section`."""
    return not section.by_hand and section.keep_reason is None
