"""What is asked of tensors before they are used: that they are some, of values, on one device, and no transform's."""

from __future__ import annotations

import torch

_transforms = torch._C._functorch.peek_interpreter_stack
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What values are computed in: FP8 codes are not values without their scales."""


def check_tensor(name: str, value: object, *, dtypes: tuple[torch.dtype, ...] | None = FLOAT_DTYPES) -> None:
    """Check that `value` is a strided tensor of one of `dtypes` (None: of any).

    Raises: TypeError.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor; got {type(value).__name__}. Convert it: torch.as_tensor({name})."
        )
    if value.is_nested or value.layout != torch.strided:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a strided tensor; got a {kind} one. Pass its values, or {name}.to_dense().")
    if dtypes is not None and value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} must be of {wanted}; got {value.dtype} {tuple(value.shape)}. Cast it: {name}.to({dtypes[0]})."
        )


def check_not_distributed(name: str, tensor: object) -> None:
    """Check that a tensor is not a DTensor, of which this process has only a part.

    Raises: TypeError.
    """
    if type(tensor) is not torch.Tensor and hasattr(type(tensor), "to_local"):
        raise TypeError(
            f"{name} must be a plain tensor; got a {type(tensor).__name__}, of which other processes may hold the "
            f"rest. Pass {name}.to_local(), or {name}.full_tensor()."
        )


def check_has_values(name: str, tensor: object) -> None:
    """Check that a tensor is not on the meta device.

    Raises: ValueError.
    """
    if isinstance(tensor, torch.Tensor) and tensor.is_meta:
        raise ValueError(
            f"{name} is on the meta device and has no values; got {tuple(tensor.shape)}. Make it on another."
        )


def check_same_device(**tensors: torch.Tensor) -> None:
    """Check that all of them, by name, lie on one device.

    Raises: ValueError.
    """
    places = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(places.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise ValueError(
            f"{' and '.join(places)} must be on one device; got {found}. Move one of them with .to(device)."
        )


def check_no_transform(what: str) -> None:
    """Check that no transform of torch.func is at work, under which tensors are not what they seem.

    Raises: RuntimeError.
    """
    if _transforms() is not None:
        raise RuntimeError(
            f"{what} cannot run under the transforms of torch.func (grad, vjp, jvp, vmap), and one is at work. Use "
            "torch.autograd for gradients, and more rows in place of vmap."
        )
