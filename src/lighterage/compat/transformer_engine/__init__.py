"""The interface of Transformer Engine's PyTorch modules and offload, over lighterage.

    import lighterage.compat.transformer_engine as te

What cannot be done as an argument asks is an error, or a `NotHonoured` warning with the reason.
"""

from lighterage.compat.transformer_engine import ops, recipe
from lighterage.compat.transformer_engine.attention import DotProductAttention
from lighterage.compat.transformer_engine.context import CpuOffloadContext, is_cpu_offload_enabled
from lighterage.compat.transformer_engine.cpu_offload import get_cpu_offload_context
from lighterage.compat.transformer_engine.graphs import make_graphed_callables
from lighterage.compat.transformer_engine.honesty import NotHonoured
from lighterage.compat.transformer_engine.linear import GroupedLinear, Linear
from lighterage.compat.transformer_engine.manual import ManualOffloadSynchronizer
from lighterage.compat.transformer_engine.marks import mark_activation_offload, mark_not_offload, start_offload
from lighterage.compat.transformer_engine.quantization import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    get_columnwise_subview_info,
    restore_columnwise_subviews,
    split_quantize,
)
from lighterage.compat.transformer_engine.quantized_regions import autocast, fp8_autocast

__all__ = [
    "CpuOffloadContext",
    "DotProductAttention",
    "Float8BlockQuantizer",
    "Float8CurrentScalingQuantizer",
    "GroupedLinear",
    "Linear",
    "MXFP8Quantizer",
    "ManualOffloadSynchronizer",
    "NVFP4Quantizer",
    "NotHonoured",
    "autocast",
    "fp8_autocast",
    "get_columnwise_subview_info",
    "get_cpu_offload_context",
    "is_cpu_offload_enabled",
    "make_graphed_callables",
    "mark_activation_offload",
    "mark_not_offload",
    "ops",
    "recipe",
    "restore_columnwise_subviews",
    "split_quantize",
    "start_offload",
]
