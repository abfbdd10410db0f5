"""Quantize a group of splits into one buffer for each direction, in one pass over the input.

A single tensor is a group of one. Which kernels do the work is chosen once for a call: the plain-torch reference on the
CPU, Triton on CUDA, or what `backend` names.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol, cast

import torch

from lighterage.formats.layout import BulkLayout, checked_rows
from lighterage.formats.parts import BASE_ALIGNMENT, FormatName, SplitRows
from lighterage.formats.quantized_tensor import DIRECTIONS, options_of, view_over
from lighterage.formats.split_tensors import BulkSource, SplitTensors

Backend = Literal["auto", "reference", "triton"]
RoundingBits = Callable[[tuple[int, int]], torch.Tensor] | None
"""Gives uniform bytes of a shape, for stochastic rounding; None rounds to nearest."""
_INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Quantizer(Protocol):
    """What every quantizer has."""

    rowwise: bool
    columnwise: bool

    def __call__(self, x: torch.Tensor, *, backend: Backend = "auto") -> torch.Tensor: ...


class BulkQuantizer(Quantizer, Protocol):
    """What the quantizer of a format with a bulk layout also has."""

    format_name: ClassVar[FormatName]
    tensor_class: ClassVar[type[torch.Tensor]]

    @property
    def block_2d(self) -> bool:
        """Whether scales belong to two-dimensional blocks."""
        ...

    def tensor_options(self) -> dict[str, object]:
        """The options of the tensors that it makes."""
        ...

    def check(self, x: torch.Tensor) -> None:
        """Raise TypeError or ValueError for what this format alone refuses."""
        ...

    def draw_seed(self) -> int | None:
        """The seed of one call, if rounding is stochastic."""
        ...

    def reference(self, x_MK: torch.Tensor, columnwise: bool, bits: RoundingBits) -> tuple[torch.Tensor, ...]:
        """One direction of one tensor in plain torch, in the order of the layout's parts."""
        ...

    def launch(
        self,
        x_MK: torch.Tensor,
        ends: torch.Tensor,
        rowwise_buffer: torch.Tensor | None,
        columnwise_buffer: torch.Tensor | None,
        num_splits: int,
        seed: int | None,
    ) -> None:
        """Both directions of all splits with Triton, into buffers as their layouts say."""
        ...


def split_quantize(
    x: torch.Tensor,
    m_splits: Sequence[int] | torch.Tensor,
    quantizers: Sequence[Quantizer],
    *,
    disable_bulk_allocation: bool = False,
    backend: Backend = "auto",
) -> tuple[SplitTensors, list[torch.Tensor]]:
    """Split `x` along its first dimension and quantize every split.

    x: (sum(m_splits), *, K) bf16, fp16 or fp32, on any device; not recorded by autograd.
    m_splits: sizes of the splits, zeros among them if you like: integers, or an integer tensor on the CPU.
    quantizers: one for each split.
    disable_bulk_allocation: give every tensor memory of its own.
    backend: "reference" (plain torch), "triton", or "auto": Triton for CUDA tensors.

    Returns: the quantized splits, a sequence whose members are made when they are first looked at, and the buffers that
    back them: uint8, 1-D, laid out as `bulk_layout` says, the rowwise one (if there is one) before the columnwise one
    (if there is one). Every member is made of ordinary views of them. Formats without a bulk layout, and lists of
    quantizers that differ in format or options, are quantized one by one, and there are no buffers.

    Work lands on the current stream; the host does not wait for it.
    Raises: ValueError, TypeError: naming the rule, what was received, and what to do.
    """
    check_input(x)
    splits = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else m_splits
    if len(splits) != len(quantizers):
        raise ValueError(
            f"split_quantize needs one quantizer for each split; got {len(quantizers)} quantizers and {len(splits)} "
            "splits. Repeat one quantizer: [quantizer] * len(m_splits)."
        )
    if not splits:
        _check_total(x, 0)
        return SplitTensors([], None), []
    quantizer = quantizers[0]
    if disable_bulk_allocation or not hasattr(quantizer, "format_name") or not _all_alike(quantizers):
        return _one_by_one(x, splits, quantizers, backend), []
    return _quantize_group(x, splits, cast(BulkQuantizer, quantizer), backend)


def quantize_one(x: torch.Tensor, quantizer: BulkQuantizer, backend: Backend) -> torch.Tensor:
    """`x` as a group of one."""
    check_input(x)
    return _quantize_group(x, (x.shape[0],), quantizer, backend)[0][0]


def quantize_into(x: torch.Tensor, quantizer: Quantizer, out: torch.Tensor, backend: Backend) -> None:
    """Quantize `x` and copy the codes into `out`, which keeps its usages.

    Raises: ValueError: if `out` was not made by such a quantizer from such a tensor.
    """
    fresh = quantizer(x, backend=backend)
    if type(out) is not type(fresh) or options_of(out) != options_of(fresh) or out.shape != fresh.shape:
        raise ValueError(
            f"update writes into a tensor of the class, options and shape that the quantizer makes, {fresh!r}; got "
            f"{out!r}. Call the quantizer to make a new one."
        )
    out.copy_(fresh)


def _quantize_group(
    x: torch.Tensor, m_splits: Sequence[int], quantizer: BulkQuantizer, backend: Backend
) -> tuple[SplitTensors, list[torch.Tensor]]:
    check_usage(quantizer)
    quantizer.check(x)
    row_shape = tuple(x.shape[1:])
    rows = checked_rows(quantizer.format_name, m_splits, row_shape)
    _check_total(x, sum(rows.splits))
    use_triton = chosen_triton(backend, x.device)
    layouts, buffers = {}, {}
    for direction in DIRECTIONS:
        if getattr(quantizer, direction):
            columnwise = direction == "columnwise"
            layout = BulkLayout(quantizer.format_name, rows, row_shape, columnwise, quantizer.block_2d)
            layouts[direction], buffers[direction] = layout, allocate(layout, x.device)
    source = BulkSource(quantizer.tensor_class, quantizer.tensor_options(), x.dtype, x.device, layouts, buffers)
    tensors = SplitTensors([None] * len(rows.splits), source)
    x_MK = x.detach().reshape(rows.total, row_shape[-1]).contiguous()
    if x_MK.numel() == 0:
        for buffer in buffers.values():
            buffer.zero_()
    elif use_triton:
        ends = upload_ends(rows, x.device)
        ways = buffers.get("rowwise"), buffers.get("columnwise")
        quantizer.launch(x_MK, ends, *ways, len(rows.splits), quantizer.draw_seed())
    else:
        _fill_with_reference(x_MK, rows, source, quantizer)
    return tensors, list(buffers.values())


def allocate(layout: BulkLayout, device: torch.device) -> torch.Tensor:
    """A new buffer for `layout`, uint8 of `layout.num_bytes`, that begins at a multiple of 256 bytes; uninitialised."""
    whole = torch.empty(layout.allocated_bytes, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % BASE_ALIGNMENT
    return whole.narrow(0, start, layout.num_bytes)


def upload_ends(rows: SplitRows, device: torch.device) -> torch.Tensor:
    """The rows up to and including each split, int64, on `device`, without waiting for it.

    The copy leaves from pinned memory, whose allocator keeps it until the copy is done and then uses it again.
    """
    sizes = torch.frombuffer(array("q", rows.rows), dtype=torch.int64)
    if device.type == "cpu":
        return sizes.cumsum(0)
    staging = torch.empty(len(rows.rows), dtype=torch.int64, pin_memory=True)
    return torch.cumsum(sizes, 0, out=staging).to(device, non_blocking=True)


def _fill_with_reference(x_MK: torch.Tensor, rows: SplitRows, source: BulkSource, quantizer: BulkQuantizer) -> None:
    seed = quantizer.draw_seed()
    random = None if seed is None else torch.Generator(x_MK.device).manual_seed(seed)
    bits = None if random is None else lambda shape: _random_bytes(shape, random)
    for index, x_split in enumerate(x_MK.split(rows.rows)):
        for direction, buffer in source.buffers.items():
            layout = source.layouts[direction]
            results = quantizer.reference(x_split, direction == "columnwise", bits)
            for part, result in zip(layout.parts, results, strict=True):
                view = view_over(buffer, layout.view(part.name, index))
                view.copy_(result.view(view.shape))


def _random_bytes(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device=generator.device)


def draw_seed(generator: torch.Generator) -> int:
    """A seed of 62 bits from a CPU or CUDA generator, which moves on. The host never waits for the device."""
    if generator.device.type == "cpu":
        return int(torch.randint(2**62, (), generator=generator))
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    local = torch.Generator().manual_seed(generator.initial_seed() ^ (offset << 20))
    return int(torch.randint(2**62, (), generator=local))


def _one_by_one(
    x: torch.Tensor, m_splits: Sequence[int], quantizers: Sequence[Quantizer], backend: Backend
) -> SplitTensors:
    if any(split < 0 for split in m_splits):
        raise ValueError(f"m_splits must not be negative; got {list(m_splits)}. Use 0 for an empty split.")
    _check_total(x, sum(m_splits))
    pieces = zip(quantizers, x.split(list(m_splits)), strict=True)
    return SplitTensors([quantizer(piece, backend=backend) for quantizer, piece in pieces], None)


def _all_alike(quantizers: Sequence[Quantizer]) -> bool:
    """Whether all are of one format with the same options. Cheap for many: one object many times, or equal ones."""
    first, num = quantizers[0], len(quantizers)
    if list(quantizers).count(first) == num:
        return True
    same_class = list(map(type, quantizers)).count(type(first)) == num
    return same_class and list(map(vars, quantizers)).count(vars(first)) == num


def chosen_triton(backend: Backend, device: torch.device) -> bool:
    """Whether Triton does the work.

    Raises: ValueError: on a device that nothing was chosen for, or an unknown name.
    """
    check_backend(backend)
    if backend == "auto" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"there are no fast kernels for {device.type} tensors. Pass backend='reference' for the slow, exact ones."
        )
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def check_backend(backend: str) -> None:
    """Check the name of a backend.

    Raises: ValueError.
    """
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton'; got {backend!r}.")


def set_usage(quantizer: Quantizer, rowwise: bool | None, columnwise: bool | None) -> None:
    """Set the directions that are not None."""
    if rowwise is not None:
        quantizer.rowwise = rowwise
    if columnwise is not None:
        quantizer.columnwise = columnwise


def check_usage(quantizer: Quantizer) -> None:
    """Check that there is something to make.

    Raises: ValueError.
    """
    if not (quantizer.rowwise or quantizer.columnwise):
        raise ValueError(
            f"{quantizer!r} makes nothing: both usages are off. Call set_usage(rowwise=True) or columnwise."
        )


def check_input(x: object) -> None:
    """Check what every format asks of its input.

    Raises: TypeError, ValueError.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in _INPUT_DTYPES or x.layout != torch.strided:
        got = f"{x.dtype} {x.layout} (x: {tuple(x.shape)})" if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"quantization needs a strided bf16, fp16 or fp32 tensor; got {got}. Cast x first.")
    if hasattr(x, "FIELDS"):
        raise TypeError(f"x is quantized already: {x!r}. Call x.dequantize() first, or use it as it is.")
    if x.ndim < 2:
        raise ValueError(f"quantization needs x of 2 dimensions or more; got {tuple(x.shape)}. Use x.view(1, -1).")


def _check_total(x: torch.Tensor, total: int) -> None:
    if total != x.shape[0]:
        which = "short" if total < x.shape[0] else "long"
        raise ValueError(
            f"m_splits must add up to the first dimension of x; got a sum of {total} for {x.shape[0]} "
            f"(x: {tuple(x.shape)}): too {which} by {abs(total - x.shape[0])}. Slice x, or correct m_splits."
        )
