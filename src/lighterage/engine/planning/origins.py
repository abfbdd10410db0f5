"""What a saved tensor is to selective recomputation: the result of a product, of something cheap, or unknown."""

from __future__ import annotations

import torch

from ...planner.timeline import Kind

_VIEW_NAMES = (
    "Alias AsStrided Diagonal Expand Narrow Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose "
    "Unbind Unfold UnsafeView Unsqueeze View"
)
_VIEWS = frozenset(f"{name}Backward{number}" for name in _VIEW_NAMES.split() for number in range(4))
_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Convolution", "ScaledDotProduct", "ScaledMm", "GroupedMm", "Mv", "Dot")

_OP_NAMES = (
    "mm addmm bmm baddbmm convolution _convolution _scaled_mm _scaled_mm_v2 _grouped_mm _scaled_grouped_mm "
    "_scaled_grouped_mm_v2 _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward "
    "_cudnn_attention_forward"
)
PRODUCT_OPS: frozenset[object] = frozenset(
    getattr(packet, overload)
    for name in _OP_NAMES.split()
    if (packet := getattr(torch.ops.aten, name, None)) is not None
    for overload in packet.overloads()
    if "out" not in overload and "dtype" not in overload
)
"""The operators that are dear to compute: products of matrices, convolutions and attention."""


def kind_of(tensor: torch.Tensor) -> Kind:
    """The kind of a saved tensor by the node that made it, views looked through."""
    node = tensor.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0] if node.next_functions else None
    if node is None or issubclass(type(node), torch.autograd.function.BackwardCFunction):
        return "other"
    name = type(node).__name__
    if name in ("AccumulateGrad", "CheckpointFunctionBackward"):
        return "other"
    if name.startswith(_PRODUCTS) or "Attention" in name or "Rnn" in name:
        return "product"
    return "pointwise"
