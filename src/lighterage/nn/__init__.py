"""Modules that own parameters and call one function of `lighterage.ops` each."""

from lighterage.nn.grouped_linear import GroupedLinear
from lighterage.nn.linear import Linear

__all__ = ["GroupedLinear", "Linear"]
