"""A list of quantized tensors that share bulk buffers, each made when it is first looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import torch

from lighterage.formats.layout import BulkLayout
from lighterage.formats.quantized_tensor import as_quantized, construct, view_over


class BulkSource:
    """What is needed to make any member of a group: its class and options, and for each direction layout and buffer."""

    __slots__ = ("buffers", "device", "dtype", "layouts", "options", "tensor_class")

    def __init__(
        self,
        tensor_class: type[torch.Tensor],
        options: Mapping[str, object],
        dtype: torch.dtype,
        device: torch.device,
        layouts: dict[str, BulkLayout],
        buffers: dict[str, torch.Tensor],
    ) -> None:
        self.tensor_class = tensor_class
        self.options = options
        self.dtype = dtype
        self.device = device
        self.layouts = layouts
        """By direction, of the directions that were quantized."""
        self.buffers = buffers
        """By direction, of those that have not been dropped: uint8, the start of the layout at the first byte."""

    def make(self, index: int) -> torch.Tensor:
        """A new tensor over the buffers."""
        inner = {
            f"{direction}_{part.name}": view_over(buffer, self.layouts[direction].view(part.name, index))
            for direction, buffer in self.buffers.items()
            for part in self.layouts[direction].parts
        }
        layout = next(iter(self.layouts.values()))
        shape = (layout.splits[index], *layout.row_shape)
        return construct(self.tensor_class, shape, self.dtype, self.device, inner, self.options)


class SplitTensors(Sequence[torch.Tensor]):
    """The tensors of one `split_quantize`: a sequence that gives the same object every time.

    Members over bulk buffers are made when they are first looked at. Until the last one is made, the sequence itself
    holds the buffers: drop it, call `update_usage`, or look at every member, to let the members alone decide.
    """

    __slots__ = ("_members", "_num_missing", "_source")

    def __init__(self, members: Sequence[torch.Tensor | None], source: BulkSource | None) -> None:
        """Either all `members` are there and there is no source, or none is and the source makes them."""
        self._members = list(members)
        self._source = source
        self._num_missing = 0 if source is None else len(members)

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        member = self._members[index]
        if member is None:
            assert self._source is not None
            member = self._members[index] = self._source.make(index if index >= 0 else index + len(self))
            self._num_missing -= 1
            if self._num_missing == 0:
                self._source = None
        return member

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [*self, *other]

    def __radd__(self, other: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"SplitTensors({list(self)!r})"

    @property
    def source(self) -> BulkSource | None:
        """What the members that are still missing will be made from; None if there are none."""
        return self._source

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """`update_usage` of every member. Dropping makes no member, and costs the same for any number of them.

        Raises: ValueError: if a direction is asked for that is not there and cannot be made.
        """
        wanted = {"rowwise": rowwise_usage, "columnwise": columnwise_usage}
        source = self._source
        if source is not None and any(want and way not in source.buffers for way, want in wanted.items()):
            self[:]
        elif source is not None:
            for direction, want in wanted.items():
                if want is False:
                    source.buffers.pop(direction, None)
        for member in self.made():
            if member is not None:
                as_quantized(member).update_usage(rowwise_usage, columnwise_usage)

    def made(self) -> Sequence[torch.Tensor | None]:
        """The members, None where one has not been made; empty if none has."""
        return self._members if self._num_missing < len(self) else ()
