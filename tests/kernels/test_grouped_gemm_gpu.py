"""The grouped kernels on a GPU, the portable ones and Hopper's: equal to one-slab products bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.grouped_gemm_cases import E4M3, E5M2, Case, slab_oracle
from tests.kernels.triton_cases import DEVICE

pytest.importorskip("triton")

from lighterage.kernels.triton.grouped_gemm import grouped_wgrad

pytestmark = pytest.mark.gpu

ROWWISE, DGRAD, COLUMNWISE = ("rowwise", "rowwise"), ("rowwise", "columnwise"), ("columnwise", "columnwise")
MANY = (torch.randint(0, 12, (256,), generator=torch.Generator().manual_seed(0)) * 16).tolist()
CASES = {
    "ragged": Case(splits=[48, 0, 176, 16], in_features=272, out_features=208),
    "first and last empty": Case(splits=[0, 144, 0, 0], in_features=128, out_features=144),
    "large": Case(splits=[512, 0, 1040, 16, 2512, 16], in_features=2048, out_features=1152),
    "short last slab": Case(splits=[512, 272], in_features=1040, out_features=656),
    "many experts": Case(splits=MANY, in_features=384, out_features=256),
    "scales not powers of two": Case(splits=[512, 160], in_features=640, out_features=512, power_of_2=False),
    "E5M2 gradients": Case(splits=[32, 160], in_features=256, out_features=384, dy_dtype=E5M2),
}


class RowsKernel:
    """One implementation of forward and input gradient, on the operands of a case."""

    def __init__(self, name: str) -> None:
        if name == "hopper":
            if torch.cuda.get_device_capability()[0] != 9:
                pytest.skip("needs Hopper")
            from lighterage.kernels.triton.grouped_gemm_hopper_rows import grouped_rows
        else:
            from lighterage.kernels.triton.grouped_gemm import grouped_rows
        self.name, self.grouped_rows = name, grouped_rows

    def __call__(self, case: Case, x, w, direction: str, out_dtype: torch.dtype, **options) -> torch.Tensor:
        depth, width = case.in_features, case.out_features
        if direction == "columnwise":
            depth, width = width, depth
        own = {"power_of_2": case.power_of_2} if self.name == "hopper" else {"w_block_2d": True}
        common = {
            "num_rows": sum(case.splits),
            "num_splits": len(case.splits),
            "depth": depth,
            "out_features": width,
            "x_dtype": x.options["fp8_dtype"],
            "w_dtype": E4M3,
            "out_dtype": out_dtype,
        }
        x_buffer = options.pop("x_buffer", x.buffers["rowwise"])
        return self.grouped_rows(x_buffer, w.buffers[direction], case.ends, **(own | common | options))


def _wgrad(case: Case, dy, x, out_dtype: torch.dtype) -> torch.Tensor:
    return grouped_wgrad(
        dy.buffers["columnwise"],
        x.buffers["columnwise"],
        case.ends,
        num_splits=len(case.splits),
        out_features=case.out_features,
        in_features=case.in_features,
        dy_dtype=dy.options["fp8_dtype"],
        x_dtype=E4M3,
        out_dtype=out_dtype,
    )


@pytest.fixture(params=["portable", "hopper"])
def rows_kernel(request) -> RowsKernel:
    return RowsKernel(request.param)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_input_gradient_equal_the_slab_oracle_bit_for_bit(rows_kernel, case, out_dtype) -> None:
    x, w, dy = case.x(), case.w(), case.dy()
    y = rows_kernel(case, x, w, "rowwise", out_dtype)
    assert torch.equal(y, torch.cat(slab_oracle(x, w, ROWWISE, out_dtype)))
    dx = rows_kernel(case, dy, w, "columnwise", out_dtype)
    assert torch.equal(dx, torch.cat(slab_oracle(dy, w, DGRAD, out_dtype)))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_weights_gradient_equals_the_slab_oracle_bit_for_bit(case, out_dtype) -> None:
    x, dy = case.x(), case.dy()
    dw = _wgrad(case, dy, x, out_dtype)
    assert torch.equal(dw, torch.stack(slab_oracle(dy, x, COLUMNWISE, out_dtype)))


def test_rows_of_no_expert_are_zeros_and_the_bias_is_added(rows_kernel) -> None:
    case = CASES["ragged"]
    x, w = case.x(), case.w()
    bias = torch.randn(len(case.splits), case.out_features, device=DEVICE)
    num_rows = sum(case.splits)
    spare = torch.full((700 * case.in_features,), 0x7F, dtype=torch.uint8, device=DEVICE)  # NaN, were it read
    longer = torch.cat([x.buffers["rowwise"], spare])
    got = rows_kernel(case, x, w, "rowwise", torch.float32, x_buffer=longer, num_rows=num_rows + 700, bias=bias)
    plain = torch.cat(slab_oracle(x, w, ROWWISE, torch.float32))
    sizes = torch.tensor(case.splits, device=DEVICE)
    assert torch.equal(got[:num_rows], plain + bias.repeat_interleave(sizes, 0))
    assert not got[num_rows:].any()


def test_scales_that_are_powers_of_two_may_be_multiplied_first() -> None:
    kernel, case = RowsKernel("hopper"), CASES["large"]
    x, w = case.x(), case.w()
    results = [kernel(case, x, w, "rowwise", torch.float32, power_of_2=known) for known in (True, False)]
    assert torch.equal(*results)


def test_repeated_launches_give_the_same_bits(rows_kernel) -> None:
    case = Case(splits=[496] * 24, in_features=1024, out_features=1024)
    x, w = case.x(), case.w()
    y = torch.cat(slab_oracle(x, w, ROWWISE, torch.bfloat16))
    for _ in range(20):
        assert torch.equal(rows_kernel(case, x, w, "rowwise", torch.bfloat16), y)
