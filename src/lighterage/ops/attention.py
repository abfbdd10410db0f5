"""Attention over PyTorch's fused kernels, whose output says which of its allocations may move.

Shape suffixes: B sequences, S tokens of each, T tokens of all, N query heads, G heads of keys and values, H head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lighterage.formats.quantizer import Quantizer
from lighterage.marks import mark_not_offload

MarkOutput = Literal["auto"] | bool


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_kv: int | None = None,
    output_quantizer: Quantizer | None = None,
    mark_output: MarkOutput = "auto",
) -> Tensor:
    """softmax(q k^T * scale) v, heads side by side, as the projection behind it takes them.

    q: (B, S, N, H), or packed (T, N, H); bf16, fp16 or fp32. k, v: the same with G heads, where G divides N: each is
        shared by N / G query heads.
    causal: a token sees itself and what is before it; q and k then have the same lengths.
    scale: 1 / sqrt(H) if None.
    dropout: of the weights, drawn from the device's generator: the same seed drops the same weights, with or without
        offload, and in a checkpoint's recomputation.
    cu_seqlens: int32 (sequences + 1,), the ends of the sequences of a packed q, beginning with 0 and ending with T;
        `cu_seqlens_kv` those of k and v if they differ. On the device the host never reads them; on a GPU with dropout,
        or in fp32, there is one kernel for each sequence, and they must be on the host.
    max_seqlen, max_seqlen_kv: at least the longest sequence. Unless given T, which is always enough; less launches
        fewer blocks on a GPU.
    output_quantizer: quantize the output; the gradient goes straight through.
    mark_output: see Note [Which allocation of an output moves].

    Returns: (B, S, N * H) or (T, N * H) of q's dtype, or the quantized tensor of that shape.
    Raises: ValueError, TypeError: naming the rule that an argument breaks.
    """
    _check(q, k, v, causal, dropout, cu_seqlens, cu_seqlens_kv)
    if cu_seqlens is None:
        gqa = k.shape[-2] != q.shape[-2]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=gqa,
        ).transpose(1, 2)
    else:
        ends_kv = cu_seqlens if cu_seqlens_kv is None else cu_seqlens_kv
        longest = max_seqlen or q.shape[0]
        longest_kv = max_seqlen_kv or (longest if cu_seqlens_kv is None else k.shape[0])
        out = _packed(q, k, v, cu_seqlens, ends_kv, longest, longest_kv, causal, scale, dropout)
    saved_by_itself = _saved_here_for_good(out)
    out = out.flatten(-2)
    if output_quantizer is not None:
        out = cast(Tensor, _Quantized.apply(out, output_quantizer))  # type: ignore[no-untyped-call]
        saved_by_itself = False
    if mark_output is True or (mark_output == "auto" and saved_by_itself):
        mark_not_offload(out)
    return out


# Note [Which allocation of an output moves]
#
# Attention's backward needs its output, and the projection behind it saves what it was given. Three cases:
#
# Both in one section, or in two. They save the same allocation, of which every byte moves once, and it is freed when
# both have let go. A mark would hold it back: there is none. Behind a quantized projection there would be a second
# allocation, the projection's codes: its `save_original_input` saves the output itself, and there is one again.
#
# Attention in no section, the projection in one. Autograd holds the output on the device whatever the projection does,
# so moving it would free nothing. That can be seen here (a kernel saved its output, and no hook was there to take it),
# and "auto" marks the output.
#
# Attention is itself a section, the projection is in none. The same the other way round, but here nobody can see what
# will be done with the output: `mark_output=True` says it. Without it the first step moves the output in vain, and the
# engine keeps it from then on.
#
# A mark holds for the allocation that is handed on. Of a quantized output those are the codes; what the kernel saved,
# the output before it was quantized, is another allocation: it belongs to attention alone and moves.


def _saved_here_for_good(out: Tensor) -> bool:
    """Whether the kernel that made `out` saved it, and nothing moves what is saved here."""
    if torch.compiler.is_compiling() or out.grad_fn is None:
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    node: torch.autograd.graph.Node | None = out.grad_fn
    if node is not None and node.name() == "TransposeBackward0":
        node = node.next_functions[0][0]
    name = "" if node is None else node.name().lower()
    return "attention" in name or "attn" in name  # the kernels made of plain operators save weights, not outputs


class _Quantized(torch.autograd.Function):
    """The codes of a tensor; its gradient is theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


# --- sequences of different lengths ----------------------------------------------------------------------------------


def _packed(
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
    bounds, bounds_kv = (tuple(x.tolist()) for x in (ends, ends_kv))
    for name, bound, num_tokens in (("q", bounds, q_TNH.shape[0]), ("k", bounds_kv, k_TGH.shape[0])):
        if bound[0] != 0 or bound[-1] != num_tokens or any(a > b for a, b in pairwise(bound)):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {num_tokens} tokens of {name}; got {list(bound)}. "
                "They are the ends of the sequences, not their lengths."
            )
    if causal and bounds != bounds_kv:
        raise ValueError(_UNEQUAL.format(list(bounds), list(bounds_kv)))
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
        lse_TN = torch.zeros(q_TNH.shape[:2], dtype=torch.float32, device=q_TNH.device)
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


# --- wrong use -------------------------------------------------------------------------------------------------------

_UNEQUAL = (
    "causal attention needs as many keys as queries, because else it is not clear which key a query is beside; got "
    "{} and {}. Pad one of them, or leave causal out."
)


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float, ends: Tensor | None, ends_kv: Tensor | None
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    dims = 4 if ends is None else 3
    if not q.ndim == k.ndim == v.ndim == dims:
        layout = "(batch, tokens, heads, width)" if ends is None else "(tokens, heads, width) with cu_seqlens"
        raise ValueError(f"attention takes q, k and v as {layout}; got {shapes}. Pass cu_seqlens for packed sequences.")
    if k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1] or (ends is None and q.shape[0] != k.shape[0]):
        raise ValueError(
            f"attention needs keys and values of the same tokens and heads, and q and k of one batch and width; got "
            f"{shapes}."
        )
    if q.shape[-2] % max(1, k.shape[-2]):
        raise ValueError(
            f"attention needs the number of key heads to divide the number of query heads; got {k.shape[-2]} and "
            f"{q.shape[-2]}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise TypeError(
            f"attention needs q, k and v of one dtype on one device; got {q.dtype} on {q.device}, {k.dtype} on "
            f"{k.device}, {v.dtype} on {v.device}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1; got {dropout}.")
    if causal and ends is None and q.shape[1] != k.shape[1]:
        raise ValueError(_UNEQUAL.format(q.shape[1], k.shape[1]))
    if ends is None and ends_kv is not None:
        raise ValueError("cu_seqlens_kv belongs to packed sequences: pass cu_seqlens too.")
    for name, bound in (("cu_seqlens", ends), ("cu_seqlens_kv", ends_kv)):
        if bound is not None and (bound.ndim != 1 or bound.numel() < 2 or bound.is_floating_point()):
            raise ValueError(
                f"{name} must be whole numbers of shape (sequences + 1,); got {bound.dtype} {tuple(bound.shape)}."
            )
    if ends is not None and ends_kv is not None and ends.numel() != ends_kv.numel():
        raise ValueError(
            f"cu_seqlens and cu_seqlens_kv must be of the same number of sequences; got {ends.numel() - 1} and "
            f"{ends_kv.numel() - 1}."
        )
