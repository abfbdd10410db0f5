"""Runs a section so that backward computes it again, whole or all but its products."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .measure import ProductLog, SectionLog
from .orders import PlannedOrders
from .origins import PRODUCT_OPS
from .sections import Section
from .selective import Held, Hold, contexts
from .views import emptied_alias

Call = Callable[..., Any]
Pack = Callable[[torch.Tensor, Section], Held]


def run_again_later(
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    orders: PlannedOrders,
    pack: Pack,
    name: str,
    module: nn.Module,
) -> Any:
    """Call `call`, and let backward call it again for what it did not save.

    What it was given is saved, and so comes to the section's own pack hook; in mode `"selective"` the products do too.

    Raises, in backward:
        RuntimeError: what the second run would start from is not what the first one started from.
    """
    leaves, spec = tree_flatten((args, kwargs))
    watch = StateWatch(module, [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    changed: list[str | None] = []

    def run(*given: Any) -> Any:
        again = bool(changed)
        if again:
            change = changed[0] or watch.change_since()
            if change is not None:
                raise RuntimeError(
                    f"section {name!r} is computed again in backward, and {change}: its gradients would not be those "
                    'of its forward. Leave that as it is until backward has run, or pass recompute="never".'
                )
        again_args, again_kwargs = tree_unflatten(list(given), spec)
        result = call(*again_args, **again_kwargs)
        if not again:
            changed.append(watch.change())
        return result

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if orders.mode == "selective":
        options["context_fn"] = lambda: contexts(_Products(orders, pack))
    return checkpoint(run, *leaves, **options)


class _Products:
    """Puts the products of one run of a section by, as the plan says."""

    def __init__(self, orders: PlannedOrders, pack: Pack) -> None:
        self._orders = orders
        self._pack = pack
        self._num = 0

    def __call__(self, op: Any, number: int, args: Any, kwargs: Any, out: Any) -> Hold | None:
        if op not in PRODUCT_OPS:
            return None
        products = self._orders.recipe.products
        save = products[self._num] if self._num < len(products) else 0
        self._num += 1
        if save is None:
            return None
        section = self._orders.section
        assert section is not None
        orders, pack = self._orders, self._pack

        def hold(tensor: torch.Tensor) -> Held:
            orders.called = save
            try:
                return pack(tensor, section)
            finally:
                orders.called = None

        return hold


# --- what may be computed again ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class SectionCall:
    """What a section's module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    compiled: bool
    """Whether the call is part of a program that is compiled."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that it is given, in the order in which a checkpoint saves them."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]


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
        if after.keys() != self._before.keys():
            return "the set of its attributes"
        for key, (was, version, size) in self._before.items():
            now, version_now, size_now = after[key]
            if now is not was or version_now != version or size_now != size:
                return key[1]
        return None


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # what inference mode made counts nothing


def _state(module: nn.Module) -> dict[tuple[int, str], tuple[object, int | None, int | None]]:
    state: dict[tuple[int, str], tuple[object, int | None, int | None]] = {}
    for part in module.modules():
        for kind, tensors in (("parameter", part._parameters), ("buffer", part._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    state[(id(part), f"the {kind} {name}")] = (tensor, _version_of(tensor), None)
        for name, value in vars(part).items():
            if name in ("_buffers", "_parameters", "_modules") or isinstance(value, types.MethodType):
                continue
            size = len(value) if isinstance(value, list | dict | set) else None
            if isinstance(value, torch.Generator):
                size = hash(bytes(value.get_state().numpy()))
            version = _version_of(value) if isinstance(value, torch.Tensor) else None
            state[(id(part), f"the attribute {name}")] = (value, version, size)
    return state


class ProductTeller(TorchDispatchMode):
    """Notes which products a section's forward computes, and whether it writes over one of them."""

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
        elif self._known and func._schema.is_mutable:
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
