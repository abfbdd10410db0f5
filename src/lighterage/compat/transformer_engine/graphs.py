"""`make_graphed_callables` with Transformer Engine's arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed

import lighterage
from lighterage.compat.transformer_engine.honesty import refuse, warn_not_honoured
from lighterage.compat.transformer_engine.quantized_regions import autocast
from lighterage.recipes import Recipe

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool

_ORDER = (
    "Wrap the modules in an nn.Sequential for each microbatch in flight, and call make_graphed_callables for each, so "
    "that they share no memory."
)


def make_graphed_callables(
    modules: Any,
    sample_args: Any,
    num_warmup_iters: int = 3,
    allow_unused_input: bool = False,
    sample_kwargs: Any = None,
    fp8_enabled: bool | tuple[bool, ...] | None = None,
    fp8_calibrating: bool | None = None,
    fp8_recipe: Recipe | None = None,
    fp8_group: torch.distributed.ProcessGroup | None = None,
    fp8_weight_caching: bool | None = None,
    enabled: bool | tuple[bool, ...] | None = None,
    calibrating: bool | None = None,
    recipe: Recipe | None = None,
    amax_reduction_group: torch.distributed.ProcessGroup | None = None,
    cache_quantized_params: bool | None = None,
    _order: list[int] | None = None,
    _num_layers_per_chunk: list[int] | None = None,
    pool: Pool | None = None,
    retain_graph_in_backward: bool = False,
    _reuse_graph_input_output_buffers: bool = False,
    pre_warmup_hook: Callable[[], object] | None = None,
    post_warmup_hook: Callable[[], object] | None = None,
) -> Any:
    """`lighterage.make_graphed_callables`, with modules captured inside of `autocast(enabled, recipe=recipe)`.

    Args:
        enabled, recipe: of the region, the same for all modules; also by their older names, `fp8_enabled` and
            `fp8_recipe`. Calls that run without graphs (eval, `no_grad`) quantize as the region says that they are in.
        calibrating, amax_reduction_group, cache_quantized_params, and their older names: warned of.
        sample_kwargs, _order, _num_layers_per_chunk, retain_graph_in_backward, _reuse_graph_input_output_buffers:
            refused; the message says what to do instead.
        The rest: as `lighterage.make_graphed_callables` has it.

    Raises: ValueError, TypeError: an argument that cannot be honoured, or does not fit. GraphError: see there.
    Warns: NotHonoured.
    """
    refuse(
        "make_graphed_callables",
        {
            "sample_kwargs": (None if _is_empty(sample_kwargs) else sample_kwargs, None, "Pass tensors by position."),
            "_order": (_order, None, _ORDER),
            "_num_layers_per_chunk": (_num_layers_per_chunk, None, _ORDER),
            "retain_graph_in_backward": (
                retain_graph_in_backward,
                False,
                "A backward graph uses up what forward saved: run each backward once.",
            ),
            "_reuse_graph_input_output_buffers": (_reuse_graph_input_output_buffers, False, _ORDER),
        },
    )
    inside = _one(enabled, fp8_enabled)
    if cache_quantized_params or fp8_weight_caching:
        warn_not_honoured(
            "cache_quantized_params=True", "weights are quantized in each forward, which is in the graph."
        )
    with autocast(
        inside,
        calibrating=bool(calibrating or fp8_calibrating),
        recipe=recipe if recipe is not None else fp8_recipe,
        amax_reduction_group=amax_reduction_group if amax_reduction_group is not None else fp8_group,
    ):
        return lighterage.make_graphed_callables(
            modules,
            sample_args,
            num_warmup_iters=num_warmup_iters,
            pre_warmup_hook=pre_warmup_hook,
            post_warmup_hook=post_warmup_hook,
            pool=pool,
            allow_unused_input=allow_unused_input,
        )


def _is_empty(sample_kwargs: Any) -> bool:
    """Whether they name nothing: None, a dict without names, or such for each module."""
    return not sample_kwargs or (isinstance(sample_kwargs, tuple | list) and not any(sample_kwargs))


def _one(enabled: bool | tuple[bool, ...] | None, older: bool | tuple[bool, ...] | None) -> bool:
    given = enabled if enabled is not None else older
    each = given if isinstance(given, tuple) else (bool(given),)
    if len(set(each)) > 1:
        raise ValueError(
            f"enabled={given!r} asks for some modules to quantize and some not. Call make_graphed_callables once for "
            "each kind, with the same pool, in the order in which they run."
        )
    return bool(each and each[0])
