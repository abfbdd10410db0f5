"""The FP8 block kernel gives the reference's bytes for every split of a group, in one launch."""

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
    ends_of,
    hard_input,
)

pytest.importorskip("triton")

from lighterage.kernels.reference.fp8_block import quantize_1d, quantize_2d
from lighterage.kernels.triton.fp8_block import split_quantize_fp8_block

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: NaN and Inf are meant
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def _check(x, splits, *, block_2d=False, directions=(False, True), **options) -> None:
    options = {"fp8_dtype": torch.float8_e4m3fn, "power_of_2": True, "epsilon": 0.0} | options
    tuning = {name: options.pop(name) for name in ("num_warps",) if name in options}
    quantize = quantize_2d if block_2d else quantize_1d

    def reference(part: torch.Tensor, columnwise: bool) -> Views:
        data, scale_inv = quantize(part, columnwise=columnwise, **options)
        return {"data": data, "scale_inv": scale_inv}

    launch = partial(split_quantize_fp8_block, block_2d=block_2d, **options, **tuning)
    check_against_reference(x, splits, "fp8_block", launch, reference, block_2d=block_2d, directions=directions)


@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_equals_the_reference(dtype, fp8_dtype, power_of_2, block_2d) -> None:
    x = hard_input(192, 160, dtype)
    _check(x, [144, 0, 48], fp8_dtype=fp8_dtype, power_of_2=power_of_2, block_2d=block_2d)


@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize(
    ("splits", "num_cols"),
    [
        ([6], 300),
        ([0, 5, 0, 3, 0], 96),
        ([256, 0, 96], 128),
        ([1, 129, 2, 126, 31], 20),
        ([0], 16),
        ([7, 130], 257),
        ([1] * 17, 8),
    ],
)
def test_ragged_and_empty_splits_equal_the_reference(splits, num_cols, block_2d) -> None:
    _check(hard_input(sum(splits) + 3, num_cols, torch.bfloat16), splits, block_2d=block_2d)


@pytest.mark.parametrize("columnwise", [False, True])
def test_one_direction_alone_equals_the_reference(columnwise) -> None:
    _check(hard_input(150, 200, torch.bfloat16), [22, 128], directions=(columnwise,))


@pytest.mark.parametrize("epsilon", [1e-6, 3.0])
def test_epsilon_is_the_least_amax(epsilon) -> None:
    _check(hard_input(100, 160, torch.float32), [64, 36], epsilon=epsilon)
    _check(hard_input(100, 160, torch.float16), [64, 36], epsilon=epsilon, power_of_2=False)


def test_the_cut_of_the_work_does_not_change_a_byte() -> None:
    for num_warps in (4, 8, 16):
        _check(hard_input(160, 400, torch.bfloat16), [32, 128], num_warps=num_warps)
        _check(hard_input(161, 130, torch.bfloat16), [32, 129], num_warps=num_warps)


def test_scales_cover_every_mantissa_and_exponent() -> None:
    amax = (torch.randint(1, 0x7F800000, (64, 1), dtype=torch.int32)).view(torch.float32)
    x = (amax * torch.rand(64, 128)).to(DEVICE)
    x[:, 0] = amax[:, 0]
    _check(x, [64], power_of_2=True)
    _check(x, [64], power_of_2=False)


def _check_swiglu(h, splits, *, block_2d=False) -> None:
    options = {"fp8_dtype": torch.float8_e4m3fn, "power_of_2": True, "epsilon": 0.0, "block_2d": block_2d}
    launch = partial(split_quantize_fp8_block, **options)
    check_swiglu_is_fused_exactly(h, splits, "fp8_block", launch, block_2d=block_2d)


@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_on_the_way_in_changes_no_byte(dtype, block_2d) -> None:
    _check_swiglu(hard_input(150, 2 * 136, dtype), [128, 0, 19], block_2d=block_2d)


def test_misuse_is_refused() -> None:
    options = {"num_splits": 1, "fp8_dtype": torch.float8_e4m3fn, "power_of_2": True, "epsilon": 0.0, "block_2d": False}
    buffer = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(16, 32, device=DEVICE)
    with pytest.raises(ValueError, match=r"contiguous \(M, K\) matrix"):
        split_quantize_fp8_block(x.t(), ends_of([32]), buffer, None, **options)
    with pytest.raises(ValueError, match="prefix sums"):
        split_quantize_fp8_block(x, ends_of([16]).int(), buffer, None, **options)
    with pytest.raises(ValueError, match="nothing to quantize into"):
        split_quantize_fp8_block(x, ends_of([16]), None, None, **options)
    with pytest.raises(ValueError, match="as many gates as ups"):
        split_quantize_fp8_block(x[:, :31].contiguous(), ends_of([16]), buffer, None, swiglu=True, **options)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        split_quantize_fp8_block(x, ends_of([16]), buffer[1:], None, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_2", [True, False])
@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_groups_equal_the_reference(dtype, fp8_dtype, power_of_2) -> None:
    x = hard_input(4096, 1024, dtype, seed=1)
    _check(x, [512] * 8, fp8_dtype=fp8_dtype, power_of_2=power_of_2)
    _check(x, [1000, 0, 17, 3, 1024, 1, 1511, 540], fp8_dtype=fp8_dtype, power_of_2=power_of_2)
    _check(x, [1000, 0, 17, 3, 1024, 1, 1511, 540], fp8_dtype=fp8_dtype, power_of_2=power_of_2, block_2d=True)


@pytest.mark.gpu
@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_on_the_way_in_changes_no_byte_of_large_groups(dtype, block_2d) -> None:
    _check_swiglu(hard_input(4096, 2 * 1040, dtype, seed=1), [1000, 0, 17, 3, 1024, 1, 1511, 540], block_2d=block_2d)


@pytest.mark.gpu
def test_many_splits_equal_the_reference() -> None:
    splits = torch.randint(0, 200, (256,), generator=torch.Generator().manual_seed(3)).tolist()
    _check(hard_input(sum(splits), 384, torch.bfloat16, seed=2), splits)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8_dtype", FP8_DTYPES)
def test_division_is_ieee(fp8_dtype) -> None:
    """2^17 mantissas of amax at several exponents: a quotient that is one unit off anywhere shows in the scales."""
    generator = torch.Generator().manual_seed(4)
    mantissas = torch.randint(0, 1 << 23, (1 << 17,), generator=generator, dtype=torch.int32)
    exponents = torch.randint(1, 254, (1 << 17,), generator=generator, dtype=torch.int32)
    amax = ((exponents << 23) | mantissas).view(torch.float32)
    x = torch.zeros(1 << 17, 128)
    x[:, 5] = amax
    x[:, 9] = -amax * 0.3
    _check(x.to(DEVICE), [1 << 17], fp8_dtype=fp8_dtype, power_of_2=False, directions=(False,))
