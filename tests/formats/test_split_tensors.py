"""What a group tells of itself, and the same group over other memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lighterage.formats import Float8BlockQuantizer, SplitTensors, split_quantize
from tests.formats.cases import ALL, BULK, same_codes

SIZES = [64, 0, 32]


def _group(name: str, **usage: bool) -> tuple[SplitTensors, list[torch.Tensor]]:
    x = torch.randn(96, 64, dtype=torch.bfloat16)
    return split_quantize(x, SIZES, [BULK[name](**usage)] * 3)


@pytest.mark.parametrize("name", BULK)
def test_a_group_tells_what_it_is_without_making_members(name: str) -> None:
    tensors, (rowwise, columnwise) = _group(name)
    quantizer = BULK[name]()
    assert (tensors.format_name, tensors.block_2d) == (quantizer.format_name, quantizer.block_2d)
    assert (tensors.num_cols, tensors.dtype, tensors.splits.host) == (64, torch.bfloat16, tuple(SIZES))
    assert tensors.buffers["rowwise"] is rowwise and tensors.buffers["columnwise"] is columnwise
    assert tensors.num_missing == 3 and not tensors.made()
    assert tensors.options == {name: getattr(tensors[0], name) for name in type(tensors[0]).OPTIONS}


@pytest.mark.parametrize("name", BULK)
def test_buffers_are_found_from_the_members_once_all_are_made(name: str) -> None:
    tensors, buffers = _group(name)
    list(tensors)
    assert tensors.num_missing == 0
    for found, wanted in zip(tensors.buffers.values(), buffers, strict=True):
        assert (found.data_ptr(), found.shape, found.dtype) == (wanted.data_ptr(), wanted.shape, wanted.dtype)
        assert found.untyped_storage().data_ptr() == wanted.untyped_storage().data_ptr()
    tensors[0].update_usage(rowwise_usage=False)
    assert list(tensors.buffers) == ["columnwise"], "all members or none"
    tensors[2].restore_from_saved(
        [None if value is None else value.clone() for value in tensors[2].prepare_for_saving()[0]]
    )
    assert tensors.buffers == {}


def test_buffers_of_no_bytes() -> None:
    tensors, buffers = split_quantize(torch.empty(0, 64), [0, 0], [Float8BlockQuantizer()] * 2)
    assert [buffer.numel() for buffer in tensors.buffers.values()] == [0, 0]
    list(tensors)
    assert [buffer.numel() for buffer in tensors.buffers.values()] == [buffer.numel() for buffer in buffers]


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("name", BULK)
def test_the_same_group_over_other_memory(name: str, look: bool) -> None:
    tensors, buffers = _group(name)
    wanted = [tensor.clone() for tensor in _group_again(tensors, buffers)]
    if look:
        list(tensors)
    tensors.update_usage(rowwise_usage=False, columnwise_usage=False)
    moved = buffers[1].clone()
    again = tensors.with_buffers(columnwise=moved)
    assert again.num_missing == 3 and list(again.buffers) == ["columnwise"] and again.splits is tensors.splits
    for tensor, other in zip(again, wanted, strict=True):
        other.update_usage(rowwise_usage=False)
        assert same_codes(tensor, other)
    assert tensors.buffers == {}, "the first group is as it was"


def _group_again(tensors: SplitTensors, buffers: list[torch.Tensor]) -> SplitTensors:
    return tensors.with_buffers(rowwise=buffers[0], columnwise=buffers[1])


def test_buffers_that_do_not_fit_are_refused() -> None:
    tensors, (rowwise, columnwise) = _group("fp8_block_2d")
    for wrong, error, message in (
        (columnwise[1:], ValueError, r"columnwise buffer must have the \d+ bytes that it had; got"),
        (columnwise.view(torch.int8), TypeError, "is a uint8 tensor; got torch.int8"),
        (columnwise.view(1, -1), ValueError, "1-D and contiguous"),
        (columnwise.to("meta"), ValueError, "must be on cpu, where the tensors are; got meta.*Bring it back"),
        (torch.cat([columnwise[:1], columnwise])[1:], ValueError, "multiple of 16 bytes"),
        ([1], TypeError, "got list"),
    ):
        with pytest.raises(error, match=message):
            tensors.with_buffers(columnwise=wrong)
    only, _ = _group("mxfp8", rowwise=False)
    with pytest.raises(ValueError, match="has no rowwise direction to put over a buffer; it was quantized columnwise"):
        only.with_buffers(rowwise=rowwise)
    alone, _ = split_quantize(torch.randn(32, 64), [32], [ALL["fp8_tensor"]()])
    with pytest.raises(ValueError, match="it was quantized one by one"):
        alone.with_buffers(rowwise=rowwise)


def test_a_group_without_buffers_says_so() -> None:
    tensors, _ = split_quantize(torch.randn(4, 8, 64), [3, 1], [ALL["fp8_tensor"]()] * 2)
    assert (tensors.format_name, tensors.buffers, tensors.options, tensors.num_cols) == (None, {}, {}, 64)
    assert tensors.splits.host == (24, 8) and tensors.block_2d is False and tensors.dtype == torch.float32


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_look_at_once_see_the_same_members(eager_threads: None) -> None:
    x = torch.randn(32 * 16, 32, dtype=torch.bfloat16)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(20):
            tensors, _ = split_quantize(x, [16] * 32, [Float8BlockQuantizer()] * 32)
            looks = [threads.submit(list, tensors) for _ in range(4)]
            seen = [look.result() for look in looks]
            assert all(a is b for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
            assert tensors.num_missing == 0 and set(tensors.buffers) == {"rowwise", "columnwise"}
