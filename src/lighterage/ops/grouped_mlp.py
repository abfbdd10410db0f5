"""A gated feed-forward network for each expert, over rows that are sorted by expert.

Letters: M rows of all experts, E experts, H hidden size, F features between the two products.

Note [What the two products save]
h = x w1^T is (M, 2F): gate and up. The second product reads silu(gate) * up, times the row's probability. Its gradients
need h itself, in full precision, so h is saved in any case; and what the weight's gradient reads, the columnwise codes
of the activation, can be made again from h at the cost of reading it once more. Saving those codes too spares that
pass and takes their bytes: it never is the mode with fewer.
The probabilities multiply the activation, not the output: the product is linear, so the result is the same, and
their gradient falls out of the activation's backward pass without the output being saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch

from lighterage.formats.arguments import is_one_of
from lighterage.formats.splits import Splits
from lighterage.ops.checks import (
    autocast_dtype,
    check_operands,
    checked_rows,
    checked_splits,
    graph_is_kept,
    without_autocast,
)
from lighterage.ops.gemm_backends import BackendName
from lighterage.ops.grouped_linear import apply_grouped_linear
from lighterage.ops.grouped_products import (
    GroupedProducts,
    choose_products,
    columnwise_bytes,
    put_together,
    shell_of,
    without_rowwise,
)
from lighterage.ops.swiglu import swiglu_gradients
from lighterage.recipes import Recipe, check_recipe
from lighterage.unseen import unseen

SaveActivation = Literal["auto", "quantized", "recompute"]


@unseen
def grouped_mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    m_splits: Sequence[int] | torch.Tensor | Splits,
    *,
    probs: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    save_activation: SaveActivation = "auto",
    backend: BackendName = "auto",
) -> torch.Tensor:
    """y = (silu(g) * u * probs) w2^T with [g, u] = x w1^T, each expert's rows with its weights.

    x: (*, H), bf16, fp16 or fp32; its leading dimensions are M rows, sorted by expert.
    w1: (E, 2F, H), the gate's F rows before the others. w2: (E, H, F).
    m_splits: as of `grouped_linear`.
    probs: (M,) a factor for each row (a router's weight), or None. It multiplies the activation before the second
        product; see Note [What the two products save]. It has a gradient.
    save_activation: "quantized" saves the activation as the second weight's gradient will read it; "recompute" makes it
        again from the first product's output, which is saved anyway; "auto" is the one with fewer bytes, "recompute".
        All give the same bits.
    recipe, backend: as of `grouped_linear`. With a block recipe the activation is quantized as it is computed, without
        being stored, unless there are `probs`.

    Returns: (*, H) of x's dtype. Under autocast, and with torch.compile, it does as `grouped_linear` does.
    Raises: TypeError, ValueError: naming the rule, what was received, and what to do.
    """
    recipe = check_recipe(recipe)
    check_operands(x, w1=w1, w2=w2, probs=probs)
    _check_weights(w1, w2, save_activation)
    cast_to = autocast_dtype(x.device)
    if cast_to is not None:
        x = x.to(cast_to)
        if recipe is None:
            w1, w2 = w1.to(cast_to), w2.to(cast_to)
    x_MH = checked_rows(x, w1, recipe)
    splits = checked_splits(m_splits, x_MH, len(w1), recipe)
    h = apply_grouped_linear(x_MH, w1, None, splits, recipe, False, backend)
    probs_M = None if probs is None else _checked_probs(probs, h)
    params = _Params(
        products=choose_products(splits, recipe, backend),
        saves_activation=save_activation == "quantized",
        recording=torch.is_grad_enabled(),
    )
    with without_autocast(x.device):
        y_MH = cast(torch.Tensor, _SwiGLULinear.apply(h, w2, probs_M, params))  # type: ignore[no-untyped-call]
    return y_MH.view(*x.shape[:-1], w2.shape[1])


grouped_mlp._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "quantized products read sizes that a graph cannot hold. Compile what is around them, without fullgraph"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Params:
    products: GroupedProducts
    saves_activation: bool
    recording: bool
    """Whether autograd records: inside a Function nobody can tell."""


class _SwiGLULinear(torch.autograd.Function):
    """y = (silu(gate) * up * probs) w^T. See Note [What the two products save]."""

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, w_EHF: torch.Tensor, probs_M: torch.Tensor | None, params: _Params
    ) -> torch.Tensor:
        products = params.products
        needs = [params.recording and needed for needed in ctx.needs_input_grad[:3]]
        needs_activation_gradient, needs_w = needs[0] or needs[2], needs[1]
        saves_activation = needs_w and params.saves_activation
        a = products.activated_rows(h, probs_M, rowwise=True, columnwise=saves_activation)
        w = products.weight(w_EHF, columnwise=needs_activation_gradient)
        saved_a = columnwise_bytes(a) if saves_activation else None
        y_MH = products.forward(a, w, None, h.dtype)
        ctx.shell = shell_of(a) if saves_activation else None
        is_quantized = products.recipe is not None
        ctx.weight = without_rowwise(w) if is_quantized and needs_activation_gradient else None
        saved_w = None if is_quantized or not needs_activation_gradient else w_EHF
        ctx.save_for_backward(h, saved_a, saved_w, probs_M)
        ctx.params = params
        ctx.dtypes = w_EHF.dtype, None if probs_M is None else probs_M.dtype
        return y_MH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_MH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        params: _Params = ctx.params
        products = params.products
        needs_h, needs_w, needs_probs = ctx.needs_input_grad[:3]
        w_dtype, probs_dtype = ctx.dtypes
        h, saved_a, saved_w, probs_M = ctx.saved_tensors
        dh = dw_EHF = dprobs_M = da_MF = None
        with without_autocast(h.device):
            dy = products.rows(dy_MH.contiguous(), "grad", rowwise=needs_h or needs_probs, columnwise=needs_w)
            if needs_h or needs_probs:
                da_MF = products.input_gradient(dy, ctx.weight if saved_w is None else saved_w, h.dtype)
            if needs_w:
                if params.saves_activation:
                    a = put_together(ctx.shell, saved_a)
                else:
                    a = products.activated_rows(h, probs_M, rowwise=False, columnwise=True)
                dw_EHF = products.weight_gradient(dy, a, w_dtype)
            if da_MF is not None:
                dh, dprobs_M = swiglu_gradients(da_MF, h, probs_M)
        if not graph_is_kept():
            ctx.weight = None
        dprobs_M = dprobs_M.to(probs_dtype) if needs_probs and dprobs_M is not None else None
        return dh if needs_h else None, dw_EHF, dprobs_M, None


def _check_weights(w1: torch.Tensor, w2: torch.Tensor, save_activation: str) -> None:
    alike = w1.ndim == w2.ndim == 3 and w1.shape == (w2.shape[0], 2 * w2.shape[2], w2.shape[1])
    if not alike:
        raise ValueError(
            f"a gated network has w1 (E, 2F, H) and w2 (E, H, F); got {tuple(w1.shape)} and {tuple(w2.shape)}."
        )
    if w1.device != w2.device or w1.dtype != w2.dtype:
        raise TypeError(
            f"w1 and w2 must have one dtype on one device; got {w1.dtype} on {w1.device} and {w2.dtype} on {w2.device}."
        )
    if not is_one_of(save_activation, get_args(SaveActivation)):
        raise ValueError(f"save_activation must be one of {list(get_args(SaveActivation))}; got {save_activation!r}.")


def _checked_probs(probs: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    if probs.shape != h.shape[:1] or probs.device != h.device or not probs.is_floating_point():
        raise ValueError(
            f"probs must be ({h.shape[0]},) floating-point numbers on {h.device}, one for each row; got {probs.dtype} "
            f"{tuple(probs.shape)} on {probs.device}."
        )
    return probs.contiguous()
