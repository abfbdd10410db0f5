"""NVFP4: worked examples, the numpy oracle, the Hadamard transform, and the statistics of stochastic rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lighterage.kernels.reference.casts import decode_fp8
from lighterage.kernels.reference.nvfp4 import (
    decode_e2m1,
    dequantize,
    encode_e2m1,
    global_scale,
    hadamard,
    inverse_hadamard,
    quantize,
    transpose_2d,
    unpack,
)
from tests.kernels.inputs import KINDS, make_input
from tests.kernels.numpy_oracle import amax, bits, codes_of, nvfp4

INF = float("inf")


@pytest.mark.parametrize(
    ("amax_value", "scale", "multiplier", "decode"),
    [
        (6.0, "0x43e00000", "0x42955556", "0x3b124925"),
        (2688.0, "0x3f800000", "0x3e2aaaab", "0x3f800000"),
        (1.0, "0x45280000", "0x43e00000", "0x39c30c31"),
        (10.0, "0x43866666", "0x42333333", "0x3b73cf3e"),
        (0.0, "0x3f800000", "0x3e2aaaab", "0x3f800000"),
        (INF, "0x3f800000", "0x3e2aaaab", "0x3f800000"),
        (1e-38, "0x7f7fffff", "0x7e2aaaaa", "0x00200000"),
        (3.3e38, "0x052d3c13", "0x03e6fac4", "0x79bd2761"),
    ],
)
def test_worked_global_scales(amax_value: float, scale: str, multiplier: str, decode: str) -> None:
    got = global_scale(torch.tensor([amax_value]))
    assert bits(got) == [scale]
    assert bits(got * (torch.ones(1) / torch.tensor([6.0]))) == [multiplier]
    assert bits(torch.ones(1) / got) == [decode]


@pytest.mark.parametrize(
    ("values", "amax_value", "scale", "codes", "dequantized"),
    [
        ([6, 3, -1.5, 0.75, 0.25, -0.25, 5, -5], 6, 0x7E, "57 2b 80 e6", [6, 3, -1.5, 1, 0, -0.0, 4, -4]),
        ([1, 0.3, -0.7, 0.1], 1, 0x7E, "47 1e", [1, 0.33333334, -0.66666669, 0.083333336]),
        ([1, 0.3, -0.7, 0.1], 10, 0x63, "47 1e", [0.98214287, 0.32738096, -0.65476191, 0.081845239]),
        ([0.01, -0.004, 0, 0.002], 10, 0x2E, "c7 20", [0.009765625, -0.0032552085, 0, 0.0016276042]),
        ([1e-5, -1e-6], 10, 0x00, "f7", [0, -0.0]),
        ([2688, 1], 2688, 0x7E, "07", [2688, 0]),
        ([0, 0], 5, 0x00, "00", [0, 0]),
    ],
)
def test_worked_blocks(
    values: list[float], amax_value: float, scale: int, codes: str, dequantized: list[float]
) -> None:
    x = torch.zeros(16, 16)
    x[0, : len(values)] = torch.tensor(values)
    given = torch.tensor([float(amax_value)])
    data, scales, used = quantize(x, columnwise=False, amax=given)
    assert scales[0, 0] == scale and codes_of(data[0, : len(values) // 2]) == codes and torch.equal(used, given)
    back = dequantize(data, scales, used, columnwise=False, hadamard=False, out_dtype=torch.float32)
    wanted = torch.tensor(dequantized, dtype=torch.float32)
    torch.testing.assert_close(back[0, : len(values)], wanted, rtol=1e-7, atol=0)
    assert torch.equal(back[0, : len(values)].signbit(), wanted.signbit())


def test_worked_hadamard_rows() -> None:
    x = torch.zeros(3, 16, dtype=torch.bfloat16)
    x[0] = torch.arange(1, 17)
    x[1, 0] = 1
    x[2, 3] = 1
    wanted = [-15.5, -7.5, 7.5, -0.5, 7.5, -0.5, -15.5, 8.5, 8.5, 16.5, 1.5, 1.5, 1.5, -2.5, 10.5, -17.5]
    signs = [-1, 1, 1, -1] * 4
    assert hadamard(x).tolist() == [wanted, [0.25] * 16, [0.25 * sign for sign in signs]]


def test_hadamard_is_the_signed_sylvester_matrix_and_orthonormal() -> None:
    matrix = hadamard(torch.eye(16, dtype=torch.bfloat16)).double()
    signs = [-1 if 0xD7E8 >> i & 1 else 1 for i in range(16)]
    wanted = [[0.25 * signs[r] * (-1) ** (r & c).bit_count() for c in range(16)] for r in range(16)]
    assert matrix.tolist() == wanted
    assert torch.equal(matrix @ matrix.t(), torch.eye(16, dtype=torch.float64))
    x = make_input("random", 4, 64, torch.bfloat16)
    torch.testing.assert_close(inverse_hadamard(hadamard(x)), x.float(), rtol=0.02, atol=0.03)


def test_zeros_of_either_sign_transform_as_subtraction_from_zero_says() -> None:
    zeros = torch.zeros(2, 16, dtype=torch.bfloat16)
    zeros[1] = -0.0
    assert not hadamard(zeros)[0].signbit().any()
    positive = torch.where(torch.tensor([0xD7E8 >> i & 1 for i in range(16)]).bool(), 0.0, -0.0)
    for distance in (1, 2, 4, 8):  # in scalars, as the note on the order says
        pairs = {i: (positive[i], positive[i + distance]) for i in range(16) if not i & distance}
        positive = positive.clone()
        for i, (a, b) in pairs.items():
            positive[i], positive[i + distance] = a + b, a - b
    assert torch.equal(hadamard(zeros)[1].signbit(), positive.signbit())


def test_hadamard_is_within_one_rounding_of_the_exact_product() -> None:
    x = make_input("wide", 32, 64, torch.bfloat16)
    matrix = hadamard(torch.eye(16, dtype=torch.bfloat16)).double()
    exact = (x.double().view(32, 4, 16) @ matrix).view(32, 64)
    scale = x.double().view(32, 4, 16).abs().sum(-1).repeat_interleave(16, 1)
    assert ((hadamard(x).double() - exact).abs() <= exact.abs() * 2.0**-8 + scale * 2.0**-22).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["1x16", "16x16", "hadamard"])
def test_equals_the_numpy_oracle(kind: str, dtype: torch.dtype, mode: str) -> None:
    x = make_input(kind, 16, 48, torch.bfloat16 if mode == "hadamard" else dtype)
    for columnwise in (False, True):
        data, scale, used = quantize(x, columnwise=columnwise, block_2d=mode == "16x16", hadamard=mode == "hadamard")
        operand = x.t().contiguous() if columnwise else x
        operand = hadamard(operand) if mode == "hadamard" else operand
        values = operand.float().numpy()
        codes, scales = nvfp4(values, amax(values), mode == "16x16")
        assert used.item() == amax(values)
        num_rows, num_cols = codes.shape
        np.testing.assert_array_equal(scale[:num_rows, : num_cols // 16].numpy(), scales)
        np.testing.assert_array_equal(unpack(data).numpy(), codes)
        assert scale.shape == (-(-num_rows // 128) * 128, -(-num_cols // 64) * 4)
        assert not scale[num_rows:].any() and not scale[:, num_cols // 16 :].any()


def test_two_dimensional_columnwise_is_the_transpose() -> None:
    x = make_input("wide", 32, 80, torch.bfloat16)
    data, scale, amax_row = quantize(x, columnwise=False, block_2d=True)
    column_data, column_scale, amax_column = quantize(x, columnwise=True, block_2d=True)
    derived_data, derived_scale = transpose_2d(data, scale)
    assert torch.equal(derived_data, column_data) and torch.equal(derived_scale, column_scale)
    assert torch.equal(amax_row, amax_column)
    back_data, back_scale = transpose_2d(column_data, column_scale)
    assert torch.equal(back_data, data) and torch.equal(back_scale, scale)


@pytest.mark.parametrize("shape", [(0, 64), (16, 0), (0, 0)])
def test_empty_inputs_have_the_right_shapes(shape: tuple[int, int]) -> None:
    num_rows, num_cols = shape
    data, scale, used = quantize(torch.ones(shape), columnwise=True)
    assert data.shape == (num_cols, num_rows // 2) and used.tolist() == [0.0]
    assert scale.shape == (-(-num_cols // 128) * 128, -(-num_rows // 64) * 4)


def test_stochastic_rounding_over_every_random_byte() -> None:
    """All 256 bytes once: the exact distribution, so no luck is involved."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = torch.cat([torch.linspace(0, 6, 481), grid, -torch.linspace(0, 6, 481)])
    random = torch.arange(256, dtype=torch.uint8)
    rounded = decode_e2m1(encode_e2m1(x[:, None].expand(-1, 256), random.expand(len(x), -1)))
    magnitude = x.abs()
    low = grid[(torch.searchsorted(grid, magnitude, right=True) - 1).clamp(0, 7)]
    step = torch.where(magnitude >= 4, 2.0, torch.where(magnitude >= 2, 1.0, 0.5))
    high = torch.where(magnitude == low, low, low + step).clamp(max=6)
    found = rounded.abs()
    assert ((found == low[:, None]) | (found == high[:, None])).all(), "only the two neighbours"
    assert torch.equal(rounded.signbit(), x.signbit()[:, None].expand(-1, 256))
    bias = (found.mean(1) - magnitude) / step
    assert bias.max() <= 1e-6 and bias.min() > -1 / 256, "toward zero by less than a 256th of a step"
    exact = magnitude == low
    assert (found[exact] == low[exact, None]).all(), "values on the grid stay"


def test_stochastic_rounding_of_special_values() -> None:
    x = torch.tensor([float("nan"), INF, -INF, -0.0])
    assert encode_e2m1(x, torch.full((4,), 255, dtype=torch.uint8)).tolist() == [7, 7, 15, 8]


def test_stochastic_rounding_of_a_tensor_has_the_right_mean() -> None:
    x = make_input("random", 32, 64, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    num_draws = 400
    total = torch.zeros(32, 64)
    for _ in range(num_draws):
        random = torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
        parts = quantize(x, columnwise=False, rounding_bits=random)
        total += dequantize(*parts, columnwise=False, hadamard=False, out_dtype=torch.float32)
    _, scale, amax_1 = quantize(x, columnwise=False)
    factor = decode_fp8(scale[:32, :4].contiguous(), torch.float8_e4m3fn) * amax_1 / 2688
    factor = factor.repeat_interleave(16, 1)
    # The block's scale is rounded too, so its largest value may saturate.
    target = x.float().clamp(-6 * factor, 6 * factor)
    error = (total / num_draws - target).abs()
    # The largest step is 2, the variance at most a quarter of its square.
    standard_error = 2 * factor * 0.5 / num_draws**0.5
    assert (error <= 4.5 * standard_error + 2 * factor / 256).all()
    nearest = dequantize(*quantize(x, columnwise=False), columnwise=False, hadamard=False, out_dtype=torch.float32)
    assert error.mean() < (nearest - target).abs().mean() / 4
