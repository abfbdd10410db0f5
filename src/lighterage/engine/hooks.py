"""Attaches to an nn.Module: every call of it runs inside a scope, however the call ends."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._C._dynamo import eval_frame

from ..unseen import see_through, unseen

# Note [Why the class is swapped]
# PyTorch's forward hooks with always_call run on Exception alone: a KeyboardInterrupt would leave saved-tensor hooks
# pushed. Replacing `module.forward` would follow the instance dict into DataParallel's replicas and call the original.
# So the instance gets a subclass of its own class, as fully_shard and parametrize do, whose __call__ wraps the scope in
# try/finally. The name, the state dict, isinstance and all hooks are as before; copies and pickles name the original
# class, and are free of the scope.

# Whoever writes on a module's class (`type(self).calls += 1`) means the class that was written down; so the swapped one
# hands such writes on. `__init_subclass__` of the original runs once for each attached module.

# Note [What torch.compile sees of a scope]
# The frame of the new __call__ is skipped, and so is all that opens and closes the scope; what the module itself does
# is compiled as it was, under the scope's hooks. Inside a compiled model the call is a graph break. The name is that of
# nn.Module's own __call__: torch.compile(layer) wraps any other skipped function into a frame that it then tries to
# capture, and with fullgraph=True cannot.

Call = Callable[..., Any]
Runner = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call in its own way: `runner(call, args, kwargs)`."""

Scope = Callable[[tuple[Any, ...], dict[str, Any], bool], AbstractContextManager[object]]
"""Makes the scope of a call with these arguments, and whether it is part of a compiled program. What entering it gives
may have a `runner`."""


class Attachment:
    """The scope around one module's calls."""

    def __init__(self, module: nn.Module, scope: Scope) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"a TorchScript module runs outside Python, so its saved tensors cannot be told apart; got "
                f"{type(module).__name__}. Pass the nn.Module that it was made from."
            )
        self._module = weakref.ref(module)
        self._scope: Scope | None = scope
        if any(a._scope is not None for kind in type(module).__mro__ if (a := _attachment_of(kind)) is not None):
            warnings.warn(
                f"this {type(module).__name__} belongs to another offloader already. That one, being inside, gets what "
                "the module saves, and this one nothing, until the other is closed. Close one of them.",
                stacklevel=5,
            )
        try:
            self._class = _subclass(type(module), self)
            module.__class__ = self._class
        except Exception as error:
            raise TypeError(
                f"the calls of a {type(module).__name__} cannot be wrapped, since its class does not let itself be "
                f"replaced by a subclass ({type(error).__name__}: {error}). Wrap the code that calls it in "
                "`with offloader.section(name):` instead."
            ) from error

    @property
    def module(self) -> nn.Module | None:
        return self._module()

    def covers(self, module: nn.Module) -> bool:
        return self._scope is not None and (module is self._module() or getattr(module, "_is_replica", False))

    @unseen
    def scope_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> AbstractContextManager[object] | None:
        """The scope of a call, not entered yet; None where another thread has detached this meanwhile."""
        scope = self._scope
        return None if scope is None else scope(args, kwargs, compiled)

    @staticmethod
    @unseen
    def enter(scope: AbstractContextManager[object]) -> Runner | None:
        return getattr(scope.__enter__(), "runner", None)

    @staticmethod
    @unseen
    def leave(scope: AbstractContextManager[object], error: BaseException | None) -> None:
        scope.__exit__(None if error is None else type(error), error, None if error is None else error.__traceback__)

    @staticmethod
    @unseen
    def drop(scope: AbstractContextManager[object]) -> None:
        """Undo what an interrupt has left of a scope: it may come before `enter` returns, or before `leave` begins."""
        if getattr(scope, "running", None) is not None:
            scope.drop()  # type: ignore[attr-defined]

    def detach(self) -> None:
        """Give the module its class back. Where another library has swapped the class since, this one turns inert."""
        self._scope = None
        module = self._module()
        while module is not None:
            attachment = type(module).__dict__.get("_lighterage_attachment")
            if attachment is None or attachment._scope is not None:
                return
            module.__class__ = type(module).__mro__[1]


def _attachment_of(kind: type) -> Attachment | None:
    return vars(kind).get("_lighterage_attachment")


class _Transparent(type):
    """The metaclass of a swapped class: what is written on it goes to the class that the module's author knows.

    Classes derived from it since, as parametrizations do, are none of its business.
    """

    def __setattr__(cls, name: str, value: object) -> None:
        if _attachment_of(cls) is None:
            super().__setattr__(name, value)
        else:
            setattr(cls.__mro__[1], name, value)

    def __delattr__(cls, name: str) -> None:
        if _attachment_of(cls) is not None:
            raise TypeError(
                f"{name!r} cannot be taken from the class of a {cls.__name__} while an offloader is attached to it. "
                "Close the offloader, change the layer (remove its parametrization, say), and call lighterage.offload "
                "again."
            )
        super().__delattr__(name)


_METACLASSES: dict[type, type] = {type: _Transparent}


def _transparent(metaclass: type) -> type:
    """`_Transparent` for classes whose own metaclass is `metaclass`."""
    if issubclass(metaclass, _Transparent):  # that of another offloader's class
        return metaclass
    if metaclass not in _METACLASSES:
        _METACLASSES[metaclass] = type("_Transparent", (_Transparent, metaclass), {})
    return _METACLASSES[metaclass]


def class_of(module: nn.Module | None) -> type | None:
    """The class of `module` as its author knows it."""
    kind = type(module)
    while "_lighterage_attachment" in vars(kind):
        kind = kind.__mro__[1]
    return None if module is None else kind


def _subclass(base: type[nn.Module], attachment: Attachment) -> type[nn.Module]:
    # See Note [What torch.compile sees of a scope].
    @see_through
    def _wrapped_call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not attachment.covers(self):
            return base.__call__(self, *args, **kwargs)
        # Only in this frame, which is skipped by itself, it can be told whether what it calls is to be compiled.
        scope = attachment.scope_of(args, kwargs, eval_frame.get_eval_frame_callback() is not None)
        if scope is None:
            return base.__call__(self, *args, **kwargs)
        try:
            try:
                runner = attachment.enter(scope)
                if runner is None:
                    result = base.__call__(self, *args, **kwargs)
                else:
                    result = runner(functools.partial(base.__call__, self), args, kwargs)
            except BaseException as error:
                attachment.leave(scope, error)
                raise
            attachment.leave(scope, None)
        finally:
            attachment.drop(scope)
        return result

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        make, arguments, *state = reduced
        arguments = tuple(base if argument is type(self) else argument for argument in arguments)
        if getattr(make, "__name__", "") in ("__newobj__", "__newobj_ex__"):
            # A function of this name pickle holds to the object's own class, which is not the one that is wanted.
            make, arguments = functools.partial(make, *arguments), ()
        return (make, arguments, *state)

    swapped: type[nn.Module] = _transparent(type(base))(
        base.__name__,
        (base,),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__call__": _wrapped_call_impl,
            "__reduce_ex__": reduce_ex,
            "_lighterage_attachment": attachment,
        },
    )
    return swapped
