"""An input that was quantized already, as the operand that a layer of its recipe would have made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from lighterage.formats.buffers import allocate
from lighterage.formats.fp8_tensor import Float8Tensor
from lighterage.formats.layout import BulkLayout
from lighterage.formats.quantized_tensor import DIRECTIONS, has_usage, inner_of, map_inner, options_of, view_over
from lighterage.formats.quantizer import BulkQuantizer
from lighterage.formats.split_tensors import Group, SplitTensors
from lighterage.formats.splits import Splits
from lighterage.ops.per_tensor import ScaledCodes
from lighterage.recipes import Recipe


def quantized_rows(
    x_MK: torch.Tensor, splits: Splits, recipe: Recipe, *, rowwise: bool, columnwise: bool
) -> SplitTensors | ScaledCodes:
    """`x_MK`, a quantized tensor, as the input of one layer. Its codes are not changed.

    They are copied only if a direction is not in one buffer, as a quantizer leaves it: after `clone()` or `to()`.

    rowwise, columnwise: the directions that will be read.
    Raises: TypeError, ValueError: if the recipe would have quantized otherwise, a direction is missing, or there are
        several experts: their blocks begin anew with each, and those of a single tensor do not.
    """
    quantizer = recipe.quantizer("input", rowwise=True, columnwise=True)
    wanted, options = _kind(recipe, quantizer)
    if type(x_MK) is not wanted or any(options_of(x_MK)[name] != value for name, value in options.items()):
        raise TypeError(
            f"an input that is quantized already must be what {recipe} makes of an input, {wanted.__name__} with "
            f"{options}; got {x_MK!r}. Quantize it with recipe.quantizer('input', rowwise=True, columnwise=True)."
        )
    if splits.num_splits != 1 or not splits.cover_all_rows:
        raise ValueError(
            f"a quantized input can be that of one layer over all its rows, not of {splits.num_splits} experts, whose "
            "blocks begin anew. "
            "Pass the input as it was before it was quantized."
        )
    for direction, needed in (("rowwise", rowwise), ("columnwise", columnwise)):
        if needed and not has_usage(x_MK, direction):
            raise ValueError(
                f"this layer reads the {direction} codes of its input, which are not there: {x_MK!r}. Quantize with "
                f"{direction}=True."
            )
    if isinstance(x_MK, Float8Tensor):
        return _scaled_codes(x_MK)
    return _group_of_one(x_MK, splits, cast(BulkQuantizer, quantizer))


def _kind(recipe: Recipe, quantizer: object) -> tuple[type[torch.Tensor], dict[str, object]]:
    """The class of what the recipe makes of an input, and the options that decide what its codes mean."""
    if hasattr(quantizer, "tensor_class"):
        made = cast(BulkQuantizer, quantizer)
        return made.tensor_class, made.tensor_options()
    return Float8Tensor, {"fp8_dtype": torch.float8_e4m3fn}


def _scaled_codes(x_MK: Float8Tensor) -> ScaledCodes:
    assert x_MK.scale_inv is not None
    data = [None if part is None else part.view(x_MK.fp8_dtype) for part in (x_MK.rowwise_data, x_MK.columnwise_data)]
    return ScaledCodes(rowwise=data[0], columnwise=data[1], scale_inv=x_MK.scale_inv)


def _group_of_one(x_MK: torch.Tensor, splits: Splits, quantizer: BulkQuantizer) -> SplitTensors:
    assert splits.rows is not None, "one split has all rows, which the host knows"
    row_shape = (x_MK.shape[1],)
    held = inner_of(x_MK)
    layouts = {
        direction: BulkLayout(
            quantizer.format_name, splits.rows, row_shape, direction == "columnwise", quantizer.block_2d
        )
        for direction in DIRECTIONS
        if f"{direction}_data" in held
    }
    group = Group.made_by(quantizer, splits, dtype=x_MK.dtype, row_shape=row_shape, layouts=layouts)
    # Another wrapper of the same codes: what the layer lets go of, the caller's tensor keeps.
    tensors = SplitTensors(group, members=[map_inner(x_MK, lambda part: part)])
    return tensors if set(tensors.buffers) == set(layouts) else SplitTensors(group, buffers=_in_buffers(group, held))


def _in_buffers(group: Group, held: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The fields of a group of one, each direction's copied into one buffer."""
    buffers = {}
    for direction in group.layouts:
        layout = group.layout(direction)
        buffers[direction] = allocate(layout, group.splits.device)
        for part in layout.parts:
            view_over(buffers[direction], layout.view(part.name, 0)).copy_(held[f"{direction}_{part.name}"])
    return buffers
