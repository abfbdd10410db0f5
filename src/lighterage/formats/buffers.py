"""What a bulk buffer must be: how one is allocated, and how one that comes back is checked."""

from __future__ import annotations

import torch

from lighterage.formats.capacity import BulkCapacity
from lighterage.formats.layout import BulkLayout
from lighterage.formats.parts import BASE_ALIGNMENT, SMALL_ALIGNMENT


def allocate(layout: BulkLayout | BulkCapacity, device: torch.device) -> torch.Tensor:
    """A new buffer for `layout`, uint8 of `layout.num_bytes`, that begins at a multiple of 256 bytes; uninitialised."""
    if device.type == "cuda":
        buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        if buffer.data_ptr() % BASE_ALIGNMENT == 0:  # as torch's own allocator has it; others may be plugged in
            return buffer
    whole = torch.empty(layout.allocated_bytes, dtype=torch.uint8, device=device)
    start = -whole.data_ptr() % BASE_ALIGNMENT
    return whole.narrow(0, start, layout.num_bytes)


def check_buffer(buffer: object, direction: str) -> torch.Tensor:
    """Check that `buffer` can be a bulk buffer at all, and return it.

    Raises: ValueError, TypeError.
    """
    if not isinstance(buffer, torch.Tensor) or buffer.dtype != torch.uint8:
        got = buffer.dtype if isinstance(buffer, torch.Tensor) else type(buffer).__name__
        raise TypeError(
            f"a {direction} buffer is a uint8 tensor; got {got}. Pass the buffer that split_quantize returned."
        )
    if buffer.ndim != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"a {direction} buffer is 1-D and contiguous; got shape {tuple(buffer.shape)}, strides {buffer.stride()}. "
            "Pass the whole buffer that split_quantize returned."
        )
    return buffer


def check_returned(buffer: object, direction: str, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Check that `buffer` can be the one of `num_bytes` that lay on `device`, and return it.

    Raises: ValueError, TypeError.
    """
    whole = check_buffer(buffer, direction)
    if whole.numel() != num_bytes:
        raise ValueError(
            f"the {direction} buffer must have the {num_bytes} bytes that it had; got {whole.numel()}. "
            "Pass the whole buffer that came back."
        )
    if whole.device != device:
        raise ValueError(
            f"the {direction} buffer must be on {device}, where the tensors are; got {whole.device}. "
            f"Bring it back: {direction}_buffer.to({str(device)!r})."
        )
    if whole.data_ptr() % SMALL_ALIGNMENT:
        raise ValueError(
            f"the {direction} buffer must begin at a multiple of {SMALL_ALIGNMENT} bytes, where scales can be read; "
            f"got one {whole.data_ptr() % SMALL_ALIGNMENT} past it. Copy it: {direction}_buffer.clone()."
        )
    return whole
