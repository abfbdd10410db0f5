"""`activation="swiglu"` quantizes SwiGLU of the input as if it had been computed before."""

from __future__ import annotations

import pytest
import torch

from lighterage.formats import MXFP8Quantizer, split_quantize
from lighterage.kernels.reference.swiglu_rows import swiglu_rows
from tests.formats.cases import ALL, BULK, same_codes
from tests.formats.test_device_splits import DEVICE, from_device

SIZES = [64, 0, 32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_codes_are_those_of_the_activation(name: str, dtype: torch.dtype) -> None:
    if name == "nvfp4_rht" and dtype != torch.bfloat16:
        return
    h = (torch.randn(96, 128) * 4).to(dtype)
    quantizers = [ALL[name]()] * 3
    y = swiglu_rows(h)
    assert y.shape == (96, 64) and y.dtype == dtype
    wanted, _ = split_quantize(y, SIZES, quantizers)
    for splits in (SIZES, from_device(SIZES, 96) if DEVICE == "cpu" else SIZES):
        got, _ = split_quantize(
            h, splits, quantizers, activation="swiglu", backend="reference" if name in BULK else "auto"
        )
        assert (got.num_cols, got.dtype) == (64, dtype)
        assert all(same_codes(a, b) for a, b in zip(got, wanted, strict=True))


def test_leading_dimensions_and_no_rows() -> None:
    h = torch.randn(6, 32, 128)
    for quantizer in (MXFP8Quantizer(), ALL["fp8_tensor"]()):
        got, _ = split_quantize(h, [2, 4], [quantizer] * 2, activation="swiglu")
        wanted, _ = split_quantize(swiglu_rows(h.flatten(0, 1)).view(6, 32, 64), [2, 4], [quantizer] * 2)
        assert [t.shape for t in got] == [(2, 32, 64), (4, 32, 64)]
        assert all(same_codes(a, b) for a, b in zip(got, wanted, strict=True))
        empty, _ = split_quantize(h[:0], [0, 0], [quantizer] * 2, activation="swiglu")
        assert [t.shape for t in empty] == [(0, 32, 64)] * 2
    assert split_quantize(h[:0], [], [], activation="swiglu")[0].num_cols == 64


def test_the_activation_is_rounded_once() -> None:
    h = torch.randn(64, 256, dtype=torch.bfloat16)
    gate, up = h.double().chunk(2, 1)
    exact = torch.nn.functional.silu(gate) * up
    assert (swiglu_rows(h).double() - exact).abs().div(exact.abs().clamp(min=1e-30)).max() <= 2**-8


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"even last dimension; got \(32, 33\).*torch.cat"):
        split_quantize(torch.randn(32, 33), [32], [MXFP8Quantizer()], activation="swiglu")
    with pytest.raises(ValueError, match="needs K divisible by 32; got K=16"):
        split_quantize(torch.randn(32, 32), [32], [MXFP8Quantizer()], activation="swiglu")
    with pytest.raises(ValueError, match="activation must be None or 'swiglu'; got 'gelu'"):
        split_quantize(torch.randn(32, 64), [32], [MXFP8Quantizer()], activation="gelu")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("name", BULK)
def test_kernels_give_the_bits_of_their_own_activation(name: str) -> None:
    pytest.importorskip("triton")
    from lighterage.kernels.triton.swiglu import swiglu

    h = (torch.randn(96, 128) * 4).to(torch.bfloat16).to(DEVICE)
    quantizers = [BULK[name]()] * 3
    wanted, _ = split_quantize(swiglu(h), SIZES, quantizers, backend="triton")
    for splits in (SIZES, from_device(SIZES, 96)):
        got, _ = split_quantize(h, splits, quantizers, activation="swiglu", backend="triton")
        assert all(same_codes(a, b) for a, b in zip(got, wanted, strict=True))
