"""What a module is made of, as its graphs know it: they read and write memory, not attributes."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..errors import GraphError


class Parts:
    """The submodules, parameters and buffers of a module, and where these are."""

    def __init__(self, name: str, module: nn.Module | None) -> None:
        self._name = name
        self._held: list[tuple[dict[str, Any], str, Any]] = []
        self._addresses: list[tuple[Tensor, int]] = []
        for one in () if module is None else module.modules():
            for held in (one._modules, one._parameters, one._buffers):
                self._held += [(held, key, part) for key, part in held.items() if part is not None]
        for _, _, part in self._held:
            # A sparse tensor, say, has no memory of its own.
            if isinstance(part, Tensor) and part.layout is torch.strided:
                self._addresses.append((part, part.data_ptr()))

    def check(self) -> None:
        """Raise GraphError if one of them was replaced or moved."""
        # Each replay asks, so the loops do nothing else.
        for held, key, part in self._held:
            if held.get(key) is not part:
                self._refuse(key, part)
        for tensor, address in self._addresses:
            if tensor.data_ptr() != address:
                self._refuse(next(key for _, key, part in self._held if part is tensor), tensor)

    def _refuse(self, key: str, part: nn.Module | Tensor) -> NoReturn:
        if isinstance(part, nn.Module):
            raise GraphError(
                f"the module {key!r} of {self._name}, a {type(part).__name__}, was replaced since the graph was "
                "captured, which still runs the old one. Capture again."
            )
        kind = "parameter" if isinstance(part, nn.Parameter) else "buffer"
        raise GraphError(
            f"the {kind} {key!r} of {self._name}, {tuple(part.shape)} {part.dtype}, is not where it was when the graph "
            "was captured, which still uses the old memory. Write parameters and buffers in place, or capture again "
            "after moving or replacing them."
        )
