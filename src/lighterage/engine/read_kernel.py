"""A kernel that copies words from wherever the device can read. Needs Triton: imported when it is first used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048


@triton.jit
def _read_kernel(to_ptr, from_ptr, num_words, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_words
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=inside), mask=inside)


def read(to: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source` to `to`, both contiguous uint8 (nbytes,), on the current stream.

    `source` may be pinned memory of the host: the device then reads it by itself.
    """
    nbytes = to.numel()
    if not nbytes:
        return
    places = to.data_ptr() | source.data_ptr() | int(to.storage_offset()) | int(source.storage_offset())
    dtype = torch.int64 if (places | nbytes) % 8 == 0 else torch.uint8
    to, source = to.view(dtype), source.view(dtype)
    num_words = to.numel()
    _read_kernel[(triton.cdiv(num_words, _BLOCK),)](to, source, num_words, BLOCK=_BLOCK, num_warps=8)
