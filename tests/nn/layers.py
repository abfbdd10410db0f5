"""Small models of lighterage's layers for the twin runs of `tests.engine.twin`, in every recipe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lighterage.nn import GatedMLP, MoE, TransformerBlock
from lighterage.recipes import (
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

RECIPES: dict[str, Recipe | None] = {
    "none": None,
    "fp8_block": Float8BlockScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "nvfp4": NVFP4BlockScaling(),
    "fp8_current": Float8CurrentScaling(),
}
WIDTH, TOKENS, BATCH = 64, 32, 2


class Stack(nn.Module):
    """Blocks between an embedding and a head; bf16, as recipes want it."""

    def __init__(self, feed_forward: Callable[[], nn.Module], recipe: Recipe | None, num_layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(
            TransformerBlock(WIDTH, 4, feed_forward(), num_kv_heads=2, max_positions=TOKENS, recipe=recipe)
            for _ in range(num_layers)
        )
        self.head = nn.Linear(WIDTH, 32)
        self.bfloat16()

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for layer in self.layers:
            x = self.layer(layer, x)
        logits: Tensor = self.head(x)
        return logits

    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x)
        return out


def sparse(recipe: Recipe | None, num_experts: int = 4, top_k: int = 2, **options: object) -> Callable[[], nn.Module]:
    """Mixtures of experts with all that they can have."""
    given = {"shared_ffn_size": 32, "z_weight": 1e-3} | options
    return lambda: MoE(WIDTH, 32, num_experts, top_k, recipe=recipe, **given)  # type: ignore[arg-type]


def dense(recipe: Recipe | None) -> Callable[[], nn.Module]:
    """Gated networks."""
    return lambda: GatedMLP(WIDTH, 96, recipe=recipe)


def text(seed: int) -> Tensor:
    """(BATCH, TOKENS + 1) numbers; other ones for each seed, so that the experts' splits change each step."""
    return torch.randint(32, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> Tensor:
    """Cross-entropy of guessing the next number."""
    batch = text(seed)
    return nn.functional.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


def train_step(model: nn.Module, seed: int) -> Tensor:
    """Forward and backward; the loss."""
    loss = loss_of(model, seed)
    loss.backward()
    return loss.detach()
