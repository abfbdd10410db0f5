"""The three products of a group of linear layers, in whatever arithmetic a recipe asks for, and what they read.

An operand is a plain tensor without a recipe, a group of quantized tensors over bulk buffers with a block recipe, codes
with one scale with a per-tensor one. The functions that autograd calls do not tell them apart: they ask for operands,
take them apart into a shell and the one tensor to save, and put them together again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, cast

import torch

from lighterage.formats.bulk import split_quantize
from lighterage.formats.parts import SplitRows
from lighterage.formats.quantized_tensor import is_quantized
from lighterage.formats.split_tensors import SplitTensors
from lighterage.formats.splits import Splits
from lighterage.ops.gemm_backends import BackendName, GemmBackend, choose_backend
from lighterage.ops.grouped_gemm import grouped_dgrad, grouped_forward, grouped_wgrad
from lighterage.ops.per_tensor import (
    PerTensorBackend,
    ScaledCodes,
    choose_per_tensor_backend,
    per_tensor_dgrad,
    per_tensor_forward,
    per_tensor_wgrad,
    quantize_rows,
    quantize_weight,
    without_nobodys_rows,
)
from lighterage.ops.quantized_rows import quantized_rows
from lighterage.ops.swiglu import swiglu_activation
from lighterage.recipes import Float8BlockScaling, Float8CurrentScaling, Recipe, Role

Operand: TypeAlias = torch.Tensor | SplitTensors | ScaledCodes
Shell: TypeAlias = SplitTensors | ScaledCodes | None
"""An operand without the bytes that were saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedProducts:
    """What one call of a grouped layer and its backward have in common. Made by `choose_products`."""

    splits: Splits
    """Which rows are whose."""
    recipe: Recipe | None
    backend: GemmBackend | PerTensorBackend
    """What multiplies, chosen once."""
    seed: int | None
    """Of the random roundings of gradients."""

    def rows(self, x_MK: torch.Tensor, role: Role, *, rowwise: bool, columnwise: bool) -> Operand:
        """An input or an output's gradient, quantized once for all experts, in the directions asked for."""
        if self.recipe is None:
            return x_MK.contiguous()
        if is_quantized(x_MK):
            return quantized_rows(x_MK, self.splits, self.recipe, rowwise=rowwise, columnwise=columnwise)
        if isinstance(self.recipe, Float8CurrentScaling):
            x_MK = without_nobodys_rows(x_MK, self.splits)
            return quantize_rows(x_MK, self.recipe, role, rowwise=rowwise, columnwise=columnwise)
        quantizer = self.recipe.quantizer(role, rowwise=rowwise, columnwise=columnwise, seed=self.seed)
        tensors, _ = split_quantize(x_MK, self.splits, [quantizer] * self.splits.num_splits)
        return tensors

    def activated_rows(
        self, h_MK2: torch.Tensor, probs_M: torch.Tensor | None, *, rowwise: bool, columnwise: bool
    ) -> Operand:
        """The SwiGLU of `h_MK2`, as an input: quantized without being stored where nothing else is to be done to it."""
        if self.recipe is None or isinstance(self.recipe, Float8CurrentScaling) or probs_M is not None:
            return self.rows(swiglu_activation(h_MK2, probs_M), "input", rowwise=rowwise, columnwise=columnwise)
        quantizer = self.recipe.quantizer("input", rowwise=rowwise, columnwise=columnwise)
        quantizers = [quantizer] * self.splits.num_splits
        tensors, _ = split_quantize(h_MK2, self.splits, quantizers, activation="swiglu")
        return tensors

    def weight(self, w_ENK: torch.Tensor, *, columnwise: bool) -> Operand:
        """The stacked weights, rowwise, and columnwise if the input's gradient will be needed."""
        if self.recipe is None:
            return w_ENK
        if isinstance(self.recipe, Float8CurrentScaling):
            return quantize_weight(w_ENK, self.recipe, columnwise=columnwise)
        num_experts, num_rows = w_ENK.shape[:2]
        quantizer = self.recipe.quantizer("weight", rowwise=True, columnwise=columnwise)
        splits = _even_splits(num_experts, num_rows, w_ENK.device)
        tensors, _ = split_quantize(w_ENK.flatten(0, 1), splits, [quantizer] * num_experts)
        return tensors

    def forward(self, x: Operand, w: Operand, bias_EN: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        """y = x w^T + bias, (M, N)."""
        if isinstance(x, ScaledCodes):
            codes, backend = cast(ScaledCodes, w), cast(PerTensorBackend, self.backend)
            return per_tensor_forward(x, codes, self.splits, backend=backend, out_dtype=out_dtype, bias_EN=bias_EN)
        assert not isinstance(w, ScaledCodes)
        backend_ = cast(GemmBackend, self.backend)
        return grouped_forward(x, w, self.splits, backend=backend_, out_dtype=out_dtype, bias=bias_EN)

    def input_gradient(self, dy: Operand, w: Operand, out_dtype: torch.dtype) -> torch.Tensor:
        """dx = dy w, (M, K)."""
        if isinstance(dy, ScaledCodes):
            codes, backend = cast(ScaledCodes, w), cast(PerTensorBackend, self.backend)
            return per_tensor_dgrad(dy, codes, self.splits, backend=backend, out_dtype=out_dtype)
        assert not isinstance(w, ScaledCodes)
        return grouped_dgrad(dy, w, self.splits, backend=cast(GemmBackend, self.backend), out_dtype=out_dtype)

    def weight_gradient(self, dy: Operand, x: Operand, out_dtype: torch.dtype) -> torch.Tensor:
        """dw = dy^T x, (E, N, K)."""
        if isinstance(dy, ScaledCodes):
            codes, backend = cast(ScaledCodes, x), cast(PerTensorBackend, self.backend)
            return per_tensor_wgrad(dy, codes, self.splits, backend=backend, out_dtype=out_dtype)
        assert not isinstance(x, ScaledCodes)
        return grouped_wgrad(dy, x, self.splits, backend=cast(GemmBackend, self.backend), out_dtype=out_dtype)


def choose_products(splits: Splits, recipe: Recipe | None, backend: BackendName) -> GroupedProducts:
    """Choose the backend of a call, and draw its seed.

    Raises: ValueError: if `backend` cannot do it.
    """
    chosen: GemmBackend | PerTensorBackend
    if isinstance(recipe, Float8CurrentScaling):
        chosen = choose_per_tensor_backend(backend, splits.device)
    else:
        format_name = None if recipe is None else recipe.format_name
        power_of_2 = isinstance(recipe, Float8BlockScaling) and recipe.power_of_2_scale
        chosen = choose_backend(backend, format_name, splits.device, splits, power_of_2_scales=power_of_2)
    return GroupedProducts(
        splits=splits, recipe=recipe, backend=chosen, seed=None if recipe is None else recipe.draw_seed()
    )


def columnwise_bytes(rows: Operand) -> torch.Tensor:
    """What the weight's gradient reads of `rows`: the one tensor to save."""
    if isinstance(rows, torch.Tensor):
        return rows
    if isinstance(rows, SplitTensors):
        return rows.buffers["columnwise"]
    assert rows.columnwise is not None
    return rows.columnwise


def shell_of(rows: Operand) -> Shell:
    """`rows` after letting go of the bytes of both directions: from here on only `columnwise_bytes` has any."""
    if isinstance(rows, SplitTensors):
        rows.update_usage(rowwise_usage=False, columnwise_usage=False)
        return rows
    return None if isinstance(rows, torch.Tensor) else replace(rows, rowwise=None, columnwise=None)


def put_together(shell: Shell, saved: torch.Tensor) -> Operand:
    """The columnwise operand whose bytes are `saved`, wherever they lie now. `shell` stays as it is."""
    if shell is None:
        return saved
    if isinstance(shell, SplitTensors):
        return shell.with_buffers(columnwise=saved)
    return replace(shell, columnwise=saved)


def without_rowwise(w: Operand) -> Operand:
    """A quantized weight that keeps what the input's gradient reads, and nothing else."""
    if isinstance(w, SplitTensors):
        w.update_usage(rowwise_usage=False)
    elif isinstance(w, ScaledCodes):
        return replace(w, rowwise=None)
    return w


def _even_splits(num_splits: int, num_rows: int, device: torch.device) -> Splits:
    """`num_splits` splits of `num_rows` each, whose ends are computed on the device: nothing is uploaded."""
    if num_rows == 0:
        return Splits(
            num_rows=0, ends=torch.zeros(num_splits, dtype=torch.int64, device=device), rows=_even_rows(num_splits, 0)
        )
    ends = torch.arange(num_rows, num_splits * num_rows + 1, num_rows, device=device)
    return Splits(num_rows=num_splits * num_rows, ends=ends, rows=_even_rows(num_splits, num_rows))


@lru_cache(maxsize=256)
def _even_rows(num_splits: int, num_rows: int) -> SplitRows:
    return SplitRows((num_rows,) * num_splits, 1)
