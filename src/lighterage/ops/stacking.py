"""Weights of many experts as one tensor, and its gradient as theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from lighterage.formats.arguments import check_list
from lighterage.formats.tensor_arguments import check_tensor


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensors, all of one shape and dtype, as one with a first dimension for them; recorded by autograd.

    Tensors that lie side by side in one storage are not copied. Their gradients are views of one gradient.
    Raises: ValueError: if there is none, or their shapes differ. TypeError: if they are not tensors.
    """
    check_list("weights and biases", tensors)
    if not tensors:
        raise ValueError("there must be a weight for each expert; got none.")
    for index, tensor in enumerate(tensors):
        check_tensor(f"weight {index}", tensor, dtypes=None)
    first = tensors[0]
    for tensor in tensors:
        if tensor.shape != first.shape or tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"the weights of all experts must be alike; got {tuple(first.shape)} {first.dtype} on {first.device} "
                f"and {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}."
            )
    return cast(torch.Tensor, _Stacked.apply(*tensors))  # type: ignore[no-untyped-call]


def are_side_by_side(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether they are contiguous, each begins where the one before ends, and all are of one storage."""
    first = tensors[0]
    storage, start, num_bytes = first.untyped_storage()._cdata, first.data_ptr(), first.nbytes
    return all(
        tensor.data_ptr() == start + index * num_bytes
        and tensor.is_contiguous()
        and tensor.untyped_storage()._cdata == storage
        for index, tensor in enumerate(tensors)
    )


class _Stacked(torch.autograd.Function):
    """`torch.stack`, or the memory as it lies."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
        if not are_side_by_side(tensors):
            return torch.stack(tensors)
        first = tensors[0].detach()
        return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tuple(
            part if needed else None for part, needed in zip(grad.unbind(0), ctx.needs_input_grad, strict=True)
        )
