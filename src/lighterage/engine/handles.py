"""What the pack hook returns: small objects that own what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..unseen import unseen
from .allocation import Allocation
from .views import ViewSpec, changed_in_place, counter_of_wrapper, settled_version, type_name

if TYPE_CHECKING:
    from .sections import Section
    from .traffic import Traffic

# Note [What a handle may hold]
# A saved output reaches the pack hook with its grad_fn; holding it, or a view of it, closes a cycle through the graph
# that the garbage collector cannot see. Handles hold detached aliases, emptied aliases and storages, never the tensor.


class Kept:
    """A saved tensor that stays where it is."""

    __slots__ = ("_section", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor, section: Section) -> None:
        alias = self._tensor = tensor.detach()
        self._version = settled_version(alias)
        self._section = section

    def unpack(self) -> torch.Tensor:
        tensor = self._tensor
        if tensor._version != self._version and (now := settled_version(tensor)) != self._version:
            raise changed_in_place(type_name(tensor), tensor.shape, self._version, now, self._section.name)
        if not self._section.visited:
            self._section.visit()
        return tensor


class KeptWrapper:
    """A saved wrapper subclass of which nothing was moved."""

    __slots__ = ("_counter", "_section", "_tensor", "_version")

    def __init__(self, tensor: torch.Tensor, section: Section) -> None:
        self._tensor = tensor.detach()
        self._counter = counter_of_wrapper(tensor)
        self._version = settled_version(tensor)
        self._section = section

    def unpack(self) -> torch.Tensor:
        tensor, counter = self._tensor, self._counter
        if counter._version != self._version and (now := settled_version(counter)) != self._version:
            raise changed_in_place(type(tensor).__name__, tensor.shape, self._version, now, self._section.name)
        if not self._section.visited:
            self._section.visit()
        return tensor


class Offloaded:
    """A saved tensor as a view over an allocation."""

    __slots__ = ("_alias", "_allocation", "_section", "_spec", "_traffic", "_version")

    def __init__(
        self,
        traffic: Traffic,
        allocation: Allocation,
        spec: ViewSpec,
        alias: torch.Tensor,
        version: int,
        section: Section,
    ) -> None:
        """`alias` has the saved tensor's version counter, which showed `version`, and none of its memory."""
        self._traffic = traffic
        self._allocation = allocation
        self._spec = spec
        self._alias = alias
        self._version = version
        self._section = section

    def unpack(self) -> torch.Tensor:
        section = self._section
        alias = self._alias
        if alias._version != self._version and (now := settled_version(alias)) != self._version:
            kind = type_name(self._allocation.sample(self._spec.dtype))
            raise changed_in_place(kind, self._spec.size, self._version, now, section.name)
        if not section.visited:
            section.visit(self._allocation)
        return self._traffic.load(self._allocation, self._spec, section.visited)


class OffloadedWrapper:
    """A saved wrapper subclass: the tensors inside are moved, or held as they are, each for itself."""

    __slots__ = ("_context", "_counter", "_inner", "_section", "_size", "_stride", "_type", "_version")

    def __init__(
        self,
        tensor: torch.Tensor,
        context: object,
        inner: dict[str, Offloaded | OffloadedWrapper | torch.Tensor],
        section: Section,
    ) -> None:
        self._type: Any = type(tensor)
        self._context = context
        self._inner = inner
        self._size = tensor.shape
        self._stride = () if tensor.is_nested else tensor.stride()
        self._counter = counter_of_wrapper(tensor)
        self._version = settled_version(tensor)
        self._section = section

    def unpack(self) -> torch.Tensor:
        counter = self._counter
        if counter._version != self._version and (now := settled_version(counter)) != self._version:
            raise changed_in_place(self._type.__name__, self._size, self._version, now, self._section.name)
        # A part need not be a tensor: DTensor names its mesh.
        inner = {
            name: part.unpack() if isinstance(part, Offloaded | OffloadedWrapper) else part
            for name, part in self._inner.items()
        }
        with torch.no_grad():
            rebuilt: torch.Tensor = self._type.__tensor_unflatten__(inner, self._context, self._size, self._stride)
        return rebuilt


Handle = Kept | KeptWrapper | Offloaded | OffloadedWrapper


@unseen
def unpack(handle: Handle) -> torch.Tensor:
    """The unpack hook."""
    return handle.unpack()
