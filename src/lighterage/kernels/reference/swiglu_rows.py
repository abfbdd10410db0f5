"""SwiGLU with a factor for each row, and its gradients, in plain torch: float32 inside, one rounding.

Letters: M rows, F features; the input has 2F of them, the gate's before the other half's.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def swiglu_rows(h: torch.Tensor, probs_M: torch.Tensor | None = None) -> torch.Tensor:
    """y = silu(gate) * up * prob, (M, F) of h's dtype, of h (M, 2F) = [gate, up]; silu(g) = g / (1 + exp(-g)).

    probs_M: a factor for each row, or None for 1.
    """
    gate, up = h.float().chunk(2, dim=1)
    y = gate / (1 + torch.exp(-gate)) * up
    return (y if probs_M is None else y * probs_M.float()[:, None]).to(h.dtype)


@torch.no_grad()
def swiglu_rows_backward(
    dy_MF: torch.Tensor, h: torch.Tensor, probs_M: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`(dh (M, 2F) of h's dtype, the gradient of probs_M in float32, or None)`."""
    gate, up = h.float().chunk(2, dim=1)
    sigmoid = 1 / (1 + torch.exp(-gate))
    silu = gate * sigmoid
    dy = dy_MF.float()
    dprobs_M = None if probs_M is None else (dy * silu * up).sum(1)
    if probs_M is not None:
        dy = dy * probs_M.float()[:, None]
    dgate = dy * up * (sigmoid * (1 + gate * (1 - sigmoid)))
    return torch.cat([dgate, dy * silu], dim=1).to(h.dtype), dprobs_M
