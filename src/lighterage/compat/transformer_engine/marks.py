"""Marks on tensors, under Transformer Engine's names."""

from __future__ import annotations

import torch

from lighterage import marks
from lighterage.formats import SplitTensors
from lighterage.unseen import unseen

Markable = torch.Tensor | SplitTensors | None
"""None is passed over, as saved tensors are often optional; of a group all buffers are meant."""


@unseen
def mark_not_offload(*tensors: Markable) -> None:
    """Keep every allocation that one of `tensors` lives in on the device, on the opt-out and on the opt-in path.

    It wins over `mark_activation_offload`, and may come after the tensor was saved.
    Raises: TypeError: an argument is no tensor, group of tensors, or None.
    """
    marks.mark_not_offload(*_tensors("mark_not_offload", tensors))


@unseen
def mark_activation_offload(*tensors: Markable) -> None:
    """Ask for every allocation that one of `tensors` lives in to be moved: what the opt-in path listens to.

    On the opt-out path these move anyway.
    Raises: TypeError: an argument is no tensor, group of tensors, or None.
    """
    marks.mark_offload(*_tensors("mark_activation_offload", tensors))


@unseen
def start_offload(*tensors: Markable, offload_base_tensor: bool = False) -> None:
    """Say that `tensors` are computed. Checked, and otherwise without work to do.

    There is nothing to start early: copies start while the layer still runs, as soon as enough was saved, each after
    the work that had been queued when it was. Nor is there a base tensor to ask for: what moves is the whole
    allocation, and views come back as views with their own strides, so both values of `offload_base_tensor` mean the
    same.
    Raises: TypeError: an argument is no tensor, group of tensors, or None.
    """
    _tensors("start_offload", tensors)
    if not isinstance(offload_base_tensor, bool):
        raise TypeError(f"offload_base_tensor is True or False; got {offload_base_tensor!r}.")


def _tensors(function: str, given: tuple[Markable, ...]) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    for position, one in enumerate(given):
        if isinstance(one, SplitTensors):
            tensors += one.buffers.values() if one.buffers else list(one)
        elif isinstance(one, torch.Tensor):
            tensors.append(one)
        elif one is not None:
            raise TypeError(
                f"{function} takes tensors; argument {position} is a {type(one).__name__}. "
                f"Pass them unpacked: {function}(*tensors)."
            )
    return tensors
