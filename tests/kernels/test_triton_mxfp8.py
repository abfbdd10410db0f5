"""The MXFP8 kernel gives the reference's bytes for every split of a group, in one launch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.kernels.triton_cases import (
    DEVICE,
    DTYPES,
    Views,
    check_against_reference,
    check_swiglu_is_fused_exactly,
    hard_input,
)

pytest.importorskip("triton")

from lighterage.kernels.reference.mxfp8 import quantize
from lighterage.kernels.triton.mxfp8 import split_quantize_mxfp8

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: NaN and Inf are meant
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def _check(x, splits, *, fp8_dtype=torch.float8_e4m3fn, directions=(False, True), **tuning) -> None:
    def reference(part: torch.Tensor, columnwise: bool) -> Views:
        data, scale = quantize(part, fp8_dtype=fp8_dtype, columnwise=columnwise)
        return {"data": data, "scale": scale, "scale_inv": scale}

    launch = partial(split_quantize_mxfp8, fp8_dtype=fp8_dtype, **tuning)
    check_against_reference(x, splits, "mxfp8", launch, reference, directions=directions)


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_equals_the_reference(dtype, fp8_dtype) -> None:
    _check(hard_input(192, 160, dtype), [128, 0, 64], fp8_dtype=fp8_dtype)


@pytest.mark.parametrize("num_warps", [1, 4])
@pytest.mark.parametrize(
    ("splits", "num_cols"), [([32], 32), ([0, 96, 0, 32, 160, 0], 288), ([256, 0, 96], 96), ([0], 64), ([32] * 18, 32)]
)
def test_ragged_and_empty_splits_equal_the_reference(splits, num_cols, num_warps) -> None:
    x = hard_input(sum(splits) + 5, num_cols, torch.bfloat16)
    _check(x, splits, num_warps=num_warps)


@pytest.mark.parametrize("columnwise", [False, True])
def test_one_direction_alone_equals_the_reference(columnwise) -> None:
    _check(hard_input(160, 192, torch.bfloat16), [32, 128], directions=(columnwise,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_on_the_way_in_changes_no_byte(dtype) -> None:
    launch = partial(split_quantize_mxfp8, fp8_dtype=torch.float8_e4m3fn)
    check_swiglu_is_fused_exactly(hard_input(160, 2 * 160, dtype), [96, 0, 32], "mxfp8", launch)


@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
def test_scale_codes_cover_every_exponent_and_the_edges_of_rounding(fp8_dtype) -> None:
    bits = torch.arange(0, 256, dtype=torch.int64)[:, None] << 23
    mantissas = torch.tensor([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF])
    amax = (bits + mantissas).clamp(max=0x7F800000).to(torch.int32).view(torch.float32).flatten()
    x = torch.zeros(-(-len(amax) // 8) * 8 // 8, 256)
    x.view(-1, 32)[: len(amax), 3] = amax
    x = torch.cat([x, torch.zeros(-len(x) % 32, 256)]).to(DEVICE)
    _check(x, [len(x)], fp8_dtype=fp8_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_groups_equal_the_reference(dtype, fp8_dtype) -> None:
    x = hard_input(4096, 1056, dtype, seed=1)
    _check(x, [512] * 8, fp8_dtype=fp8_dtype)
    _check(x, [1024, 0, 32, 992, 64, 1984], fp8_dtype=fp8_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_on_the_way_in_changes_no_byte_of_large_groups(dtype) -> None:
    launch = partial(split_quantize_mxfp8, fp8_dtype=torch.float8_e4m3fn)
    h = hard_input(4096, 2 * 1056, dtype, seed=1)
    check_swiglu_is_fused_exactly(h, [1024, 0, 32, 992, 64, 1984], "mxfp8", launch)


@pytest.mark.gpu
def test_many_splits_equal_the_reference() -> None:
    splits = (torch.randint(0, 8, (256,), generator=torch.Generator().manual_seed(3)) * 32).tolist()
    _check(hard_input(sum(splits), 384, torch.bfloat16, seed=2), splits)
