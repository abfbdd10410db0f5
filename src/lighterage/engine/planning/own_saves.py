"""What PyTorch's checkpoint saves for itself, which differs from version to version."""

from __future__ import annotations

from functools import cache

import torch
from torch.utils.checkpoint import checkpoint


@cache
def saves_before_inputs() -> int:
    """How many tensors of its own PyTorch's checkpoint saves before those that it is given: one, up to PyTorch 2.12."""
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        checkpoint(torch.clone, torch.ones(7, requires_grad=True), use_reentrant=False)
    return saved.index(7)
