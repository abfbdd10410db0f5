"""Runs a section so that backward computes it again, whole or all but its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ..scopes import Pack
from ..selective import Held, Hold, contexts
from .origins import PRODUCT_OPS
from .run import PlannedOrders
from .watches import StateWatch

Call = Callable[..., Any]


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
        # Nobody asked for products to be put by: the forward may write over them as it does without.
        options["context_fn"] = lambda: contexts(_Products(orders, pack), again_if_overwritten=lambda _: True)
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
        products = self._orders.course.recipe.products
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
