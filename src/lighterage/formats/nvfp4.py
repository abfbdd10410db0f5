"""NVFP4: E2M1 values, one E4M3 scale for each 16 of them, one float32 amax for the tensor.

The columnwise direction is transposed and packed along the rows, and may pass a random Hadamard transform first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from lighterage.formats import bulk, quantized_tensor, quantizer
from lighterage.formats.arguments import check_flags
from lighterage.formats.dispatch import answers_torch
from lighterage.formats.layout import ViewSpec
from lighterage.formats.parts import FormatName
from lighterage.kernels.reference import nvfp4 as reference


@final
@answers_torch
class NVFP4Tensor(torch.Tensor):
    """A tensor (*leading, K), quantized to NVFP4; M counts the rows of its leading dimensions.

    rowwise_data: uint8 (*leading, K/2), two values a byte, the even one in the low nibble;
    rowwise_scale_inv: uint8 (ru(M, 128), ru(K/16, 4)) of E4M3 codes; rowwise_amax: float32 (1,).
    columnwise_data: uint8 (K, M/2); columnwise_scale_inv: uint8 (ru(K, 128), ru(M/16, 4)); columnwise_amax: float32
    (1,), of the transformed values if `with_rht`.
    Each is None where its usage is off.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        "rowwise_data",
        "rowwise_scale_inv",
        "rowwise_amax",
        "columnwise_data",
        "columnwise_scale_inv",
        "columnwise_amax",
    )
    OPTIONS: ClassVar[tuple[str, ...]] = ("with_rht", "with_2d_quantization")

    rowwise_data: torch.Tensor | None
    rowwise_scale_inv: torch.Tensor | None
    rowwise_amax: torch.Tensor | None
    columnwise_data: torch.Tensor | None
    columnwise_scale_inv: torch.Tensor | None
    columnwise_amax: torch.Tensor | None
    with_rht: bool
    with_2d_quantization: bool

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values that the codes stand for, in `dtype` (None: that of what was quantized).

        Values that were transformed are transformed back.
        Raises: RuntimeError: if both usages were dropped.
        """
        direction = quantized_tensor.some_direction(self)
        columnwise = direction == "columnwise"
        data, scale, amax = quantized_tensor.fields_of(self, direction)
        values = reference.dequantize(
            data if columnwise else data.flatten(0, -2),
            scale,
            amax,
            columnwise=columnwise,
            hadamard=columnwise and self.with_rht,
            out_dtype=quantized_tensor.value_dtype(dtype, self.dtype),
        )
        return values.view(self.shape)

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Drop the directions that are False; None leaves a direction as it is.

        With 16x16 blocks one direction is the exact transpose of the other, and is made from it when it is asked for.
        Both False is legal: the data has gone away and may be restored.
        Raises: ValueError: if a direction is asked for that is not there and cannot be made.
        """
        quantized_tensor.update_usage(self, rowwise_usage, columnwise_usage, self._transposed)

    def _transposed(self, direction: str) -> dict[str, torch.Tensor] | None:
        if not self.with_2d_quantization:
            return None
        data, scale, amax = quantized_tensor.fields_of(self, quantized_tensor.other_direction(direction))
        specs = self.inner_specs(self.shape)
        data, scale = reference.transpose_2d(data.flatten(0, -2), scale)
        return {
            f"{direction}_data": data.view(specs[f"{direction}_data"].shape),
            f"{direction}_scale_inv": scale,
            f"{direction}_amax": amax,
        }

    def inner_specs(self, shape: Sequence[int]) -> dict[str, ViewSpec]:
        """Shape and dtype of every field, were this tensor of `shape`."""
        return quantized_tensor.bulk_specs("nvfp4", shape, self.with_2d_quantization)

    data_tensors = quantized_tensor.data_tensors
    prepare_for_saving = quantized_tensor.prepare_for_saving
    restore_from_saved = quantized_tensor.restore_from_saved


@final
@dataclass(kw_only=True, eq=False)
class NVFP4Quantizer:
    """Makes `NVFP4Tensor`s."""

    rowwise: bool = True
    """Quantize along K."""
    columnwise: bool = True
    """Quantize along the rows, into transposed data."""
    with_rht: bool = False
    """Pass the columnwise direction through the random Hadamard transform, by runs of 16 rows. Needs bf16."""
    stochastic_rounding: bool = False
    """Round to one of the two neighbouring values at random, with the right mean. Needs `generator`."""
    generator: torch.Generator | None = None
    """Where seeds come from: one is drawn for each call, on the host, from a CPU or a CUDA generator."""
    with_2d_quantization: bool = False
    """One scale for each 16x16 block (weights), so that both directions hold the same values."""

    format_name: ClassVar[FormatName] = "nvfp4"
    tensor_class: ClassVar[type[torch.Tensor]] = NVFP4Tensor

    def __post_init__(self) -> None:
        check_flags(self, "rowwise", "columnwise", "with_rht", "stochastic_rounding", "with_2d_quantization")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None; got {self.generator!r}.")
        if self.stochastic_rounding and self.generator is None:
            raise ValueError(
                "stochastic_rounding needs a generator to be reproducible; got None. "
                "Pass generator=torch.Generator().manual_seed(seed)."
            )
        if self.with_rht and self.with_2d_quantization:
            raise ValueError(
                "with_rht and with_2d_quantization exclude each other: 2-D blocks promise equal values in both "
                "directions, and the transform changes one. Use the transform for activations and gradients, "
                "2-D blocks for weights."
            )

    def __call__(self, x: torch.Tensor, *, backend: quantizer.Backend = "auto") -> NVFP4Tensor:
        """Quantize `x` (*leading, K) bf16, fp16 or fp32, rows and K multiples of 16; not recorded by autograd.

        Each direction is one allocation. Work lands on the current stream.
        Raises: ValueError, TypeError: naming the rule that x breaks.
        """
        tensor = bulk.quantize_one(x, self, backend)
        assert isinstance(tensor, NVFP4Tensor)
        return tensor

    set_usage = quantizer.set_usage
    update = quantizer.quantize_into

    # What `bulk` calls.

    @property
    def block_2d(self) -> bool:
        return self.with_2d_quantization

    def tensor_options(self) -> dict[str, object]:
        return {"with_rht": self.with_rht, "with_2d_quantization": self.with_2d_quantization}

    def check(self, x: torch.Tensor) -> None:
        if self.with_rht and self.columnwise and x.dtype != torch.bfloat16:
            raise TypeError(
                f"NVFP4 with the Hadamard transform needs torch.bfloat16; got {x.dtype} (x: {tuple(x.shape)}). "
                "Cast x to bf16, or pass with_rht=False (of a recipe: random_hadamard_transform=False)."
            )

    def draw_seed(self) -> int | None:
        return quantizer.draw_seed(self.generator) if self.stochastic_rounding and self.generator is not None else None

    def reference(self, x_MK: torch.Tensor, columnwise: bool, bits: quantizer.RoundingBits) -> tuple[torch.Tensor, ...]:
        num_rows, num_cols = x_MK.shape
        return reference.quantize(
            x_MK,
            columnwise=columnwise,
            block_2d=self.with_2d_quantization,
            hadamard=self.with_rht and columnwise,
            rounding_bits=bits((num_cols, num_rows) if columnwise else (num_rows, num_cols)) if bits else None,
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
        from lighterage.kernels.triton.nvfp4 import split_quantize_nvfp4

        split_quantize_nvfp4(
            x_MK,
            ends,
            rowwise_buffer,
            columnwise_buffer,
            num_splits=num_splits,
            hadamard=self.with_rht,
            block_2d=self.with_2d_quantization,
            stochastic_rounding=self.stochastic_rounding,
            seed=seed or 0,
            swiglu=swiglu,
        )
