"""Attention of sequences of different lengths, packed one after another.

Shape suffixes: T tokens of all, N query heads, G heads of keys and values, H head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

UNEQUAL_LENGTHS = (
    "causal attention needs as many keys as queries, because else it is not clear which key a query is beside; got "
    "{} and {}. Pad one of them, or leave causal out."
)
"""To format with both."""


def packed_attention(
    q_TNH: Tensor,
    k_TGH: Tensor,
    v_TGH: Tensor,
    ends: Tensor,
    ends_kv: Tensor,
    longest: int,
    longest_kv: int,
    causal: bool,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """softmax(q k^T * scale) v of sequences that lie one after another: (T, N, H), as `attention` says.

    longest, longest_kv: at least the longest sequences.
    Raises: ValueError: if the ends of sequences do not fit, where the host has them, or if it needs them and has not.
    """
    if q_TNH.is_cuda and dropout == 0 and q_TNH.dtype in (torch.bfloat16, torch.float16):
        ends, ends_kv = (x.to(device=q_TNH.device, dtype=torch.int32) for x in (ends, ends_kv))
        return _flash(causal, scale, q_TNH.shape[1] != k_TGH.shape[1])(
            q_TNH, k_TGH, v_TGH, ends, ends_kv, longest, longest_kv
        )
    if ends.is_cuda or ends_kv.is_cuda:
        raise ValueError(
            f"attention with cu_seqlens in {q_TNH.dtype} and dropout {dropout} has a kernel for each sequence, so "
            "cu_seqlens must be on the host; got it on the GPU. Pass cu_seqlens.cpu(), or use bf16 without dropout."
        )
    bounds, bounds_kv = checked_bounds(ends, "q", q_TNH.shape[0]), checked_bounds(ends_kv, "k", k_TGH.shape[0])
    for name, bound, most in (("max_seqlen", bounds, longest), ("max_seqlen_kv", bounds_kv, longest_kv)):
        found = max(b - a for a, b in pairwise(bound))
        if found > most:
            raise ValueError(
                f"{name} must be at least the longest sequence; got {most} where one has {found} tokens. Pass that, "
                "or leave it out."
            )
    if causal and bounds != bounds_kv:
        raise ValueError(UNEQUAL_LENGTHS.format(list(bounds), list(bounds_kv)))
    if q_TNH.device.type == "cpu" and dropout == 0:
        return cast(Tensor, _EachSequence.apply(q_TNH, k_TGH, v_TGH, bounds, bounds_kv, causal, scale))  # type: ignore[no-untyped-call]
    pieces = [
        F.scaled_dot_product_attention(
            _heads_first(q_TNH[a:b]),
            _heads_first(k_TGH[c:d]),
            _heads_first(v_TGH[c:d]),
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=q_TNH.shape[1] != k_TGH.shape[1],
        )[0].transpose(0, 1)
        for (a, b), (c, d) in _sequences(bounds, bounds_kv)
    ]
    return torch.cat(pieces) if pieces else torch.zeros_like(q_TNH)


def checked_bounds(ends: Tensor, name: str, num_tokens: int) -> tuple[int, ...]:
    """The ends of sequences, which the host has, as numbers: from 0 to the `num_tokens` tokens of what `name` says.

    Raises: ValueError: if they are others.
    """
    bounds = tuple(ends.tolist())
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the {num_tokens} tokens of {name}; got {list(bounds)}. "
            "They are the ends of the sequences, not their lengths."
        )
    return bounds


def _sequences(
    bounds: tuple[int, ...], bounds_kv: tuple[int, ...]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Beginnings and ends of the sequences that have tokens."""
    for rows, rows_kv in zip(pairwise(bounds), pairwise(bounds_kv), strict=True):
        if rows[0] < rows[1]:
            yield rows, rows_kv


@lru_cache(maxsize=16)
def _flash(causal: bool, scale: float | None, gqa: bool) -> Callable[..., Tensor]:
    """PyTorch's packed kernel, with the keywords that this version of it has."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {}
    if causal and "window_size" in known:
        options["window_size"] = (-1, 0)
    elif causal:
        options["is_causal"] = True
    if scale is not None:
        options["scale"] = scale
    if gqa and "enable_gqa" in known:
        options["enable_gqa"] = True
    return cast(Callable[..., Tensor], partial(varlen_attn, **cast(Any, options)))


class _EachSequence(torch.autograd.Function):
    """PyTorch's CPU kernel for one sequence after another, into one output.

    What is saved is what a packed kernel saves: q, k, v, the output and the logarithms, each one allocation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_TNH: Tensor,
        k_TGH: Tensor,
        v_TGH: Tensor,
        bounds: tuple[int, ...],
        bounds_kv: tuple[int, ...],
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        out_TNH = torch.zeros(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        lse_dtype = torch.promote_types(q_TNH.dtype, torch.float32)  # what the kernel accumulates in
        lse_TN = torch.zeros(q_TNH.shape[:2], dtype=lse_dtype, device=q_TNH.device)
        groups = q_TNH.shape[1] // k_TGH.shape[1]
        for (a, b), (c, d) in _sequences(bounds, bounds_kv):
            if c == d:
                continue
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q_TNH[a:b]),
                _heads_first(k_TGH[c:d], groups),
                _heads_first(v_TGH[c:d], groups),
                0.0,
                causal,
                scale=scale,
            )
            out_TNH[a:b] = out[0].transpose(0, 1)
            lse_TN[a:b] = lse[0].transpose(0, 1)
        ctx.save_for_backward(q_TNH, k_TGH, v_TGH, out_TNH, lse_TN)
        ctx.rest = bounds, bounds_kv, causal, scale
        return out_TNH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TNH: Tensor) -> tuple[Tensor | None, ...]:
        q_TNH, k_TGH, v_TGH, out_TNH, lse_TN = ctx.saved_tensors
        bounds, bounds_kv, causal, scale = ctx.rest
        num_groups = k_TGH.shape[1]
        groups = q_TNH.shape[1] // num_groups
        dq, dk, dv = torch.zeros_like(q_TNH), torch.zeros_like(k_TGH), torch.zeros_like(v_TGH)
        for (a, b), (c, d) in _sequences(bounds, bounds_kv):
            if c == d:
                continue
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(grad_TNH[a:b]),
                _heads_first(q_TNH[a:b]),
                _heads_first(k_TGH[c:d], groups),
                _heads_first(v_TGH[c:d], groups),
                _heads_first(out_TNH[a:b]),
                lse_TN[a:b].transpose(0, 1)[None],
                0.0,
                causal,
                scale=scale,
            )
            dq[a:b] = found[0][0].transpose(0, 1)
            for whole, part in ((dk, found[1]), (dv, found[2])):
                whole[c:d] = part[0].unflatten(0, (num_groups, groups)).sum(1).transpose(0, 1)
        return dq, dk, dv, None, None, None, None


def _heads_first(x_TNH: Tensor, groups: int = 1) -> Tensor:
    """(1, N * groups, T, H), each head repeated `groups` times."""
    x_1NTH = x_TNH.transpose(0, 1)[None]
    return x_1NTH if groups == 1 else x_1NTH.repeat_interleave(groups, dim=1)
