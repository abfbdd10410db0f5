"""`get_cpu_offload_context`: Transformer Engine's arguments, as a policy of the engine."""

from __future__ import annotations

import dataclasses
import os
import warnings
from typing import Any, Literal, TypeVar

import torch
from torch import nn

import lighterage
from lighterage import Policy
from lighterage.compat.transformer_engine.context import CpuOffloadContext, DisabledContext
from lighterage.compat.transformer_engine.honesty import warn_not_honoured
from lighterage.compat.transformer_engine.manual import ManualOffloadSynchronizer

CodePath = Literal["v1", "v2"]
V1_VARIABLE = "NVTE_CPU_OFFLOAD_V1"

T = TypeVar("T")


def get_cpu_offload_context(
    enabled: bool = False,
    num_layers: int | None = 1,
    model_layers: int = 1,
    offload_activations: bool = True,
    offload_weights: bool = False,
    double_buffering: bool = False,
    manual_synchronization: bool = False,
    retain_pinned_cpu_buffers: bool = False,
    offload_stream: torch.Stream | None = None,
    *,
    code_path: CodePath | None = None,
    policy: Policy | None = None,
) -> tuple[Any, ...]:
    """A context to run each layer in, and a function to pass each layer's output through.

        context, sync_function = get_cpu_offload_context(enabled=True, num_layers=3, model_layers=12)
        for layer in layers:
            with context:
                x = layer(x)
            x = sync_function(x)

    Args:
        enabled: if not, the context does nothing; it has the same methods, and None for its offloader.
        num_layers: how many layers, from the first on, have their saved tensors moved. By hand it
            means nothing, there as here: the layers move that `start_offload_layer` is called for.
        model_layers: how many layers run under the context in one forward. Running more or fewer is allowed: see
            Note [Which layer this is].
        offload_activations: False, with `offload_weights`, moves nothing.
        offload_weights: warned of; no weight ever moves.
        double_buffering: warned of; there is nothing to double.
        manual_synchronization: return a controller too, and leave the schedule to it.
        retain_pinned_cpu_buffers: True or False, host memory is kept for the next step, in blocks of any shape.
        offload_stream: warned of; the engine has a stream of its own for each direction.
        code_path: "v2", opt-out: all moves but what is marked `mark_not_offload`. "v1", opt-in: only what is marked
            `mark_activation_offload`. None: "v1" if the environment variable NVTE_CPU_OFFLOAD_V1 is "1" now, otherwise
            "v2". `mark_not_offload` holds on both.
        policy: of the engine: tier, budget and the like. `select`, `keep_last`, `release_after` and `prefetch_ahead`
            follow from the other arguments.

    By default at most `model_layers - num_layers` layers' saved tensors are on the device in forward, as there, and as
    many come back ahead of backward. On "v1" each layer is let go of one layer later, and comes back two layers ahead.

    Returns: `(context, sync_function)`, with `manual_synchronization` `(context, sync_function, controller)`; the
        controller is None if nothing is to be moved. `sync_function` gives back what it is given: the engine sees by
        itself where backward is.
    Raises: ValueError, TypeError: naming the argument.
    Warns: NotHonoured: for an argument that has no effect, with the reason.
    """
    _check_switches(
        enabled=enabled,
        offload_activations=offload_activations,
        offload_weights=offload_weights,
        double_buffering=double_buffering,
        manual_synchronization=manual_synchronization,
        retain_pinned_cpu_buffers=retain_pinned_cpu_buffers,
    )
    _check_counts(num_layers, model_layers, none_will_do=manual_synchronization or not enabled)
    path = code_path if code_path is not None else "v1" if os.environ.get(V1_VARIABLE, "0") == "1" else "v2"
    if path not in ("v1", "v2"):
        raise ValueError(f'code_path is "v1" (opt-in), "v2" (opt-out) or None (as {V1_VARIABLE} says); got {path!r}.')
    if enabled and not offload_weights and not offload_activations:
        raise ValueError("offload is enabled with nothing to offload. Pass offload_activations=True, or enabled=False.")
    if enabled and offload_weights:
        warn_not_honoured(
            "offload_weights=True",
            "weights are used in every step, and stay on the device."
            + ("" if offload_activations else " With offload_activations=False nothing moves at all."),
        )
    if not enabled or not offload_activations:
        nothing = DisabledContext(model_layers), sync_function
        return (*nothing, None) if manual_synchronization else nothing
    if double_buffering:
        warn_not_honoured(
            "double_buffering=True", "each allocation comes back into memory of its own, as early as there is room."
        )
    if offload_stream is not None:
        if not manual_synchronization:
            raise ValueError(
                "offload_stream goes with manual_synchronization=True. Leave it out: without, streams are the engine's."
            )
        warn_not_honoured(
            f"offload_stream={offload_stream!r}",
            "the engine copies on two streams of its own, one for each direction. Waiting for this one waits for no "
            "copy, and nothing needs it: release_activation_forward_gpu_memory orders memory after its copies, and "
            "backward waits for what it reads.",
        )
    if not manual_synchronization:
        _warn_of_few_on_device(num_layers, model_layers)
    num_offloaded = 0 if num_layers is None else num_layers
    chosen = _policy(policy, path, model_layers - num_offloaded, manual_synchronization)
    offloader = lighterage.offload([_Somewhere()], chosen)
    controller = ManualOffloadSynchronizer(offloader, model_layers) if manual_synchronization else None
    context = CpuOffloadContext(offloader, num_layers=model_layers, num_offloaded=num_offloaded, controller=controller)
    return (context, sync_function) if controller is None else (context, sync_function, controller)


def sync_function(tensor: T) -> T:
    """What it is given. Transformer Engine learns here where backward is; the engine sees it by what backward reads."""
    return tensor


class _Somewhere(nn.Module):
    """Stands for the layers, which the context never sees: it tells the engine which device they are on.

    With an accelerator CPU tensors are on the host already, and stay; so it is in Transformer Engine. Without, they are
    what moves.
    """

    def __init__(self) -> None:
        super().__init__()
        device = torch.accelerator.current_accelerator(check_available=True)
        self.register_buffer("here", torch.empty(0, device=device or "cpu"), persistent=False)


def _check_switches(**switches: bool) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is True or False; got {value!r}.")


def _check_counts(num_layers: int | None, model_layers: int, *, none_will_do: bool) -> None:
    for name, value in (("model_layers", model_layers), ("num_layers", num_layers)):
        if isinstance(value, bool) or not isinstance(value, int):
            if name == "num_layers" and value is None and none_will_do:
                continue
            raise TypeError(f"{name} is a whole number; got {value!r}.")
    if model_layers < 1:
        raise ValueError(f"model_layers must be at least 1; got {model_layers}.")
    if num_layers is not None and not 0 <= num_layers <= model_layers:
        raise ValueError(
            f"num_layers must be from 0 to model_layers={model_layers}; got {num_layers}. model_layers counts all "
            "layers that run under the context."
        )


def _warn_of_few_on_device(num_layers: int | None, model_layers: int) -> None:
    if num_layers is not None and num_layers >= max(model_layers - 1, 1):
        warnings.warn(
            f"num_layers={num_layers} of model_layers={model_layers} leaves at most one layer on the device at a time, "
            "so that no copy can hide behind the compute of another layer. num_layers=model_layers - 2 or fewer can.",
            stacklevel=3,
        )


def _policy(policy: Policy | None, path: str, num_on_device: int, manual: bool) -> Policy:
    given = Policy() if policy is None else policy
    if not isinstance(given, Policy):
        raise TypeError(f"policy is a lighterage.Policy; got {type(policy).__name__}.")
    if given.by_hand or given.select != "unmarked":
        raise ValueError(
            "policy may not name keep_last, release_after, prefetch_ahead or select here: num_layers, model_layers and "
            "code_path say them. Leave them out, or use lighterage.offload."
        )
    ahead = max(num_on_device - 1, 0)
    return dataclasses.replace(
        given,
        select="marked" if path == "v1" else "unmarked",
        keep_last=0,
        release_after=1 if path == "v1" else ahead,
        prefetch_ahead=0 if manual else 2 if path == "v1" else ahead,
    )
