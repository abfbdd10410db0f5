"""Quantized tensor formats, and groups of them that share one buffer.

A quantizer turns a tensor into a quantized one. `split_quantize` does it for all splits of a tensor at once, into one
buffer for each direction, that can be taken away and brought back as a whole.

    >>> import torch
    >>> quantizer = Float8BlockQuantizer()
    >>> x = torch.randn(96, 256, dtype=torch.bfloat16)
    >>> tensors, (rowwise, columnwise) = split_quantize(x, [64, 0, 32], [quantizer] * 3)
    >>> tensors[0].shape, tensors[0].columnwise_data.shape
    (torch.Size([64, 256]), torch.Size([256, 64]))
    >>> info = get_columnwise_subview_info(tensors, columnwise)
    >>> tensors.update_usage(rowwise_usage=False, columnwise_usage=False)
    >>> restore_columnwise_subviews(tensors, columnwise.clone(), info)
    >>> tensors[2].dequantize().shape
    torch.Size([32, 256])
"""

from lighterage.formats.bulk import split_quantize
from lighterage.formats.capacity import BulkCapacity, bulk_capacity
from lighterage.formats.dequantize import dequantize_group
from lighterage.formats.fp8_block import Float8BlockQuantizer, Float8BlockTensor
from lighterage.formats.fp8_tensor import Float8CurrentScalingQuantizer, Float8Tensor
from lighterage.formats.layout import BulkLayout, ViewSpec, bulk_layout
from lighterage.formats.mxfp8 import MXFP8Quantizer, MXFP8Tensor
from lighterage.formats.nvfp4 import NVFP4Quantizer, NVFP4Tensor
from lighterage.formats.split_tensors import SplitTensors
from lighterage.formats.splits import Splits
from lighterage.formats.subviews import SubviewInfo, get_columnwise_subview_info, restore_columnwise_subviews

__all__ = [
    "BulkCapacity",
    "BulkLayout",
    "Float8BlockQuantizer",
    "Float8BlockTensor",
    "Float8CurrentScalingQuantizer",
    "Float8Tensor",
    "MXFP8Quantizer",
    "MXFP8Tensor",
    "NVFP4Quantizer",
    "NVFP4Tensor",
    "SplitTensors",
    "Splits",
    "SubviewInfo",
    "ViewSpec",
    "bulk_capacity",
    "bulk_layout",
    "dequantize_group",
    "get_columnwise_subview_info",
    "restore_columnwise_subviews",
    "split_quantize",
]
