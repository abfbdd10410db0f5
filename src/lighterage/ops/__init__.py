"""What the modules do, as functions."""

from lighterage.ops.grouped_linear import grouped_linear
from lighterage.ops.grouped_mlp import grouped_mlp
from lighterage.ops.linear import linear

__all__ = ["grouped_linear", "grouped_mlp", "linear"]
