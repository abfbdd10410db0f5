"""The values of a whole group in one matrix, from one of its bulk buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast

import torch

from lighterage.formats.arguments import is_one_of
from lighterage.formats.quantized_tensor import DIRECTIONS, value_dtype, view_over
from lighterage.formats.quantizer import Backend, chosen_triton
from lighterage.formats.split_tensors import SplitTensors
from lighterage.kernels.reference import fp8_block, mxfp8, nvfp4


def dequantize_group(
    tensors: SplitTensors,
    direction: Literal["rowwise", "columnwise"],
    *,
    dtype: torch.dtype | None = None,
    with_amax: bool = True,
    backend: Backend = "auto",
) -> torch.Tensor:
    """What the codes of one direction of all splits stand for, as one matrix.

    tensors: what `split_quantize` gave with buffers. No member is made.
    direction: whose codes are read.
    dtype: bf16, fp16 or fp32 of the result; None: that of what was quantized.
    with_amax: False leaves out the factor amax / 2688 that NVFP4 has for each split: the rest is exact in bf16.
    backend: as for `split_quantize`. Triton makes one launch and never waits for the device.

    Returns: (M, K), leading dimensions flattened, not transposed. Rows past the last split are zeros. What NVFP4
    transformed before it quantized stays transformed: products of two such operands want it so.
    Raises: ValueError: if there is no buffer of that direction. TypeError: on arguments of another kind.
    """
    _check_group(tensors, direction)
    dtype = value_dtype(dtype, tensors.dtype)
    buffer = tensors.buffers.get(direction)
    name = tensors.format_name
    if buffer is None or name is None:
        raise ValueError(
            f"there is no {direction} buffer to read: the group has {sorted(tensors.buffers) or 'none'}. "
            f"Quantize with {direction}=True into bulk buffers, or bring it back with with_buffers({direction}=...)."
        )
    splits, fp8_dtype = tensors.splits, tensors.options.get("fp8_dtype")
    if chosen_triton(backend, splits.device):
        from lighterage.kernels.triton.dequantize import dequantize_rows

        return dequantize_rows(
            buffer,
            splits.ends,
            format_name=name,
            num_rows=splits.num_rows,
            num_cols=tensors.num_cols,
            num_splits=splits.num_splits,
            columnwise=direction == "columnwise",
            block_2d=tensors.block_2d,
            out_dtype=dtype,
            fp8_dtype=cast(torch.dtype, fp8_dtype or torch.float8_e4m3fn),
            with_amax=with_amax,
        )
    values = torch.zeros(splits.num_rows, tensors.num_cols, dtype=dtype, device=splits.device)
    layout = tensors.group.layout(direction)
    sizes = splits.sizes
    for index, values_MK in enumerate(values[: sum(sizes)].split(sizes)):
        fields = {part.name: view_over(buffer, layout.view(part.name, index)) for part in layout.parts}
        if values_MK.numel():
            values_MK.copy_(_values(tensors, fields, direction == "columnwise", dtype, with_amax))
    return values


def _check_group(tensors: object, direction: object) -> None:
    if not isinstance(tensors, SplitTensors) or not is_one_of(direction, DIRECTIONS):
        raise TypeError(
            f"dequantize_group takes the tensors of split_quantize and 'rowwise' or 'columnwise'; got "
            f"{type(tensors).__name__} and {direction!r}. A single tensor has dequantize()."
        )


def _values(
    tensors: SplitTensors, fields: Mapping[str, torch.Tensor], columnwise: bool, dtype: torch.dtype, with_amax: bool
) -> torch.Tensor:
    """(M, K) of one split, in plain torch."""
    data, scale = fields["data"], fields["scale_inv"]
    if tensors.format_name == "nvfp4":
        return nvfp4.dequantize(
            data if columnwise else data.flatten(0, -2),
            scale,
            fields["amax"] if with_amax else None,
            columnwise=columnwise,
            hadamard=False,
            out_dtype=dtype,
        )
    fp8_dtype = cast(torch.dtype, tensors.options["fp8_dtype"])
    if tensors.format_name == "mxfp8":
        return mxfp8.dequantize(data.flatten(0, -2), scale, fp8_dtype=fp8_dtype, columnwise=columnwise, out_dtype=dtype)
    return fp8_block.dequantize(
        data.flatten(1) if columnwise else data.flatten(0, -2),
        scale,
        fp8_dtype=fp8_dtype,
        block_2d=tensors.block_2d,
        columnwise=columnwise,
        out_dtype=dtype,
    )
