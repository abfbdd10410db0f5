"""MXFP8: worked examples, torchao as the oracle, and the laws that the layouts obey."""

from __future__ import annotations

import pytest
import torch

from lighterage.kernels.reference import casts
from lighterage.kernels.reference.mxfp8 import decode_e8m0, dequantize, encode_e8m0_round_up, quantize, swizzle
from tests.kernels.inputs import DTYPES, KINDS, make_input
from tests.kernels.numpy_oracle import codes_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INF, NAN = float("inf"), float("nan")


def _block(values: list[float], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.zeros(32, 32, dtype=dtype)
    x[0, : len(values)] = torch.tensor(values, dtype=dtype)
    return x


@pytest.mark.parametrize(
    ("values", "code", "codes", "dequantized"),
    [
        ([1, 0.30078125, -0.69921875, 0.00099945], 119, "78 6a f3 28", [1, 0.3125, -0.6875, 0.0009765625]),
        ([448, -1], 127, "7e b8", [448, -1]),
        ([450, -449], 128, "76 f6", [448, -448]),
        ([1.75, 1], 119, "7e 78", [1.75, 1]),
        ([1.7578125, 1], 120, "76 70", [1.75, 1]),
        ([0], 0, "00", [0]),
        ([6e-39], 0, "38", [2.0**-127]),
        ([3.3e38, 1], 247, "78 00", [INF, 0]),
        ([INF, 2], 254, "7e 00", [INF, 0]),
        ([NAN, 2], 120, "7f 78", [NAN, 2]),
    ],
)
def test_worked_blocks_e4m3(values: list[float], code: int, codes: str, dequantized: list[float]) -> None:
    _check_block(values, E4M3, code, codes, dequantized)


@pytest.mark.parametrize(
    ("values", "code", "codes", "dequantized"),
    [
        ([1, 0.3, -0.7, 0.001], 112, "78 71 f6 50", [1, 0.3125, -0.75, 0.0009765625]),
        ([57344, 1], 127, "7b 3c", [57344, 1]),
        ([61440, 1], 128, "78 38", [65536, 1]),
    ],
)
def test_worked_blocks_e5m2(values: list[float], code: int, codes: str, dequantized: list[float]) -> None:
    _check_block(values, E5M2, code, codes, dequantized)


def _check_block(values: list[float], fp8_dtype: torch.dtype, code: int, codes: str, dequantized: list[float]) -> None:
    data, scale = quantize(_block(values), fp8_dtype=fp8_dtype, columnwise=False)
    assert scale[0, 0] == code and codes_of(data[0, : len(values)]) == codes
    back = dequantize(data, scale, fp8_dtype=fp8_dtype, columnwise=False, out_dtype=torch.float32)
    wanted = torch.tensor(dequantized, dtype=torch.float32)
    torch.testing.assert_close(back[0, : len(values)], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_up_covers_and_one_less_would_not(kind: str, dtype: torch.dtype) -> None:
    x = make_input(kind, 64, 96, dtype)
    _, scale = quantize(x, fp8_dtype=E4M3, columnwise=False)
    reciprocal = torch.tensor(1.0) / torch.tensor(448.0)
    needed = casts.amax(x.view(64, 3, 32), -1) * reciprocal
    codes = scale[:64, :3]
    finite = needed.isfinite() & (needed > 2.0**-127)
    assert (decode_e8m0(codes)[finite] >= needed[finite]).all()
    assert (decode_e8m0(codes - 1)[finite] < needed[finite]).all()
    assert (codes[needed == 0] == 0).all() and (codes[needed.isinf()] == 254).all()


@pytest.mark.parametrize("fp8_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("nan", "inf")])
def test_equals_torchao_rounding_up(kind: str, dtype: torch.dtype, fp8_dtype: torch.dtype) -> None:
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = make_input(kind, 64, 96, dtype)
    for columnwise in (False, True):
        data, scale = quantize(x, fp8_dtype=fp8_dtype, columnwise=columnwise)
        ours = (data.t(), scale[:2, :96].t()) if columnwise else (data, scale[:64, :3])
        operand = x.t().contiguous() if columnwise else x
        theirs_scale, theirs = mx_tensor.to_mx(operand, fp8_dtype, 32, mx_tensor.ScaleCalculationMode.RCEIL)
        assert torch.equal(ours[1], theirs_scale.view(torch.uint8).view(ours[1].shape))
        # torchao takes code 0 for a block of zeros, and scales by 1; for us it is 2^-127 and subnormals survive.
        block_is_zero = (ours[1] == 0).repeat_interleave(32, 1)
        theirs = theirs.view(torch.uint8)
        assert torch.equal(torch.where(block_is_zero, theirs, ours[0]), theirs)
        assert (ours[1] > 0).any() == (kind not in ("zero", "subnormal"))


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (384, 8)])
def test_swizzle_equals_torchao(shape: tuple[int, int]) -> None:
    to_blocked = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
    scale = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert torch.equal(swizzle(scale), to_blocked(scale).flatten())
    i, j = shape[0] - 37, shape[1] - 3
    place = ((i // 128) * (shape[1] // 4) + j // 4) * 512 + (i % 32) * 16 + (i % 128) // 32 * 4 + j % 4
    assert swizzle(scale)[place] == scale[i, j]


def test_swizzle_refuses_unpadded_scales() -> None:
    with pytest.raises(ValueError, match=r"multiple of 128, a multiple of 4\); got \(96, 3\)"):
        swizzle(torch.zeros(96, 3, dtype=torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_columnwise_is_rowwise_of_the_transpose_with_data_in_place(kind: str) -> None:
    x = make_input(kind, 96, 160, torch.bfloat16)
    data, scale = quantize(x, fp8_dtype=E4M3, columnwise=True)
    data_t, scale_t = quantize(x.t().contiguous(), fp8_dtype=E4M3, columnwise=False)
    assert data.shape == (96, 160) and scale.shape == (4, 256)
    assert torch.equal(data, data_t.t()) and torch.equal(scale[:3, :160], scale_t[:160, :3].t())
    assert not scale[3:].any() and not scale[:, 160:].any()


def test_two_dimensional_blocks_have_one_scale_in_both_directions() -> None:
    x = make_input("wide", 64, 96, torch.bfloat16)
    data, scale = quantize(x, fp8_dtype=E4M3, columnwise=False, block_2d=True)
    column_data, column_scale = quantize(x, fp8_dtype=E4M3, columnwise=True, block_2d=True)
    assert torch.equal(data, column_data)
    assert torch.equal(scale[:64:32, :3], column_scale[:2, :96:32])
    amax = casts.amax(x.view(2, 32, 3, 32), (1, 3))
    wanted = encode_e8m0_round_up(amax * (torch.tensor(1.0) / torch.tensor(448.0)))
    assert torch.equal(scale[:64, :3], wanted.repeat_interleave(32, 0))


@pytest.mark.parametrize("shape", [(0, 64), (32, 0), (0, 0)])
def test_empty_inputs_have_the_right_shapes(shape: tuple[int, int]) -> None:
    num_rows, num_cols = shape
    _, scale = quantize(torch.ones(shape), fp8_dtype=E4M3, columnwise=False)
    assert scale.shape == (-(-num_rows // 128) * 128, -(-num_cols // 128) * 4)
    _, scale = quantize(torch.ones(shape), fp8_dtype=E4M3, columnwise=True)
    assert scale.shape == (-(-num_rows // 128) * 4, -(-num_cols // 128) * 128)
