"""What a module is made of, as its graphs know it: they read and write memory, not attributes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GraphError


class Parts:
    """The submodules, parameters and buffers of a module, and where these are."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        self._name = name
        self._tensors: list[tuple[str, dict[str, Any], str, Tensor, int]] = []
        self._modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        for one in () if module is None else module.modules():
            self._modules += [(one._modules, key, child) for key, child in one._modules.items() if child is not None]
            self._tensors += [
                (kind, held, key, tensor, _address(tensor))
                for kind, held in (("parameter", one._parameters), ("buffer", one._buffers))
                for key, tensor in held.items()
                if tensor is not None
            ]

    def check(self) -> None:
        """Raise GraphError if one of them was replaced or moved."""
        for kind, held, key, tensor, address in self._tensors:
            if held.get(key) is not tensor or _address(tensor) != address:
                raise GraphError(
                    f"the {kind} {key!r} of {self._name}, {tuple(tensor.shape)} {tensor.dtype}, is not where it was "
                    "when the graph was captured, which still uses the old memory. Write parameters and buffers in "
                    "place, or capture again after moving or replacing them."
                )
        for held, key, child in self._modules:
            if held.get(key) is not child:
                raise GraphError(
                    f"the module {key!r} of {self._name}, a {type(child).__name__}, was replaced since the graph was "
                    "captured, which still runs the old one. Capture again."
                )


def _address(tensor: Tensor) -> int:
    """Where it is; 0 where it has no memory of its own, as a sparse one."""
    return tensor.data_ptr() if tensor.layout is torch.strided else 0
