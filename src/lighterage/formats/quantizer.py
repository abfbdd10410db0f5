"""What every quantizer is, what those of bulk layouts also are, and what all of them share as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import torch

from lighterage.formats.arguments import check_flag, is_one_of
from lighterage.formats.parts import FormatName
from lighterage.formats.quantized_tensor import T, options_of
from lighterage.formats.tensor_arguments import check_no_transform, check_not_distributed

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
        swiglu: bool,
    ) -> None:
        """Both directions of all splits with Triton, into buffers as their layouts say. swiglu: of SwiGLU of `x_MK`."""
        ...


def quantize_into(quantizer: Quantizer, x: torch.Tensor, out: T, *, backend: Backend = "auto") -> T:
    """Quantize `x` into the memory of `out`, which keeps its usages; returns `out`. Every quantizer's `update`.

    Raises: ValueError, TypeError: if `out` is not what this quantizer makes of `x`.
    """
    fresh = quantizer(x, backend=backend)
    if type(out) is not type(fresh) or options_of(out) != options_of(fresh) or out.shape != fresh.shape:
        raise ValueError(
            f"update writes into a tensor of the class, options and shape that the quantizer makes, {fresh!r}; got "
            f"{out!r}. Call the quantizer to make a new one."
        )
    out.copy_(fresh)
    return out


def chosen_triton(backend: Backend, device: torch.device) -> bool:
    """Whether Triton does the work.

    Raises: ValueError: on a device that nothing was chosen for or that holds nothing, or an unknown name.
    """
    check_backend(backend)
    check_has_memory(device)
    if backend == "auto" and device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"there are no fast kernels for {device.type} tensors. Pass backend='reference' for the slow, exact ones."
        )
    return backend == "triton" or (backend == "auto" and device.type == "cuda")


def check_has_memory(device: torch.device) -> None:
    """Check that tensors on `device` have values.

    Raises: ValueError.
    """
    if device.type == "meta":
        raise ValueError(
            "tensors on the meta device have no values to quantize. Move them first: x.to_empty, or to('cpu')."
        )


def check_backend(backend: str) -> None:
    """Check the name of a backend.

    Raises: ValueError.
    """
    if not is_one_of(backend, ("auto", "reference", "triton")):
        raise ValueError(f"backend must be 'auto', 'reference' or 'triton'; got {backend!r}.")


def set_usage(quantizer: Quantizer, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
    """Choose which directions the next tensors get; None leaves one as it is."""
    for name, usage in (("rowwise", rowwise), ("columnwise", columnwise)):
        if usage is not None:
            check_flag(name, usage)
            setattr(quantizer, name, usage)


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
    check_not_distributed("x", x)
    check_no_transform("quantization")
    if x.is_nested:
        raise TypeError("quantization needs a strided tensor; got a nested one. Pass its values: x.values().")
    if x.ndim < 2:
        raise ValueError(f"quantization needs x of 2 dimensions or more; got {tuple(x.shape)}. Use x.view(1, -1).")


def draw_seed(generator: torch.Generator) -> int:
    """A seed of 62 bits from a CPU or CUDA generator, which moves on. The host never waits for the device."""
    if generator.device.type == "cpu":
        return int(torch.randint(2**62, (), generator=generator))
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    local = torch.Generator().manual_seed(generator.initial_seed() ^ (offset << 20))
    return int(torch.randint(2**62, (), generator=local))
