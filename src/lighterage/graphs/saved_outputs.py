"""Which outputs of a forward graph its backward graph reads, so that nobody may write to them in between."""

from __future__ import annotations

import torch
from torch import Tensor

# Note [Outputs that backward reads]
# Outputs are memory of the graph. Some operations save their own result for backward (a sigmoid does), and PyTorch
# tells when somebody writes to it before: the version counter is not what it was. A graph's backward asks no counter;
# so it is asked here. Which outputs are saved nobody says, but who saves holds: the storage, or the tensor itself, is
# held more often than by what is returned and the bases of views.


def saved_outputs(outputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Which of `outputs`, by their places, somebody but the caller holds. Better one too many than one too few."""
    return tuple(place for place, output in enumerate(outputs) if _is_held(output, outputs))


def _is_held(output: Tensor, outputs: tuple[Tensor, ...]) -> bool:
    if type(output) is not Tensor or output.layout is not torch.strided:
        return True
    storage = output.untyped_storage()
    known: dict[int, Tensor] = {}
    for one in outputs:
        for tensor in (one, one._base):
            if tensor is not None and tensor.untyped_storage()._cdata == storage._cdata:
                known[id(tensor)] = tensor
    if torch._C._storage_Use_Count(storage._cdata) > len(known) + 1:  # and `storage` itself
        return True
    return any(_tensor_holders(tensor, list(known.values())) > 0 for tensor in known.values())


def _tensor_holders(tensor: Tensor, known: list[Tensor]) -> int:
    """How many hold `tensor`, but for Python and the views of it that are known."""
    count = getattr(tensor, "_use_count", None)  # not every PyTorch tells
    return 1 if count is None else int(count()) - 1 - sum(one._base is tensor for one in known)
