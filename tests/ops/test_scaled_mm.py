"""The loop over experts hands `scaled_mm` the right codes and scales, cut from the bulk buffers, without members."""

from __future__ import annotations

import pytest
import torch

from lighterage.formats import Float8BlockQuantizer, SplitTensors, split_quantize
from lighterage.formats.splits import Splits
from lighterage.ops import gemm_scaled_mm
from lighterage.ops.gemm_mixed import MixedBackend
from lighterage.ops.gemm_reference import ReferenceBackend
from lighterage.ops.gemm_scaled_mm import ScaledMMBackend
from lighterage.ops.gemm_triton import TritonBackend

SIZES = [48, 0, 144, 16, 0]
NUM_OUT, NUM_IN = 272, 144


def _values(codes: torch.Tensor, scale: torch.Tensor, recipe: int) -> torch.Tensor:
    """float64 (rows, depth) of one operand, its scales read as `torch.nn.functional.scaled_mm` documents them."""
    rows, depth = codes.shape
    slabs = -(-depth // 128)
    if recipe == 5:  # 128x128 blocks, (slabs padded to 4, blocks of rows)
        assert scale.shape == (-(-slabs // 4) * 4, -(-rows // 128))
        scale_RS = scale[:slabs].t().repeat_interleave(128, 0)[:rows]
    else:
        assert scale.shape == (rows, slabs) and scale.stride(0) == 1
        scale_RS = scale
    return codes.double() * scale_RS.double().repeat_interleave(128, 1)[:, :depth]


@pytest.fixture
def operator(monkeypatch) -> list[int]:
    """`scaled_mm` in float64, which the CPU has not; the addresses that it was given."""
    addresses = []

    def scaled_mm(a, b, a_scales, a_recipes, a_swizzles, b_scales, b_recipes, b_swizzles, bias, dtype, *, out):
        assert a.stride(1) == 1 and b.stride(0) == 1 and not a_swizzles and not b_swizzles and bias is None
        addresses.extend([a.data_ptr(), b.data_ptr()])
        out.copy_(_values(a, a_scales[0], a_recipes[0]) @ _values(b.t(), b_scales[0], b_recipes[0]).t())
        assert out.dtype == dtype

    monkeypatch.setattr(gemm_scaled_mm, "_scaled_mm", scaled_mm)
    return addresses


def _group(rows: int, cols: int, sizes: list[int], block: int, shift: int = 0) -> SplitTensors:
    """A group whose buffers begin somewhere in a larger storage, as those that come back from elsewhere do."""
    generator = torch.Generator().manual_seed(rows + cols)
    x = torch.randn(rows, cols, generator=generator).bfloat16()
    tensors, buffers = split_quantize(x, sizes, [Float8BlockQuantizer(block_scaling_dim=block)] * len(sizes))
    moved = []
    for buffer in buffers:
        storage = torch.empty(buffer.numel() + 512, dtype=torch.uint8)
        start = -storage.data_ptr() % 256 + shift
        moved.append(storage[start : start + buffer.numel()].copy_(buffer))
    return tensors.with_buffers(rowwise=moved[0], columnwise=moved[1])


@pytest.mark.parametrize("shift", [0, 240])
def test_the_three_products_are_the_references(operator, shift) -> None:
    splits = Splits.of(SIZES, sum(SIZES), "cpu")
    x, dy = (_group(sum(SIZES), cols, SIZES, 1, shift) for cols in (NUM_IN, NUM_OUT))
    w = _group(NUM_OUT * len(SIZES), NUM_IN, [NUM_OUT] * len(SIZES), 2, shift)
    bias = torch.randn(len(SIZES), NUM_OUT)
    loop, reference = ScaledMMBackend(), ReferenceBackend()
    for got, want in (
        [backend.forward(x, w, splits, out_dtype=torch.float32, bias=None) for backend in (loop, reference)],
        [backend.forward(x, w, splits, out_dtype=torch.float32, bias=bias) for backend in (loop, reference)],
        [backend.dgrad(dy, w, splits, out_dtype=torch.float32) for backend in (loop, reference)],
        [backend.wgrad(dy, x, splits, out_dtype=torch.float32) for backend in (loop, reference)],
    ):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert not loop.wgrad(dy, x, splits, out_dtype=torch.float32)[1].any()


def test_no_member_is_made_and_no_byte_is_copied(operator) -> None:
    splits = Splits.of(SIZES, sum(SIZES), "cpu")
    x, dy = (_group(sum(SIZES), cols, SIZES, 1) for cols in (NUM_IN, NUM_OUT))
    ScaledMMBackend().wgrad(dy, x, splits, out_dtype=torch.float32)
    assert not x.made() and not dy.made()
    for address, group in zip(operator, [dy, x] * 3, strict=True):
        buffer = group.buffers["columnwise"]
        assert buffer.data_ptr() <= address < buffer.data_ptr() + buffer.numel()


def test_mixed_takes_weight_gradients_from_the_loop_and_rows_from_the_grouped_kernel(operator, monkeypatch) -> None:
    splits = Splits.of(SIZES, sum(SIZES), "cpu")
    x, dy = (_group(sum(SIZES), cols, SIZES, 1) for cols in (NUM_IN, NUM_OUT))
    w = _group(NUM_OUT * len(SIZES), NUM_IN, [NUM_OUT] * len(SIZES), 2)
    mixed = MixedBackend(rows=TritonBackend(power_of_2_scales=True))
    mixed.wgrad(dy, x, splits, out_dtype=torch.float32)
    assert len(operator) == 2 * sum(size > 0 for size in SIZES)
    asked = []
    monkeypatch.setattr(TritonBackend, "_rows", lambda self, *arguments: asked.append(self))
    mixed.forward(x, w, splits, out_dtype=torch.float32, bias=None)
    mixed.dgrad(dy, w, splits, out_dtype=torch.float32)
    assert asked == [mixed.rows, mixed.rows] and len(operator) == 2 * sum(size > 0 for size in SIZES)


def test_codes_that_scaled_mm_does_not_multiply_are_refused(operator) -> None:
    quantizers = [Float8BlockQuantizer(fp8_dtype=torch.float8_e5m2)] * 2
    splits = Splits.of([32, 32], 64, "cpu")
    dy = split_quantize(torch.randn(64, 64), splits, quantizers)[0]
    with pytest.raises(ValueError, match=r"in E4M3 only; dy is E5M2\. Pass backend='triton'"):
        ScaledMMBackend().wgrad(dy, dy, splits, out_dtype=torch.float32)
