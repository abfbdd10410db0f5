"""Which sections may be computed again: only those of which a whole step has shown that nothing speaks against it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..sections import SectionCall
from .run import PlannedOrders
from .section_log import READ_TWICE, SectionLog, StateKey
from .step_log import StepLog
from .tracing import Tracer
from .watches import ModuleWatch, ProductTeller, StateWatch


def why_never(module: nn.Module | None, call: SectionCall | None) -> str | None:
    """Why a section must not be computed again, as far as can be told before it runs; or None."""
    if module is None or call is None:
        return "it is named in code, not a module"
    if not call.tensors:
        return "it is given no tensor"
    if call.compiled:
        return "it is compiled"
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return f"forward hooks of {type(part).__name__} would run twice"
        if getattr(part, "_compiled_call_impl", None) is not None or type(part).__name__ == "OptimizedModule":
            return "it is compiled"
        if isinstance(part, torch.jit.ScriptModule):
            return "it is scripted"
    return None


class Repeatable:
    """What steps have shown of their sections. Called with the offloader's lock held, but for the contexts it gives."""

    def __init__(self) -> None:
        self._seen: dict[StateKey, str | None] = {}
        """Why each section must not be computed again, or None where it may."""
        self._now: dict[StateKey, str | None] = {}
        """The same, as far as the step under way has shown it."""
        self.backward_came = False
        """Whether the step under way has come to its backward."""

    def step_begins(self) -> None:
        """Forget what a step showed that came to nothing."""
        self._now.clear()
        self.backward_came = False

    def step_ended(self, log: StepLog | None) -> None:
        """What the step has shown holds from now on, if it was a whole one."""
        for section in log.sections if log is not None else ():
            if section.key is not None and section.not_recomputed is not None:
                self._now[section.key] = section.not_recomputed
        if self.backward_came:
            self._seen.update(self._now)
        self._now.clear()

    def check(
        self, orders: PlannedOrders, name: str, module: nn.Module | None, call: SectionCall | None
    ) -> contextlib.AbstractContextManager[object]:
        """Have a section save all, unless it is known to be repeatable. The context is for its forward."""
        mode, orders.mode = orders.mode, "save"
        if module is None or call is None or why_never(module, call) is not None:
            return contextlib.nullcontext()
        key = _state_key(name, module)
        if key not in self._seen:
            orders.read_twice = functools.partial(self._now.__setitem__, key, READ_TWICE)
            watch = StateWatch(module, call.tensors)
            orders.watch = lambda: self._note(key, watch.change_since())
            return self._watched(watch, key, None)
        if self._seen[key] is None:
            orders.mode = mode
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def told(
        self,
        log: SectionLog,
        module: nn.Module,
        call: SectionCall,
        num_saves: Callable[[], int],
        *,
        with_modules: bool,
        tracer: Tracer | None,
    ) -> Iterator[None]:
        """Around a forward: tells `log` what it computes, whether it is repeatable, and which modules save what."""
        with contextlib.ExitStack() as around:
            if log.not_recomputed is None:
                log.key = _state_key(log.name, module)
                self._seen.pop(log.key, None)
                watch = StateWatch(module, call.tensors)
                log.watch = watch.change_since
                around.enter_context(self._watched(watch, log.key, log))
                around.enter_context(ProductTeller(log, num_saves))
            if tracer is not None:
                around.enter_context(tracer)
            if with_modules:
                around.enter_context(ModuleWatch(module, log))
            yield

    @contextlib.contextmanager
    def _watched(self, watch: StateWatch, key: StateKey, log: SectionLog | None) -> Iterator[None]:
        yield
        change = watch.change()
        self._note(key, change)
        if log is not None:
            log.not_recomputed = log.not_recomputed or change

    def _note(self, key: StateKey, change: str | None) -> None:
        # A section may run several times in a step: one that speaks against it is enough.
        self._now[key] = self._now.get(key) or change

    def visited(self, orders: object, log: SectionLog | None) -> None:
        """Backward has come to a section: is all still there that its forward started from?"""
        self.backward_came = True
        if log is not None and log.watch is not None:
            log.not_recomputed = log.not_recomputed or log.watch()
            log.watch = None
        if isinstance(orders, PlannedOrders) and orders.watch is not None:
            orders.watch()
            orders.watch = None


def _state_key(name: str, module: nn.Module) -> StateKey:
    # What a forward changes depends on which of its modules train.
    return name, tuple(part.training for part in module.modules())
