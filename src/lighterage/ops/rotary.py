"""Rotary positions for queries and keys that lie beside values in one tensor.

Shape suffixes: B sequences, S tokens of each, N heads of all three, H head width; P pairs of channels, H / 2.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lighterage.formats.arguments import check_count, check_number
from lighterage.formats.tensor_arguments import check_same_device, check_tensor


def rotary_table(num_positions: int, head_width: int, *, base: float = 10000.0, device: Any = None) -> Tensor:
    """Cosines and sines of every position: float32 (2, num_positions, head_width / 2).

    Raises: ValueError, TypeError: on an odd width, or numbers that are none.
    """
    check_count("num_positions", num_positions)
    check_count("head_width", head_width)
    check_number("base", base)
    if head_width % 2:
        raise ValueError(f"rotary positions turn pairs of channels, so the head width must be even; got {head_width}.")
    pairs = head_width // 2
    speed_P = base ** (-torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    angle_SP = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), speed_P)
    return torch.stack([angle_SP.cos(), angle_SP.sin()])


def rotate_heads(x: Tensor, table: Tensor, num_rotated: int) -> Tensor:
    """Turn the first `num_rotated` heads by their positions; the others are copied.

    x: (B, S, N, H), or (S, N, H) with a table whose rows are the tokens' positions. table: float32 (2, S, H / 2).
    Channel p is paired with p + H / 2. Computed in float32, rounded once.

    Queries, keys and values of one product come out as views of one new allocation, all of which attention saves: had
    the values stayed where they were, they would hold all of the product's allocation.
    Raises: ValueError, TypeError: on other shapes or dtypes.
    """
    check_tensor("x", x)
    check_tensor("table", table, dtypes=(torch.float32,))
    if check_count("num_rotated", num_rotated) > (x.shape[-2] if x.ndim in (3, 4) else -1):
        raise ValueError(
            f"rotate_heads turns up to all heads of x (B, S, N, H) or (S, N, H); got {num_rotated} of {tuple(x.shape)}."
        )
    if table.shape != (2, x.shape[-3], x.shape[-1] // 2) or x.shape[-1] % 2:
        raise ValueError(
            f"the rotary table must be {(2, x.shape[-3], x.shape[-1] // 2)} for x {tuple(x.shape)}; got "
            f"{tuple(table.shape)}. Make it with rotary_table(tokens, head_width)."
        )
    check_same_device(x=x, table=table)
    return cast(Tensor, _RotateHeads.apply(x, table, num_rotated))  # type: ignore[no-untyped-call]


class _RotateHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSNH: Tensor, table_2SP: Tensor, num_rotated: int) -> Tensor:
        ctx.save_for_backward(table_2SP)
        ctx.num_rotated = num_rotated
        return _turned(x_BSNH, table_2SP[0], table_2SP[1], num_rotated)

    @staticmethod
    def backward(ctx: Any, grad_BSNH: Tensor) -> tuple[Tensor, None, None]:
        (table_2SP,) = ctx.saved_tensors
        return _turned(grad_BSNH, table_2SP[0], -table_2SP[1], ctx.num_rotated), None, None


def _turned(x_BSNH: Tensor, cos_SP: Tensor, sin_SP: Tensor, num_rotated: int) -> Tensor:
    cos_S1P, sin_S1P = cos_SP[:, None], sin_SP[:, None]
    out_BSNH = torch.empty_like(x_BSNH, memory_format=torch.contiguous_format)
    a, b = x_BSNH[..., :num_rotated, :].float().chunk(2, dim=-1)
    half = x_BSNH.shape[-1] // 2
    out_BSNH[..., :num_rotated, :half] = a * cos_S1P - b * sin_S1P
    out_BSNH[..., :num_rotated, half:] = a * sin_S1P + b * cos_S1P
    out_BSNH[..., num_rotated:, :] = x_BSNH[..., num_rotated:, :]
    return out_BSNH
