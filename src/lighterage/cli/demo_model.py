"""The model that the demo trains: a decoder over bytes in plain PyTorch, which knows nothing of offload.

Shape suffixes: B batch, T tokens of a sequence, D model width, N heads, H head width, F feed-forward width, V bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEAD_WIDTH = 64
_VOCABULARY = 256


class Attention(nn.Module):
    """Causal self-attention with rotary positions; two query heads share a key and value head where there are two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // _HEAD_WIDTH
        self.num_kv_heads = self.num_heads // 2 if self.num_heads % 2 == 0 else self.num_heads
        self.qkv = nn.Linear(width, (self.num_heads + 2 * self.num_kv_heads) * _HEAD_WIDTH, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BTD: Tensor, rotation_TH: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        qkv_BTNH = self.qkv(x_BTD).view(batch, tokens, -1, _HEAD_WIDTH)
        q, k, v = qkv_BTNH.transpose(1, 2).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotate(q, rotation_TH), rotate(k, rotation_TH)
        k, v = self._for_every_head(k), self._for_every_head(v)
        y_BNTH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out_BTD: Tensor = self.out(y_BNTH.transpose(1, 2).reshape(batch, tokens, width))
        return out_BTD

    def _for_every_head(self, x_BNTH: Tensor) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        return x_BNTH.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


class FeedForward(nn.Module):
    """SwiGLU, with gate and value in one product: autograd saves two halves of one allocation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 64 * round(width * 8 / 3 / 64)
        self.gate_and_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, value_BTF = self.gate_and_value(x_BTD).chunk(2, dim=-1)
        out_BTD: Tensor = self.out(F.silu(gate_BTF) * value_BTF)
        return out_BTD


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width)
        self.feed_forward_norm = nn.RMSNorm(width, eps=1e-6)
        self.feed_forward = FeedForward(width)

    def forward(self, x_BTD: Tensor, rotation_TH: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation_TH)
        out_BTD: Tensor = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return out_BTD


class Decoder(nn.Module):
    """Bytes in, the loss of guessing each next byte out."""

    rotation_TH: Tensor

    def __init__(self, *, layers: int, width: int, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)
        self.register_buffer("rotation_TH", rotation(tokens), persistent=False)

    def forward(self, text_BT: Tensor, next_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(text_BT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.rotation_TH)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), next_BT.flatten())


def rotation(tokens: int) -> Tensor:
    """Cosines and sines of rotary positions: (tokens, head width), the first half cosines, float32."""
    half = _HEAD_WIDTH // 2
    speed_H = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle_TH = torch.outer(torch.arange(tokens, dtype=torch.float32), speed_H)
    return torch.cat([angle_TH.cos(), angle_TH.sin()], dim=1)


def rotate(x_BNTH: Tensor, rotation_TH: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle."""
    cos_TH, sin_TH = rotation_TH.to(x_BNTH.dtype).chunk(2, dim=1)
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat([a * cos_TH - b * sin_TH, a * sin_TH + b * cos_TH], dim=-1)
