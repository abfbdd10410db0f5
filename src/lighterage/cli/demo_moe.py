"""The demo's mixture of experts: a decoder over bytes made of lighterage's layers, in which nothing knows of offload.

Shape suffixes: B batch, T tokens of a sequence, D model width, V bytes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lighterage.nn import MoE, TransformerBlock
from lighterage.recipes import (
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

_HEAD_WIDTH = 64
_VOCABULARY = 256

RECIPES: dict[str, Recipe | None] = {
    "fp8_block": Float8BlockScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "nvfp4": NVFP4BlockScaling(),
    "fp8_current": Float8CurrentScaling(fp8_format="e4m3"),
    "none": None,
}
"""What `--recipe` may name. Per-tensor FP8 has E4M3 gradients: PyTorch's grouped product on a GPU takes no others."""


class MoEDecoder(nn.Module):
    """Bytes in, the loss of guessing each next byte out; the experts' auxiliary losses are in the gradients."""

    def __init__(self, *, layers: int, width: int, tokens: int, experts: int, top_k: int, recipe: str) -> None:
        super().__init__()
        chosen = RECIPES[recipe]
        num_heads = width // _HEAD_WIDTH
        num_kv_heads = num_heads // 2 if num_heads % 2 == 0 else num_heads
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.layers = nn.ModuleList(
            TransformerBlock(
                width,
                num_heads,
                MoE(width, width, experts, top_k, recipe=chosen),
                num_kv_heads=num_kv_heads,
                max_positions=tokens,
                recipe=chosen,
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)

    def forward(self, text_BT: Tensor, next_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(text_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), next_BT.flatten())
