"""What all quantized tensor classes do alike, as functions: build, flatten, drop, save, copy, and answer torch's calls.

A quantized tensor is a wrapper subclass: to PyTorch it has the shape, dtype and device of what was quantized, and its
bytes are plain tensors in its fields. Each class declares those fields as data; the functions here read that list.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

import torch

from lighterage.formats.arguments import check_flag
from lighterage.formats.layout import BulkLayout, ViewSpec
from lighterage.formats.parts import FormatName, SplitRows
from lighterage.formats.tensor_arguments import FLOAT_DTYPES

DTYPES = {"uint8": torch.uint8, "float32": torch.float32}
DIRECTIONS = ("rowwise", "columnwise")


class QuantizedTensor(torch.Tensor):
    """The shape that shared functions rely on: a type to annotate with, never instantiated nor inherited from."""

    FIELDS: ClassVar[tuple[str, ...]]
    """Names of the attributes that hold plain tensors, or None."""
    OPTIONS: ClassVar[tuple[str, ...]]
    """Names of the attributes that say how those are to be read."""

    if TYPE_CHECKING:

        def inner_specs(self, shape: Sequence[int]) -> dict[str, ViewSpec]:
            """Shape and dtype of every field, were the tensor of `shape`. Offsets mean nothing here."""
            ...

        def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
            """The values that the codes stand for."""
            ...

        def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
            """Drop or make directions."""
            ...


T = TypeVar("T", bound=torch.Tensor)


def as_quantized(tensor: torch.Tensor) -> QuantizedTensor:
    """`tensor`, for the type checker."""
    return cast(QuantizedTensor, tensor)


def is_quantized(value: object) -> bool:
    """Whether `value` is a tensor of one of the quantized classes."""
    return isinstance(value, torch.Tensor) and hasattr(type(value), "FIELDS")


def construct(
    cls: type[T],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    inner: Mapping[str, torch.Tensor | None],
    options: Mapping[str, object],
) -> T:
    """A new wrapper of class `cls` around the plain tensors `inner`, which are neither copied nor checked.

    shape, dtype, device: those of the high-precision tensor that it stands for.
    """
    tensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=device)
    for name in as_quantized(tensor).FIELDS:
        setattr(tensor, name, inner.get(name))
    for name in as_quantized(tensor).OPTIONS:
        setattr(tensor, name, options[name])
    return tensor


def inner_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The plain tensors that are there, by field name."""
    fields = {name: getattr(tensor, name) for name in as_quantized(tensor).FIELDS}
    return {name: value for name, value in fields.items() if value is not None}


def options_of(tensor: torch.Tensor) -> dict[str, object]:
    """The options by name."""
    return {name: getattr(tensor, name) for name in as_quantized(tensor).OPTIONS}


def map_inner(tensor: T, change: Callable[[torch.Tensor], torch.Tensor], device: torch.device | None = None) -> T:
    """A new wrapper whose plain tensors are `change` of this one's."""
    inner = {name: change(value) for name, value in inner_of(tensor).items()}
    return construct(type(tensor), tensor.shape, tensor.dtype, device or tensor.device, inner, options_of(tensor))


def emptied(tensor: T) -> T:
    """A wrapper of the same shape and options that holds no data."""
    return construct(type(tensor), tensor.shape, tensor.dtype, tensor.device, {}, options_of(tensor))


def bulk_specs(format_name: FormatName, shape: Sequence[int], block_2d: bool) -> dict[str, ViewSpec]:
    """The view spec of every field of one tensor of `shape`, from the layout of a group of one."""
    row_shape = tuple(shape[1:])
    rows = SplitRows((shape[0],), prod(row_shape[:-1]))
    specs = {}
    for direction in DIRECTIONS:
        layout = BulkLayout(format_name, rows, row_shape, direction == "columnwise", block_2d)
        specs.update({f"{direction}_{part.name}": layout.view(part.name, 0) for part in layout.parts})
    return specs


def view_over(buffer: torch.Tensor, spec: ViewSpec) -> torch.Tensor:
    """The tensor that `spec` describes, over the bytes of `buffer` (1-D uint8).

    It is an ordinary view, so PyTorch knows whom it shares memory with. One of no bytes is a tensor of its own.
    """
    num_bytes = spec.num_bytes
    if num_bytes == 0:
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=buffer.device)
    return buffer.narrow(0, spec.offset, num_bytes).view(DTYPES[spec.dtype]).view(spec.shape)


def value_dtype(dtype: object, default: torch.dtype) -> torch.dtype:
    """What to dequantize to: `dtype`, or `default` if it is None.

    Raises: TypeError.
    """
    if dtype is None:
        return default
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        raise TypeError(f"a tensor is dequantized to bf16, fp16, fp32 or fp64; got {dtype!r}. Cast the result further.")
    return dtype


# --- usages ---------------------------------------------------------------------------------------------------------


def other_direction(direction: str) -> str:
    """The one of the two that `direction` is not."""
    return DIRECTIONS[1 - DIRECTIONS.index(direction)]


def fields_of(tensor: torch.Tensor, direction: str) -> list[torch.Tensor]:
    """The plain tensors of a direction that is there, in the order of the fields: data, scales, perhaps an amax."""
    return [getattr(tensor, name) for name in as_quantized(tensor).FIELDS if name.startswith(direction)]


def has_usage(tensor: torch.Tensor, direction: str) -> bool:
    """Whether the data of `direction` ("rowwise" or "columnwise") is there."""
    return getattr(tensor, f"{direction}_data") is not None


def update_usage(
    tensor: torch.Tensor,
    rowwise: bool | None,
    columnwise: bool | None,
    derive: Callable[[str], dict[str, torch.Tensor] | None],
) -> None:
    """Drop the directions that are False, make those that are True and missing, and leave those that are None.

    derive: gives the fields of a missing direction from the other one, or None if they cannot be had exactly.
    Raises: ValueError: if a missing direction cannot be made.
    """
    wanted = {"rowwise": rowwise, "columnwise": columnwise}
    for direction, want in wanted.items():
        if want is not None:
            check_flag(f"{direction}_usage", want)
    made: dict[str, torch.Tensor] = {}
    for direction, want in wanted.items():
        if want and not has_usage(tensor, direction):
            other = other_direction(direction)
            fields = derive(direction) if has_usage(tensor, other) else None
            if fields is None:
                why = f"cannot be made exactly from the {other} data" if has_usage(tensor, other) else "has gone away"
                raise ValueError(
                    f"{direction} data of {tensor!r} is asked for, but it is not there and {why}. Quantize with "
                    f"{direction}=True, or restore it first (restore_from_saved, restore_columnwise_subviews)."
                )
            made.update(fields)
    for name, value in made.items():
        setattr(tensor, name, value)
    for direction, want in wanted.items():
        if want is False:
            for name in as_quantized(tensor).FIELDS:
                if name.startswith(direction):
                    setattr(tensor, name, None)
    if not any(has_usage(tensor, direction) for direction in DIRECTIONS):
        for name in as_quantized(tensor).FIELDS:  # what both directions share goes with the last of them
            setattr(tensor, name, None)


def some_direction(tensor: torch.Tensor) -> str:
    """The direction to read values from: rowwise if it is there.

    Raises: RuntimeError: if the data has gone away.
    """
    for direction in DIRECTIONS:
        if has_usage(tensor, direction):
            return direction
    raise RuntimeError(
        f"{tensor!r} holds no data: both usages were dropped. Bring it back first, with restore_from_saved() or "
        "restore_columnwise_subviews()."
    )


# --- saving ---------------------------------------------------------------------------------------------------------


def data_tensors(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The plain tensors that hold the bytes: data, scales and amax of every usage that is on."""
    return tuple(inner_of(tensor).values())


def prepare_for_saving(tensor: T) -> tuple[list[torch.Tensor | None], T]:
    """The plain tensors (or None) to save, in the order of the fields, and a shell on which to `restore_from_saved`."""
    return [getattr(tensor, name) for name in as_quantized(tensor).FIELDS], emptied(tensor)


def restore_from_saved(tensor: torch.Tensor, saved: Sequence[torch.Tensor | None]) -> None:
    """Put back the list that `prepare_for_saving` gave.

    Raises: ValueError: if its length, or the shape, dtype or device of a tensor is wrong.
    """
    fields = as_quantized(tensor).FIELDS
    if not isinstance(saved, (list, tuple)) or any(not isinstance(x, torch.Tensor | None) for x in saved):
        raise TypeError(
            "restore_from_saved takes the list of tensors and None that prepare_for_saving() gave; got "
            f"{type(saved).__name__}."
        )
    if len(saved) != len(fields):
        raise ValueError(
            f"{type(tensor).__name__} has {len(fields)} fields to restore {list(fields)}; got {len(saved)} tensors. "
            "Pass the whole list that prepare_for_saving() gave, with its None."
        )
    specs = as_quantized(tensor).inner_specs(tensor.shape)
    for name, value in zip(fields, saved, strict=True):
        if value is not None:
            check_field(tensor, name, value, specs[name])
    for name, value in zip(fields, saved, strict=True):
        setattr(tensor, name, value)


def check_field(tensor: torch.Tensor, name: str, value: torch.Tensor, spec: ViewSpec) -> None:
    """Check that `value` can be the field `name` of `tensor`.

    Raises: ValueError.
    """
    wanted = (spec.shape, DTYPES[spec.dtype], tensor.device)
    got = (tuple(value.shape), value.dtype, value.device)
    if got != wanted:
        raise ValueError(
            f"{name} of {type(tensor).__name__} {tuple(tensor.shape)} must have shape, dtype and device {wanted}; got "
            f"{got}. Pass the tensor that was saved for this one, on the device that it came from."
        )


def _as_leaf_like(tensor: T, wanted: torch.Tensor | Mapping[str, object]) -> T:
    """`tensor`, new, as what `wanted` is to autograd and to modules: a parameter, a leaf that requires a gradient."""
    if isinstance(wanted, torch.Tensor):
        wanted = _leaf_state(wanted)
    needs_grad = bool(wanted.get("requires_grad", False))
    if wanted.get("is_parameter", False):
        return cast(T, torch.nn.Parameter(tensor, requires_grad=needs_grad))
    tensor.requires_grad_(needs_grad)
    return tensor


def _leaf_state(tensor: torch.Tensor) -> dict[str, object]:
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return {"is_parameter": is_parameter, "requires_grad": tensor.is_leaf and tensor.requires_grad}


def flatten(tensor: torch.Tensor) -> tuple[list[str], dict[str, object]]:
    """What `__tensor_flatten__` returns: names of the plain tensors that are there, and all else."""
    return list(inner_of(tensor)), {**options_of(tensor), "dtype": tensor.dtype, "device": tensor.device}


def unflatten(
    cls: type[T], inner: Mapping[str, torch.Tensor], context: Mapping[str, object], shape: Sequence[int]
) -> T:
    """The inverse of `flatten`. The device is that of the plain tensors: they may have moved since."""
    device = next((value.device for value in inner.values()), cast(torch.device, context["device"]))
    return construct(cls, shape, cast(torch.dtype, context["dtype"]), device, inner, context)


def reduce(tensor: torch.Tensor) -> tuple[object, ...]:
    """What `__reduce_ex__` returns: pickle and torch.save carry the plain tensors.

    All of them travel as bytes: torch.save refuses tensors of different dtypes that share one storage.
    """
    inner = inner_of(tensor)
    bytes_of = {name: value.view(torch.uint8) for name, value in inner.items()}
    dtypes = {name: value.dtype for name, value in inner.items()}
    context = {**flatten(tensor)[1], **_leaf_state(tensor)}
    return rebuild, (type(tensor), bytes_of, dtypes, context, tuple(tensor.shape))


def rebuild(
    cls: type[T],
    bytes_of: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    context: Mapping[str, object],
    shape: Sequence[int],
) -> T:
    """The inverse of `reduce`; name it and the class to `torch.serialization.add_safe_globals` to load weights only."""
    inner = {name: value.view(dtypes[name]) for name, value in bytes_of.items()}
    return _as_leaf_like(unflatten(cls, inner, context, shape), context)


def deepcopy(tensor: T, memo: dict[int, object]) -> T:
    """A deep copy. Tensors that share one buffer and are copied together share one buffer again."""
    if id(tensor) not in memo:
        copied = _as_leaf_like(map_inner(tensor, partial(copy.deepcopy, memo=memo)), tensor)
        memo[id(tensor)] = copied
        if tensor.is_leaf and tensor.grad is not None:
            copied.grad = copy.deepcopy(tensor.grad, memo)
    return cast(T, memo[id(tensor)])


def describe(tensor: torch.Tensor) -> str:
    """The text of `__repr__`."""
    options = "".join(f", {name}={value}" for name, value in options_of(tensor).items())
    usages = "+".join(direction for direction in DIRECTIONS if has_usage(tensor, direction)) or "none"
    what = f"shape={tuple(tensor.shape)}, dtype={tensor.dtype}{options}, usages={usages}, device={tensor.device}"
    return f"{type(tensor).__name__}({what})"
