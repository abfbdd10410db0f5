"""The products of grouped layers through every backend, and what choosing one refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lighterage.formats import Float8BlockQuantizer, MXFP8Quantizer, NVFP4Quantizer, split_quantize
from lighterage.formats.bulk import Quantizer
from lighterage.formats.splits import Splits
from lighterage.ops import gemm_backends
from lighterage.ops.grouped_gemm import Operand, choose_backend, grouped_dgrad, grouped_forward, grouped_wgrad
from tests.kernels.grouped_gemm_cases import error, slab_oracle
from tests.kernels.triton_cases import DEVICE

QUANTIZERS: dict[str | None, tuple[Quantizer | None, Quantizer | None]] = {
    None: (None, None),
    "fp8_block": (Float8BlockQuantizer(), Float8BlockQuantizer(block_scaling_dim=2)),
    "mxfp8": (MXFP8Quantizer(), MXFP8Quantizer()),
    "nvfp4": (NVFP4Quantizer(with_rht=True), NVFP4Quantizer(with_2d_quantization=True)),
}
QUANTIZATION_ERROR = {None: 5e-3, "fp8_block": 0.05, "mxfp8": 0.05, "nvfp4": 0.2}
ALL = [
    (None, "reference"),
    (None, "torch"),
    ("fp8_block", "reference"),
    ("fp8_block", "triton"),
    ("mxfp8", "reference"),
    ("mxfp8", "emulation"),
    ("nvfp4", "reference"),
    ("nvfp4", "emulation"),
    pytest.param("fp8_block", "torch", marks=pytest.mark.gpu),
    pytest.param("fp8_block", "mixed", marks=pytest.mark.gpu),
]


@dataclass(frozen=True)
class Layer:
    """The plain operands of a layer, and the same ones in a format."""

    splits: Splits
    x: torch.Tensor
    dy: torch.Tensor
    w: torch.Tensor
    operands: tuple[Operand, Operand, Operand]

    @classmethod
    def make(cls, format_name: str | None, sizes: list[int], num_rows: int | None = None, *, on_device=False) -> Layer:
        generator = torch.Generator().manual_seed(0)
        total = num_rows or sum(sizes)
        x, dy = (torch.randn(total, n, generator=generator).bfloat16().to(DEVICE) for n in (160, 96))
        w = torch.randn(len(sizes), 96, 160, generator=generator).bfloat16().to(DEVICE)
        splits = Splits.of(sizes, sum(sizes), DEVICE)
        if on_device:
            splits = Splits(num_rows=total, ends=splits.ends)
        rows_quantizer, weight_quantizer = QUANTIZERS[format_name]
        operands: tuple[Operand, Operand, Operand] = (x, dy, w)
        if rows_quantizer is not None and weight_quantizer is not None:
            num = len(sizes)
            operands = (
                split_quantize(x, splits, [rows_quantizer] * num)[0],
                split_quantize(dy, splits, [rows_quantizer] * num)[0],
                split_quantize(w.view(-1, 160), [96] * num, [weight_quantizer] * num)[0],
            )
        return cls(splits, x, dy, w, operands)

    def exact(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y, dx and dw of the plain operands, float64."""
        x, dy, w = self.x.double(), self.dy.double(), self.w.double()
        y, dx, dw = x.new_zeros(len(x), 96), dy.new_zeros(len(dy), 160), torch.zeros_like(w)
        bounds = [0, *self.splits.ends.tolist()]
        for expert in range(len(w)):
            rows = slice(bounds[expert], bounds[expert + 1])
            y[rows], dx[rows], dw[expert] = x[rows] @ w[expert].t(), dy[rows] @ w[expert], dy[rows].t() @ x[rows]
        return y, dx, dw

    def products(self, backend_name, format_name, out_dtype, bias=None) -> tuple[torch.Tensor, ...]:
        x, dy, w = self.operands
        backend = choose_backend(backend_name, format_name, torch.device(DEVICE), self.splits)
        return (
            grouped_forward(x, w, self.splits, backend=backend, out_dtype=out_dtype, bias=bias),
            grouped_dgrad(dy, w, self.splits, backend=backend, out_dtype=out_dtype),
            grouped_wgrad(dy, x, self.splits, backend=backend, out_dtype=out_dtype),
        )


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("format_name", "backend_name"), ALL)
def test_the_three_products_are_those_of_the_values_but_for_their_quantization(
    format_name, backend_name, out_dtype
) -> None:
    layer = Layer.make(format_name, [96, 0, 160, 32])
    results = layer.products(backend_name, format_name, out_dtype)
    for got, want in zip(results, layer.exact(), strict=True):
        assert got.dtype == out_dtype and got.shape == want.shape
        assert error(got, want) < QUANTIZATION_ERROR[format_name]
    assert not results[2][1].any()


@pytest.mark.parametrize(
    ("format_name", "backend_name", "bound"),
    [
        (None, "torch", 5e-3),
        ("fp8_block", "triton", 1e-3),
        ("mxfp8", "emulation", 5e-3),
        ("nvfp4", "emulation", 6e-3),
        pytest.param("fp8_block", "torch", 1e-3, marks=pytest.mark.gpu),
    ],
)
def test_every_backend_comes_close_to_the_reference(format_name, backend_name, bound) -> None:
    layer = Layer.make(format_name, [96, 0, 160, 32])
    want = layer.products("reference", format_name, torch.float32)
    for got, reference in zip(layer.products(backend_name, format_name, torch.float32), want, strict=True):
        assert error(got, reference) < bound


@pytest.mark.parametrize(("format_name", "backend_name"), ALL)
def test_the_bias_of_each_expert_is_added(format_name, backend_name) -> None:
    layer = Layer.make(format_name, [32, 0, 64])
    bias = torch.randn(3, 96, device=DEVICE).bfloat16()
    plain = layer.products(backend_name, format_name, torch.float32)[0]
    got = layer.products(backend_name, format_name, torch.float32, bias)[0]
    want = plain + bias.float().repeat_interleave(torch.tensor([32, 0, 64], device=DEVICE), 0)
    assert error(got, want) < 1e-5


@pytest.mark.parametrize(("format_name", "backend_name"), ALL)
def test_splits_of_the_device_leave_zeros_in_rows_of_no_expert(format_name, backend_name) -> None:
    if format_name == "fp8_block" and backend_name in ("torch", "mixed"):
        with pytest.raises(ValueError, match="the host must know the splits"):
            Layer.make(format_name, [32, 64], 128, on_device=True).products(backend_name, format_name, torch.float32)
        return
    if DEVICE == "cpu" and format_name is not None:
        pytest.skip("split_quantize looks at splits that lie on the CPU")
    layer = Layer.make(format_name, [32, 0, 64], 160, on_device=True)
    for got, want in zip(layer.products(backend_name, format_name, torch.float32), layer.exact(), strict=True):
        assert error(got, want) < QUANTIZATION_ERROR[format_name]
    for got in layer.products(backend_name, format_name, torch.float32)[:2]:
        assert not got[96:].any()


def test_auto_takes_what_fits_the_device() -> None:
    splits = Splits.of([32], 32, DEVICE)
    names = {name: choose_backend("auto", name, torch.device(DEVICE), splits).name for name in QUANTIZERS}
    if DEVICE == "cpu":
        assert names == {None: "torch", "fp8_block": "reference", "mxfp8": "reference", "nvfp4": "reference"}
    else:
        assert names[None] == "torch" and names["mxfp8"] == names["nvfp4"] == "emulation"
        assert names["fp8_block"] in ("triton", "torch")


@pytest.mark.parametrize(("has_kernel", "few_large"), [(True, "mixed"), (False, "torch")])
def test_auto_takes_weight_gradients_expert_by_expert_where_they_are_few_and_large_and_the_host_knows_it(
    monkeypatch, has_kernel, few_large
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(gemm_backends, "capability", lambda device: (9, 0))
    monkeypatch.setattr(gemm_backends, "has_hopper_kernel", lambda device: has_kernel)
    cuda = torch.device("cuda", 0)

    def choose(sizes: list[int], *, on_device: bool = False) -> str:
        splits = Splits.of(sizes, sum(sizes), "cpu")
        if on_device:
            splits = Splits(num_rows=splits.num_rows, ends=splits.ends)
        return choose_backend("auto", "fp8_block", cuda, splits).name

    assert choose([4096] * 8) == choose([0, 4096, 0, 2048]) == few_large
    assert choose([512] * 64) == choose([4096] * 8, on_device=True) == choose([0, 0]) == "triton"


def test_a_wrong_choice_is_refused_with_what_to_pass() -> None:
    device = torch.device(DEVICE)
    with pytest.raises(ValueError, match="a GEMM backend is one of 'auto'"):
        choose_backend("cublas", None, device)
    with pytest.raises(ValueError, match=r"does not multiply mxfp8\. Pass 'auto' or one of 'emulation', 'reference'"):
        choose_backend("triton", "mxfp8", device)
    with pytest.raises(ValueError, match="operands that are not quantized"):
        choose_backend("triton", None, device)
    with pytest.raises(ValueError, match="products are known of"):
        choose_backend("auto", "int8", device)


def test_fp8_on_the_cpu_is_refused_by_torch_and_without_the_interpreter_by_triton(monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    for name in ("torch", "mixed"):
        with pytest.raises(ValueError, match=f"{name!r} multiplies FP8 on CUDA devices"):
            choose_backend(name, "fp8_block", torch.device("cpu"))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    for name, format_name in (("triton", "fp8_block"), ("emulation", "nvfp4")):
        with pytest.raises(ValueError, match=f"'{name}' runs on CUDA devices.*TRITON_INTERPRET=1"):
            choose_backend(name, format_name, torch.device("cpu"))


def test_operands_that_a_backend_cannot_read_are_refused() -> None:
    layer, plain = Layer.make("fp8_block", [32, 64]), Layer.make(None, [32, 64])
    (x, dy, w), splits = layer.operands, layer.splits
    triton = choose_backend("triton", "fp8_block", torch.device(DEVICE), splits)
    with pytest.raises(TypeError, match=r"x is a plain tensor\. Quantize it rowwise"):
        grouped_forward(plain.x, w, splits, backend=triton, out_dtype=torch.float32)
    x.update_usage(rowwise_usage=False)
    with pytest.raises(ValueError, match="reads x rowwise, which is not there"):
        grouped_forward(x, w, splits, backend=triton, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="dy with 1x128 scales; it has 128x128"):
        grouped_wgrad(w, x, splits, backend=triton, out_dtype=torch.float32)
    unaligned = Splits.of([24, 72], 96, DEVICE)
    with pytest.raises(ValueError, match=r"multiples of 16; got 24 for expert 0\. Pad each expert's rows"):
        grouped_dgrad(dy, w, unaligned, backend=triton, out_dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_name", ["torch", "triton", "mixed"])
def test_fp8_block_products_equal_the_slab_oracle_bit_for_bit(backend_name) -> None:
    layer = Layer.make("fp8_block", [512, 0, 1024, 128, 2048])
    x, dy, w = layer.operands
    for out_dtype in (torch.bfloat16, torch.float32):
        y, dx, dw = layer.products(backend_name, "fp8_block", out_dtype)
        assert torch.equal(y, torch.cat(slab_oracle(x, w, ("rowwise", "rowwise"), out_dtype)))
        assert torch.equal(dx, torch.cat(slab_oracle(dy, w, ("rowwise", "columnwise"), out_dtype)))
        assert torch.equal(dw, torch.stack(slab_oracle(dy, x, ("columnwise", "columnwise"), out_dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format_name", "backend_name"), [(None, "torch"), ("fp8_block", "triton"), ("nvfp4", "emulation")]
)
def test_launches_do_not_depend_on_the_number_of_experts(format_name, backend_name) -> None:
    def launches(num_experts: int) -> int:
        layer = Layer.make(format_name, [32] * num_experts)
        layer.products(backend_name, format_name, torch.bfloat16)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layer.products(backend_name, format_name, torch.bfloat16)
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    assert launches(8) == launches(64) == launches(256)
