"""A list of quantized tensors that share bulk buffers, each made when it is first looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final, overload

import torch

from lighterage.formats.buffers import check_returned
from lighterage.formats.capacity import BulkCapacity
from lighterage.formats.layout import BulkLayout
from lighterage.formats.parts import FormatName
from lighterage.formats.quantized_tensor import as_quantized, construct, view_over
from lighterage.formats.quantizer import BulkQuantizer
from lighterage.formats.splits import Splits

Buffers = Mapping[str, torch.Tensor]


@final
class Group:
    """What a group of quantized splits is, apart from its memory: enough to make any member over buffers."""

    __slots__ = (
        "_known",
        "block_2d",
        "dtype",
        "format_name",
        "layouts",
        "options",
        "row_shape",
        "splits",
        "tensor_class",
    )

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        row_shape: tuple[int, ...],
        splits: Splits,
        tensor_class: type[torch.Tensor] = torch.Tensor,
        options: Mapping[str, object] | None = None,
        format_name: FormatName | None = None,
        block_2d: bool = False,
        layouts: Mapping[str, BulkLayout | BulkCapacity] | None = None,
    ) -> None:
        self.dtype = dtype
        """Of what was quantized."""
        self.row_shape = row_shape
        """Its dimensions after the first."""
        self.splits = splits
        self.tensor_class = tensor_class
        self.options = options or {}
        self.format_name = format_name
        """None: the members were quantized one by one, and there are no layouts."""
        self.block_2d = block_2d
        self.layouts = layouts or {}
        """By direction, of the directions that were quantized: capacities where only the device knows the splits."""
        self._known: dict[str, BulkLayout] = {}

    @classmethod
    def made_by(
        cls,
        quantizer: BulkQuantizer,
        splits: Splits,
        *,
        dtype: torch.dtype,
        row_shape: tuple[int, ...],
        layouts: Mapping[str, BulkLayout | BulkCapacity],
    ) -> Group:
        """The group that a quantizer of bulk layouts makes of splits of such an input."""
        return cls(
            tensor_class=quantizer.tensor_class,
            options=quantizer.tensor_options(),
            format_name=quantizer.format_name,
            block_2d=quantizer.block_2d,
            dtype=dtype,
            row_shape=row_shape,
            splits=splits,
            layouts=layouts,
        )

    def layout(self, direction: str) -> BulkLayout:
        """Where everything lies. Splits that only the device knows are asked for, once, which waits for it."""
        if direction not in self._known:
            layout = self.layouts[direction]
            known = layout.layout(self.splits.sizes) if isinstance(layout, BulkCapacity) else layout
            self._known[direction] = known
        return self._known[direction]

    def make(self, index: int, buffers: Buffers) -> torch.Tensor:
        """A new tensor over `buffers`, by direction."""
        inner = {
            f"{direction}_{part.name}": view_over(buffer, self.layout(direction).view(part.name, index))
            for direction, buffer in buffers.items()
            for part in self.layout(direction).parts
        }
        shape = (self.layout(next(iter(self.layouts))).splits[index], *self.row_shape)
        return construct(self.tensor_class, shape, self.dtype, self.splits.device, inner, self.options)


@final
class SplitTensors(Sequence[torch.Tensor]):
    """The tensors of one `split_quantize`: a sequence that gives the same object every time, to every thread.

    Members over bulk buffers are made when they are first looked at. Until the last one is made, the sequence itself
    holds the buffers: drop it, call `update_usage`, or look at every member, to let the members alone decide. Where
    only the device knows the splits, the first look at a member waits for it; the attributes never do.
    """

    __slots__ = ("_buffers", "_group", "_members")

    def __init__(self, group: Group, *, members: Sequence[torch.Tensor] | None = None, buffers: Buffers | None = None):
        """Either all `members` are there, or they will be made over `buffers`."""
        self._group = group
        self._buffers = dict(buffers or {})
        # By index, in the order in which they were made. Threads may make one member at a time: the first that puts it
        # in wins, which is one step of a dict, and so is every other change here.
        self._members: dict[int, torch.Tensor] = dict(enumerate(members or ()))

    @property
    def splits(self) -> Splits:
        """How the rows are split."""
        return self._group.splits

    @property
    def format_name(self) -> FormatName | None:
        """Of the bulk layout; None if the members were quantized one by one, each into memory of its own."""
        return self._group.format_name

    @property
    def num_cols(self) -> int:
        """K, the last dimension of what was quantized."""
        return self._group.row_shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Of what was quantized."""
        return self._group.dtype

    @property
    def block_2d(self) -> bool:
        """Whether scales belong to two-dimensional blocks."""
        return self._group.block_2d

    @property
    def options(self) -> Mapping[str, object]:
        """The options that every member has, by name; empty if they were quantized one by one."""
        return self._group.options

    @property
    def buffers(self) -> Buffers:
        """The bulk buffers that back all members, by direction ("rowwise", "columnwise"): uint8, 1-D.

        A direction that was dropped or never made is not among them, nor one that only some members hold.
        """
        buffers = self._buffers
        if self.num_missing:
            return dict(buffers)
        found = {direction: self._buffer_of_members(direction) for direction in self._group.layouts}
        return {direction: buffer for direction, buffer in found.items() if buffer is not None}

    def with_buffers(
        self, *, rowwise: torch.Tensor | None = None, columnwise: torch.Tensor | None = None
    ) -> SplitTensors:
        """The same group over other memory: the bytes of the given buffers, wherever they lie now.

        rowwise, columnwise: buffers with the bytes of `buffers`, or None: the new group has not that direction.
        Makes no member, and does not touch this group.
        Raises: ValueError, TypeError: if a buffer has not the size, dtype or device, or was not quantized.
        """
        buffers = {}
        for direction, buffer in (("rowwise", rowwise), ("columnwise", columnwise)):
            if buffer is not None:
                layout = self._group.layouts.get(direction)
                if layout is None:
                    raise ValueError(
                        f"this group has no {direction} direction to put over a buffer; it was quantized "
                        f"{' and '.join(self._group.layouts) or 'one by one'}. Quantize with {direction}=True."
                    )
                buffers[direction] = check_returned(buffer, direction, layout.num_bytes, self._group.splits.device)
        return SplitTensors(self._group, buffers=buffers)

    def __len__(self) -> int:
        return self._group.splits.num_splits

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self))[index]
        member = self._members.get(place)
        if member is None:
            member = self._members.setdefault(place, self._group.make(place, self._buffers))
            if not self.num_missing:
                self._buffers = {}
        return member

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [*self, *other]

    def __radd__(self, other: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"SplitTensors({list(self)!r})"

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """`update_usage` of every member. Dropping makes no member, and costs the same for any number of them.

        Raises: ValueError: if a direction is asked for that is not there and cannot be made.
        """
        wanted = {"rowwise": rowwise_usage, "columnwise": columnwise_usage}
        if self.num_missing and any(want and way not in self._buffers for way, want in wanted.items()):
            self[:]
        for direction, want in wanted.items():
            if want is False:
                self._buffers.pop(direction, None)
        for member in self.made():
            if member is not None:
                as_quantized(member).update_usage(rowwise_usage, columnwise_usage)

    def made(self) -> Sequence[torch.Tensor | None]:
        """The members, None where one has not been made; empty if none has."""
        return [self._members.get(index) for index in range(len(self))] if self._members else ()

    @property
    def num_missing(self) -> int:
        """How many members have not been made."""
        return len(self) - len(self._members)

    @property
    def group(self) -> Group:
        """What the members are made from, apart from memory."""
        return self._group

    def hold(self, direction: str, buffer: torch.Tensor) -> None:
        """Make the members that are still missing over `buffer`, which was checked."""
        if self.num_missing:
            self._buffers[direction] = buffer

    def _buffer_of_members(self, direction: str) -> torch.Tensor | None:
        """The buffer that the members alone keep, if all of them hold their part of one."""
        layout, num_bytes = self._group.layout(direction), self._group.layouts[direction].num_bytes
        start: int | None = None
        buffer = torch.empty(num_bytes if not any(layout.splits) else 0, dtype=torch.uint8, device=self.splits.device)
        for part in layout.parts:
            name = f"{direction}_{part.name}"
            for member, offset_of_part in zip(self, layout.offsets(part), strict=True):
                value: torch.Tensor | None = getattr(member, name)
                if value is None:
                    return None
                if value.numel() == 0:
                    continue
                begin = value.data_ptr() - offset_of_part
                if start is None:
                    storage = value.untyped_storage()
                    offset = begin - storage.data_ptr()
                    if offset < 0 or offset + num_bytes > storage.nbytes():
                        return None
                    start, buffer = begin, buffer.set_(storage, offset, (num_bytes,), (1,))
                if begin != start:
                    return None
        return buffer
