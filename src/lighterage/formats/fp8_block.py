"""FP8 block scaling: float32 scales over 1x128 tiles or 128x128 blocks.

The columnwise direction is transposed data, (K, *leading), with its own scales: the operand that a product over the
rows reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from lighterage.formats import bulk, quantized_tensor, quantizer
from lighterage.formats.arguments import check_flags, check_number, is_one_of
from lighterage.formats.dispatch import answers_torch
from lighterage.formats.layout import ViewSpec
from lighterage.formats.parts import FormatName
from lighterage.kernels.reference import fp8_block as reference
from lighterage.kernels.reference.casts import fp8_max


@final
@answers_torch
class Float8BlockTensor(torch.Tensor):
    """A tensor (*leading, K), quantized to FP8 with block scales; M counts the rows of its leading dimensions.

    rowwise_data: uint8 (*leading, K); rowwise_scale_inv: float32 (ceil(K/128), ru(M, 4)).
    columnwise_data: uint8 (K, *leading); columnwise_scale_inv: float32 (ceil(M/128), ru(K, 4)).
    With 128x128 blocks the scales are (ceil(M/128), ru(ceil(K/128), 4)) and (ceil(K/128), ru(ceil(M/128), 4)).
    Each is None where its usage is off.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        "rowwise_data",
        "rowwise_scale_inv",
        "columnwise_data",
        "columnwise_scale_inv",
    )
    OPTIONS: ClassVar[tuple[str, ...]] = ("fp8_dtype", "block_scaling_dim")

    rowwise_data: torch.Tensor | None
    rowwise_scale_inv: torch.Tensor | None
    columnwise_data: torch.Tensor | None
    columnwise_scale_inv: torch.Tensor | None
    fp8_dtype: torch.dtype
    block_scaling_dim: int

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values that the codes stand for, in `dtype` (None: that of what was quantized).

        Raises: RuntimeError: if both usages were dropped.
        """
        direction = quantized_tensor.some_direction(self)
        columnwise = direction == "columnwise"
        data, scale_inv = quantized_tensor.fields_of(self, direction)
        num_cols = self.shape[-1]
        num_rows = self.numel() // num_cols if num_cols else 0
        values = reference.dequantize(
            data.view(num_cols, num_rows) if columnwise else data.view(num_rows, num_cols),
            scale_inv,
            fp8_dtype=self.fp8_dtype,
            block_2d=self.block_scaling_dim == 2,
            columnwise=columnwise,
            out_dtype=quantized_tensor.value_dtype(dtype, self.dtype),
        )
        return values.view(self.shape)

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Drop the directions that are False and make those that are True; None leaves a direction as it is.

        With 128x128 blocks one direction is the exact transpose of the other, and can be made from it. Both False is
        legal: the data has gone away and may be restored.
        Raises: ValueError: if a direction is asked for that is not there and cannot be made.
        """
        quantized_tensor.update_usage(self, rowwise_usage, columnwise_usage, self._transposed)

    def _transposed(self, direction: str) -> dict[str, torch.Tensor] | None:
        if self.block_scaling_dim != 2:
            return None
        data, scale_inv = quantized_tensor.fields_of(self, quantized_tensor.other_direction(direction))
        specs = self.inner_specs(self.shape)
        data_spec, scale_spec = specs[f"{direction}_data"], specs[f"{direction}_scale_inv"]
        rows = data.flatten(0, -2) if direction == "columnwise" else data.flatten(1)
        num_tiles, padded = scale_spec.shape
        scale = scale_inv.new_zeros(num_tiles, padded)
        scale[:, : scale_inv.shape[0]] = scale_inv[:, :num_tiles].t()
        return {
            f"{direction}_data": rows.t().contiguous().view(data_spec.shape),
            f"{direction}_scale_inv": scale,
        }

    def inner_specs(self, shape: Sequence[int]) -> dict[str, ViewSpec]:
        """Shape and dtype of every field, were this tensor of `shape`."""
        return quantized_tensor.bulk_specs("fp8_block", shape, self.block_scaling_dim == 2)

    data_tensors = quantized_tensor.data_tensors
    prepare_for_saving = quantized_tensor.prepare_for_saving
    restore_from_saved = quantized_tensor.restore_from_saved


@final
@dataclass(kw_only=True, eq=False)
class Float8BlockQuantizer:
    """Makes `Float8BlockTensor`s."""

    rowwise: bool = True
    """Quantize along K."""
    columnwise: bool = True
    """Quantize along the rows, into transposed data."""
    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    """E4M3, or torch.float8_e5m2."""
    block_scaling_dim: Literal[1, 2] = 1
    """1: one scale for 1x128 values (activations, gradients). 2: one for 128x128 (weights)."""
    power_of_2_scale: bool = True
    """Round scales down to powers of two."""
    amax_epsilon: float = 0.0
    """A smaller largest magnitude counts as this."""

    format_name: ClassVar[FormatName] = "fp8_block"
    tensor_class: ClassVar[type[torch.Tensor]] = Float8BlockTensor

    def __post_init__(self) -> None:
        fp8_max(self.fp8_dtype)
        check_flags(self, "rowwise", "columnwise", "power_of_2_scale")
        if not is_one_of(self.block_scaling_dim, (1, 2)):
            raise ValueError(f"block_scaling_dim must be 1 (1x128) or 2 (128x128); got {self.block_scaling_dim!r}.")
        check_number("amax_epsilon", self.amax_epsilon, least=0)

    def __call__(self, x: torch.Tensor, *, backend: quantizer.Backend = "auto") -> Float8BlockTensor:
        """Quantize `x` (*leading, K) bf16, fp16 or fp32, of any sizes; not recorded by autograd.

        Each direction is one allocation. Work lands on the current stream.
        Raises: ValueError, TypeError: naming the rule that x breaks.
        """
        tensor = bulk.quantize_one(x, self, backend)
        assert isinstance(tensor, Float8BlockTensor)
        return tensor

    set_usage = quantizer.set_usage
    update = quantizer.quantize_into

    # What `bulk` calls.

    @property
    def block_2d(self) -> bool:
        return self.block_scaling_dim == 2

    def tensor_options(self) -> dict[str, object]:
        return {"fp8_dtype": self.fp8_dtype, "block_scaling_dim": self.block_scaling_dim}

    def check(self, x: torch.Tensor) -> None:
        """Any input of the dtypes that every format takes will do."""

    def reference(self, x_MK: torch.Tensor, columnwise: bool, bits: quantizer.RoundingBits) -> tuple[torch.Tensor, ...]:
        quantize = reference.quantize_2d if self.block_2d else reference.quantize_1d
        return quantize(
            x_MK,
            fp8_dtype=self.fp8_dtype,
            power_of_2=self.power_of_2_scale,
            epsilon=self.amax_epsilon,
            columnwise=columnwise,
        )

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
        from lighterage.kernels.triton.fp8_block import split_quantize_fp8_block

        split_quantize_fp8_block(
            x_MK,
            ends,
            rowwise_buffer,
            columnwise_buffer,
            num_splits=num_splits,
            fp8_dtype=self.fp8_dtype,
            power_of_2=self.power_of_2_scale,
            epsilon=self.amax_epsilon,
            block_2d=self.block_2d,
            swiglu=swiglu,
        )

    def draw_seed(self) -> int | None:
        return None
