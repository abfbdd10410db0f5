"""Take the columnwise buffer of a group away, and rebuild every view of it over the bytes that come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lighterage.formats.layout import BulkLayout, ViewSpec
from lighterage.formats.quantized_tensor import DTYPES, as_quantized, is_quantized, view_over
from lighterage.formats.split_tensors import SplitTensors

_PREFIX = "columnwise_"


@dataclass(frozen=True, kw_only=True)
class SubviewInfo:
    """Where in a columnwise buffer every data, scale and amax lies: small, immutable, picklable, without tensors."""

    num_bytes: int
    """Bytes of the buffer."""
    layout: BulkLayout | None = None
    """The whole description, for the group that `split_quantize` made."""
    views: tuple[tuple[tuple[str, ViewSpec], ...], ...] = ()
    """Otherwise the view specs of each tensor, by part name."""

    def __len__(self) -> int:
        return len(self.views) if self.layout is None else len(self.layout)

    def of(self, index: int) -> dict[str, ViewSpec]:
        """The view specs of one tensor, by part name."""
        if self.layout is None:
            return dict(self.views[index])
        return {part.name: self.layout.view(part.name, index) for part in self.layout.parts}


def get_columnwise_subview_info(tensors: Sequence[torch.Tensor], columnwise_buffer: torch.Tensor) -> SubviewInfo:
    """Record byte offset, shape and dtype of every columnwise view of `tensors` in `columnwise_buffer`.

    tensors: what `split_quantize` gave, whole or in part, in any order.
    columnwise_buffer: the buffer that it gave with them, uint8, 1-D.
    For the whole sequence it makes no member, so its cost does not grow with their number.

    Raises: ValueError, TypeError: if a tensor has no columnwise data, or data elsewhere than in this buffer.
    """
    _check_buffer(columnwise_buffer)
    if isinstance(tensors, SplitTensors) and tensors.source is not None:
        own = tensors.source.buffers.get("columnwise")
        if own is None or not _same_bytes(own, columnwise_buffer):
            have = "no columnwise buffer" if own is None else f"one of {own.numel()} bytes elsewhere"
            raise ValueError(
                f"the tensors are not views of this columnwise buffer ({columnwise_buffer.numel()} bytes): they have "
                f"{have}. Pass the last of the buffers that split_quantize returned with them."
            )
        return SubviewInfo(num_bytes=own.numel(), layout=tensors.source.layouts["columnwise"])
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
    _check_buffer(columnwise_buffer)
    if columnwise_buffer.numel() != info.num_bytes:
        raise ValueError(
            f"the columnwise buffer must have the {info.num_bytes} bytes that it had; got {columnwise_buffer.numel()}. "
            "Pass the whole buffer that came back."
        )
    if columnwise_buffer.data_ptr() % 4:
        raise ValueError(
            "the columnwise buffer begins at an odd address, where float32 scales cannot be read. "
            "Copy it: columnwise_buffer.clone()."
        )
    if len(tensors) != len(info):
        raise ValueError(
            f"the info is of {len(info)} tensors; got {len(tensors)}. Pass the same tensors in the same order."
        )
    members: Sequence[torch.Tensor | None] = tensors
    source = tensors.source if isinstance(tensors, SplitTensors) else None
    if isinstance(tensors, SplitTensors) and source and info.layout == source.layouts.get("columnwise"):
        _check_device(source.device, columnwise_buffer)
        source.buffers["columnwise"] = columnwise_buffer
        members = tensors.made()
    for index, member in enumerate(members):
        if member is not None:
            _restore(member, index, columnwise_buffer, info.of(index))


def _restore(tensor: torch.Tensor, index: int, buffer: torch.Tensor, views: dict[str, ViewSpec]) -> None:
    if not is_quantized(tensor):
        raise TypeError(
            f"tensor {index} must be quantized; got {type(tensor).__name__}. Pass split_quantize's tensors."
        )
    _check_device(tensor.device, buffer)
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


def _check_buffer(buffer: object) -> None:
    if not isinstance(buffer, torch.Tensor) or buffer.dtype != torch.uint8:
        got = buffer.dtype if isinstance(buffer, torch.Tensor) else type(buffer).__name__
        raise TypeError(
            f"a columnwise buffer is a uint8 tensor; got {got}. Pass the buffer that split_quantize returned."
        )
    if buffer.ndim != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"a columnwise buffer is 1-D and contiguous; got shape {tuple(buffer.shape)}, strides {buffer.stride()}. "
            "Pass the whole buffer that split_quantize returned."
        )


def _check_device(device: torch.device, buffer: torch.Tensor) -> None:
    if buffer.device != device:
        raise ValueError(
            f"the columnwise buffer must be on {device}, where the tensors are; got {buffer.device}. "
            f"Bring it back: columnwise_buffer.to({str(device)!r})."
        )
