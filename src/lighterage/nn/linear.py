"""`Linear`: PyTorch's, with a recipe."""

from __future__ import annotations

import math

import torch
from torch import nn

from lighterage.formats.arguments import check_count, check_flag
from lighterage.ops.checks import check_features
from lighterage.ops.linear import linear
from lighterage.recipes import Recipe, check_recipe


class Linear(nn.Module):
    """y = x w^T + bias, whose products are quantized as a recipe says. Its state dict is that of `torch.nn.Linear`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        recipe: Recipe | None = None,
        save_original_input: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`bias`, `device`, `dtype`: of the parameters, initialised as `torch.nn.Linear` does.

        recipe: None multiplies in the dtype of the parameters.
        save_original_input: save the input itself and quantize it again in backward.
        """
        super().__init__()
        check_count("in_features", in_features)
        check_count("out_features", out_features)
        check_flag("save_original_input", save_original_input)
        check_flag("bias", bias)
        self.in_features, self.out_features = in_features, out_features
        self.recipe = check_recipe(recipe)
        check_features(self.recipe, in_features, out_features)
        self.save_original_input = save_original_input
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the parameters anew: uniformly up to 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(max(self.in_features, 1))
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(*, in_features) to (*, out_features): see `lighterage.ops.linear`."""
        return linear(x, self.weight, self.bias, recipe=self.recipe, save_original_input=self.save_original_input)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"recipe={self.recipe}"
        )
