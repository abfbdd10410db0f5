"""`split_quantize`: equal to one by one, one buffer a direction, members on demand, and its errors."""

from __future__ import annotations

import copy
import gc
import operator
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from lighterage.formats import (
    Float8BlockQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    SplitTensors,
    bulk_layout,
    split_quantize,
)
from tests.formats.cases import ALL, BULK, same_codes
from tests.kernels.inputs import KINDS, make_input

SPLITS = [64, 0, 32, 96]


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(ALL)),
    tiles=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    num_cols=st.integers(0, 9),
    usage=st.sampled_from([(True, True), (True, False), (False, True)]),
    kind=st.sampled_from(KINDS),
    bulk=st.booleans(),
)
def test_each_split_equals_quantizing_it_alone(
    name: str, tiles: list[int], num_cols: int, usage: tuple[bool, bool], kind: str, bulk: bool
) -> None:
    ragged = "block" in name or "tensor" in name
    splits = [tile * (7 if ragged else 32) for tile in tiles]
    x = make_input(kind, sum(splits), num_cols * (19 if ragged else 32), torch.bfloat16)
    quantizer = ALL[name](rowwise=usage[0], columnwise=usage[1])
    tensors, buffers = split_quantize(x, splits, [quantizer] * len(splits), disable_bulk_allocation=not bulk)
    assert len(buffers) == (sum(usage) if bulk and name in BULK else 0)
    assert len(tensors) == len(splits)
    for tensor, part in zip(tensors, x.split(splits), strict=True):
        assert same_codes(tensor, quantizer(part))


@pytest.mark.parametrize("name", BULK)
def test_members_are_disjoint_aligned_views_inside_their_buffer(name: str) -> None:
    quantizer = BULK[name]()
    x = make_input("random", sum(SPLITS), 160, torch.bfloat16)
    tensors, buffers = split_quantize(x, SPLITS, [quantizer] * 4)
    for direction, buffer in zip(("rowwise", "columnwise"), buffers, strict=True):
        layout = bulk_layout(
            quantizer.format_name, SPLITS, 160, columnwise=direction == "columnwise", block_2d=quantizer.block_2d
        )
        assert (buffer.dtype, buffer.shape) == (torch.uint8, (layout.num_bytes,))
        assert buffer.data_ptr() % 256 == 0 and buffer.untyped_storage().nbytes() == layout.allocated_bytes
        covered = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        for index, tensor in enumerate(tensors):
            for part in layout.parts:
                value, spec = getattr(tensor, f"{direction}_{part.name}"), layout.view(part.name, index)
                assert tuple(value.shape) == spec.shape and value.stride() == spec.stride
                if value.numel() == 0:
                    assert value.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr()
                    continue
                assert value.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
                assert value.data_ptr() - buffer.data_ptr() == spec.offset
                assert value.data_ptr() % part.alignment == 0 and value._base is not None, "an ordinary view"
                covered[spec.offset : spec.offset + spec.num_bytes] += 1
        assert covered.max() == 1
        gaps = buffer[covered == 0].numel()
        assert gaps < 256 * len(SPLITS) * len(layout.parts)


@pytest.mark.parametrize("name", BULK)
def test_pads_are_zero(name: str) -> None:
    quantizer = BULK[name]()
    x = torch.full((96, 160), 3.0, dtype=torch.bfloat16)
    for tensor in split_quantize(x, [64, 32], [quantizer] * 2)[0]:
        blocks, tile = {"f": (128, 128), "m": (32, 1), "n": (16, 1)}[name[0]]
        scale = tensor.rowwise_scale_inv.view(torch.uint8 if name[0] != "f" else torch.float32)
        num_rows, num_cols = tensor.shape[0], -(-tensor.shape[1] // blocks)
        if name[0] == "f":
            valid = (-(-num_rows // tile), num_cols) if "2d" in name else (num_cols, num_rows)
        else:
            valid = (num_rows, num_cols)
        mask = torch.ones(scale.shape, dtype=torch.bool)
        mask[: valid[0], : valid[1]] = False
        assert not scale[mask].any() and (scale[~mask] != 0).all()


def test_members_are_made_when_they_are_looked_at_and_stay_the_same_objects() -> None:
    x = torch.randn(sum(SPLITS), 64, dtype=torch.bfloat16)
    tensors, _ = split_quantize(x, SPLITS, [MXFP8Quantizer()] * 4)
    assert isinstance(tensors, SplitTensors) and not tensors.made()
    last = tensors[-1]
    assert tensors[3] is last and [made is None for made in tensors.made()] == [True, True, True, False]
    assert last.shape == (96, 64) and tensors[1:3][0] is tensors[1] and len(tensors[::2]) == 2
    assert [a is b for a, b in zip(tensors, list(tensors), strict=True)] == [True] * 4
    both = operator.add(tensors, [last]), operator.add([last], tensors)
    assert both[0][0] is tensors[0] and both[0][4] is last and both[1][1] is tensors[0]
    with pytest.raises(IndexError):
        tensors[4]
    assert repr(tensors).startswith("SplitTensors([MXFP8Tensor(shape=(64, 64)")


def test_a_group_can_be_pickled_and_copied_before_and_after_members_are_made() -> None:
    x = torch.randn(sum(SPLITS), 64, dtype=torch.bfloat16)
    tensors, _ = split_quantize(x, SPLITS, [NVFP4Quantizer()] * 4)
    for again in (pickle.loads(pickle.dumps(tensors)), copy.deepcopy(tensors)):
        assert all(same_codes(a, b) for a, b in zip(again, list(tensors), strict=True))
    again = copy.deepcopy(tensors)
    assert len({value.untyped_storage().data_ptr() for t in again for value in t.data_tensors() if value.numel()}) == 2


@pytest.mark.parametrize("look_first", [False, True])
def test_dropping_a_usage_frees_its_buffer(look_first: bool) -> None:
    x = torch.randn(sum(SPLITS), 64, dtype=torch.bfloat16)
    tensors, buffers = split_quantize(x, SPLITS, [Float8BlockQuantizer()] * 4)
    if look_first:
        tensors[0], tensors[2]
    gone = [StorageWeakRef(buffer.untyped_storage()) for buffer in buffers]
    del buffers
    assert not any(ref.expired() for ref in gone)
    tensors.update_usage(rowwise_usage=False)
    gc.collect()
    assert [ref.expired() for ref in gone] == [True, False]
    for tensor in tensors:
        assert tensor.rowwise_data is None and tensor.columnwise_data is not None
        tensor.update_usage(columnwise_usage=False)
    gc.collect()
    assert gone[1].expired(), "the sequence holds nothing once every member was made"


def test_a_usage_that_is_not_there_is_made_for_every_member_or_refused() -> None:
    x = torch.randn(sum(SPLITS), 64, dtype=torch.bfloat16)
    quantizer = Float8BlockQuantizer(block_scaling_dim=2, columnwise=False)
    tensors, _ = split_quantize(x, SPLITS, [quantizer] * 4)
    tensors.update_usage(rowwise_usage=False, columnwise_usage=True)
    quantizer.set_usage(rowwise=False, columnwise=True)
    assert all(same_codes(a, quantizer(b)) for a, b in zip(tensors, x.split(SPLITS), strict=True))
    tensors, _ = split_quantize(x, SPLITS, [MXFP8Quantizer(columnwise=False)] * 4)
    with pytest.raises(ValueError, match="cannot be made exactly"):
        tensors.update_usage(columnwise_usage=True)


def test_mixed_lists_are_quantized_one_by_one_each_as_its_quantizer_says() -> None:
    x = torch.randn(192, 64, dtype=torch.bfloat16)
    splits = [64, 32, 96]
    for quantizers in (
        [Float8BlockQuantizer(), MXFP8Quantizer(), ALL["fp8_tensor"]()],
        [Float8BlockQuantizer(), Float8BlockQuantizer(power_of_2_scale=False), Float8BlockQuantizer()],
        [MXFP8Quantizer(), MXFP8Quantizer(rowwise=False), MXFP8Quantizer()],
    ):
        tensors, buffers = split_quantize(x, splits, quantizers)
        assert buffers == []
        assert all(same_codes(t, q(p)) for t, q, p in zip(tensors, quantizers, x.split(splits), strict=True))


def test_equal_quantizers_need_not_be_one_object() -> None:
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    assert len(split_quantize(x, [32, 32], [MXFP8Quantizer(), MXFP8Quantizer()])[1]) == 2


def test_leading_dimensions_and_splits_as_a_tensor() -> None:
    x = torch.randn(6, 32, 64, dtype=torch.bfloat16)
    for quantizer in (MXFP8Quantizer(), Float8BlockQuantizer(), NVFP4Quantizer()):
        tensors, _ = split_quantize(x, torch.tensor([2, 0, 4]), [quantizer] * 3)
        assert [t.shape for t in tensors] == [(2, 32, 64), (0, 32, 64), (4, 32, 64)]
        assert all(same_codes(t, quantizer(p)) for t, p in zip(tensors, x.split([2, 0, 4]), strict=True))


def test_no_splits_and_no_rows() -> None:
    tensors, buffers = split_quantize(torch.empty(0, 64), [], [])
    assert len(tensors) == 0 and list(tensors) == [] and buffers == []
    for name in BULK:
        tensors, buffers = split_quantize(torch.empty(0, 64, dtype=torch.bfloat16), [0, 0], [BULK[name]()] * 2)
        assert len(buffers) == 2 and [t.shape for t in tensors] == [(0, 64)] * 2
        if name.startswith("nvfp4"):
            assert tensors[1].columnwise_amax.tolist() == [0.0]


@pytest.mark.parametrize(
    ("splits", "count", "message"),
    [
        ([64, 64], 2, "sum of 128 for 192: too short by 64"),
        ([128, 96], 2, "sum of 224 for 192: too long by 32"),
        ([96, 96], 1, "one quantizer for each split; got 1 quantizers and 2 splits"),
        ([224, -32], 2, "must not be negative; got"),
        ([], 0, "too short by 192"),
    ],
)
@pytest.mark.parametrize("bulk", [True, False])
def test_splits_that_do_not_fit_are_refused(splits: list[int], count: int, message: str, bulk: bool) -> None:
    x = torch.randn(192, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=message):
        split_quantize(x, splits, [MXFP8Quantizer()] * count, disable_bulk_allocation=not bulk)


def test_inputs_that_do_not_fit_are_refused() -> None:
    x = torch.randn(64, 64)
    with pytest.raises(ValueError, match="got 33 rows in split 0"):
        split_quantize(x, [33, 31], [MXFP8Quantizer()] * 2)
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        split_quantize(x.double(), [64], [MXFP8Quantizer()])
    with pytest.raises(TypeError, match="must be integers"):
        split_quantize(x, [32.0, 32.0], [MXFP8Quantizer()] * 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="makes nothing"):
        split_quantize(x, [64], [MXFP8Quantizer(rowwise=False, columnwise=False)])


def test_stochastic_rounding_of_a_group_is_reproducible() -> None:
    x = torch.randn(64, 64, dtype=torch.bfloat16)

    def group(seed: int) -> list[torch.Tensor]:
        quantizer = NVFP4Quantizer(stochastic_rounding=True, generator=torch.Generator().manual_seed(seed))
        return list(split_quantize(x, [32, 32], [quantizer] * 2)[0])

    assert all(same_codes(a, b) for a, b in zip(group(3), group(3), strict=True))
    assert not same_codes(group(3)[0], group(4)[0])
    same_rows = split_quantize(
        torch.cat([x[:32], x[:32]]),
        [32, 32],
        [NVFP4Quantizer(stochastic_rounding=True, generator=torch.Generator().manual_seed(3))] * 2,
    )[0]
    assert not same_codes(same_rows[0], same_rows[1]), "splits do not share random numbers"
