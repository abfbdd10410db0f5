"""Take the columnwise buffer of a group away, and rebuild every view of it over the bytes that come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lighterage.formats.buffers import check_buffer, check_returned
from lighterage.formats.capacity import BulkCapacity
from lighterage.formats.layout import BulkLayout, ViewSpec
from lighterage.formats.quantized_tensor import DTYPES, as_quantized, is_quantized, view_over
from lighterage.formats.split_tensors import SplitTensors

_PREFIX = "columnwise_"


@dataclass(frozen=True, kw_only=True)
class SubviewInfo:
    """Where in a columnwise buffer every data, scale and amax lies: small, immutable, picklable, without tensors."""

    num_bytes: int
    """Bytes of the buffer."""
    layout: BulkLayout | BulkCapacity | None = None
    """The description of a whole group that `split_quantize` made; a capacity, if only the device knew its splits."""
    views: tuple[tuple[tuple[str, ViewSpec], ...], ...] = ()
    """Otherwise the view specs of each tensor, by part name."""

    def __len__(self) -> int:
        return len(self.views) if self.layout is None else len(self.layout)

    def of(self, index: int) -> dict[str, ViewSpec]:
        """The view specs of one tensor, by part name.

        Raises: ValueError: if only the device knew the splits.
        """
        if self.layout is None:
            return dict(self.views[index])
        if isinstance(self.layout, BulkCapacity):
            raise ValueError(
                "this info was recorded without the splits, which only the device knew. Restore the sequence that "
                "split_quantize returned, not its members, or record the info of list(tensors)."
            )
        return {part.name: self.layout.view(part.name, index) for part in self.layout.parts}


def get_columnwise_subview_info(tensors: Sequence[torch.Tensor], columnwise_buffer: torch.Tensor) -> SubviewInfo:
    """Record byte offset, shape and dtype of every columnwise view of `tensors` in `columnwise_buffer`.

    tensors: what `split_quantize` gave, whole or in part, in any order.
    columnwise_buffer: the buffer that it gave with them, uint8, 1-D.
    For the whole sequence it makes no member, so its cost does not grow with their number, and it waits for nothing.

    Raises: ValueError, TypeError: if a tensor has no columnwise data, or data elsewhere than in this buffer.
    """
    check_buffer(columnwise_buffer, "columnwise")
    _check_tensors(tensors)
    if isinstance(tensors, SplitTensors) and tensors.num_missing:
        own = tensors.buffers.get("columnwise")
        if own is None or not _same_bytes(own, columnwise_buffer):
            have = "no columnwise buffer" if own is None else f"one of {own.numel()} bytes elsewhere"
            raise ValueError(
                f"the tensors are not views of this columnwise buffer ({columnwise_buffer.numel()} bytes): they have "
                f"{have}. Pass the last of the buffers that split_quantize returned with them."
            )
        return SubviewInfo(num_bytes=own.numel(), layout=tensors.group.layouts["columnwise"])
    views = tuple(_views_in(tensor, index, columnwise_buffer) for index, tensor in enumerate(tensors))
    return SubviewInfo(num_bytes=columnwise_buffer.numel(), views=views)


def restore_columnwise_subviews(
    tensors: Sequence[torch.Tensor], columnwise_buffer: torch.Tensor, info: SubviewInfo
) -> None:
    """Rebuild every columnwise view of `tensors`, in place, over `columnwise_buffer`, wherever that lies now.

    Views are ordinary views with the dtype, shape and stride that they had. What the tensors hold rowwise stays.

    Raises: ValueError, TypeError: if the buffer has not the size, dtype or device, or the tensors not the number, that
    `info` was made for.
    """
    check_buffer(columnwise_buffer, "columnwise")
    _check_tensors(tensors)
    if not isinstance(info, SubviewInfo):
        raise TypeError(f"info is what get_columnwise_subview_info gave; got {type(info).__name__}.")
    if len(tensors) != len(info):
        raise ValueError(
            f"the info is of {len(info)} tensors; got {len(tensors)}. Pass the same tensors in the same order."
        )
    if (
        isinstance(tensors, SplitTensors)
        and info.layout is not None
        and info.layout == tensors.group.layouts.get("columnwise")
    ):
        check_returned(columnwise_buffer, "columnwise", info.num_bytes, tensors.splits.device)
        tensors.hold("columnwise", columnwise_buffer)
        for index, member in enumerate(tensors.made()):
            if member is not None:
                layout = tensors.group.layout("columnwise")
                views = {part.name: layout.view(part.name, index) for part in layout.parts}
                _restore(member, index, columnwise_buffer, views)
        return
    for index, tensor in enumerate(tensors):
        if not is_quantized(tensor):
            raise TypeError(
                f"tensor {index} must be quantized; got {type(tensor).__name__}. Pass split_quantize's tensors."
            )
        check_returned(columnwise_buffer, "columnwise", info.num_bytes, tensor.device)
        _restore(tensor, index, columnwise_buffer, info.of(index))


def _check_tensors(tensors: object) -> None:
    if not isinstance(tensors, Sequence) or isinstance(tensors, str):
        raise TypeError(
            f"tensors are a list of quantized tensors; got {type(tensors).__name__}. Pass split_quantize's."
        )


def _restore(tensor: torch.Tensor, index: int, buffer: torch.Tensor, views: dict[str, ViewSpec]) -> None:
    specs = as_quantized(tensor).inner_specs(tensor.shape)
    for name, view in views.items():
        wanted = specs.get(_PREFIX + name)
        if wanted is None or (wanted.shape, wanted.dtype) != (view.shape, view.dtype):
            raise ValueError(
                f"tensor {index}, {tensor!r}, has no columnwise {name} of {view.shape} {view.dtype}. "
                "Pass the same tensors in the same order as when the info was made."
            )
    for name, view in views.items():
        setattr(tensor, _PREFIX + name, view_over(buffer, view))


def _views_in(tensor: torch.Tensor, index: int, buffer: torch.Tensor) -> tuple[tuple[str, ViewSpec], ...]:
    """The view specs of one tensor, found by address."""
    if not is_quantized(tensor):
        raise TypeError(
            f"tensor {index} must be quantized; got {type(tensor).__name__}. Pass split_quantize's tensors."
        )
    names = [name for name in as_quantized(tensor).FIELDS if name.startswith(_PREFIX)]
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    views = []
    for name in names:
        value = getattr(tensor, name)
        if value is None:
            raise ValueError(
                f"tensor {index}, {tensor!r}, has no columnwise data to record. "
                "Take the info before update_usage(columnwise_usage=False)."
            )
        offset = value.data_ptr() - buffer.data_ptr() if value.numel() else 0
        inside = offset >= 0 and offset + value.numel() * value.itemsize <= buffer.numel()
        same = value.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        if value.numel() and not (inside and same):
            raise ValueError(
                f"{name} of tensor {index} lies outside the columnwise buffer of {buffer.numel()} bytes. Pass the last "
                "of the buffers that split_quantize returned with these tensors; without bulk allocation there is none."
            )
        views.append(
            (name[len(_PREFIX) :], ViewSpec(offset=offset, shape=tuple(value.shape), dtype=dtypes[value.dtype]))
        )
    return tuple(views)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.device == b.device and a.data_ptr() == b.data_ptr() and a.numel() == b.numel())
