"""MXFP8: FP8 values with one power-of-two (E8M0) scale for each 32 of them.

The columnwise direction is not transposed: its data lies like the rowwise data, but is scaled along the rows.
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
from lighterage.kernels.reference import mxfp8 as reference
from lighterage.kernels.reference.casts import fp8_max


@final
@answers_torch
class MXFP8Tensor(torch.Tensor):
    """A tensor (*leading, K), quantized to MXFP8; M counts the rows of its leading dimensions.

    rowwise_data: uint8 (*leading, K); rowwise_scale_inv: uint8 (ru(M, 128), ru(K/32, 4)) of E8M0 codes.
    columnwise_data: uint8 (*leading, K); columnwise_scale_inv: uint8 (ru(M/32, 4), ru(K, 128)).
    Each is None where its usage is off.
    """

    FIELDS: ClassVar[tuple[str, ...]] = (
        "rowwise_data",
        "rowwise_scale_inv",
        "columnwise_data",
        "columnwise_scale_inv",
    )
    OPTIONS: ClassVar[tuple[str, ...]] = ("fp8_dtype",)

    rowwise_data: torch.Tensor | None
    rowwise_scale_inv: torch.Tensor | None
    columnwise_data: torch.Tensor | None
    columnwise_scale_inv: torch.Tensor | None
    fp8_dtype: torch.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The values that the codes stand for, in `dtype` (None: that of what was quantized).

        Raises: RuntimeError: if both usages were dropped.
        """
        direction = quantized_tensor.some_direction(self)
        data, scale = quantized_tensor.fields_of(self, direction)
        values = reference.dequantize(
            data.flatten(0, -2),
            scale,
            fp8_dtype=self.fp8_dtype,
            columnwise=direction == "columnwise",
            out_dtype=quantized_tensor.value_dtype(dtype, self.dtype),
        )
        return values.view(self.shape)

    def update_usage(self, rowwise_usage: bool | None = None, columnwise_usage: bool | None = None) -> None:
        """Drop the directions that are False; None leaves a direction as it is.

        Both False is legal: the data has gone away and may be restored.
        Raises: ValueError: if a direction is asked for that is not there: neither can be made from the other.
        """
        quantized_tensor.update_usage(self, rowwise_usage, columnwise_usage, lambda direction: None)

    def inner_specs(self, shape: Sequence[int]) -> dict[str, ViewSpec]:
        """Shape and dtype of every field, were this tensor of `shape`."""
        return quantized_tensor.bulk_specs("mxfp8", shape, False)

    data_tensors = quantized_tensor.data_tensors
    prepare_for_saving = quantized_tensor.prepare_for_saving
    restore_from_saved = quantized_tensor.restore_from_saved


@final
@dataclass(kw_only=True, eq=False)
class MXFP8Quantizer:
    """Makes `MXFP8Tensor`s."""

    rowwise: bool = True
    """Quantize along K."""
    columnwise: bool = True
    """Quantize along the rows."""
    fp8_dtype: torch.dtype = torch.float8_e4m3fn
    """E4M3, or torch.float8_e5m2."""

    format_name: ClassVar[FormatName] = "mxfp8"
    tensor_class: ClassVar[type[torch.Tensor]] = MXFP8Tensor
    block_2d: ClassVar[bool] = False

    def __post_init__(self) -> None:
        fp8_max(self.fp8_dtype)
        check_flags(self, "rowwise", "columnwise")

    def __call__(self, x: torch.Tensor, *, backend: quantizer.Backend = "auto") -> MXFP8Tensor:
        """Quantize `x` (*leading, K) bf16, fp16 or fp32, rows and K multiples of 32; not recorded by autograd.

        Each direction is one allocation. Work lands on the current stream.
        Raises: ValueError, TypeError: naming the rule that x breaks.
        """
        tensor = bulk.quantize_one(x, self, backend)
        assert isinstance(tensor, MXFP8Tensor)
        return tensor

    set_usage = quantizer.set_usage
    update = quantizer.quantize_into

    # What `bulk` calls.

    def tensor_options(self) -> dict[str, object]:
        return {"fp8_dtype": self.fp8_dtype}

    def check(self, x: torch.Tensor) -> None:
        """Any input of the dtypes that every format takes will do."""

    def draw_seed(self) -> int | None:
        return None

    def reference(self, x_MK: torch.Tensor, columnwise: bool, bits: quantizer.RoundingBits) -> tuple[torch.Tensor, ...]:
        return reference.quantize(x_MK, fp8_dtype=self.fp8_dtype, columnwise=columnwise)

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
        from lighterage.kernels.triton.mxfp8 import split_quantize_mxfp8

        split_quantize_mxfp8(
            x_MK,
            ends,
            rowwise_buffer,
            columnwise_buffer,
            num_splits=num_splits,
            fp8_dtype=self.fp8_dtype,
            swiglu=swiglu,
        )
