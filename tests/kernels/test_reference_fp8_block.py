"""FP8 block scaling: worked examples, the numpy oracle, and the laws that the layouts obey."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lighterage.kernels.reference.fp8_block import dequantize, quantize_1d, quantize_2d
from tests.kernels.inputs import DTYPES, KINDS, make_input
from tests.kernels.numpy_oracle import bits, codes_of, fp8_block

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INF, NAN = float("inf"), float("nan")


def _tile(values: list[float], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.zeros(1, 128, dtype=dtype)
    x[0, : len(values)] = torch.tensor(values, dtype=dtype)
    return x


def _quantize(x: torch.Tensor, power_of_2: bool, fp8_dtype: torch.dtype = E4M3) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_1d(x, fp8_dtype=fp8_dtype, power_of_2=power_of_2, epsilon=0.0, columnwise=False)


@pytest.mark.parametrize(
    ("amax", "dtype", "pow2_inv", "fp32_inv"),
    [
        (1.0, torch.bfloat16, "0x3b800000", "0x3b124925"),
        (3.0, torch.bfloat16, "0x3c000000", "0x3bdb6db7"),
        (448.0, torch.bfloat16, "0x3f800000", "0x3f800000"),
        (449.0, torch.float32, "0x40000000", "0x3f804925"),
        (450.0, torch.bfloat16, "0x40000000", "0x3f809249"),
        (0.001, torch.float32, "0x36800000", "0x3615cbed"),
        (0.0, torch.bfloat16, "0x3f800000", "0x3f800000"),
        (INF, torch.bfloat16, "0x3f800000", "0x3f800000"),
        (2.0**-133, torch.bfloat16, "0x00400000", "0x00202020"),
        (1.3e-36, torch.bfloat16, "0x00400000", "0x00202020"),
        (2.0**-149, torch.float32, "0x00400000", "0x00200000"),
        (3.3895e38, torch.float32, "0x7b800000", "0x7b11b683"),
    ],
)
def test_worked_scales_e4m3(amax: float, dtype: torch.dtype, pow2_inv: str, fp32_inv: str) -> None:
    for power_of_2, wanted in ((True, pow2_inv), (False, fp32_inv)):
        _, scale_inv = _quantize(_tile([amax], dtype), power_of_2)
        assert bits(scale_inv) == [wanted] + ["0x00000000"] * 3


@pytest.mark.parametrize(
    ("amax", "pow2_inv", "fp32_inv"),
    [
        (1.0, "0x38000000", "0x37924925"),
        (57344.0, "0x3f800000", "0x3f800000"),
        (60000.0, "0x40000000", "0x3f85edb7"),
    ],
)
def test_worked_scales_e5m2(amax: float, pow2_inv: str, fp32_inv: str) -> None:
    for power_of_2, wanted in ((True, pow2_inv), (False, fp32_inv)):
        _, scale_inv = _quantize(_tile([amax], torch.float32), power_of_2, E5M2)
        assert bits(scale_inv)[0] == wanted


@pytest.mark.parametrize(
    ("values", "power_of_2", "codes", "scale_inv", "dequantized"),
    [
        (
            [1.0, 0.30078125, -0.69921875, 0.00099945068, -0.000100135803, 0],
            True,
            "78 6a f3 28 8d 00",
            "0x3b800000",
            [1, 0.3125, -0.6875, 0.0009765625, -9.91821289e-05, 0],
        ),
        (
            [1.0, 0.30078125, -0.69921875, 0.00099945068, -0.000100135803, 0],
            False,
            "7e 70 fa 2e 93 00",
            "0x3b124925",
            [1, 0.28571430, -0.71428573, 0.0009765625, -9.59123936e-05, 0],
        ),
        ([450, -448, 224, 1, 0.5], True, "76 f6 6e 30 28", "0x40000000", [448, -448, 224, 1, 0.5]),
        ([450, -448, 224, 1, 0.5], False, "7e fe 76 38 30", "0x3f809249", None),
        ([NAN, 2], True, "7f 78", "0x3c000000", [NAN, 2]),
        ([INF, 2], True, "7e 40", "0x3f800000", [448, 2]),
    ],
)
def test_worked_tiles(
    values: list[float], power_of_2: bool, codes: str, scale_inv: str, dequantized: list[float] | None
) -> None:
    data, scale = _quantize(_tile(values), power_of_2)
    assert codes_of(data[0, : len(values)]) == codes
    assert bits(scale)[0] == scale_inv
    if dequantized is not None:
        back = dequantize(data, scale, fp8_dtype=E4M3, block_2d=False, columnwise=False, out_dtype=torch.float32)
        torch.testing.assert_close(
            back[0, : len(values)], torch.tensor(dequantized, dtype=torch.float32), rtol=1e-7, atol=0, equal_nan=True
        )


def test_worked_layout() -> None:
    m, k = torch.arange(6)[:, None], torch.arange(300)[None]
    x = ((m + 1) * 2.0 ** (k // 128)).bfloat16()
    options = {"fp8_dtype": E4M3, "power_of_2": True, "epsilon": 0.0}
    data, scale = quantize_1d(x, columnwise=False, **options)
    row = torch.tensor([2.0**-8, 2.0**-7, 2.0**-7, 2.0**-6, 2.0**-6, 2.0**-6, 0, 0])
    assert data.shape == (6, 300) and torch.equal(scale, torch.stack([row, row * 2, row * 4]))
    data, scale = quantize_1d(x, columnwise=True, **options)
    assert data.shape == (300, 6) and scale.shape == (1, 300)
    assert scale[0, 0] == 2.0**-6 and scale[0, 299] == 2.0**-4
    row_data, scale = quantize_2d(x, columnwise=False, **options)
    assert torch.equal(scale, torch.tensor([[2.0**-6, 2.0**-5, 2.0**-4, 0]]))
    data, scale = quantize_2d(x, columnwise=True, **options)
    assert scale.shape == (3, 4) and torch.equal(data, row_data.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_numpy_oracle(kind: str, dtype: torch.dtype) -> None:
    shapes = [(3, 200), (130, 2), (2, 128)]
    for number, (num_rows, num_cols) in enumerate(shapes):
        x = make_input(kind, num_rows, num_cols, dtype, seed=number)
        for columnwise in (False, True):
            for power_of_2 in (False, True):
                fp8_dtype = E5M2 if number == 1 else E4M3
                epsilon = 1e-3 if number == 2 else 0.0
                options = {"fp8_dtype": fp8_dtype, "power_of_2": power_of_2, "epsilon": epsilon}
                for block_2d, quantize in ((False, quantize_1d), (True, quantize_2d)):
                    data, scale = quantize(x, columnwise=columnwise, **options)
                    wanted = fp8_block(x, columnwise=columnwise, block_2d=block_2d, **options)
                    np.testing.assert_array_equal(data.numpy(), wanted[0])
                    assert scale.numpy().tobytes() == wanted[1].tobytes()


@pytest.mark.parametrize("quantize", [quantize_1d, quantize_2d])
@pytest.mark.parametrize("shape", [(0, 256), (256, 0), (0, 0), (1, 1)])
def test_empty_and_tiny_inputs_have_the_right_shapes(quantize: object, shape: tuple[int, int]) -> None:
    options = {"fp8_dtype": E4M3, "power_of_2": True, "epsilon": 0.0, "columnwise": False}
    data, scale = quantize(torch.ones(shape), **options)  # type: ignore[operator]
    num_rows, num_cols = shape
    tiles = -(-num_cols // 128)
    wanted = (tiles, -(-num_rows // 4) * 4) if quantize is quantize_1d else (-(-num_rows // 128), -(-tiles // 4) * 4)
    assert data.shape == shape and scale.shape == wanted


@pytest.mark.parametrize("fp8_dtype", [E4M3, E5M2])
def test_power_of_two_scales_are_those_of_mxfp8(fp8_dtype: torch.dtype) -> None:
    from lighterage.kernels.reference import mxfp8

    x = make_input("wide", 32, 32, torch.float32)
    padded = torch.zeros(32, 128)
    padded[:, :32] = x
    _, scale_inv = _quantize(padded, True, fp8_dtype)
    _, codes = mxfp8.quantize(x, fp8_dtype=fp8_dtype, columnwise=False)
    assert torch.equal(scale_inv[0], mxfp8.decode_e8m0(codes[:32, 0]))


def test_error_is_within_half_a_step() -> None:
    x = make_input("wide", 64, 256, torch.float32)
    data, scale = _quantize(x, True)
    back = dequantize(data, scale, fp8_dtype=E4M3, block_2d=False, columnwise=False, out_dtype=torch.float32)
    step = scale[:, :64].t().repeat_interleave(128, 1) * 2.0**-10
    assert ((back - x).abs() <= x.abs() * 2.0**-4 + step).all()
