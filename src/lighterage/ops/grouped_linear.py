"""A linear layer for each expert, over rows that are sorted by expert, in one call.

Letters: M rows of all experts, E experts, N output features, K input features.

Note [What a grouped layer saves]
Inputs are quantized once for all experts, into one buffer for each direction. The forward product reads the rowwise
one, which is dropped after it; the weight's gradient reads the columnwise one. That one buffer is what autograd saves,
through whatever saved-tensor hooks there are, and in backward the group is put together over the address that comes
back. Nothing here knows whether it was away. Weights are quantized anew in each forward; their columnwise copy, which
the input's gradient reads, is an attribute of the graph's node, so no hook ever sees it, and it goes with the first
backward that does not retain the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from lighterage.formats.arguments import check_flag
from lighterage.formats.quantized_tensor import is_quantized
from lighterage.formats.splits import Splits
from lighterage.ops.checks import (
    autocast_dtype,
    check_operands,
    checked_bias,
    checked_rows,
    checked_splits,
    graph_is_kept,
    without_autocast,
)
from lighterage.ops.gemm_backends import BackendName
from lighterage.ops.grouped_products import (
    GroupedProducts,
    choose_products,
    columnwise_bytes,
    put_together,
    shell_of,
    without_rowwise,
)
from lighterage.ops.segment_sums import segment_sums
from lighterage.ops.stacking import stacked
from lighterage.recipes import Recipe, check_recipe
from lighterage.unseen import unseen


@unseen
def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor | Sequence[torch.Tensor],
    m_splits: Sequence[int] | torch.Tensor | Splits,
    *,
    bias: torch.Tensor | Sequence[torch.Tensor] | None = None,
    recipe: Recipe | None = None,
    save_original_input: bool = False,
    backend: BackendName = "auto",
) -> torch.Tensor:
    """y = x w^T + bias, each expert's rows with its weight and bias.

    x: (*, K), bf16, fp16 or fp32; its leading dimensions are M rows, sorted by expert.
    weight: (E, N, K), or E tensors (N, K), which cost nothing more if they lie side by side in one storage. bias:
        (E, N), or E tensors (N,), or None.
    m_splits: rows of each expert: integers that add up to M, or an integer tensor on the device, which the host never
        waits for, in forward or in backward; rows past their sum belong to no expert, and get zeros. Or `Splits`, made
        once for all layers that work on the same rows.
    recipe: how operands are quantized; None multiplies them as they are.
    save_original_input: save x itself and quantize it again in backward. Worth it where something else saves x anyway.
    backend: which products to use, for this call and its backward: see `lighterage.ops.choose_backend`.

    Returns: (*, N) of x's dtype. The gradient of each argument has the argument's dtype.
    Under autocast x is cast to autocast's dtype; so are weight and bias without a recipe. With one they are quantized
    as they are, so float32 weights lose nothing twice.
    Work lands on the current stream. Not differentiable twice. torch.compile ends its graph here.
    Raises: TypeError, ValueError: naming the rule, what was received, and what to do.
    """
    recipe = check_recipe(recipe)
    check_flag("save_original_input", save_original_input)
    w_ENK = weight if isinstance(weight, torch.Tensor) else stacked(weight)
    bias_EN = bias if isinstance(bias, torch.Tensor) or bias is None else stacked(bias)
    check_operands(x, weight=w_ENK, bias=bias_EN)
    if w_ENK.ndim != 3:
        raise ValueError(f"weight must be (E, N, K); got {tuple(w_ENK.shape)}. Use weight[None] for one expert.")
    return apply_grouped_linear(x, w_ENK, bias_EN, m_splits, recipe, save_original_input, backend)


grouped_linear._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "quantized products read sizes that a graph cannot hold. Compile what is around them, without fullgraph"
)


def apply_grouped_linear(
    x: torch.Tensor,
    w_ENK: torch.Tensor,
    bias_EN: torch.Tensor | None,
    m_splits: Sequence[int] | torch.Tensor | Splits,
    recipe: Recipe | None,
    save_original_input: bool,
    backend: BackendName,
) -> torch.Tensor:
    """`grouped_linear` of stacked weights and a checked recipe."""
    cast_to = autocast_dtype(x.device)
    if cast_to is not None:
        x = x if is_quantized(x) else x.to(cast_to)
        if recipe is None:
            w_ENK, bias_EN = w_ENK.to(cast_to), None if bias_EN is None else bias_EN.to(cast_to)
    x_MK = checked_rows(x, w_ENK, recipe)
    bias_EN = checked_bias(bias_EN, w_ENK)
    splits = checked_splits(m_splits, x_MK, len(w_ENK), recipe)
    params = _Params(
        products=choose_products(splits, recipe, backend),
        save_original_input=save_original_input and not is_quantized(x),
        recording=torch.is_grad_enabled(),
    )
    with without_autocast(x.device):
        y_MN = cast(torch.Tensor, _GroupedLinear.apply(x_MK, w_ENK, bias_EN, params))  # type: ignore[no-untyped-call]
    return y_MN.view(*x.shape[:-1], w_ENK.shape[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Params:
    products: GroupedProducts
    save_original_input: bool
    recording: bool
    """Whether autograd records: inside a Function nobody can tell."""


class _GroupedLinear(torch.autograd.Function):
    """See Note [What a grouped layer saves]."""

    @staticmethod
    def forward(
        ctx: Any, x_MK: torch.Tensor, w_ENK: torch.Tensor, bias_EN: torch.Tensor | None, params: _Params
    ) -> torch.Tensor:
        products = params.products
        needs_x, needs_w = (params.recording and needed for needed in ctx.needs_input_grad[:2])
        quantized_is_saved = needs_w and not params.save_original_input
        x = products.rows(x_MK, "input", rowwise=True, columnwise=quantized_is_saved)
        w = products.weight(w_ENK, columnwise=needs_x)
        saved = columnwise_bytes(x) if quantized_is_saved else x_MK if needs_w else None
        y_MN = products.forward(x, w, bias_EN, x_MK.dtype)
        ctx.shell = shell_of(x) if quantized_is_saved else None
        is_quantized = products.recipe is not None
        ctx.weight = without_rowwise(w) if needs_x and is_quantized else None
        ctx.save_for_backward(saved, w_ENK if needs_x and not is_quantized else None)
        ctx.params = params
        ctx.dtypes = x_MK.dtype, w_ENK.dtype, None if bias_EN is None else bias_EN.dtype
        return y_MN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MN: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        params: _Params = ctx.params
        products = params.products
        needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
        x_dtype, w_dtype, b_dtype = ctx.dtypes
        dx_MK = dw_ENK = db_EN = None
        with without_autocast(dy_MN.device):
            dy_MN = dy_MN.contiguous()
            if needs_x or needs_w:
                dy = products.rows(dy_MN, "grad", rowwise=needs_x, columnwise=needs_w)
            # Asked for once, as checkpoints want it, and as late as can be: the bytes may still be on their way back.
            if needs_x and ctx.weight is not None:
                dx_MK = products.input_gradient(dy, ctx.weight, x_dtype)
            saved, saved_w = ctx.saved_tensors
            if needs_x and ctx.weight is None:
                dx_MK = products.input_gradient(dy, saved_w, x_dtype)
            if needs_w:
                if params.save_original_input:
                    x = products.rows(saved, "input", rowwise=False, columnwise=True)
                else:
                    x = put_together(ctx.shell, saved)
                dw_ENK = products.weight_gradient(dy, x, w_dtype)
            if needs_b:
                db_EN = segment_sums(dy_MN, products.splits).to(b_dtype)
        if not graph_is_kept():
            ctx.weight = None
        return dx_MK, dw_ENK, db_EN, None
