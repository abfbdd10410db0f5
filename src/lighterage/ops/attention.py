"""Attention over PyTorch's fused kernels, whose output says which of its allocations may move.

Shape suffixes: B sequences, S tokens of each, T tokens of all, N query heads, G heads of keys and values, H head width.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lighterage.formats.arguments import check_count, check_flag, check_number
from lighterage.formats.quantizer import Quantizer
from lighterage.formats.tensor_arguments import check_no_transform, check_tensor
from lighterage.marks import mark_not_offload
from lighterage.ops.packed_attention import UNEQUAL_LENGTHS, packed_attention

_WHOLE = (torch.int32, torch.int64, torch.int16, torch.int8)
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
    max_seqlen, max_seqlen_kv: at least the longest sequence of packed ones; checked where the host has cu_seqlens.
        Unless given T, which is always enough; less launches fewer blocks on a GPU.
    output_quantizer: quantize the output; the gradient goes straight through.
    mark_output: see Note [Which allocation of an output moves].

    Returns: (B, S, N * H) or (T, N * H) of q's dtype, or the quantized tensor of that shape.
    Raises: ValueError, TypeError: naming the rule that an argument breaks.
    """
    _check(q, k, v, causal, cu_seqlens, cu_seqlens_kv)
    check_options(causal, scale, dropout, mark_output, output_quantizer)
    for name, longest, tokens in (("max_seqlen", max_seqlen, q), ("max_seqlen_kv", max_seqlen_kv, k)):
        _check_longest(name, longest, tokens.shape[0], cu_seqlens is not None)
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
        longest = q.shape[0] if max_seqlen is None else min(max_seqlen, q.shape[0])
        if max_seqlen_kv is not None:
            longest_kv = min(max_seqlen_kv, k.shape[0])
        else:
            longest_kv = longest if cu_seqlens_kv is None else k.shape[0]
        out = packed_attention(q, k, v, cu_seqlens, ends_kv, longest, longest_kv, causal, scale, dropout)
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


# --- wrong use -------------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, ends: Tensor | None, ends_kv: Tensor | None) -> None:
    if not torch.compiler.is_compiling():
        check_no_transform("attention")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
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
    if q.shape[-2] and (not k.shape[-2] or q.shape[-2] % k.shape[-2]):
        raise ValueError(
            f"attention needs the number of key heads to divide the number of query heads; got {k.shape[-2]} and "
            f"{q.shape[-2]}."
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise TypeError(
            f"attention needs q, k and v of one dtype on one device; got {q.dtype} on {q.device}, {k.dtype} on "
            f"{k.device}, {v.dtype} on {v.device}."
        )
    if causal and ends is None and q.shape[1] != k.shape[1]:
        raise ValueError(UNEQUAL_LENGTHS.format(q.shape[1], k.shape[1]))
    if ends is None and ends_kv is not None:
        raise ValueError("cu_seqlens_kv belongs to packed sequences: pass cu_seqlens too.")
    for name, bound in (("cu_seqlens", ends), ("cu_seqlens_kv", ends_kv)):
        if bound is not None:
            check_ends(name, bound)
    if ends is not None and v.shape[-1] != q.shape[-1]:
        raise ValueError(f"packed attention needs values as wide as queries; got {shapes}. Pad v, and cut the output.")
    if ends is not None and ends_kv is not None and ends.numel() != ends_kv.numel():
        raise ValueError(
            f"cu_seqlens and cu_seqlens_kv must be of the same number of sequences; got {ends.numel() - 1} and "
            f"{ends_kv.numel() - 1}."
        )


def check_ends(name: str, ends: object) -> None:
    """Check that the ends of sequences are a tensor of them.

    Raises: ValueError, TypeError.
    """
    check_tensor(name, ends, dtypes=None)
    if isinstance(ends, Tensor) and (ends.ndim != 1 or ends.numel() < 2 or ends.dtype not in _WHOLE):
        raise ValueError(
            f"{name} must be whole numbers of shape (sequences + 1,); got {ends.dtype} {tuple(ends.shape)}."
        )


def check_options(
    causal: bool, scale: float | None, dropout: float, mark_output: object, output_quantizer: object
) -> None:
    """Check what does not depend on the tensors.

    Raises: ValueError, TypeError.
    """
    check_flag("causal", causal)
    check_number("dropout", dropout)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1; got {dropout}.")
    if scale is not None:
        check_number("scale", scale)
    if not isinstance(mark_output, bool) and mark_output != "auto":
        raise ValueError(f'mark_output must be True, False or "auto"; got {mark_output!r}.')
    if output_quantizer is not None and not hasattr(type(output_quantizer), "set_usage"):
        raise TypeError(
            f"output_quantizer must be a quantizer; got {output_quantizer!r}. Of a recipe pass "
            'recipe.quantizer("input", rowwise=True, columnwise=True).'
        )


def _check_longest(name: str, longest: object, num_tokens: int, is_packed: bool) -> None:
    if longest is None:
        return
    if not is_packed:
        raise ValueError(f"{name} belongs to packed sequences: pass cu_seqlens too, or leave it out.")
    check_count(name, longest, least=min(num_tokens, 1))
