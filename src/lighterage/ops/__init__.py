"""What the modules do, as functions."""

from lighterage.ops.attention import attention
from lighterage.ops.gemm_backends import choose_backend
from lighterage.ops.grouped_linear import grouped_linear
from lighterage.ops.grouped_mlp import grouped_mlp
from lighterage.ops.linear import linear
from lighterage.ops.permute import (
    Permutation,
    pad_rows,
    permute,
    plan_permutation,
    unpad_rows,
    unpermute,
    weights_of_rows,
)
from lighterage.ops.rotary import rotary_table, rotate_heads
from lighterage.ops.router import Routing, attach_loss, load_balancing_loss, route, router_logits, router_z_loss

__all__ = [
    "Permutation",
    "Routing",
    "attach_loss",
    "attention",
    "choose_backend",
    "grouped_linear",
    "grouped_mlp",
    "linear",
    "load_balancing_loss",
    "pad_rows",
    "permute",
    "plan_permutation",
    "rotary_table",
    "rotate_heads",
    "route",
    "router_logits",
    "router_z_loss",
    "unpad_rows",
    "unpermute",
    "weights_of_rows",
]
