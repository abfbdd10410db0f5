"""FP8 with one float32 scale for the whole tensor, from its own largest magnitude (current scaling).

The columnwise direction is the same codes, transposed, with the same scale. Its tensors are allocated one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from lighterage.formats import quantized_tensor, quantizer
from lighterage.formats.arguments import check_flags, check_number
from lighterage.formats.dispatch import answers_torch
from lighterage.formats.layout import ViewSpec
from lighterage.kernels.reference import fp8_tensor as reference
from lighterage.kernels.reference.casts import fp8_max


@final
@answers_torch
class Float8Tensor(torch.Tensor):
    """A tensor (*leading, K), quantized to FP8 with one scale.

    rowwise_data: uint8 (*leading, K). columnwise_data: uint8 (K, *leading). scale_inv: float32 (1,), of both.
    Each data is None where its usage is off, and the scale where both are.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ("rowwise_data", "columnwise_data", "scale_inv")
    OPTIONS: ClassVar[tuple[str, ...]] = ("fp8_dtype",)

    rowwise_data: torch.Tensor | None
    columnwise_data: torch.Tensor | None
    scale_inv: torch.Tensor | None
    fp8_dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values that the codes stand for, in `dtype` (None: that of what was quantized).

        Raises: RuntimeError: if both usages were dropped.
        """
        columnwise = quantized_tensor.some_direction(self) == "columnwise"
        data = self.columnwise_data.movedim(0, -1) if self.columnwise_data is not None else None
        if not columnwise:
            data = self.rowwise_data
        assert data is not None and self.scale_inv is not None
        values = reference.dequantize(
            data.contiguous(),
            self.scale_inv,
            fp8_dtype=self.fp8_dtype,
            out_dtype=quantized_tensor.value_dtype(dtype, self.dtype),
        )
        return values.view(self.shape)

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Drop the directions that are False and make those that are True; None leaves a direction as it is.

        Either direction is the exact transpose of the other, and is made from it. Both False is legal: the data has
        gone away and may be restored.
        Raises: ValueError: if a direction is asked for and neither is there.
        """
        quantized_tensor.update_usage(self, rowwise_usage, columnwise_usage, self._transposed)

    def _transposed(self, direction: str) -> dict[str, torch.Tensor] | None:
        data = self.rowwise_data if direction == "columnwise" else self.columnwise_data
        assert data is not None
        moved = data.movedim(-1, 0) if direction == "columnwise" else data.movedim(0, -1)
        return {f"{direction}_data": moved.contiguous()}

    def inner_specs(self, shape: Sequence[int]) -> dict[str, ViewSpec]:
        """Shape and dtype of every field, were this tensor of `shape`."""
        return {
            "rowwise_data": ViewSpec(offset=0, shape=tuple(shape), dtype="uint8"),
            "columnwise_data": ViewSpec(offset=0, shape=(shape[-1], *shape[:-1]), dtype="uint8"),
            "scale_inv": ViewSpec(offset=0, shape=(1,), dtype="float32"),
        }

    data_tensors = quantized_tensor.data_tensors
    prepare_for_saving = quantized_tensor.prepare_for_saving
    restore_from_saved = quantized_tensor.restore_from_saved


@final
@dataclass(kw_only=True, eq=False)
class Float8CurrentScalingQuantizer:
    """Makes `Float8Tensor`s whose scale comes from the tensor itself."""

    rowwise: bool = True
    """Make the data as it lies."""
    columnwise: bool = True
    """Make the transposed data."""
    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    """E4M3, or torch.float8_e5m2."""
    power_of_2_scale: bool = False
    """Round the scale down to a power of two."""
    amax_epsilon: float = 0.0
    """A smaller largest magnitude counts as this."""

    def __post_init__(self) -> None:
        fp8_max(self.fp8_dtype)
        check_flags(self, "rowwise", "columnwise", "power_of_2_scale")
        check_number("amax_epsilon", self.amax_epsilon, least=0)

    def __call__(self, x: torch.Tensor, *, backend: quantizer.Backend = "auto") -> Float8Tensor:
        """Quantize `x` (*leading, K) bf16, fp16 or fp32, of any sizes; not recorded by autograd.

        backend: "auto" and "reference" are the same plain-torch arithmetic, on any device.
        Raises: ValueError, TypeError: naming the rule that x breaks.
        """
        quantizer.check_usage(self)
        quantizer.check_input(x)
        quantizer.check_backend(backend)
        if backend == "triton":
            raise ValueError("per-tensor FP8 has no Triton kernel. Pass backend='auto' or backend='reference'.")
        data, scale_inv, _ = reference.quantize(
            x.detach(), fp8_dtype=self.fp8_dtype, power_of_2=self.power_of_2_scale, epsilon=self.amax_epsilon
        )
        inner = {"rowwise_data": data, "scale_inv": scale_inv}
        options: dict[str, object] = {"fp8_dtype": self.fp8_dtype}
        out = quantized_tensor.construct(Float8Tensor, x.shape, x.dtype, x.device, inner, options)
        out.update_usage(rowwise_usage=self.rowwise, columnwise_usage=self.columnwise)
        return out

    set_usage = quantizer.set_usage
    update = quantizer.quantize_into
