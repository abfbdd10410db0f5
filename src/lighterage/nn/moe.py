"""A mixture of experts, and the gated network that each expert is.

Shape suffixes: T tokens, k experts of each, E experts, C rows of capacity, H hidden size, F features between.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from lighterage.formats.arguments import check_count, check_flag, check_number, is_one_of
from lighterage.formats.tensor_arguments import check_tensor
from lighterage.ops.checks import check_features
from lighterage.ops.gemm_backends import BackendName
from lighterage.ops.grouped_mlp import SaveActivation, grouped_mlp
from lighterage.ops.permute import pad_rows, permute, plan_permutation, unpad_rows, unpermute, weights_of_rows
from lighterage.ops.router import Score, load_balancing_loss, route, router_logits, router_z_loss
from lighterage.recipes import Recipe, alignment_of, check_recipe


class GatedMLP(nn.Module):
    """y = (silu(g) * u) w2^T with [g, u] = x w1^T: what Llama's layers have behind attention."""

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        recipe: Recipe | None = None,
        save_activation: SaveActivation = "auto",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """recipe, save_activation, backend: as of `lighterage.ops.grouped_mlp`; this is the case of one expert.

        `w1` is (2 * ffn_size, hidden_size), the gate's rows first; `w2` is (hidden_size, ffn_size).
        """
        super().__init__()
        self.recipe = check_recipe(recipe)
        _check_network(hidden_size, ffn_size, self.recipe, save_activation, backend)
        self.save_activation: SaveActivation = save_activation
        self.backend: BackendName = backend
        self.w1 = nn.Parameter(torch.empty(2 * ffn_size, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(hidden_size, ffn_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the parameters anew: uniformly up to 1 / sqrt(input features)."""
        for weight in (self.w1, self.w2):
            _fill(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(*, H) to (*, H). Rows are padded to what the recipe needs."""
        _check_input(x, self.w1.shape[-1])
        x_TH = x.flatten(0, -2)
        sizes, alignment = [x_TH.shape[0]], alignment_of(self.recipe)
        if uneven := sizes[0] % alignment != 0:
            x_TH, sizes = pad_rows(x_TH, sizes, alignment)
        y_TH = grouped_mlp(
            x_TH,
            self.w1[None],
            self.w2[None],
            sizes,
            recipe=self.recipe,
            save_activation=self.save_activation,
            backend=self.backend,
        )
        if uneven:
            y_TH = unpad_rows(y_TH, [x.numel() // x.shape[-1]], alignment)
        return y_TH.view(x.shape)


class MoEOutput(NamedTuple):
    """What a mixture of experts gives."""

    hidden: Tensor
    """As the input: (*, H)."""
    aux_loss: Tensor
    """float32 scalar to add to the loss, weighted already."""


class MoE(nn.Module):
    """Each token goes to the `top_k` of `num_experts` gated networks that a router chooses.

    No token is dropped: the rows of all experts, padded to what the recipe's blocks need, have a capacity that follows
    from the shapes alone, so nothing waits for the device to know how many tokens an expert got.

    Saved for backward are the router's input, one buffer of quantized rows for the first product and the first
    product's output, and indices: the tokens' own rows are not, nor is what the experts gave, because the router's
    weights multiply the rows before the last product.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        top_k: int,
        *,
        recipe: Recipe | None = None,
        score: Score = "softmax",
        normalize: bool = True,
        balance_weight: float = 0.01,
        z_weight: float = 0.0,
        shared_ffn_size: int = 0,
        save_activation: SaveActivation = "auto",
        backend: BackendName = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`router` is (E, H), `w1` (E, 2F, H), the gate's rows first, `w2` (E, H, F).

        recipe, save_activation, backend: as of `lighterage.ops.grouped_mlp`. The router is in float32 with any recipe.
        score, normalize: as of `lighterage.ops.route`.
        balance_weight, z_weight: of the two terms of `aux_loss`; see `lighterage.ops.load_balancing_loss` and
            `router_z_loss`.
        shared_ffn_size: features of a network that every token goes to as well; 0 for none.
        Raises: ValueError, TypeError: if `top_k` is not from 1 to `num_experts`, or an argument is of the wrong kind.
        """
        super().__init__()
        self.recipe = check_recipe(recipe)
        _check_network(hidden_size, ffn_size, self.recipe, save_activation, backend)
        check_count("num_experts", num_experts, least=1)
        check_count("shared_ffn_size", shared_ffn_size)
        check_flag("normalize", normalize)
        check_number("balance_weight", balance_weight)
        check_number("z_weight", z_weight)
        if not is_one_of(score, get_args(Score)):
            raise ValueError(f"score must be one of {list(get_args(Score))}; got {score!r}.")
        if not 1 <= check_count("top_k", top_k) <= num_experts:
            raise ValueError(f"top_k must be from 1 to the {num_experts} experts; got {top_k}.")
        self.num_experts, self.top_k = num_experts, top_k
        self.score: Score = score
        self.normalize = normalize
        self.balance_weight, self.z_weight = balance_weight, z_weight
        self.save_activation: SaveActivation = save_activation
        self.backend: BackendName = backend
        self.router = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.w1 = nn.Parameter(torch.empty(num_experts, 2 * ffn_size, hidden_size, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size, device=device, dtype=dtype))
        self.shared: GatedMLP | None = None
        if shared_ffn_size:
            self.shared = GatedMLP(
                hidden_size,
                shared_ffn_size,
                recipe=recipe,
                save_activation=save_activation,
                backend=backend,
                device=device,
                dtype=dtype,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the parameters anew: uniformly up to 1 / sqrt(input features)."""
        for weight in (self.router, self.w1, self.w2):
            _fill(weight)
        if self.shared is not None:
            self.shared.reset_parameters()

    def forward(self, x: Tensor) -> MoEOutput:
        """(*, H) to (*, H), and the auxiliary loss."""
        _check_input(x, self.router.shape[-1])
        x_TH = x.flatten(0, -2)
        logits_TE = router_logits(x_TH, self.router)
        routing = route(logits_TE, self.top_k, score=self.score, normalize=self.normalize)
        plan = plan_permutation(routing.experts, self.num_experts, alignment_of(self.recipe))
        y_CH = grouped_mlp(
            permute(x_TH, plan),
            self.w1,
            self.w2,
            plan.splits,
            probs=weights_of_rows(routing.weights, plan),
            recipe=self.recipe,
            save_activation=self.save_activation,
            backend=self.backend,
        )
        hidden = unpermute(y_CH, plan).view(x.shape)
        if self.shared is not None:
            hidden = hidden + self.shared(x)
        aux_loss = logits_TE.new_zeros(())
        if self.balance_weight:
            aux_loss = aux_loss + self.balance_weight * load_balancing_loss(routing.scores, plan.num_tokens_of)
        if self.z_weight:
            aux_loss = aux_loss + self.z_weight * router_z_loss(logits_TE)
        return MoEOutput(hidden, aux_loss)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, score={self.score!r}, recipe={self.recipe}"


def _check_network(
    hidden_size: int, ffn_size: int, recipe: Recipe | None, save_activation: object, backend: object
) -> None:
    check_features(recipe, check_count("hidden_size", hidden_size, least=1), check_count("ffn_size", ffn_size, least=1))
    for name, value, choices in (
        ("save_activation", save_activation, get_args(SaveActivation)),
        ("backend", backend, get_args(BackendName)),
    ):
        if not is_one_of(value, choices):
            raise ValueError(f"{name} must be one of {list(choices)}; got {value!r}.")


def _check_input(x: Tensor, hidden_size: int) -> None:
    check_tensor("x", x)
    if x.ndim < 2 or x.shape[-1] != hidden_size:
        raise ValueError(f"x must be (*, {hidden_size}) of 2 dimensions or more; got {tuple(x.shape)}.")


def _fill(weight: Tensor) -> None:
    bound = 1 / math.sqrt(max(weight.shape[-1], 1))
    nn.init.uniform_(weight, -bound, bound)
