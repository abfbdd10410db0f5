"""`launch` keeps what Triton compiled by all that it depends on: no launch runs what was compiled for another."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from lighterage.kernels.triton.launch import launch, on_device_of  # noqa: E402


@triton.jit(do_not_specialize=["n", "much"])
def _scale_kernel(x, y, n, factor, much, ADD: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32) * factor + ADD + (much.to(tl.int64) >> 32)
    tl.store(y + place, value, mask=place < n)


@triton.jit
def _specialized_kernel(x, n, ADD: tl.constexpr):
    tl.store(x, n + ADD)


@pytest.mark.parametrize("num_warps", [1, pytest.param(2, marks=pytest.mark.gpu)])
def test_dtypes_alignments_numbers_and_constants_never_meet_anothers_code(num_warps: int) -> None:
    memory = torch.arange(200, device=DEVICE, dtype=torch.float32)
    for dtype in (torch.float32, torch.float16):
        for start in (0, 1, 16):
            x = memory.to(dtype)[start : start + 100]
            for n in (1, 5, 16, 100):
                for factor, much, add in ((2.0, 1, 0), (0.5, 5 << 32, 3), (2.0, 3 << 32, 0)):
                    y = torch.zeros(100, device=DEVICE)
                    with on_device_of(x):
                        launch(
                            _scale_kernel,
                            -(-n // 32),
                            (x, y),
                            (n, factor, much),
                            {"ADD": add, "BLOCK": 32},
                            num_warps=num_warps,
                        )
                    wanted = torch.zeros(100, device=DEVICE)
                    wanted[:n] = x[:n].float() * factor + add + (much >> 32)
                    assert torch.equal(y, wanted)


@pytest.mark.gpu
def test_a_kernel_that_specializes_its_numbers_or_another_order_of_constants_is_refused() -> None:
    x = torch.zeros(16, device=DEVICE)
    with pytest.raises(AssertionError):
        launch(_specialized_kernel, 1, (x,), (1,), {"ADD": 1}, num_warps=1)
    with pytest.raises(AssertionError):
        launch(_scale_kernel, 1, (x, x), (1, 1.0, 1), {"BLOCK": 32, "ADD": 0}, num_warps=1)
