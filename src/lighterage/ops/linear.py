"""A linear layer whose operands a recipe quantizes.

Letters: M rows, N output features, K input features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lighterage.formats.arguments import check_flag
from lighterage.ops.checks import check_operands
from lighterage.ops.gemm_backends import BackendName
from lighterage.ops.grouped_linear import apply_grouped_linear
from lighterage.recipes import Recipe, check_recipe
from lighterage.unseen import unseen


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    recipe: Recipe | None = None,
    save_original_input: bool = False,
    backend: BackendName = "auto",
) -> torch.Tensor:
    """y = x w^T + bias.

    x: (*, K), bf16, fp16 or fp32. weight: (N, K). bias: (N,) or None.
    recipe: how operands are quantized. None is `torch.nn.functional.linear`, which is the backend "torch".
    save_original_input, backend: as of `grouped_linear`, of which this is the case of one expert: the input is
        quantized once, and its columnwise buffer is the one tensor that is saved for backward.

    Any number of rows will do: what the format lacks of a multiple is filled with zeros, which costs a copy of x.

    Returns: (*, N) of x's dtype. Under autocast, and with torch.compile, it does as `grouped_linear` does.
    Raises: TypeError, ValueError: naming the rule, what was received, and what to do.
    """
    if check_recipe(recipe) is None:
        check_flag("save_original_input", save_original_input)
        if backend not in ("auto", "torch"):
            raise ValueError(
                f"without a recipe the product is PyTorch's own, so the backend is 'auto' or 'torch'; got {backend!r}. "
                "Leave it out, or pass a recipe."
            )
        return F.linear(x, weight, bias)
    return _quantized_linear(x, weight, bias, recipe, save_original_input, backend)


@unseen
def _quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    recipe: Recipe | None,
    save_original_input: bool,
    backend: BackendName,
) -> torch.Tensor:
    check_operands(x, weight=weight, bias=bias)
    check_flag("save_original_input", save_original_input)
    if weight.ndim != 2:
        raise ValueError(f"weight must be (N, K); got {tuple(weight.shape)}. Experts have ops.grouped_linear.")
    bias_1N = None if bias is None else bias[None]
    num_rows = x.numel() // max(x.shape[-1], 1) if x.ndim else 0
    assert recipe is not None
    missing = -num_rows % recipe.row_multiple
    if missing and type(x) in (torch.Tensor, torch.nn.Parameter) and x.ndim and x.shape[-1] == weight.shape[1]:
        # Zeros change no scale and no gradient: blocks are as they would be if they could end early.
        padded = F.pad(x.reshape(num_rows, -1), (0, 0, 0, missing))
        y = apply_grouped_linear(
            padded, weight[None], bias_1N, [num_rows + missing], recipe, save_original_input, backend
        )
        return y[:num_rows].view(*x.shape[:-1], y.shape[-1])
    return apply_grouped_linear(x, weight[None], bias_1N, [num_rows], recipe, save_original_input, backend)
