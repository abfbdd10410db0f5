"""Modules that own parameters and call one function of `lighterage.ops` each."""

from lighterage.nn.attention import DotProductAttention, SelfAttention
from lighterage.nn.grouped_linear import GroupedLinear
from lighterage.nn.linear import Linear
from lighterage.nn.moe import GatedMLP, MoE, MoEOutput
from lighterage.nn.transformer import TransformerBlock

__all__ = [
    "DotProductAttention",
    "GatedMLP",
    "GroupedLinear",
    "Linear",
    "MoE",
    "MoEOutput",
    "SelfAttention",
    "TransformerBlock",
]
