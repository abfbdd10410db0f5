"""Wrapper subclasses: the plain tensors inside, and what has to happen before they may be touched."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether the tensor can be taken apart and put together again through `__tensor_flatten__`."""
    return is_traceable_wrapper_subclass(tensor)


def parts_of(tensor: Any) -> tuple[object, dict[str, tuple[Any, bool]]]:
    """The context of `__tensor_flatten__`, and by name each part with whether it may be moved.

    A part need not be a tensor (DTensor names its mesh). Of a jagged tensor only the values move: fresh offsets would
    make a new ragged size.
    """
    names, context = tensor.__tensor_flatten__()
    jagged = tensor.is_nested
    parts: dict[str, tuple[Any, bool]] = {}
    for name in names:
        part = getattr(tensor, name)
        movable = isinstance(part, torch.Tensor) and (not jagged or name == "_values")
        parts[name] = (wait_for(part) if movable else part, movable)
    return context, parts


def wait_for(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself; of a collective's result that may not have arrived, the tensor that has."""
    if type(tensor).__name__ == "AsyncCollectiveTensor" and hasattr(tensor, "wait"):
        waited: torch.Tensor = tensor.wait()
        return waited
    return tensor
