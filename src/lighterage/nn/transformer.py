"""A decoder layer: attention and a network behind it, each behind a norm and beside a residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lighterage.nn.attention import SelfAttention
from lighterage.nn.moe import MoEOutput
from lighterage.ops.router import attach_loss
from lighterage.recipes import Recipe


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), and that plus network(norm of it)."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        feed_forward: nn.Module,
        *,
        num_kv_heads: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        max_positions: int = 4096,
        rotary_base: float = 10000.0,
        eps: float = 1e-6,
        recipe: Recipe | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """feed_forward: what comes behind attention, (*, H) to (*, H): a `GatedMLP`, a `MoE`, or a module of yours.

        recipe: of attention's products; the network has its own.
        The rest as of `SelfAttention`; `eps` is the norms'.
        """
        super().__init__()
        if not isinstance(feed_forward, nn.Module):
            raise TypeError(f"feed_forward must be a torch.nn.Module; got {feed_forward!r}. Pass a GatedMLP or a MoE.")
        self.attention_norm = nn.RMSNorm(hidden_size, eps=eps, device=device, dtype=dtype)
        self.attention = SelfAttention(
            hidden_size,
            num_heads,
            num_kv_heads=num_kv_heads,
            causal=causal,
            dropout=dropout,
            max_positions=max_positions,
            rotary_base=rotary_base,
            recipe=recipe,
            device=device,
            dtype=dtype,
        )
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=eps, device=device, dtype=dtype)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, *, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """(B, S, H) to (B, S, H); or (T, H) of packed sequences, which end at `cu_seqlens`, to (T, H).

        The auxiliary loss of a mixture of experts needs no plumbing: gradients are those of the loss plus the auxiliary
        losses of all layers. (With gradient accumulation divide the weights in `MoE` by the number of microbatches, as
        you divide the loss.) To log it, register a forward hook on the `MoE`, which returns it.
        """
        x = x + self.attention(self.attention_norm(x), cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        y = self.feed_forward(self.feed_forward_norm(x))
        if isinstance(y, MoEOutput):
            y = attach_loss(y.hidden, y.aux_loss)
        out: Tensor = x + y
        return out
