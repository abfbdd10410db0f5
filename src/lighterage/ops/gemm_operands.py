"""What every backend asks of its operands before it multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from lighterage.formats.split_tensors import SplitTensors

if TYPE_CHECKING:
    from lighterage.formats.splits import Splits

Direction = Literal["rowwise", "columnwise"]
Operand: TypeAlias = SplitTensors | torch.Tensor


def quantized(operand: Operand, role: str, direction: Direction) -> SplitTensors:
    """`operand` as what `split_quantize` made of it.

    Raises: TypeError: if it is a plain tensor.
    """
    if not isinstance(operand, SplitTensors):
        raise TypeError(
            f"this GEMM backend multiplies quantized operands; {role} is a plain tensor. Quantize it {direction} with "
            "split_quantize, or choose the backend for format None."
        )
    return operand


def plain(operand: Operand, role: str) -> torch.Tensor:
    """`operand` as a tensor.

    Raises: TypeError: if it is quantized.
    """
    if isinstance(operand, SplitTensors):
        raise TypeError(
            f"this GEMM backend multiplies plain tensors; {role} is quantized. Choose the backend for its format."
        )
    return operand


def bulk_buffer(operand: SplitTensors, role: str, direction: Direction) -> torch.Tensor:
    """The uint8 buffer of one direction.

    Raises: ValueError: if that direction is not there.
    """
    buffer = operand.buffers.get(direction)
    if buffer is None:
        raise ValueError(
            f"this product reads {role} {direction}, which is not there. Quantize it with {direction}=True, and do not "
            "drop that usage before."
        )
    return buffer


def check_aligned(splits: Splits, multiple: int, what: str) -> None:
    """Check that every expert's rows are whole blocks, as far as the host knows them.

    Raises: ValueError.
    """
    if splits.rows is None or splits.rows.bits % multiple == 0:
        return
    for expert, size in enumerate(splits.rows.rows):
        if size % multiple:
            raise ValueError(
                f"{what} needs the rows of every expert in multiples of {multiple}; got {size} for expert {expert}. "
                f"Pad each expert's rows: lighterage.ops.pad_rows(x, m_splits, {multiple})."
            )


def spans(splits: Splits) -> Iterator[tuple[int, int]]:
    """First row and end of every expert. Asks the device if the host does not know."""
    sizes = splits.host
    ends = splits.ends.tolist() if sizes is None else accumulate(sizes)
    return pairwise([0, *ends])


def fp8_dtype_of(operand: SplitTensors) -> torch.dtype:
    """E4M3 or E5M2, of an operand in an FP8 format."""
    fp8_dtype = operand.options["fp8_dtype"]
    assert isinstance(fp8_dtype, torch.dtype)
    return fp8_dtype


def check_one_dimensional_scales(operand: SplitTensors, role: str) -> None:
    """Check that an operand other than the weight has 1x128 scales.

    Raises: ValueError.
    """
    if operand.block_2d:
        raise ValueError(
            f"a block-scaled product reads {role} with 1x128 scales; it has 128x128 ones. Quantize it with "
            "block_scaling_dim=1."
        )


def codes_of(tensor: torch.Tensor, direction: Direction) -> torch.Tensor:
    """2-D uint8 codes of a member, the contracted dimension last; MXFP8 is not transposed columnwise and differs."""
    data = field_of(tensor, direction, "data")
    return data.flatten(1) if direction == "columnwise" else data.flatten(0, -2)


def field_of(tensor: torch.Tensor, direction: Direction, name: str) -> torch.Tensor:
    """One field of a member.

    Raises: ValueError: if its usage is off.
    """
    field: torch.Tensor | None = getattr(tensor, f"{direction}_{name}")
    if field is None:
        raise ValueError(
            f"this product reads {type(tensor).__name__} {direction}, which is not there. Quantize it with "
            f"{direction}=True, and do not drop that usage before."
        )
    return field
