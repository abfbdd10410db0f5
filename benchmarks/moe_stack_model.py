"""A stack of gated feed-forward networks, one for each expert, and what a step of it cannot do without."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lighterage.formats import bulk_layout
from lighterage.formats.splits import Splits
from lighterage.ops import grouped_mlp
from lighterage.recipes import Float8BlockScaling, MXFP8BlockScaling, NVFP4BlockScaling, Recipe

RECIPES: dict[str, Recipe | None] = {
    "fp8_block": Float8BlockScaling(),
    "bf16": None,
    "mxfp8": MXFP8BlockScaling(),
    "nvfp4": NVFP4BlockScaling(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackShape:
    """Layers of experts, and the rows that go through them, in equal parts to each expert."""

    name: str
    layers: int
    experts: int
    tokens: int
    hidden: int
    features: int
    """Between the two products; the first makes twice as many."""

    @property
    def splits(self) -> list[int]:
        """Rows of each expert."""
        return [self.tokens // self.experts] * self.experts


class GroupedMLP(nn.Module):
    """One layer."""

    def __init__(self, shape: StackShape, recipe: Recipe | None, device: torch.device) -> None:
        super().__init__()
        num, hidden, features = shape.experts, shape.hidden, shape.features
        self.w1 = nn.Parameter(torch.empty(num, 2 * features, hidden, device=device, dtype=torch.bfloat16))
        self.w2 = nn.Parameter(torch.empty(num, hidden, features, device=device, dtype=torch.bfloat16))
        for parameter, fan_in in ((self.w1, hidden), (self.w2, features)):
            nn.init.normal_(parameter, std=fan_in**-0.5)
        self.recipe = recipe

    def forward(self, x: Tensor, splits: Splits) -> Tensor:
        return grouped_mlp(x, self.w1, self.w2, splits, recipe=self.recipe)


class Stack(nn.Module):
    """The layers, one after another; the first `num_checkpointed` are recomputed in backward."""

    num_checkpointed = 0

    def __init__(self, shape: StackShape, recipe: Recipe | None, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GroupedMLP(shape, recipe, device) for _ in range(shape.layers))
        self.shape, self.device = shape, device

    def forward(self, x: Tensor) -> Tensor:
        splits = Splits.of(self.shape.splits, len(x), x.device)
        for number, layer in enumerate(self.layers):
            if number < self.num_checkpointed:
                x = torch.utils.checkpoint.checkpoint(layer, x, splits, use_reentrant=False)
            else:
                x = layer(x, splits)
        return x

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Rows, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = self.shape.tokens, self.shape.hidden
        x, gradient = (
            torch.randn(size, generator=generator, device=self.device, dtype=torch.bfloat16) for _ in range(2)
        )
        return x.requires_grad_(), gradient


def saved_bytes_by_formula(shape: StackShape, name: str) -> int:
    """Bytes that one layer saves for backward: the columnwise codes of its input, and the first product in bf16."""
    rows, hidden = shape.tokens, shape.hidden
    recipe = RECIPES[name]
    codes = 2 * rows * hidden
    if recipe is not None:
        codes = bulk_layout(recipe.format_name, shape.splits, hidden, columnwise=True).num_bytes  # type: ignore[arg-type]
    return codes + 2 * rows * 2 * shape.features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What the device does at best, measured where the table is made."""

    copy_bytes_per_s: float
    """Read and written."""
    product_flops: float
    """Dense products along the features: forward and input gradient."""
    weight_gradient_flops: float
    """Dense products along the rows."""


def limit_ms(shape: StackShape, name: str, rates: Rates) -> float:
    """Milliseconds of a step if each pass ran at the device's rates, reading operands and writing results once.

    Quantizing passes and products follow each other: each takes the longer of its arithmetic and its bytes.
    """
    rows, hidden, features, experts = shape.tokens, shape.hidden, shape.features, shape.experts
    quantized = RECIPES[name] is not None
    total_s = 0.0
    for num_in, num_out, gated in ((hidden, 2 * features, False), (features, hidden, True)):
        x, y, w = rows * num_in, rows * num_out, experts * num_in * num_out
        code = 1 if quantized else 2
        read_x = 2 * x * (2 if gated else 1)
        if quantized:
            # Inputs both ways where the columnwise codes are saved, one way now and one way later where not; weights;
            # the gradient of the output.
            total_s += (read_x + x) / rates.copy_bytes_per_s + (read_x * gated + x) / rates.copy_bytes_per_s
            total_s += (2 * w + 2 * w) / rates.copy_bytes_per_s
            total_s += (2 * y + 2 * y) / rates.copy_bytes_per_s
        elif gated:
            total_s += 2 * (read_x + 2 * x) / rates.copy_bytes_per_s
        if gated:
            total_s += (2 * x + 4 * x + 4 * x) / rates.copy_bytes_per_s  # SwiGLU's gradient
        flops = 2 * rows * num_in * num_out
        for rate, read, written in (
            (rates.product_flops, code * (x + w), 2 * y),
            (rates.product_flops, code * (y + w), 2 * x),
            (rates.weight_gradient_flops, code * (x + y), 2 * w),
        ):
            total_s += max(flops / rate, (read + written) / rates.copy_bytes_per_s)
    return shape.layers * total_s * 1e3
