"""The slab reference does what the formula says, step by step."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from lighterage.kernels.reference.grouped_gemm import block_scaled_product, fused_multiply_add

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _nearest(value: Fraction) -> np.float32:
    """The float32 nearest to an exact value: of three neighbours, by exact comparison."""
    near = np.float32(float(value))
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.uint32)) & 1))


def _codes(num_rows: int, num_cols: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, num_cols, generator=generator) * 20).to(dtype).view(torch.uint8)


def _scales(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) + 0.5


@pytest.mark.parametrize("b_block_2d", [False, True])
@pytest.mark.parametrize("b_dtype", [E4M3, E5M2])
def test_every_step_is_the_formulas(b_block_2d, b_dtype) -> None:
    a, b = _codes(3, 272, E4M3, 0), _codes(130, 272, b_dtype, 1)
    a_scale = _scales(3, 4, seed=2)
    b_scale = _scales(2, 4, seed=3) if b_block_2d else _scales(3, 132, seed=3)
    got = block_scaled_product(
        a, a_scale, b, b_scale, a_dtype=E4M3, b_dtype=b_dtype, b_block_2d=b_block_2d, out_dtype=torch.float32
    )
    a_values, b_values = a.view(E4M3).double(), b.view(b_dtype).double()
    for i, j in [(0, 0), (1, 127), (2, 128), (1, 129)]:
        y = np.float32(0)
        for slab in range(3):
            columns = slice(slab * 128, slab * 128 + 128)
            products = zip(a_values[i, columns].tolist(), b_values[j, columns].tolist(), strict=True)
            exact = sum((Fraction(p) * Fraction(q) for p, q in products), Fraction(0))
            scale_b = b_scale[j // 128, slab] if b_block_2d else b_scale[slab, j]
            scaled = np.float32(_nearest(exact)) * np.float32(float(a_scale[slab, i]))
            y = _nearest(Fraction(float(scaled)) * Fraction(float(scale_b)) + Fraction(float(y)))
        assert float(got[i, j]) == float(y)


def test_fused_multiply_add_rounds_once() -> None:
    a, b = torch.tensor([1 + 2**-12]), torch.tensor([1 + 2**-12])
    c = torch.tensor([-1.0])
    assert float(fused_multiply_add(a, b, c)) == 2**-11 + 2**-24
    assert float(a * b + c) == 2**-11


def test_one_thread_and_many_give_the_same_bits() -> None:
    a, b = _codes(96, 512, E4M3, 0), _codes(160, 512, E4M3, 1)
    options = {"a_dtype": E4M3, "b_dtype": E4M3, "b_block_2d": True, "out_dtype": torch.float32}
    a_scale, b_scale = _scales(4, 96, seed=2), _scales(2, 4, seed=3)
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(block_scaled_product(a, a_scale, b, b_scale, **options))
    finally:
        torch.set_num_threads(threads)
    rows = torch.cat([block_scaled_product(a[i : i + 1], a_scale[:, i:], b, b_scale, **options) for i in range(96)])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], rows)


def test_nothing_contracted_gives_zeros_and_the_bias() -> None:
    a, b = torch.empty(4, 0, dtype=torch.uint8), torch.empty(6, 0, dtype=torch.uint8)
    bias = torch.arange(6.0)
    got = block_scaled_product(
        a,
        torch.empty(0, 4),
        b,
        torch.empty(0, 8),
        a_dtype=E4M3,
        b_dtype=E4M3,
        b_block_2d=False,
        out_dtype=torch.bfloat16,
        bias=bias,
    )
    assert torch.equal(got, bias.bfloat16().expand(4, 6))


def test_the_bias_is_added_before_the_one_rounding() -> None:
    a, b = _codes(5, 128, E4M3, 0), _codes(16, 128, E4M3, 1)
    options = {"a_dtype": E4M3, "b_dtype": E4M3, "b_block_2d": False}
    bias = torch.randn(16).bfloat16()
    exact = block_scaled_product(
        a, _scales(1, 8, seed=0), b, _scales(1, 16, seed=1), out_dtype=torch.float32, **options
    )
    got = block_scaled_product(
        a, _scales(1, 8, seed=0), b, _scales(1, 16, seed=1), out_dtype=torch.bfloat16, bias=bias, **options
    )
    assert torch.equal(got, (exact + bias.float()).bfloat16())
