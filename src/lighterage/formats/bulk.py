"""Quantize a group of splits into one buffer for each direction, in one pass over the input.

A single tensor is a group of one. Which kernels do the work is chosen once for a call: the plain-torch reference on the
CPU, Triton on CUDA, or what `backend` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, cast

import torch

from lighterage.formats.arguments import check_flag
from lighterage.formats.buffers import allocate
from lighterage.formats.capacity import BulkCapacity, bulk_capacity
from lighterage.formats.layout import BulkLayout, check_blocks, check_split_blocks, known_layout
from lighterage.formats.quantized_tensor import DIRECTIONS, view_over
from lighterage.formats.quantizer import Backend, BulkQuantizer, check_input, check_usage, chosen_triton
from lighterage.formats.quantizer import Quantizer as Quantizer
from lighterage.formats.split_tensors import Group, SplitTensors
from lighterage.formats.splits import Splits
from lighterage.kernels.reference.swiglu_rows import swiglu_rows

Activation = Literal["swiglu"] | None
"""What is computed of the input before it is quantized."""


def split_quantize(
    x: torch.Tensor,
    m_splits: Sequence[int] | torch.Tensor | Splits,
    quantizers: Sequence[Quantizer],
    *,
    activation: Activation = None,
    disable_bulk_allocation: bool = False,
    backend: Backend = "auto",
) -> tuple[SplitTensors, list[torch.Tensor]]:
    """Split `x` along its first dimension and quantize every split.

    x: (sum(m_splits), *, K) bf16, fp16 or fp32, on any device; not recorded by autograd.
    m_splits: sizes of the splits, zeros among them if you like: integers, an integer tensor on the CPU or on the device
        of x, or `Splits`. Sizes on the device are never looked at: buffers are as large as any splits of so many rows
        need, rows past the last split are ignored, and only the first look at a member waits for the device. Sizes
        that the format does not allow, or that add up to more than the rows, are undefined behaviour there.
    quantizers: one for each split.
    activation: "swiglu": x is (M, *, 2K), and what is quantized is silu of its first K columns times the other K, in
        float32, rounded to the dtype of x once. It is not stored.
    disable_bulk_allocation: give every tensor memory of its own.
    backend: "reference" (plain torch, which must look at the sizes), "triton", or "auto": Triton for CUDA tensors.

    Returns: the quantized splits, a sequence whose members are made when they are first looked at, and the buffers that
    back them: uint8, 1-D, laid out as `bulk_layout` says, the rowwise one (if there is one) before the columnwise one
    (if there is one). Every member is made of ordinary views of them. Formats without a bulk layout, and lists of
    quantizers that differ in format or options, are quantized one by one, and there are no buffers.

    Work lands on the current stream; the host does not wait for it.
    Raises: ValueError, TypeError: naming the rule, what was received, and what to do.
    """
    check_input(x)
    _check_activation(x, activation)
    check_flag("disable_bulk_allocation", disable_bulk_allocation)
    _check_quantizers(quantizers)
    shape = x.shape
    splits = Splits.of(m_splits, shape[0], x.device, rows_per_split=1 if len(shape) == 2 else prod(shape[1:-1]))
    if splits.num_splits != len(quantizers):
        raise ValueError(
            f"split_quantize needs one quantizer for each split; got {len(quantizers)} quantizers and "
            f"{splits.num_splits} splits. Repeat one quantizer: [quantizer] * len(m_splits)."
        )
    if not quantizers:
        return SplitTensors(Group(dtype=x.dtype, row_shape=_row_shape(x, activation), splits=splits)), []
    quantizer = quantizers[0]
    if disable_bulk_allocation or not hasattr(quantizer, "format_name") or not _all_alike(quantizers):
        return _one_by_one(x, splits, quantizers, activation, backend), []
    return _quantize_group(x, splits, cast(BulkQuantizer, quantizer), activation, backend)


def quantize_one(x: torch.Tensor, quantizer: BulkQuantizer, backend: Backend) -> torch.Tensor:
    """`x` as a group of one."""
    check_input(x)
    splits = Splits.of((x.shape[0],), x.shape[0], x.device, rows_per_split=prod(x.shape[1:-1]))
    return _quantize_group(x, splits, quantizer, None, backend)[0][0]


def _quantize_group(
    x: torch.Tensor, splits: Splits, quantizer: BulkQuantizer, activation: Activation, backend: Backend
) -> tuple[SplitTensors, list[torch.Tensor]]:
    check_usage(quantizer)
    quantizer.check(x)
    use_triton = chosen_triton(backend, x.device)
    row_shape = _row_shape(x, activation)
    check_blocks(quantizer.format_name, row_shape[-1])
    if splits.rows is not None:
        check_split_blocks(quantizer.format_name, splits.rows)
    layouts: dict[str, BulkLayout | BulkCapacity] = {}
    buffers = {}
    for direction in DIRECTIONS:
        if getattr(quantizer, direction):
            layouts[direction] = _layout(quantizer, splits, row_shape, direction == "columnwise")
            buffers[direction] = allocate(layouts[direction], x.device)
    group = Group.made_by(quantizer, splits, dtype=x.dtype, row_shape=row_shape, layouts=layouts)
    tensors = SplitTensors(group, buffers=buffers)
    whole = x.dim() == 2 and x.is_contiguous()
    x_MK = x if whole else x.detach().reshape(splits.num_rows, x.shape[-1]).contiguous()
    if x_MK.numel() == 0:
        for buffer in buffers.values():
            buffer.zero_()
    elif use_triton:
        ways = buffers.get("rowwise"), buffers.get("columnwise")
        quantizer.launch(x_MK, splits.ends, *ways, splits.num_splits, quantizer.draw_seed(), activation == "swiglu")
    else:
        _fill_with_reference(swiglu_rows(x_MK) if activation else x_MK, group, buffers, quantizer)
    return tensors, list(buffers.values())


def _row_shape(x: torch.Tensor, activation: Activation) -> tuple[int, ...]:
    """The dimensions after the first of what is quantized."""
    row_shape = tuple(x.shape[1:])
    return row_shape if activation is None else (*row_shape[:-1], row_shape[-1] // 2)


def _layout(
    quantizer: BulkQuantizer, splits: Splits, row_shape: tuple[int, ...], columnwise: bool
) -> BulkLayout | BulkCapacity:
    if splits.rows is not None:
        return known_layout(quantizer.format_name, splits.rows, row_shape, columnwise, quantizer.block_2d)
    return bulk_capacity(
        quantizer.format_name,
        num_rows=splits.num_rows,
        num_splits=splits.num_splits,
        num_cols=row_shape[-1],
        columnwise=columnwise,
        block_2d=quantizer.block_2d,
    )


def _fill_with_reference(
    x_MK: torch.Tensor, group: Group, buffers: dict[str, torch.Tensor], quantizer: BulkQuantizer
) -> None:
    seed = quantizer.draw_seed()
    random = None if seed is None else torch.Generator(x_MK.device).manual_seed(seed)
    bits = None if random is None else lambda shape: _random_bytes(shape, random)
    sizes = group.splits.sizes
    for index, x_split in enumerate(x_MK[: sum(sizes)].split(sizes)):
        for direction, buffer in buffers.items():
            layout = group.layout(direction)
            results = quantizer.reference(x_split, direction == "columnwise", bits)
            for part, result in zip(layout.parts, results, strict=True):
                view = view_over(buffer, layout.view(part.name, index))
                view.copy_(result.view(view.shape))


def _random_bytes(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=generator.device)


def _one_by_one(
    x: torch.Tensor, splits: Splits, quantizers: Sequence[Quantizer], activation: Activation, backend: Backend
) -> SplitTensors:
    row_shape = _row_shape(x, activation)
    y = swiglu_rows(x.detach().flatten(0, -2)).view(x.shape[0], *row_shape) if activation else x
    sizes = splits.sizes if splits.rows is None else splits.rows.splits
    pieces = zip(quantizers, y[: sum(sizes)].split(sizes), strict=True)
    members = [quantizer(piece, backend=backend) for quantizer, piece in pieces]
    return SplitTensors(Group(dtype=x.dtype, row_shape=row_shape, splits=splits), members=members)


def _all_alike(quantizers: Sequence[Quantizer]) -> bool:
    """Whether all are of one format with the same options. Cheap for many: one object many times, or equal ones."""
    first, num = quantizers[0], len(quantizers)
    if list(quantizers).count(first) == num:
        return True
    same_class = list(map(type, quantizers)).count(type(first)) == num
    return same_class and list(map(vars, quantizers)).count(vars(first)) == num


def _check_quantizers(quantizers: object) -> None:
    if not isinstance(quantizers, Sequence) or isinstance(quantizers, str):
        raise TypeError(
            f"quantizers must be a list with one for each split; got {quantizers!r}. Pass [quantizer] * len(m_splits)."
        )
    if quantizers and not hasattr(type(quantizers[0]), "set_usage"):
        raise TypeError(f"quantizers must be quantizers, such as Float8BlockQuantizer(); got {quantizers[0]!r}.")


def _check_activation(x: torch.Tensor, activation: object) -> None:
    if activation is not None and activation != "swiglu":
        raise ValueError(f"activation must be None or 'swiglu'; got {activation!r}.")
    if activation and x.shape[-1] % 2:
        raise ValueError(
            f"swiglu needs gate and up side by side, an even last dimension; got {tuple(x.shape)}. "
            "Pass torch.cat([gate, up], -1)."
        )
