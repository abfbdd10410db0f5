"""Transformer blocks whose network is a mixture of experts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lighterage.nn import MoE, TransformerBlock
from lighterage.recipes import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockShape:
    """Blocks, and the sequences that go through them."""

    name: str
    layers: int
    hidden: int
    heads: int
    experts: int
    top_k: int
    features: int
    """Of one expert, between its two products."""
    batch: int
    seq: int


BLOCKS = BlockShape(
    name="8 MoE blocks", layers=8, hidden=2048, heads=16, experts=32, top_k=4, features=1024, batch=4, seq=4096
)
"""H 2048, F 1024, 32 experts of which a token takes 4. 3.3 GiB of weights in bf16, and as much of gradients."""

TINY_BLOCKS = BlockShape(
    name="3 tiny MoE blocks", layers=3, hidden=64, heads=2, experts=4, top_k=2, features=32, batch=2, seq=64
)
"""For a smoke test on a CPU: no figure taken with it means anything."""


class Blocks(nn.Module):
    """The blocks, one after another; the first `num_checkpointed` are recomputed in backward."""

    num_checkpointed = 0

    def __init__(self, shape: BlockShape, recipe: Recipe | None, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        where = {"recipe": recipe, "device": device, "dtype": torch.bfloat16}
        self.layers = nn.ModuleList(
            TransformerBlock(
                shape.hidden,
                shape.heads,
                MoE(shape.hidden, shape.features, shape.experts, shape.top_k, **where),
                max_positions=shape.seq,
                **where,
            )
            for _ in range(shape.layers)
        )
        self.shape, self.device = shape, device

    def forward(self, x_BSH: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            if number < self.num_checkpointed:
                x_BSH = torch.utils.checkpoint.checkpoint(layer, x_BSH, use_reentrant=False)
            else:
                x_BSH = layer(x_BSH)
        return x_BSH

    def inputs(self) -> tuple[Tensor, Tensor]:
        """An input, and the gradient of the output; (batch, sequence, hidden), of a fixed seed."""
        generator = torch.Generator(self.device).manual_seed(1)
        size = (self.shape.batch, self.shape.seq, self.shape.hidden)
        x, gradient = (
            torch.randn(size, generator=generator, device=self.device, dtype=torch.bfloat16) for _ in range(2)
        )
        return x.requires_grad_(), gradient
