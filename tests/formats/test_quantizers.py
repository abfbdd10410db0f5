"""Quantizers: options, usages, updates, and the errors for what they cannot take."""

from __future__ import annotations

import pytest
import torch

from lighterage import formats
from lighterage.formats import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    MXFP8Quantizer,
    NVFP4Quantizer,
    bulk_layout,
)
from lighterage.kernels.reference import fp8_block, mxfp8, nvfp4
from tests.formats.cases import ALL, BULK, bytes_equal, same_codes
from tests.kernels.inputs import make_input

X = make_input("wide", 64, 96, torch.bfloat16)


@pytest.mark.parametrize("name", ALL)
def test_usages_choose_what_is_made(name: str) -> None:
    quantizer = ALL[name]()
    both = quantizer(X)
    for rowwise, columnwise in ((True, False), (False, True)):
        quantizer.set_usage(rowwise=rowwise, columnwise=columnwise)
        assert (quantizer.rowwise, quantizer.columnwise) == (rowwise, columnwise)
        one = quantizer(X)
        assert (one.rowwise_data is not None, one.columnwise_data is not None) == (rowwise, columnwise)
        assert same_codes(one, _with_usage(both, rowwise, columnwise))
    quantizer.set_usage(columnwise=False)
    assert quantizer.rowwise is False, "None leaves a usage as it is"
    with pytest.raises(ValueError, match="makes nothing: both usages are off"):
        quantizer(X)


def _with_usage(tensor: torch.Tensor, rowwise: bool, columnwise: bool) -> torch.Tensor:
    kept = tensor.detach()
    kept.update_usage(rowwise_usage=rowwise, columnwise_usage=columnwise)  # type: ignore[attr-defined]
    return kept


def test_fields_are_what_the_reference_makes() -> None:
    tensor = Float8BlockQuantizer(fp8_dtype=torch.float8_e5m2, amax_epsilon=0.5)(X)
    options = {"fp8_dtype": torch.float8_e5m2, "power_of_2": True, "epsilon": 0.5}
    for direction in ("rowwise", "columnwise"):
        data, scale = fp8_block.quantize_1d(X, columnwise=direction == "columnwise", **options)
        assert bytes_equal(getattr(tensor, f"{direction}_data"), data)
        assert bytes_equal(getattr(tensor, f"{direction}_scale_inv"), scale)
    tensor = MXFP8Quantizer()(X)
    data, scale = mxfp8.quantize(X, fp8_dtype=torch.float8_e4m3fn, columnwise=True)
    assert bytes_equal(tensor.columnwise_data, data) and bytes_equal(tensor.columnwise_scale_inv, scale)
    tensor = NVFP4Quantizer(with_rht=True)(X)
    for direction in ("rowwise", "columnwise"):
        columnwise = direction == "columnwise"
        wanted = nvfp4.quantize(X, columnwise=columnwise, hadamard=columnwise)
        for field, value in zip(("data", "scale_inv", "amax"), wanted, strict=True):
            assert bytes_equal(getattr(tensor, f"{direction}_{field}"), value)


@pytest.mark.parametrize("name", BULK)
def test_each_direction_of_a_single_tensor_is_one_allocation(name: str) -> None:
    tensor = BULK[name]()(X)
    for direction in ("rowwise", "columnwise"):
        fields = [field for field in type(tensor).FIELDS if field.startswith(direction)]
        storages = {getattr(tensor, field).untyped_storage().data_ptr() for field in fields}
        assert len(storages) == 1
        layout = bulk_layout(
            BULK[name]().format_name, [64], 96, columnwise=direction == "columnwise", block_2d=BULK[name]().block_2d
        )
        assert getattr(tensor, fields[0]).untyped_storage().nbytes() == layout.allocated_bytes
        assert getattr(tensor, fields[0]).data_ptr() % 256 == 0


@pytest.mark.parametrize("name", ALL)
def test_update_writes_into_the_same_memory(name: str) -> None:
    quantizer = ALL[name]()
    out, other = quantizer(X), make_input("random", 64, 96, torch.bfloat16, seed=5)
    places = [value.data_ptr() for value in out.data_tensors()]
    assert quantizer.update(other, out) is out
    assert same_codes(out, quantizer(other)) and [value.data_ptr() for value in out.data_tensors()] == places
    out.update_usage(rowwise_usage=False)
    quantizer.update(X, out)
    assert out.rowwise_data is None and bytes_equal(out.columnwise_data, quantizer(X).columnwise_data)


@pytest.mark.parametrize("name", ALL)
def test_update_refuses_a_tensor_of_another_kind(name: str) -> None:
    quantizer = ALL[name]()
    with pytest.raises(ValueError, match="update writes into a tensor of the class, options and shape"):
        quantizer.update(X[:32], quantizer(X))
    other = "mxfp8" if name != "mxfp8" else "nvfp4"
    with pytest.raises(ValueError, match="update writes into a tensor of the class, options and shape"):
        quantizer.update(X, ALL[other]()(X))


@pytest.mark.parametrize("name", ALL)
def test_inputs_of_every_shape_and_stride(name: str) -> None:
    quantizer = ALL[name]()
    assert same_codes(quantizer(X.t().contiguous().t()), quantizer(X)), "strides do not matter"
    deep = quantizer(X.view(4, 16, 96))
    assert deep.shape == (4, 16, 96) and same_codes(deep.view(64, 96), quantizer(X))
    assert same_codes(quantizer(X).view(4, 16, 96), deep)
    leaf = X.float().requires_grad_() if name != "nvfp4_rht" else X.clone().requires_grad_()
    assert not quantizer(leaf).requires_grad, "not recorded by autograd"
    empty = quantizer(X[:0])
    assert empty.shape == (0, 96) and empty.dequantize().shape == (0, 96)


@pytest.mark.parametrize("name", ALL)
def test_bad_inputs_are_refused_with_a_remedy(name: str) -> None:
    quantizer = ALL[name]()
    with pytest.raises(TypeError, match=r"needs a strided bf16, fp16 or fp32 tensor; got torch.int32"):
        quantizer(torch.ones(32, 32, dtype=torch.int32))
    with pytest.raises(TypeError, match="got list"):
        quantizer([1.0])
    with pytest.raises(TypeError, match=r"quantized already.*dequantize"):
        quantizer(quantizer(X))
    with pytest.raises(ValueError, match=r"2 dimensions or more; got \(32,\)"):
        quantizer(torch.ones(32))
    with pytest.raises(ValueError, match="backend must be 'auto', 'reference' or 'triton'"):
        quantizer(X, backend="fast")
    if name.startswith(("mxfp8", "nvfp4")):
        with pytest.raises(ValueError, match=r"needs K divisible by \d+; got K=100.*Pad K, or use Float8Block"):
            quantizer(X[:32, :1].expand(32, 100))
        with pytest.raises(ValueError, match=r"rows of every split divisible by \d+; got 40 rows"):
            quantizer(X[:40])


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fp8_dtype must be .*; got torch.float16"):
        MXFP8Quantizer(fp8_dtype=torch.float16)
    with pytest.raises(ValueError, match="block_scaling_dim must be 1"):
        Float8BlockQuantizer(block_scaling_dim=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="amax_epsilon must be a finite number of 0 or more"):
        Float8CurrentScalingQuantizer(amax_epsilon=float("nan"))
    with pytest.raises(ValueError, match="stochastic_rounding needs a generator"):
        NVFP4Quantizer(stochastic_rounding=True)
    with pytest.raises(ValueError, match="exclude each other"):
        NVFP4Quantizer(with_rht=True, with_2d_quantization=True)
    with pytest.raises(TypeError, match=r"needs torch.bfloat16; got torch.float32"):
        NVFP4Quantizer(with_rht=True)(torch.ones(16, 16))
    with pytest.raises(ValueError, match="has no Triton kernel"):
        Float8CurrentScalingQuantizer()(X, backend="triton")


def test_stochastic_rounding_is_reproducible_from_a_seed_and_moves_on() -> None:
    def quantizer(seed: int) -> NVFP4Quantizer:
        return NVFP4Quantizer(stochastic_rounding=True, generator=torch.Generator().manual_seed(seed))

    first = quantizer(1)
    a, b = first(X), first(X)
    assert same_codes(a, quantizer(1)(X)), "the seed decides"
    assert not same_codes(a, b), "each call draws anew"
    assert not same_codes(a, quantizer(2)(X))
    assert bytes_equal(a.rowwise_scale_inv, NVFP4Quantizer()(X).rowwise_scale_inv), "scales are not random"


def test_exact_names_are_public() -> None:
    for name in formats.__all__:
        assert hasattr(formats, name)
