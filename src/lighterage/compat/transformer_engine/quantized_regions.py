"""`autocast`: which recipe the modules of this package use, for the length of a `with`."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import torch
import torch.distributed
from torch import nn

from lighterage.compat.transformer_engine.honesty import warn_not_honoured
from lighterage.recipes import Recipe, check_recipe


class _Regions(threading.local):
    def __init__(self) -> None:
        self.recipes: list[Recipe | None] = []


_REGIONS = _Regions()
_HISTORY = "scales come from the tensor itself, and there is no history of earlier steps to {}."


class autocast(contextlib.ContextDecorator):
    """Modules of this package that run inside quantize as `recipe` says; outside of any region they do not quantize.

    Regions nest, the innermost counts, and each belongs to the thread that entered it. Only forward needs to be inside.
    What runs forward again in backward must be told the recipe too: `checkpoint(..., use_reentrant=False,
    context_fn=lambda: (contextlib.nullcontext(), autocast(recipe=recipe)))`.
    """

    def __init__(
        self,
        enabled: bool = True,
        calibrating: bool = False,
        recipe: Recipe | None = None,
        amax_reduction_group: torch.distributed.ProcessGroup | None = None,
        _graph: bool = False,
    ) -> None:
        """enabled: whether anything is quantized inside.

        recipe: one of `recipe`'s, or of `lighterage.recipes`.
        calibrating, amax_reduction_group, _graph: warned of. They are about delayed scaling's history.
        Raises: ValueError: enabled without a recipe. TypeError: something else than a recipe.
        """
        if enabled and recipe is None:
            raise ValueError(
                "autocast needs a recipe: which one is the default there depends on the card, and on most it is "
                "delayed scaling, which is not here. Pass autocast(recipe=Float8BlockScaling()), say."
            )
        if calibrating:
            warn_not_honoured("calibrating=True", _HISTORY.format("collect"))
        if amax_reduction_group is not None:
            warn_not_honoured("amax_reduction_group", _HISTORY.format("reduce"))
        if _graph:
            warn_not_honoured("_graph=True", _HISTORY.format("update"))
        self._recipe = check_recipe(recipe) if enabled else None

    def __enter__(self) -> autocast:
        _REGIONS.recipes.append(self._recipe)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _REGIONS.recipes.pop()


def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: torch.distributed.ProcessGroup | None = None,
    _graph: bool = False,
) -> autocast:
    """`autocast` by its older name and arguments."""
    return autocast(enabled, calibrating, fp8_recipe, fp8_group, _graph)


class RegionRecipe:
    """The recipe for one module's next forward, from the region that it runs in."""

    def __init__(self) -> None:
        self._was_quantized = False

    def now(self, module: nn.Module) -> Recipe | None:
        """The innermost region's recipe, or None.

        Raises: RuntimeError: backward runs this forward again, outside the region that it first ran in: it would give
            other values than the first time.
        """
        inside = bool(_REGIONS.recipes)
        recipe = _REGIONS.recipes[-1] if inside else None
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not inside and self._was_quantized:
            raise RuntimeError(
                f"{type(module).__name__} ran in an autocast region, and backward now runs it again outside of any: it "
                "would not quantize, and give other values. Enter the region inside the function that is checkpointed, "
                "or pass checkpoint(..., use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), "
                "autocast(recipe=recipe)))."
            )
        if not in_backward:
            self._was_quantized = recipe is not None
        return recipe
