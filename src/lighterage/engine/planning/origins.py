"""What a saved tensor is to selective recomputation, and which operators are dear, or cheap, to call again."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...planner.timeline import Kind

_VIEW_NAMES = (
    "Alias AsStrided Diagonal Expand Narrow Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T Transpose "
    "Unbind Unfold UnsafeView Unsqueeze View"
)
_VIEWS = frozenset(f"{name}Backward{number}" for name in _VIEW_NAMES.split() for number in range(4))
_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Convolution", "ScaledDotProduct", "ScaledMm", "GroupedMm", "Mv", "Dot")


def _overloads(names: str) -> frozenset[object]:
    """Every form of these operators that this PyTorch has, but for those that write to a tensor they are given."""
    return frozenset(
        getattr(packet, overload)
        for name in names.split()
        if (packet := getattr(torch.ops.aten, name, None)) is not None
        for overload in packet.overloads()
        if "out" not in overload and "dtype" not in overload
    )


_OP_NAMES = (
    "mm addmm bmm baddbmm convolution _convolution _scaled_mm _scaled_mm_v2 _grouped_mm _scaled_grouped_mm "
    "_scaled_grouped_mm_v2 _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward "
    "_cudnn_attention_forward"
)
PRODUCT_OPS = _overloads(_OP_NAMES)
"""The operators that are dear to compute: products of matrices, convolutions and attention."""


# Beside what PyTorch tags as pointwise. None of them draws random numbers, writes to what it is given, or sums in an
# order that may change from call to call.
_CHEAP_NAMES = (
    "_fused_rms_norm native_layer_norm native_group_norm _softmax _log_softmax _to_copy cat stack repeat flip roll "
    "tril triu constant_pad_nd sum mean amax amin var_mean linalg_vector_norm index_select gather"
)
_CHEAP_OPS = _overloads(_CHEAP_NAMES)


@functools.cache
def is_cheap(op: Any) -> bool:
    """Whether an operator is cheap to call again, and gives the same bits then."""
    if op.namespace != "aten" or op in PRODUCT_OPS or op._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in op.tags:
        return False
    return torch.Tag.pointwise in op.tags or op in _CHEAP_OPS


def _maker(tensor: torch.Tensor) -> Any:
    """The node that made the bytes of `tensor`, views looked through."""
    node = tensor.grad_fn
    while node is not None and type(node).__name__ in _VIEWS:
        node = node.next_functions[0][0] if node.next_functions else None
    return node


def made_by_custom_function(tensor: torch.Tensor) -> bool:
    """Whether an `autograd.Function` made it: PyTorch does not see what that does."""
    return issubclass(type(_maker(tensor)), torch.autograd.function.BackwardCFunction)


def kind_of(tensor: torch.Tensor) -> Kind:
    """The kind of a saved tensor by the node that made it, views looked through."""
    node = _maker(tensor)
    if node is None or issubclass(type(node), torch.autograd.function.BackwardCFunction):
        return "other"
    name = type(node).__name__
    if name in ("AccumulateGrad", "CheckpointFunctionBackward"):
        return "other"
    if name.startswith(_PRODUCTS) or "Attention" in name or "Rnn" in name:
        return "product"
    return "pointwise"
