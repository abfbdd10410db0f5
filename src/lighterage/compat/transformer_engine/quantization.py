"""`split_quantize`, the helpers of its sub-views, and quantizers, under Transformer Engine's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lighterage import formats
from lighterage.formats import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    SplitTensors,
    get_columnwise_subview_info,
    restore_columnwise_subviews,
)
from lighterage.formats.bulk import Quantizer


def split_quantize(
    tensor: torch.Tensor,
    split_sections: Sequence[int] | torch.Tensor,
    quantizer_list: Sequence[Quantizer],
    disable_bulk_allocation: bool = False,
) -> tuple[SplitTensors, list[torch.Tensor]]:
    """Quantize each split of `tensor`, all of them into one buffer a direction: see `lighterage.formats`.

    Returns: the quantized splits, and the buffers that back them, the rowwise one (if there is one) before the
        columnwise one (if there is one).
    """
    return formats.split_quantize(
        tensor, split_sections, quantizer_list, disable_bulk_allocation=disable_bulk_allocation
    )


__all__ = [
    "Float8BlockQuantizer",
    "Float8CurrentScalingQuantizer",
    "MXFP8Quantizer",
    "NVFP4Quantizer",
    "get_columnwise_subview_info",
    "restore_columnwise_subviews",
    "split_quantize",
]
