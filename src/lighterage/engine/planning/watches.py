"""Watches on a section's forward: what it changes, which products it computes, which of its modules run."""

from __future__ import annotations

import collections
import contextlib
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..views import emptied_alias
from .origins import PRODUCT_OPS
from .section_log import ProductLog, SectionLog


class StateWatch:
    """Tells whether what a forward starts from is still the same after it, and as its backward begins.

    It holds none of the inputs' memory.
    """

    def __init__(self, module: nn.Module, inputs: list[torch.Tensor]) -> None:
        self._module = module
        self._before = _state(module)
        # Wrappers and the like are watched by their handles alone.
        plain = [t for t in inputs if type(t) is torch.Tensor and t.layout is torch.strided and not t.is_inference()]
        self._inputs = [(emptied_alias(tensor), tensor._version) for tensor in plain]

    def change(self) -> str | None:
        """What the forward, which has just ended, has changed; or None."""
        found = self._difference()
        self._before = _state(self._module)
        self._inputs = [(alias, alias._version) for alias, _ in self._inputs]
        return None if found is None else f"its forward changes {found}"

    def change_since(self) -> str | None:
        """What has changed since `change` was asked; or None."""
        found = self._difference()
        return None if found is None else f"{found} changes between its forward and its backward"

    def _difference(self) -> str | None:
        if any(alias._version != version for alias, version in self._inputs):
            return "its input in place"
        after = _state(self._module)
        if len(after) != len(self._before):
            return "the set of its attributes"
        for before, now in zip(self._before, after, strict=True):
            found = _change_of(before, now)
            if found is not None:
                return found
        return None


# A section of some modules has hundreds of attributes, which are looked at three times in each step in which it is
# computed again: by lists of values, and not one by one.

_KINDS = "the parameter", "the buffer", "the attribute"
_Values = tuple[tuple[str, ...], list[Any], list[object]]
"""Names, values, and of each value that can change and remain the same object what tells that."""

_UNCHANGING = frozenset([bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size, types.FunctionType])
_SIZED = frozenset([dict, list, set, collections.OrderedDict])


def _state(module: nn.Module) -> list[tuple[_Values, _Values, _Values]]:
    """What each module that `module` is made of consists of: parameters, buffers, and other attributes."""
    return [(_tensors(part._parameters), _tensors(part._buffers), _attributes(vars(part))) for part in module.modules()]


def _tensors(named: Mapping[str, torch.Tensor | None]) -> _Values:
    return tuple(named), list(named.values()), [None if t is None else _version_of(t) for t in named.values()]


def _attributes(named: Mapping[str, Any]) -> _Values:
    values = list(named.values())
    kinds = list(map(type, values))
    if types.MethodType in kinds:
        values = [None if kind is types.MethodType else value for value, kind in zip(values, kinds, strict=True)]
    marks = [
        len(value) if kind in _SIZED else None if kind in _UNCHANGING else _mark_of(value)
        for value, kind in zip(values, kinds, strict=True)
    ]
    return tuple(named), values, marks


def _mark_of(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return _version_of(value)
    if isinstance(value, list | dict | set):
        return len(value)
    return bytes(value.get_state().numpy()) if isinstance(value, torch.Generator) else None


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what inference mode made counts nothing


def _change_of(before: tuple[_Values, _Values, _Values], now: tuple[_Values, _Values, _Values]) -> str | None:
    """What differs, for people; or None."""
    for kind, (names, values, marks), (names_now, values_now, marks_now) in zip(_KINDS, before, now, strict=True):
        if names != names_now:
            return "the set of its attributes"
        if marks == marks_now and all(map(operator.is_, values, values_now)):
            continue
        for place, name in enumerate(names):
            if values[place] is not values_now[place] or marks[place] != marks_now[place]:
                return f"{kind} {name}"
    return None


class ProductTeller(TorchDispatchMode):
    """Notes which products a section's forward computes, and whether it writes over one of them."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Under any other mode torch.compile gives up what runs inside, for good."""
        return True

    def __init__(self, log: SectionLog, num_saves: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log = log
        self._num_saves = num_saves
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = self._num_saves()
        if any(isinstance(value, torch.Generator) for value in kwargs.values()):
            self._log.not_recomputed = "it draws from a random generator of its own"
        out = func(*args, **kwargs)
        if func in PRODUCT_OPS:
            product = ProductLog(before)
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.numel():
                    product.take(tensor)
                    self._known.update(product.keys)
            self._log.products.append(product)
        elif self._known and not isinstance(func, HigherOrderOperator) and func._schema.is_mutable:
            for number, argument in enumerate(func._schema.arguments):
                info = argument.alias_info
                if info is None or not info.is_write:
                    continue
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                        self._log.overwritten |= tensor.untyped_storage()._cdata in self._known
        return out


class ModuleWatch(contextlib.AbstractContextManager[None]):
    """Keeps the names of the modules inside a section that run now."""

    def __init__(self, module: nn.Module, log: SectionLog) -> None:
        self._names = {id(part): name for name, part in module.named_modules() if name}
        self._log = log
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        hooks = nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: object) -> None:
        name = self._names.get(id(module))
        if name is not None:
            self._log.inside.append(name)

    def _leave(self, module: nn.Module, args: object, result: object) -> None:
        name = self._names.get(id(module))
        if name is not None and name in self._log.inside:
            self._log.inside.remove(name)

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._log.inside.clear()
