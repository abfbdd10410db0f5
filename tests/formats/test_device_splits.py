"""Splits that only the device knows give the same codes; the host looks at them for members alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lighterage.formats import (
    Float8BlockQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    Splits,
    SplitTensors,
    bulk_layout,
    get_columnwise_subview_info,
    restore_columnwise_subviews,
    split_quantize,
)
from lighterage.formats.capacity import bulk_capacity
from tests.formats.cases import ALL, BULK, bytes_equal, no_waiting, same_codes
from tests.kernels.inputs import make_input

SIZES = [64, 0, 32]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def from_device(sizes: list[int], num_rows: int) -> Splits:
    return Splits(num_rows=num_rows, ends=torch.tensor(sizes, dtype=torch.int64, device=DEVICE).cumsum(0))


def group_of(name: str, sizes: list[int], unused: int = 0, backend: str = "reference") -> tuple[SplitTensors, list]:
    x = make_input("wide", sum(sizes) + unused, 96, torch.bfloat16).to(DEVICE)
    splits = from_device(sizes, len(x))
    return split_quantize(x, splits, [BULK[name]()] * len(sizes), backend=backend)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(BULK)),
    tiles=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    unused=st.integers(0, 70),
    usage=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_the_codes_are_those_of_splits_that_the_host_knows(
    name: str, tiles: list[int], unused: int, usage: tuple[bool, bool]
) -> None:
    sizes = [tile * (7 if "block" in name else 32) for tile in tiles]
    x = make_input("random", sum(sizes) + unused, 64, torch.bfloat16).to(DEVICE)
    quantizers = [BULK[name](rowwise=usage[0], columnwise=usage[1])] * len(sizes)
    wanted, _ = split_quantize(x[: sum(sizes)], sizes, quantizers, backend="reference")
    tensors, buffers = split_quantize(x, from_device(sizes, len(x)), quantizers, backend="reference")
    assert len(buffers) == sum(usage) and tensors.num_missing == len(sizes)
    assert all(same_codes(a, b) for a, b in zip(tensors, wanted, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("name", BULK)
def test_kernels_write_where_the_true_splits_say(name: str) -> None:
    pytest.importorskip("triton")
    kernels, buffers = group_of(name, [32, 0, 64], unused=40, backend="triton")
    plain, _ = group_of(name, [32, 0, 64], unused=40)
    assert kernels.splits.host is None and kernels.num_missing == 3
    for way, buffer in zip(("rowwise", "columnwise"), buffers, strict=True):
        layout = bulk_layout(
            kernels.format_name, [32, 0, 64], 96, columnwise=way == "columnwise", block_2d=kernels.block_2d
        )
        capacity = bulk_capacity(
            kernels.format_name,
            num_rows=136,
            num_splits=3,
            num_cols=96,
            columnwise=way == "columnwise",
            block_2d=kernels.block_2d,
        )
        assert buffer.numel() == capacity.num_bytes > layout.num_bytes
        assert kernels.group.layout(way) == layout
    assert all(same_codes(a, b) for a, b in zip(kernels, plain, strict=True))


@pytest.mark.parametrize("name", BULK)
def test_attributes_and_buffers_look_at_no_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, buffers = group_of(name, SIZES)
    tensors = tensors.with_buffers(rowwise=buffers[0], columnwise=buffers[1])
    tensors.splits.__dict__.pop("sizes", None)  # the reference had to look
    tensors.group._known.clear()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("the device was asked"))
    assert (tensors.num_cols, tensors.dtype, len(tensors)) == (96, torch.bfloat16, 3)
    assert tensors.format_name == BULK[name]().format_name
    assert list(tensors.buffers) == ["rowwise", "columnwise"]
    info = get_columnwise_subview_info(tensors, tensors.buffers["columnwise"])
    assert len(pickle.dumps(info)) < 1000 and pickle.loads(pickle.dumps(info)) == info
    moved = tensors.buffers["columnwise"].clone()
    tensors.update_usage(rowwise_usage=False, columnwise_usage=False)
    assert tensors.buffers == {}
    restore_columnwise_subviews(tensors, moved, info)
    assert tensors.buffers["columnwise"] is moved and tensors.num_missing == 3


@pytest.mark.parametrize("look", ["never", "some", "all"])
@pytest.mark.parametrize("name", BULK)
def test_views_come_back_over_another_address(name: str, look: str) -> None:
    wanted = [tensor.detach() for tensor in group_of(name, SIZES)[0]]
    tensors, buffers = group_of(name, SIZES)
    info = get_columnwise_subview_info(tensors, buffers[1])
    members = list(tensors) if look == "all" else [tensors[2]] if look == "some" else []
    tensors.update_usage(rowwise_usage=False, columnwise_usage=False)
    restore_columnwise_subviews(tensors, buffers[1].clone(), info)
    for tensor, other in zip(tensors, wanted, strict=True):
        other.update_usage(rowwise_usage=False)
        assert same_codes(tensor, other)
    assert all(any(member is tensor for tensor in tensors) for member in members)


def test_info_without_splits_belongs_to_the_sequence() -> None:
    tensors, buffers = group_of("mxfp8", SIZES)
    info = get_columnwise_subview_info(tensors, buffers[1])
    with pytest.raises(ValueError, match=r"recorded without the splits, which only the device knew. Restore the seq"):
        restore_columnwise_subviews(list(tensors), buffers[1], info)
    by_address = get_columnwise_subview_info(list(tensors), buffers[1])
    restore_columnwise_subviews(list(tensors), buffers[1].clone(), by_address)


def test_a_group_can_be_pickled_and_copied() -> None:
    tensors, _ = group_of("nvfp4", SIZES)
    for again in (pickle.loads(pickle.dumps(tensors)), copy.deepcopy(tensors)):
        assert again.splits.host is None
        assert all(same_codes(a, b) for a, b in zip(again, list(tensors), strict=True))


def test_lists_without_bulk_buffers_look_at_the_sizes() -> None:
    x = torch.randn(100, 64, dtype=torch.bfloat16, device=DEVICE)
    for quantizers in ([ALL["fp8_tensor"]()] * 3, [MXFP8Quantizer(), NVFP4Quantizer()] * 2):
        sizes = [32, 0, 64, 0][: len(quantizers)]
        tensors, buffers = split_quantize(x, from_device(sizes, 100), quantizers)
        assert buffers == [] and [len(t) for t in tensors] == sizes
        assert all(same_codes(t, q(p)) for t, q, p in zip(tensors, quantizers, x[:96].split(sizes), strict=True))


def test_no_rows() -> None:
    tensors, buffers = split_quantize(torch.empty(0, 64, device=DEVICE), from_device([0, 0], 0), [NVFP4Quantizer()] * 2)
    assert len(buffers) == 2 and [t.shape for t in tensors] == [(0, 64)] * 2
    assert tensors[1].columnwise_amax.tolist() == [0.0]


def test_what_the_host_can_check_is_checked() -> None:
    x = torch.randn(64, 64, device=DEVICE)
    with pytest.raises(ValueError, match="one quantizer for each split; got 3 quantizers and 2 splits"):
        split_quantize(x, from_device([32, 32], 64), [MXFP8Quantizer()] * 3)
    with pytest.raises(ValueError, match="are of 96 rows"):
        split_quantize(x, from_device([32, 32], 96), [MXFP8Quantizer()] * 2)
    with pytest.raises(ValueError, match="needs K divisible by 32; got K=33"):
        split_quantize(x[:, :33], from_device([32, 32], 64), [MXFP8Quantizer()] * 2)
    with pytest.raises(ValueError, match="more than 2 dimensions"):
        split_quantize(x.view(4, 16, 64), from_device([2, 2], 4), [Float8BlockQuantizer()] * 2)
    with pytest.raises(ValueError, match="rows of every split divisible by 32; got 33 rows in split 0"):
        split_quantize(x, from_device([33, 31], 64), [MXFP8Quantizer()] * 2, backend="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", BULK)
def test_the_host_never_waits_for_sizes_on_the_device(name: str, dtype: torch.dtype) -> None:
    x = make_input("wide", 600, 160, torch.bfloat16).cuda()
    sizes = torch.tensor([256, 0, 96, 128], dtype=dtype, device="cuda")
    torch.cuda.synchronize()
    with no_waiting():
        tensors, buffers = split_quantize(x, sizes, [BULK[name]()] * 4)
        info = get_columnwise_subview_info(tensors, buffers[1])
        tensors.update_usage(rowwise_usage=False, columnwise_usage=False)
        restore_columnwise_subviews(tensors, buffers[1].clone(), info)
        again = tensors.with_buffers(columnwise=buffers[1])
    wanted, _ = split_quantize(x[:480], [256, 0, 96, 128], [BULK[name](rowwise=False)] * 4, backend="reference")
    for group in (tensors, again):
        for a, b in zip(group, wanted, strict=True):
            assert all(bytes_equal(getattr(a, field), getattr(b, field)) for field in type(a).FIELDS)
