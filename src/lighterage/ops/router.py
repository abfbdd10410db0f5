"""Which experts a token goes to, with what weights, and the losses that keep experts and logits in balance.

Shape suffixes: T tokens, k experts of each, E experts, H features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from lighterage.formats.arguments import check_count, check_flag, is_one_of
from lighterage.formats.tensor_arguments import check_has_values, check_no_transform, check_same_device, check_tensor
from lighterage.ops.checks import without_autocast

Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """What the router decided."""

    experts: Tensor
    """int64 (T, k): the experts of each token, the best first."""
    weights: Tensor
    """float32 (T, k): what each expert's output counts; differentiable."""
    scores: Tensor
    """float32 (T, E): the scores of all experts, which sum to 1 for each token; differentiable."""


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in float32, whatever the dtype of x and autocast; x itself is saved, not its float32 copy.

    x: (T, H). weight: (E, H) of any floating dtype. Returns float32 (T, E).
    Raises: TypeError, ValueError: on anything else.
    """
    _check_call(x=x, weight=weight)
    check_has_values("x", x)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"router_logits takes x (T, H) and weight (E, H); got {tuple(x.shape)} and {tuple(weight.shape)}. Flatten "
            "the leading dimensions of x: x.flatten(0, -2)."
        )
    return cast(Tensor, _RouterLogits.apply(x, weight))  # type: ignore[no-untyped-call]


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    normalize: bool = True,
    bias: Tensor | None = None,
) -> Routing:
    """The `top_k` experts of each token.

    logits: float32 (T, E).
    score: "softmax" over the experts, or "sigmoid" of each.
    normalize: divide the weights of a token by their sum, so that they sum to 1.
    bias: (E,) added to the scores when experts are chosen, and only then: for balance without a loss.

    Of equal scores the expert with the smaller number wins, on every device.
    Raises: ValueError: on a wrong shape, dtype, score or number.
    """
    _check_call(logits=logits, **({} if bias is None else {"bias": bias}))
    check_flag("normalize", normalize)
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise ValueError(
            f"route takes float32 logits (T, E), in which near ties are told apart; got {logits.dtype} "
            f"{tuple(logits.shape)}. Use router_logits(x, weight), or logits.float()."
        )
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"bias must be ({logits.shape[1]},), one for each expert; got {tuple(bias.shape)}.")
    if check_count("top_k", top_k) > logits.shape[1] or top_k < 1:
        raise ValueError(f"top_k must be from 1 to the {logits.shape[1]} experts; got {top_k}.")
    if not is_one_of(score, get_args(Score)):
        raise ValueError(f"score must be one of {list(get_args(Score))}; got {score!r}.")
    if score == "softmax":
        raw_TE = scores_TE = logits.softmax(-1)
    else:
        raw_TE = logits.sigmoid()
        scores_TE = raw_TE / raw_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    chosen_by_TE = raw_TE.detach() if bias is None else raw_TE.detach() + bias.detach().float()
    experts_Tk = _best(chosen_by_TE, top_k)
    weights_Tk = raw_TE.gather(1, experts_Tk)
    if normalize:
        weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return Routing(experts=experts_Tk, weights=weights_Tk, scores=scores_TE)


def _best(scores_TE: Tensor, top_k: int) -> Tensor:
    """Indices of the largest scores, the smaller index first among equals.

    Each score becomes a whole number of the same order, with the index in its low bits: then no two are equal, and
    every implementation of top-k finds the same.
    """
    num_experts = scores_TE.shape[1]
    bits = (scores_TE + 0.0).contiguous().view(torch.int32)  # + 0.0 makes -0.0 the same as 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    index = torch.arange(num_experts - 1, -1, -1, device=scores_TE.device)
    keys = ordered.long() * (1 << 31) + index
    return keys.topk(top_k, dim=1).indices


def load_balancing_loss(scores: Tensor, num_tokens_of: Tensor) -> Tensor:
    """How far the experts are from equally loaded: 1 when they are, E when one has all.

    E * sum over experts of (its share of the copies) * (its mean score); the gradient goes through the scores.
    scores: float32 (T, E) from `route`. num_tokens_of: (E,) copies that went to each expert, from the permutation.
    Source: Switch Transformer, equations 4 to 6, with k copies of a token for one.
    Raises: TypeError, ValueError: on other shapes or dtypes.
    """
    _check_call(scores=scores)
    check_tensor("num_tokens_of", num_tokens_of, dtypes=None)
    if scores.ndim != 2 or num_tokens_of.shape != scores.shape[1:]:
        raise ValueError(
            f"load_balancing_loss takes scores (T, E) and num_tokens_of (E,); got {tuple(scores.shape)} and "
            f"{tuple(num_tokens_of.shape)}. Pass routing.scores and plan.num_tokens_of."
        )
    check_same_device(scores=scores, num_tokens_of=num_tokens_of)
    copies = num_tokens_of.to(torch.float32)
    share = copies / copies.sum().clamp_min(1.0)
    return (share * scores.sum(0)).sum() * (scores.shape[1] / max(1, scores.shape[0]))


def router_z_loss(logits: Tensor) -> Tensor:
    """The mean square of the logarithm of the sum of exponentials, which keeps logits small.

    Source: ST-MoE, equation 5.
    Raises: TypeError, ValueError: if `logits` is not a floating matrix (T, E).
    """
    _check_call(logits=logits)
    if logits.ndim != 2:
        raise ValueError(f"router_z_loss takes logits (T, E); got {tuple(logits.shape)}.")
    return logits.logsumexp(-1).square().sum() / max(1, logits.shape[0])


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """`x`, through which a gradient also reaches `loss`, as if `loss` had been added to what backward begins from.

    loss: one number, of any floating dtype.
    Raises: TypeError, ValueError: if it is none.
    """
    _check_call(x=x, loss=loss)
    if loss.ndim:
        raise ValueError(f"a loss to attach is one number; got {tuple(loss.shape)}. Pass loss.sum() or loss.mean().")
    return cast(Tensor, _AttachLoss.apply(x, loss))  # type: ignore[no-untyped-call]


def _check_call(**tensors: Tensor) -> None:
    if not torch.compiler.is_compiling():
        check_no_transform("routing")
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    check_same_device(**tensors)


class _AttachLoss(torch.autograd.Function):
    """The identity of its first argument, with a gradient of 1 for the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss_like
        return grad, torch.ones((), dtype=dtype, device=device)


class _RouterLogits(torch.autograd.Function):
    """A float32 product that saves its operands in the dtypes that they have."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_TH, weight_EH)
        with without_autocast(x_TH.device):
            return x_TH.float() @ weight_EH.float().t()

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TH, weight_EH = ctx.saved_tensors
        with without_autocast(x_TH.device):
            dx_TH = (grad_TE @ weight_EH.float()).to(x_TH.dtype) if ctx.needs_input_grad[0] else None
            dweight_EH = (grad_TE.t() @ x_TH.float()).to(weight_EH.dtype) if ctx.needs_input_grad[1] else None
        return dx_TH, dweight_EH
