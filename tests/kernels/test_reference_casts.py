"""Casts and scales against ml_dtypes and hand-computed values."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from lighterage.kernels.reference import casts, mxfp8, nvfp4
from tests.kernels.numpy_oracle import ELEMENT, bits, codes_of

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def _every_binade(count: int) -> torch.Tensor:
    """Float32 values of every sign, exponent and many mantissas, ties of the small formats among them."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    coarse = words & ~0x7FFFF  # few mantissa bits: exact values and ties
    values = torch.cat([words, coarse]).to(torch.int32).view(torch.float32)
    return values[~values.isnan()]


@pytest.mark.parametrize("fp8_dtype", FP8)
def test_fp8_cast_equals_ml_dtypes_after_clamping(fp8_dtype: torch.dtype) -> None:
    x = torch.cat([_every_binade(50_000), torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])
    element, limit = ELEMENT[fp8_dtype]
    wanted = np.clip(x.numpy(), -limit, limit).astype(element).view(np.uint8)
    assert casts.cast_fp8(x, fp8_dtype).numpy().tobytes() == wanted.tobytes()


@pytest.mark.parametrize("fp8_dtype", FP8)
def test_fp8_cast_saturates_and_has_one_nan(fp8_dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    top = codes_of(casts.cast_fp8(torch.tensor([1e30, inf, -1e30, -inf, nan, -nan, -0.0]), fp8_dtype))
    assert top == {torch.float8_e4m3fn: "7e 7e fe fe 7f 7f 80", torch.float8_e5m2: "7b 7b fb fb 7f 7f 80"}[fp8_dtype]


@pytest.mark.parametrize("fp8_dtype", FP8)
def test_fp8_decode_equals_ml_dtypes(fp8_dtype: torch.dtype) -> None:
    codes = np.arange(256, dtype=np.uint8)
    wanted = codes.view(ELEMENT[fp8_dtype][0]).astype(np.float32)
    np.testing.assert_array_equal(casts.decode_fp8(torch.from_numpy(codes), fp8_dtype).numpy(), wanted)


def test_e8m0_decode_equals_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    wanted = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(mxfp8.decode_e8m0(torch.from_numpy(codes)).numpy(), wanted)


def test_e8m0_encode_rounds_up_to_the_next_power_of_two() -> None:
    x = torch.tensor([1.0, 1.0000001, 2.0, 0.0, 2.0**-127, 2.0**-127 * 1.5, 2.0**-126, 2.0**-149, 2.0**127, 3.4e38])
    assert mxfp8.encode_e8m0_round_up(x).tolist() == [127, 128, 128, 0, 0, 1, 1, 0, 254, 254]
    assert mxfp8.encode_e8m0_round_up(torch.tensor([float("inf"), float("nan")])).tolist() == [254, 255]


def test_e8m0_encode_is_the_smallest_power_that_covers() -> None:
    x = _every_binade(20_000).abs()
    x = x[x.isfinite() & (x > 2.0**-127) & (x <= 2.0**127)]
    codes = mxfp8.encode_e8m0_round_up(x)
    assert (mxfp8.decode_e8m0(codes) >= x).all()
    assert (mxfp8.decode_e8m0(codes - 1) < x).all()


def test_e2m1_thresholds() -> None:
    below_and_at = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    at = nvfp4.decode_e2m1(nvfp4.encode_e2m1(torch.tensor(below_and_at)))
    assert at.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    above = torch.nextafter(torch.tensor(below_and_at), torch.tensor(9.0))
    below = torch.nextafter(torch.tensor(below_and_at), torch.tensor(0.0))
    assert nvfp4.decode_e2m1(nvfp4.encode_e2m1(above)).tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert nvfp4.decode_e2m1(nvfp4.encode_e2m1(below)).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    special = torch.tensor([-0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 100.0, -0.25])
    assert nvfp4.encode_e2m1(special).tolist() == [8, 7, 7, 7, 15, 7, 8]


def test_e2m1_equals_ml_dtypes() -> None:
    x = torch.cat([_every_binade(50_000), torch.linspace(-7, 7, 20_001)])
    x = x[x.isfinite()]
    wanted = np.clip(x.numpy(), -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(nvfp4.encode_e2m1(x).numpy(), wanted)
    codes = np.arange(16, dtype=np.uint8)
    wanted_values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert bits(nvfp4.decode_e2m1(torch.from_numpy(codes))) == bits(torch.from_numpy(wanted_values))


def test_packing_puts_the_even_element_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert nvfp4.pack(codes).tolist() == [[0x21, 0x0F]]
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)


def test_division_is_the_ieee_quotient() -> None:
    x = torch.rand(100_000, generator=torch.Generator().manual_seed(2)) + 0.01
    wanted = np.float32(448) / x.numpy()
    assert casts.divide(448.0, x).numpy().tobytes() == wanted.tobytes()


def test_amax_ignores_nan_and_counts_inf() -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, -2.0], [nan, nan], [inf, 1.0], [-0.0, 0.0]])
    assert casts.amax(x, 1).tolist() == [2.0, 0.0, inf, 0.0]
    assert casts.amax(torch.empty(0, 3)).item() == 0.0
    assert casts.amax(torch.empty(3, 0), 1).tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_fp8_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be torch\.float8_e4m3fn or torch\.float8_e5m2"):
        casts.fp8_max(torch.float8_e4m3fnuz)
