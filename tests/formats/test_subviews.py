"""Sub-views: recorded by offset, rebuilt over a buffer that moved; and buffers that are not the right ones."""

from __future__ import annotations

import dataclasses
import gc
import pickle

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from lighterage.formats import (
    MXFP8Quantizer,
    NVFP4Quantizer,
    get_columnwise_subview_info,
    restore_columnwise_subviews,
    split_quantize,
)
from tests.formats.cases import BULK, same_codes
from tests.kernels.inputs import make_input

SPLITS = [64, 0, 32]


def _group(name: str) -> tuple[object, list[torch.Tensor], torch.Tensor]:
    x = make_input("wide", sum(SPLITS), 160, torch.bfloat16)
    tensors, buffers = split_quantize(x, SPLITS, [BULK[name]()] * 3)
    wanted = [tensor.clone() for tensor in split_quantize(x, SPLITS, [BULK[name]()] * 3)[0]]
    for tensor in wanted:
        tensor.update_usage(rowwise_usage=False)
    return tensors, wanted, buffers[1]


@pytest.mark.parametrize("look", ["never", "some", "all", "as a list"])
@pytest.mark.parametrize("name", BULK)
def test_every_view_comes_back_over_another_address(name: str, look: str) -> None:
    tensors, wanted, buffer = _group(name)
    members = list(tensors) if look in ("all", "as a list") else [tensors[2]] if look == "some" else []
    group = members if look == "as a list" else tensors
    info = pickle.loads(pickle.dumps(get_columnwise_subview_info(group, buffer)))
    moved = torch.cat([torch.zeros(1024, dtype=torch.uint8), buffer])[1024:]  # elsewhere, at an offset in its storage
    gone = StorageWeakRef(buffer.untyped_storage())
    if look == "as a list":
        for tensor in group:
            tensor.update_usage(rowwise_usage=False, columnwise_usage=False)
    else:
        group.update_usage(rowwise_usage=False, columnwise_usage=False)
    del buffer
    gc.collect()
    assert gone.expired()
    restore_columnwise_subviews(group, moved, info)
    for tensor, expected in zip(group, wanted, strict=True):
        assert same_codes(tensor, expected)
        for field in type(tensor).FIELDS:
            value, other = getattr(tensor, field), getattr(expected, field)
            if value is not None:
                assert value.stride() == other.stride() and value.dtype == other.dtype
                assert value.numel() == 0 or value._base is not None
    assert all(any(member is tensor for tensor in group) for member in members), "the same objects"


def test_info_is_small_immutable_and_free_of_tensors() -> None:
    x = torch.randn(256 * 32, 64, dtype=torch.bfloat16)
    tensors, buffers = split_quantize(x, [32] * 256, [NVFP4Quantizer()] * 256)
    info = get_columnwise_subview_info(tensors, buffers[1])
    assert not tensors.made(), "recording looks at no member"
    assert len(pickle.dumps(info)) < 2000 and len(info) == 256
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.num_bytes = 0
    assert info == pickle.loads(pickle.dumps(info)) and hash(info) is not None
    by_address = get_columnwise_subview_info(list(tensors), buffers[1])
    assert [info.of(i) for i in (0, 7, 255)] == [by_address.of(i) for i in (0, 7, 255)]


def test_some_tensors_in_any_order() -> None:
    tensors, wanted, buffer = _group("nvfp4_rht")
    some = [tensors[2], tensors[0]]
    info = get_columnwise_subview_info(some, buffer)
    for tensor in some:
        tensor.update_usage(False, False)
    restore_columnwise_subviews(some, buffer.clone(), info)
    assert same_codes(some[0], wanted[2]) and same_codes(some[1], wanted[0])


def test_shells_take_the_views_too() -> None:
    tensors, wanted, buffer = _group("mxfp8")
    info = get_columnwise_subview_info(tensors, buffer)
    shells = [tensor.prepare_for_saving()[1] for tensor in tensors]
    restore_columnwise_subviews(shells, buffer.clone(), info)
    assert all(same_codes(a, b) for a, b in zip(shells, wanted, strict=True))


def test_rowwise_data_stays() -> None:
    tensors, _, buffer = _group("fp8_block")
    info = get_columnwise_subview_info(tensors, buffer)
    before = [tensor.detach() for tensor in tensors]
    restore_columnwise_subviews(tensors, buffer.clone(), info)
    assert all(same_codes(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("made", [False, True])
def test_buffers_that_do_not_fit_are_refused(made: bool) -> None:
    tensors, _, buffer = _group("mxfp8")
    info = get_columnwise_subview_info(tensors, buffer)
    group = list(tensors) if made else tensors
    for wrong, error, message in (
        (buffer[1:], ValueError, r"must have the \d+ bytes that it had"),
        (torch.cat([buffer, buffer]), ValueError, "must have the"),
        (buffer.view(torch.int8), TypeError, "is a uint8 tensor; got torch.int8"),
        (buffer.view(1, -1), ValueError, "1-D and contiguous"),
        (buffer.to("meta"), ValueError, "must be on cpu, where the tensors are; got meta.*Bring it back"),
        (torch.cat([buffer[:1], buffer])[1:], ValueError, "multiple of 16 bytes.*got one 1 past it"),
        (None, TypeError, "got NoneType"),
    ):
        with pytest.raises(error, match=message):
            restore_columnwise_subviews(group, wrong, info)
    with pytest.raises(ValueError, match="info is of 3 tensors; got 2"):
        restore_columnwise_subviews(tensors[:2], buffer, info)
    with pytest.raises(ValueError, match="has no columnwise data of"):
        restore_columnwise_subviews([tensors[2], tensors[1], tensors[0]], buffer, info)
    with pytest.raises(TypeError, match="must be quantized; got Tensor"):
        restore_columnwise_subviews([buffer] * 3, buffer, info)


def test_recording_against_the_wrong_buffer_is_refused() -> None:
    tensors, _, buffer = _group("mxfp8")
    with pytest.raises(ValueError, match="not views of this columnwise buffer"):
        get_columnwise_subview_info(tensors, buffer.clone())
    with pytest.raises(ValueError, match="lies outside the columnwise buffer"):
        get_columnwise_subview_info(list(tensors), buffer.clone())
    alone, _ = split_quantize(torch.randn(32, 64), [32], [MXFP8Quantizer()], disable_bulk_allocation=True)
    with pytest.raises(ValueError, match="without bulk allocation there is none"):
        get_columnwise_subview_info(alone, buffer)
    with pytest.raises(TypeError, match="must be quantized"):
        get_columnwise_subview_info([buffer], buffer)
    tensors.update_usage(columnwise_usage=False)
    with pytest.raises(ValueError, match="no columnwise data to record"):
        get_columnwise_subview_info(tensors, buffer)
