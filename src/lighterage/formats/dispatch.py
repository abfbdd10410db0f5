"""How quantized tensors answer PyTorch's operators.

Moving, copying and viewing keep the codes. Any other operator sees the dequantized values; writing into a quantized
tensor by one is an error, because it would write into a temporary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import getattr_static
from math import prod
from types import GetSetDescriptorType
from typing import cast

import torch
from torch.utils._pytree import tree_map

from lighterage.formats.quantized_tensor import (
    T,
    as_quantized,
    construct,
    deepcopy,
    describe,
    flatten,
    inner_of,
    is_quantized,
    map_inner,
    options_of,
    reduce,
    unflatten,
)

Handler = Callable[[tuple[object, ...], Mapping[str, object]], object]
aten = torch.ops.aten
_PLAIN_DATA = cast(GetSetDescriptorType, getattr_static(torch.Tensor, "data"))


def answers_torch(cls: type[T]) -> type[T]:
    """Give the wrapper subclass `cls` all that PyTorch, pickle and copy call, for a class decorator."""

    def torch_dispatch(
        _: type[T],
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        return dispatch(func, args, kwargs or {})

    def tensor_unflatten(
        inner: Mapping[str, torch.Tensor], context: Mapping[str, object], shape: Sequence[int], stride: object
    ) -> T:
        return unflatten(cls, inner, context, shape)

    def set_item(tensor: torch.Tensor, index: object, value: object) -> None:
        raise TypeError(
            f"a quantized tensor cannot be written element by element: got an assignment into {tensor!r}. Dequantize "
            "it first, or quantize new values into it with quantizer.update(x, out)."
        )

    methods = {
        "data": property(_PLAIN_DATA.__get__, _set_data),
        "__setitem__": set_item,
        "__torch_function__": torch._C._disabled_torch_function_impl,
        "__torch_dispatch__": classmethod(torch_dispatch),
        "__tensor_flatten__": flatten,
        "__tensor_unflatten__": staticmethod(tensor_unflatten),
        "__reduce_ex__": lambda tensor, protocol: reduce(tensor),
        "__deepcopy__": deepcopy,
        "__repr__": lambda tensor, *, tensor_contents=None: describe(tensor),
    }
    for name, method in methods.items():
        setattr(cls, name, method)
    return cls


def dispatch(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """The result of `func`, for `__torch_dispatch__` of any quantized class.

    Raises: TypeError: if `func` writes into a quantized tensor and is not a copy from its like.
    """
    handler = _HANDLERS.get(func)
    if handler is not None and is_quantized(args[0]):
        return handler(args, kwargs)
    for argument, value in zip(func._schema.arguments, args, strict=False):
        _refuse_write(func, argument, value)
    for argument in func._schema.arguments:
        _refuse_write(func, argument, kwargs.get(argument.name))
    plain_args = cast(tuple[object, ...], tree_map(_plain, args))
    return func(*plain_args, **tree_map(_plain, dict(kwargs)))


def _plain(value: object) -> object:
    return as_quantized(cast(torch.Tensor, value)).dequantize() if is_quantized(value) else value


def _set_data(tensor: torch.Tensor, value: object) -> None:
    """`tensor.data = value`: what modules and FSDP move parameters by. PyTorch's own knows nothing of the codes."""
    if type(value) is not type(tensor):
        got = f"{type(value).__name__} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(
            f"the data of {tensor!r} must be a tensor of its class; got a {got}. Quantize new values into it with "
            "quantizer.update(x, out); to cast a module, put a parameter of dequantize() in its place first."
        )
    _PLAIN_DATA.__set__(tensor, value)
    for name in (*as_quantized(value).FIELDS, *as_quantized(value).OPTIONS):
        setattr(tensor, name, getattr(value, name))


def _refuse_write(func: torch._ops.OpOverload, argument: torch.Argument, value: object) -> None:
    if argument.alias_info is None or not argument.alias_info.is_write:
        return
    for member in value if isinstance(value, (list, tuple)) else (value,):
        if is_quantized(member):
            raise TypeError(
                f"{func} writes into its argument, and a quantized tensor cannot be written element by element: got "
                f"{member!r}. Dequantize it first, or quantize new values into it with quantizer.update(x, out)."
            )


def _first(args: tuple[object, ...]) -> torch.Tensor:
    return cast(torch.Tensor, args[0])


def _alias(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    return map_inner(_first(args), lambda inner: inner)


def _clone(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    return map_inner(_first(args), torch.clone)


def _view(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Another grouping of the leading dimensions keeps the codes: blocks only see rows and K."""
    tensor, shape = _first(args), list(cast(Sequence[int], args[1]))
    if -1 in shape:
        known = prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = tensor.numel() // known if known else 0
    if prod(shape) != tensor.numel():
        raise RuntimeError(f"shape {shape} is invalid for {tensor!r}")
    if len(shape) < 2 or shape[-1] != tensor.shape[-1]:
        return as_quantized(tensor).dequantize().view(shape)
    specs = as_quantized(tensor).inner_specs(shape)
    inner = {name: value.view(specs[name].shape) for name, value in inner_of(tensor).items()}
    return construct(type(tensor), shape, tensor.dtype, tensor.device, inner, options_of(tensor))


def _to_copy(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Another device keeps the codes; another dtype dequantizes."""
    tensor = _first(args)
    if kwargs.get("dtype") not in (None, tensor.dtype):
        others = {key: value for key, value in kwargs.items() if key != "dtype"}
        return aten._to_copy.default(as_quantized(tensor).dequantize(cast(torch.dtype, kwargs["dtype"])), **others)
    kept = {key: kwargs[key] for key in ("device", "non_blocking", "pin_memory") if kwargs.get(key) is not None}
    device = torch.empty(0, device=cast(torch.device, kwargs.get("device") or tensor.device)).device  # with its index
    return map_inner(tensor, lambda inner: aten._to_copy.default(inner, **kept), device)


def _empty_like(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    tensor = _first(args)
    if kwargs.get("dtype") not in (None, tensor.dtype):
        return aten.empty_like.default(as_quantized(tensor).dequantize(), **kwargs)
    kept = {key: kwargs[key] for key in ("device", "pin_memory") if kwargs.get(key) is not None}
    device = torch.empty(0, device=cast(torch.device, kwargs.get("device") or tensor.device)).device
    return map_inner(tensor, lambda inner: aten.empty_like.default(inner, **kept), device)


def _copy(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    """Codes into codes, field by field; the source must have what the destination holds."""
    target, source = _first(args), cast(torch.Tensor, args[1])
    if type(source) is not type(target) or source.shape != target.shape or options_of(source) != options_of(target):
        raise TypeError(
            f"copy_ into {target!r} needs a tensor of the same class, shape and options; got {source!r}. "
            "Quantize new values into it with quantizer.update(x, out)."
        )
    if not inner_of(target):
        raise ValueError(
            f"there is nothing to copy into: both usages of {target!r} were dropped. Restore it first, or call the "
            "quantizer to make a new one."
        )
    codes = inner_of(source)
    missing = [name for name in inner_of(target) if name not in codes]
    if missing:
        raise ValueError(
            f"copy_ into {target!r} needs {missing}, which {source!r} does not hold. "
            "Drop that usage of the target first, or copy from a tensor that has it."
        )
    non_blocking = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    for name, value in inner_of(target).items():
        value.copy_(codes[name], non_blocking=non_blocking)
    return target


def _is_same_size(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    return _first(args).shape == cast(torch.Tensor, args[1]).shape


def _is_pinned(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    inner = inner_of(_first(args)).values()
    return bool(inner) and all(value.is_pinned() for value in inner)


def _pin(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    return map_inner(_first(args), torch.Tensor.pin_memory)


def _record_stream(args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    for value in inner_of(_first(args)).values():
        value.record_stream(cast(torch.Stream, args[1]))
    return None


_HANDLERS: dict[object, Handler] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    aten.is_same_size.default: _is_same_size,
    aten.is_pinned.default: _is_pinned,
    aten._pin_memory.default: _pin,
    aten.record_stream.default: _record_stream,
}
