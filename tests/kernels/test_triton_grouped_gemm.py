"""The grouped kernels against the slab reference: every split, both directions, one launch."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.grouped_gemm_cases import E4M3, E5M2, Case, error, expected
from tests.kernels.triton_cases import DEVICE, ends_of

pytest.importorskip("triton")

from lighterage.formats.split_tensors import SplitTensors
from lighterage.kernels.triton.grouped_gemm import grouped_rows, grouped_wgrad

# Tensor cores sum a slab with about 14 bits, the interpreter in float32.
BOUND = 1e-3 if DEVICE == "cuda" else 1e-6
CASES = {
    "ragged": Case(splits=[48, 0, 176, 16], in_features=272, out_features=208),
    "whole tiles": Case(splits=[128, 256], in_features=256, out_features=128),
    "first and last empty": Case(splits=[0, 144, 0, 0], in_features=128, out_features=144),
    "one row tile of many experts": Case(splits=[16] * 9, in_features=144, out_features=16),
    "scales not powers of two": Case(splits=[32, 160], in_features=384, out_features=144, power_of_2=False),
    "tiles of 1x128 in the weight": Case(splits=[32, 160], in_features=272, out_features=144, w_block_2d=False),
    "E5M2 gradients": Case(splits=[32, 160], in_features=144, out_features=272, dy_dtype=E5M2),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    return request.param


def _forward(case: Case, x: SplitTensors, w: SplitTensors, **options) -> torch.Tensor:
    options = {"num_rows": sum(case.splits), "out_dtype": torch.float32} | options
    return grouped_rows(
        options.pop("x_buffer", x.buffers["rowwise"]),
        w.buffers["rowwise"],
        case.ends,
        num_splits=len(case.splits),
        depth=case.in_features,
        out_features=case.out_features,
        x_dtype=case.x_dtype,
        w_dtype=E4M3,
        w_block_2d=case.w_block_2d,
        **options,
    )


def _dgrad(case: Case, dy: SplitTensors, w: SplitTensors, **options) -> torch.Tensor:
    options = {"out_dtype": torch.float32} | options
    return grouped_rows(
        dy.buffers["rowwise"],
        w.buffers["columnwise"],
        case.ends,
        num_rows=sum(case.splits),
        num_splits=len(case.splits),
        depth=case.out_features,
        out_features=case.in_features,
        x_dtype=case.dy_dtype,
        w_dtype=E4M3,
        w_block_2d=case.w_block_2d,
        **options,
    )


def _wgrad(case: Case, dy: SplitTensors, x: SplitTensors, **options) -> torch.Tensor:
    options = {"out_dtype": torch.float32} | options
    return grouped_wgrad(
        dy.buffers["columnwise"],
        x.buffers["columnwise"],
        case.ends,
        num_splits=len(case.splits),
        out_features=case.out_features,
        in_features=case.in_features,
        dy_dtype=case.dy_dtype,
        x_dtype=case.x_dtype,
        **options,
    )


def test_forward_comes_close_to_the_reference(case) -> None:
    x, w = case.x(), case.w()
    assert error(_forward(case, x, w), torch.cat(expected(x, w, ("rowwise", "rowwise"), torch.float32))) < BOUND


def test_the_inputs_gradient_comes_close_to_the_reference(case) -> None:
    dy, w = case.dy(), case.w()
    assert error(_dgrad(case, dy, w), torch.cat(expected(dy, w, ("rowwise", "columnwise"), torch.float32))) < BOUND


def test_the_weights_gradient_comes_close_to_the_reference(case) -> None:
    dy, x = case.dy(), case.x()
    want = torch.stack(expected(dy, x, ("columnwise", "columnwise"), torch.float32))
    got = _wgrad(case, dy, x)
    assert error(got, want) < BOUND
    for expert, rows in enumerate(case.splits):
        assert rows or not got[expert].any()


def test_the_bias_of_each_expert_is_added() -> None:
    case = CASES["ragged"]
    x, w = case.x(), case.w()
    bias = torch.randn(len(case.splits), case.out_features, device=DEVICE)
    want = torch.cat([y + b for y, b in zip(expected(x, w, ("rowwise", "rowwise"), torch.float32), bias, strict=True)])
    assert error(_forward(case, x, w, bias=bias), want) < BOUND


def test_rows_of_no_expert_are_zeros_with_a_bias_too() -> None:
    case = CASES["ragged"]
    x, w = case.x(), case.w()
    bias = torch.ones(len(case.splits), case.out_features, device=DEVICE)
    num_rows = sum(case.splits)
    spare = torch.full((300 * case.in_features,), 0x7F, dtype=torch.uint8, device=DEVICE)  # NaN, were it read
    longer = torch.cat([x.buffers["rowwise"], spare])
    got = _forward(case, x, w, x_buffer=longer, num_rows=num_rows + 300, bias=bias)
    assert got.shape[0] == num_rows + 300
    assert torch.equal(got[:num_rows], _forward(case, x, w, bias=bias))
    assert not got[num_rows:].any()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_rounded_once(out_dtype) -> None:
    case = CASES["whole tiles"]
    x, w = case.x(), case.w()
    got, exact = _forward(case, x, w, out_dtype=out_dtype), _forward(case, x, w)
    assert got.dtype == out_dtype
    # The interpreter's own conversion may be off by a unit in the last place.
    assert torch.equal(got, exact.to(out_dtype)) if DEVICE == "cuda" else error(got, exact) < 4e-3


def test_the_cut_of_the_work_does_not_change_a_bit() -> None:
    case = CASES["ragged"]
    x, w, dy = case.x(), case.w(), case.dy()
    for tuning in ({"tile_m": 64, "tile_n": 64, "num_warps": 4}, {"tile_n": 256}, {"group": 1, "num_stages": 2}):
        for got, wanted in (
            (_forward(case, x, w, **tuning), _forward(case, x, w)),
            (_wgrad(case, dy, x, **tuning), _wgrad(case, dy, x)),
        ):
            # The interpreter's products are NumPy's: on some processors their order of adding depends on the shape.
            assert torch.equal(got, wanted) if DEVICE == "cuda" else error(got, wanted) < 1e-6


def test_nothing_to_do_gives_zeros_of_the_right_shape() -> None:
    case = Case(splits=[0, 0], in_features=128, out_features=64)
    x, w = case.x(), case.w()
    assert _forward(case, x, w).shape == (0, 64)
    assert torch.equal(_wgrad(case, case.dy(), x), torch.zeros(2, 64, 128, device=DEVICE))


def test_misuse_is_refused() -> None:
    case = CASES["whole tiles"]
    buffer = torch.empty(1 << 17, dtype=torch.uint8, device=DEVICE)
    options = {
        "num_rows": 16,
        "num_splits": 2,
        "depth": 128,
        "out_features": 64,
        "x_dtype": E4M3,
        "w_dtype": E4M3,
        "w_block_2d": True,
        "out_dtype": torch.float32,
    }
    with pytest.raises(ValueError, match="multiples of 16"):
        grouped_rows(buffer, buffer, case.ends, **(options | {"out_features": 40}))
    with pytest.raises(ValueError, match="prefix sums"):
        grouped_rows(buffer, buffer, case.ends.int(), **options)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        grouped_rows(buffer[1:], buffer, case.ends, **options)


def test_ends_of_a_capacity_are_read_to_the_last_split_alone() -> None:
    case = CASES["ragged"]
    x, w = case.x(), case.w()
    ends = torch.cat([case.ends, ends_of([9999])])
    got = grouped_rows(
        x.buffers["rowwise"],
        w.buffers["rowwise"],
        ends,
        num_rows=sum(case.splits),
        num_splits=len(case.splits),
        depth=case.in_features,
        out_features=case.out_features,
        x_dtype=E4M3,
        w_dtype=E4M3,
        w_block_2d=True,
        out_dtype=torch.float32,
    )
    assert torch.equal(got, _forward(case, x, w))
