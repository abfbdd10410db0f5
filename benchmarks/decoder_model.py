"""The decoder that is measured: plain PyTorch layers, one autograd node for each operation.

Shape suffixes: B batch, S sequence, H hidden, F feed-forward, N heads, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.shapes import DecoderShape


class DecoderLayer(nn.Module):
    """RMS norm, rotary grouped-query attention, RMS norm, SwiGLU."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.attention_norm = nn.Parameter(torch.ones(shape.hidden))
        self.ffn_norm = nn.Parameter(torch.ones(shape.hidden))
        self.q = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        x_BSH = x_BSH + self._attention(F.rms_norm(x_BSH, (self.shape.hidden,), self.attention_norm), cos_SD, sin_SD)
        n_BSH = F.rms_norm(x_BSH, (self.shape.hidden,), self.ffn_norm)
        return x_BSH + self.down(F.silu(self.gate(n_BSH)) * self.up(n_BSH))

    def _attention(self, n_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        batch, seq, _ = n_BSH.shape
        q_BNSD = self.q(n_BSH).view(batch, seq, self.shape.heads, -1).transpose(1, 2)
        k_BNSD = self.k(n_BSH).view(batch, seq, self.shape.kv_heads, -1).transpose(1, 2)
        v_BNSD = self.v(n_BSH).view(batch, seq, self.shape.kv_heads, -1).transpose(1, 2)
        q_BNSD, k_BNSD = _rotate(q_BNSD, cos_SD, sin_SD), _rotate(k_BNSD, cos_SD, sin_SD)
        y_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BNSD, v_BNSD, is_causal=True, enable_gqa=True)
        return self.o(y_BNSD.transpose(1, 2).reshape(batch, seq, -1))


class Decoder(nn.Module):
    """The layers, the rotary tables, and a loss that costs next to no memory."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.layers))
        angle_SD = torch.outer(
            torch.arange(shape.seq, dtype=torch.float32),
            10000.0 ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim),
        ).repeat(1, 2)
        self.register_buffer("cos_SD", angle_SD.cos(), persistent=False)
        self.register_buffer("sin_SD", angle_SD.sin(), persistent=False)

    def forward(self, x_BSH: Tensor, probe_BSH: Tensor) -> Tensor:
        seq = x_BSH.shape[1]
        cos_SD, sin_SD = self.cos_SD[:seq], self.sin_SD[:seq]
        for layer in self.layers:
            x_BSH = self.run_layer(layer, x_BSH, cos_SD, sin_SD)
        # A fixed direction instead of a head: its gradient is the probe itself, so nothing large is saved for it.
        return (x_BSH * probe_BSH).sum(dtype=torch.float32)

    def run_layer(self, layer: nn.Module, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        return layer(x_BSH, cos_SD, sin_SD)


class CheckpointedDecoder(Decoder):
    """The same, with every layer recomputed in backward."""

    def run_layer(self, layer: nn.Module, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, x_BSH, cos_SD, sin_SD, use_reentrant=False)


def _rotate(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat([-second, first], dim=-1) * sin_SD


def build(shape: DecoderShape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """A model with weights of a fixed seed, made on `device`."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Decoder(shape)
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype)


def twin(model: Decoder, kind: type[Decoder] = Decoder) -> Decoder:
    """A module tree of its own over the same parameters and buffers: modes do not meet in each other's hooks."""
    other = kind.__new__(kind)
    nn.Module.__init__(other)
    for name, buffer in model.named_buffers(recurse=False):
        other.register_buffer(name, buffer, persistent=False)
    other.layers = nn.ModuleList(_twin_layer(layer) for layer in model.layers)
    return other


def _twin_layer(layer: nn.Module) -> DecoderLayer:
    other = DecoderLayer.__new__(DecoderLayer)
    nn.Module.__init__(other)
    other.shape = layer.shape
    for name, parameter in layer.named_parameters(recurse=False):
        other.register_parameter(name, parameter)
    for name, child in layer.named_children():
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = child.in_features, child.out_features
        linear.weight, linear.bias = child.weight, None
        other.add_module(name, linear)
    return other


def inputs(
    shape: DecoderShape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seq: int | None = None
) -> tuple[Tensor, Tensor]:
    """An input and a probe, (batch, sequence, hidden), of a fixed seed."""
    generator = torch.Generator(device).manual_seed(1)
    size = (shape.batch, seq or shape.seq, shape.hidden)
    x, probe = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    return x, probe
