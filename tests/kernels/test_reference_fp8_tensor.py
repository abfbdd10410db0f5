"""Per-tensor FP8 with current scaling: worked values and a numpy oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lighterage.kernels.reference.fp8_tensor import dequantize, quantize
from tests.kernels.inputs import DTYPES, KINDS, make_input
from tests.kernels.numpy_oracle import ELEMENT, FP32_MAX, amax, bits, block_scale, cast_fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def test_worked_scale_is_limit_over_amax() -> None:
    _, scale_inv, amax_1 = quantize(torch.tensor([[5.0, -1.0]]), fp8_dtype=E4M3, power_of_2=False, epsilon=0.0)
    assert amax_1.tolist() == [5.0]
    scale = torch.tensor([448.0]) / torch.tensor([5.0])
    assert bits(scale) == ["0x42b33333"] and torch.equal(scale_inv, torch.ones(1) / scale)


def test_a_tiny_amax_saturates_the_scale_at_the_largest_float32_whatever_the_input_dtype() -> None:
    for dtype, value in ((torch.bfloat16, 2.0**-133), (torch.float32, 2.0**-149)):
        _, scale_inv, _ = quantize(torch.tensor([[value]], dtype=dtype), fp8_dtype=E4M3, power_of_2=False, epsilon=0.0)
        assert bits(scale_inv) == bits(torch.ones(1) / torch.tensor([torch.finfo(torch.float32).max]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_numpy_oracle(kind: str, dtype: torch.dtype) -> None:
    x = make_input(kind, 7, 33, dtype)
    values = x.float().numpy()
    for fp8_dtype in (E4M3, E5M2):
        for power_of_2 in (False, True):
            data, scale_inv, _ = quantize(x, fp8_dtype=fp8_dtype, power_of_2=power_of_2, epsilon=1e-6)
            scale = block_scale(amax(values), ELEMENT[fp8_dtype][1], power_of_2, 1e-6, FP32_MAX)
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(data.numpy(), cast_fp8(values * scale, fp8_dtype))
            assert scale_inv.item() == np.float32(1) / scale
            back = dequantize(data, scale_inv, fp8_dtype=fp8_dtype, out_dtype=torch.float32)
            assert back.shape == x.shape


@pytest.mark.parametrize("values", [[], [float("nan")] * 3, [0.0, 0.0], [float("inf"), 1.0]])
def test_nothing_to_scale_by_means_scale_one(values: list[float]) -> None:
    _, scale_inv, _ = quantize(torch.tensor([values]), fp8_dtype=E4M3, power_of_2=False, epsilon=0.0)
    assert scale_inv.tolist() == [1.0]
