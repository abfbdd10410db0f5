"""With the engine: each buffer of a group leaves in one copy, is freed whole, and comes back bit for bit."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import lighterage
from lighterage.formats import get_columnwise_subview_info, restore_columnwise_subviews, split_quantize
from tests.formats.cases import BULK

K, ROWS = 128, 1024
NUM_LAYERS = 2
Refs = list[StorageWeakRef]


class _Quantized(torch.autograd.Function):
    """y = x * w, where backward uses the quantized x; `mode` says as what it is saved."""

    @staticmethod
    def forward(ctx, x, w, splits, quantizer, mode, refs):  # type: ignore[no-untyped-def]
        tensors, buffers = split_quantize(x, splits, [quantizer] * len(splits))
        refs.extend(StorageWeakRef(buffer.untyped_storage()) for buffer in buffers)
        ctx.mode = mode
        if mode == "wrappers":
            ctx.save_for_backward(w, *tensors)
        elif mode == "sub-tensors":
            saved = [tensor.prepare_for_saving() for tensor in tensors]
            ctx.shells = [shell for _, shell in saved]
            # Field by field, so that the views of one buffer are saved one after another.
            ctx.save_for_backward(w, *[value for field in zip(*[s for s, _ in saved], strict=True) for value in field])
        else:
            ctx.info = get_columnwise_subview_info(tensors, buffers[-1])
            tensors.update_usage(rowwise_usage=False, columnwise_usage=False)
            ctx.tensors = tensors
            ctx.save_for_backward(w, buffers[-1])
        return x * w

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        w, *saved = ctx.saved_tensors
        if ctx.mode == "wrappers":
            tensors = saved
        elif ctx.mode == "sub-tensors":
            tensors = ctx.shells
            for index, tensor in enumerate(tensors):
                tensor.restore_from_saved(saved[index :: len(tensors)])
        else:
            tensors = ctx.tensors
            restore_columnwise_subviews(tensors, saved[0], ctx.info)
        values = torch.cat([tensor.dequantize() for tensor in tensors])
        digest = sum(part.long().sum() for tensor in tensors for part in _bytes(tensor))
        return g * w, (g * values).sum(0) + digest % 1024, None, None, None, None


def _bytes(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every byte that came back, so that the gradient depends on all of them."""
    return [value.reshape(-1).view(torch.uint8) for value in tensor.data_tensors()]


class _Layer(nn.Module):
    def __init__(self, splits: list[int], quantizer: object, mode: str, refs: Refs) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, K, dtype=torch.bfloat16))
        self.rest = (splits, quantizer, mode, refs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Quantized.apply(x, self.w, *self.rest)


def _splits(num_experts: int) -> list[int]:
    """Ragged, multiples of 32, some of them empty."""
    units = ROWS // 32
    splits = [(units // num_experts) * 32 for _ in range(num_experts)]
    for i in range(0, num_experts - 1, 3):
        splits[i + 1] += splits[i]
        splits[i] = 0
    splits[-1] += ROWS - sum(splits)
    return splits


@pytest.mark.parametrize("mode", ["sub-tensors", "wrappers", "buffer"])
@pytest.mark.parametrize("num_experts", [1, 8, 64])
@pytest.mark.parametrize("name", ["fp8_block", "mxfp8", "nvfp4_rht"])
def test_one_copy_a_buffer_freed_whole_and_the_same_bits(name: str, num_experts: int, mode: str) -> None:
    _check(name, num_experts, mode, rowwise=False)


def test_both_directions_saved_are_two_copies() -> None:
    _check("nvfp4", 8, "sub-tensors", rowwise=True)


def _check(name: str, num_experts: int, mode: str, rowwise: bool) -> None:
    quantizer = BULK[name](rowwise=rowwise)
    refs: Refs = []
    layers = nn.ModuleList(_Layer(_splits(num_experts), quantizer, mode, refs) for _ in range(NUM_LAYERS))
    x = torch.randn(ROWS, K, dtype=torch.bfloat16, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y.float().square().sum()

    def gradients() -> list[torch.Tensor]:
        found = [x.grad.clone(), *(layer.w.grad.clone() for layer in layers)]
        x.grad = None
        layers.zero_grad()
        return found

    forward().backward()
    wanted = gradients()
    refs.clear()
    with lighterage.offload(layers, keep_last=0, min_bytes=1024) as offloader:
        loss = forward()
        for section in offloader.sections:
            offloader.release(section)
        del section  # a step ends when nobody holds its sections
        gc.collect()
        assert [ref.expired() for ref in refs] == [True] * len(refs), "no view keeps a buffer alive"
        loss.backward()
        stats = offloader.stats()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), wanted, strict=True))
    num_buffers = NUM_LAYERS * (2 if rowwise else 1)
    assert (stats.copies_out, stats.copies_in) == (num_buffers, num_buffers)
    assert stats.bytes_out > num_buffers * ROWS * K // 2 and stats.still_alive_bytes == 0
