"""What grouped layers ask of their arguments, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from lighterage.formats.quantized_tensor import is_quantized
from lighterage.formats.splits import Splits
from lighterage.formats.tensor_arguments import (
    check_has_values,
    check_no_transform,
    check_not_distributed,
    check_tensor,
)
from lighterage.recipes import Recipe

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_OPTIONAL = ("bias", "probs")


def check_operands(x: object, **parameters: object) -> None:
    """Check that the input, weights and biases of a layer, by name, are tensors at all, and none is a transform's.

    Raises: TypeError, RuntimeError.
    """
    check_no_transform("quantized and grouped layers")
    check_tensor("x", x, dtypes=None)
    check_not_distributed("x", x)
    check_has_values("x", x)
    for name, parameter in parameters.items():
        if parameter is not None or name not in _OPTIONAL:
            check_tensor(name, parameter, dtypes=None)
            check_not_distributed(name, parameter)
            if is_quantized(parameter):
                raise TypeError(
                    f"{name} must be in high precision, and is quantized by the recipe; got {parameter!r}. Pass what "
                    "it was made from, or its dequantize()."
                )


def checked_rows(x: torch.Tensor, w_ENK: torch.Tensor, recipe: Recipe | None) -> torch.Tensor:
    """`x` (*, K) as a matrix (M, K), after checking that it fits the weights.

    Raises: TypeError, ValueError: naming the rule, what was received, and what to do.
    """
    if x.device.type == "meta":
        raise ValueError(
            "the input is on the meta device and has no values. Make the model and its input on a real one."
        )
    if x.dtype not in _DTYPES or (is_quantized(x) and recipe is None):
        raise TypeError(
            f"a linear layer needs a bf16, fp16 or fp32 input; got a {type(x).__name__} of {x.dtype}. Cast it, or call "
            "its dequantize()."
        )
    if w_ENK.dtype not in _DTYPES:
        raise TypeError(f"a linear layer needs bf16, fp16 or fp32 weights; got {w_ENK.dtype}. Cast them.")
    if x.device != w_ENK.device:
        raise ValueError(f"the input is on {x.device} and the weight on {w_ENK.device}. Move one: x.to(weight.device).")
    num_out, num_in = w_ENK.shape[1:]
    if w_ENK.shape[0] == 0 or num_in == 0:
        raise ValueError(f"there must be an expert and an input feature at least; got weights {tuple(w_ENK.shape)}.")
    if x.ndim < 1 or x.shape[-1] != num_in:
        raise ValueError(
            f"the last dimension of the input must be the {num_in} input features; got {tuple(x.shape)} for weights "
            f"{tuple(w_ENK.shape)}."
        )
    if recipe is None and x.dtype != w_ENK.dtype:
        raise TypeError(
            f"without a recipe the input must have the weight's dtype, {w_ENK.dtype}; got {x.dtype}. Cast the input, "
            "use torch.autocast, or name a recipe."
        )
    check_features(recipe, num_in, num_out)
    return x.reshape(-1, num_in)


def check_features(recipe: Recipe | None, num_in: int, num_out: int) -> None:
    """Check that a layer is as wide as its recipe needs it.

    Raises: ValueError: naming the rule, what was received, and what to do.
    """
    if recipe is not None and (num_in % recipe.dim_multiple or num_out % recipe.dim_multiple):
        raise ValueError(
            f"{type(recipe).__name__} needs input and output features divisible by {recipe.dim_multiple}; got {num_in} "
            f"and {num_out}. Pad the layer, or leave the recipe out for it."
        )


def checked_splits(
    m_splits: Sequence[int] | torch.Tensor | Splits,
    x_MK: torch.Tensor,
    num_experts: int,
    recipe: Recipe | None,
) -> Splits:
    """The splits of the rows of `x_MK`, one for each expert, in multiples of what the recipe's blocks need.

    Sizes that only the device knows are not looked at, and cannot be checked.
    Raises: TypeError, ValueError: naming the rule, what was received, and what to do.
    """
    splits = Splits.of(m_splits, x_MK.shape[0], x_MK.device)
    if splits.num_splits != num_experts:
        raise ValueError(
            f"m_splits needs one size for each of the {num_experts} experts; got {splits.num_splits}. Use 0 for an "
            "expert without rows."
        )
    if recipe is None or splits.rows is None or splits.rows.bits % recipe.row_multiple == 0:
        return splits
    sizes = splits.rows.rows
    expert = next(i for i, size in enumerate(sizes) if size % recipe.row_multiple)
    raise ValueError(
        f"{type(recipe).__name__} needs the rows of every expert in multiples of {recipe.row_multiple}; got "
        f"{sizes[expert]} for expert {expert}. Pad them: x, m_splits = "
        f"lighterage.ops.pad_rows(x, m_splits, {recipe.alignment})."
    )


def checked_bias(bias_EN: torch.Tensor | None, w_ENK: torch.Tensor) -> torch.Tensor | None:
    """`bias_EN`, after checking its shape and device.

    Raises: ValueError.
    """
    if bias_EN is not None and (bias_EN.shape != w_ENK.shape[:2] or bias_EN.device != w_ENK.device):
        raise ValueError(
            f"bias must be {tuple(w_ENK.shape[:2])} on {w_ENK.device}, one row for each expert; got "
            f"{tuple(bias_EN.shape)} on {bias_EN.device}."
        )
    return bias_EN


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on this device, if it is on."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, autocast does not touch the products that a backend makes."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def graph_is_kept() -> bool:
    """Whether the backward that is running was told to retain its graph, so that it may come again."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
