"""The pack hooks that scopes push, and when a scope has to stand aside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

from ..unseen import unseen
from .sections import Section


class Unpackable(Protocol):
    """A handle, as far as autograd is concerned."""

    def unpack(self) -> torch.Tensor: ...


Pack = Callable[[torch.Tensor, Section], Unpackable]


class Recorder:
    """The pack hook of one section."""

    __slots__ = ("_pack", "_section")

    def __init__(self, pack: Pack, section: Section) -> None:
        self._pack = pack
        self._section = section

    @unseen
    def __call__(self, tensor: torch.Tensor) -> Unpackable:
        return self._pack(tensor, self._section)

    def hold(self, tensor: torch.Tensor) -> Unpackable:
        """Move a tensor that autograd has not saved."""
        return _held(self._pack, tensor, self._section)


def _held(pack: Pack, tensor: torch.Tensor, section: Section) -> Unpackable:
    """Pack what is to move whatever the plan or the policy says of the section."""
    section.begin()
    orders, reason = section.orders, section.keep_reason
    section.orders = section.keep_reason = None
    try:
        return pack(tensor, section)
    finally:
        section.orders, section.keep_reason = orders, reason


class _Entered(threading.local):
    def __init__(self) -> None:
        self.stack: list[Recorder | BetweenSections] = []


_entered = _Entered()


def enter(scope: Recorder | BetweenSections) -> None:
    """Count `scope` among those that the calling thread is inside of."""
    _entered.stack.append(scope)


def leave(scope: Recorder | BetweenSections) -> bool:
    """The calling thread is inside of `scope` no more; whether it was."""
    if scope not in _entered.stack:
        return False
    _entered.stack.remove(scope)
    return True


def pop_if_on_top(hooks: torch.autograd.graph.saved_tensors_hooks) -> None:
    """Take `hooks` off the calling thread's stack, if they are the ones that were pushed last."""
    top = _top()
    if top is not None and top[0] is hooks.pack_hook:
        hooks.__exit__()


class HooksPutBy(contextlib.AbstractContextManager[None]):
    """No saved-tensor hooks inside, whatever the calling thread has pushed."""

    __slots__ = ("_hooks",)

    def __init__(self) -> None:
        self._hooks: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        while (top := _top()) is not None:
            self._hooks.append(top)  # first, so that an interrupt between the two loses nothing
            torch._C._autograd._pop_saved_tensors_default_hooks()

    def __exit__(self, *_: object) -> None:
        self.put_back()

    def put_back(self) -> None:
        """Push the hooks again that were put by. Harmless when repeated."""
        while self._hooks:
            pack, unpack = self._hooks[-1]
            top = _top()
            if top is None or top[0] is not pack:
                torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)
            self._hooks.pop()


def _top() -> tuple[object, object] | None:
    # The stub leaves the None out that stands for an empty stack.
    return cast(tuple[object, object] | None, torch._C._autograd._top_saved_tensors_default_hooks(True))


def innermost() -> Recorder | BetweenSections | None:
    """The scope that the calling thread entered last and has not left; None where there is none."""
    return _entered.stack[-1] if _entered.stack else None


class _Gaps(Protocol):
    def open_gap(self, position: int) -> Section: ...

    def close_section(self, section: Section) -> None: ...

    def pack_of(self, section: Section) -> Pack: ...


class BetweenSections:
    """The pack hook of a module's forward around its sections: each stretch between two of them is a section too."""

    __slots__ = ("_gaps", "_pack", "_position", "_section")

    def __init__(self, gaps: _Gaps) -> None:
        self._pack: Pack | None = None
        self._gaps = gaps
        self._position = -1
        self._section: Section | None = None

    @unseen
    def __call__(self, tensor: torch.Tensor) -> Unpackable:
        if self._section is None:
            self._section = self._gaps.open_gap(self._position)
            self._pack = self._gaps.pack_of(self._section)
        assert self._pack is not None
        return self._pack(tensor, self._section)

    def hold(self, tensor: torch.Tensor) -> Unpackable:
        """Move a tensor that autograd has not saved."""
        if self._section is None:
            self._section = self._gaps.open_gap(self._position)
            self._pack = self._gaps.pack_of(self._section)
        assert self._pack is not None
        return _held(self._pack, tensor, self._section)

    @property
    def begun(self) -> bool:
        """Whether anything of it has happened: a section has begun, or something was saved."""
        return self._position >= 0 or self._section is not None

    def end_stretch(self, position: int | None = None) -> None:
        """A section begins here, the one at `position`; None: one that is not in the list, or the forward ends."""
        section, self._section = self._section, None
        if position is not None:
            self._position = position
        if section is not None:
            self._gaps.close_section(section)


def why_stand_aside() -> str | None:
    """Why saved-tensor hooks must not be pushed here, by this thread, now; or None."""
    if torch._C._current_graph_task_id() != -1:
        return "inside a running backward"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return "saved-tensor hooks are disabled"
    top = _top()
    if top is None or isinstance(top[0], Recorder | BetweenSections):
        return None
    module = getattr(top[0], "__module__", type(top[0]).__module__)
    return "inside torch.utils.checkpoint" if module == "torch.utils.checkpoint" else f"under hooks of {module}"
