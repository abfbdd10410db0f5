"""Sums over splits: Triton and plain torch against a loop in float64."""

from __future__ import annotations

import pytest
import torch

from lighterage.kernels.reference.segment_sums import segment_sums as reference
from tests.kernels.triton_cases import DEVICE, ends_of

CASES = ([5, 0, 70, 1], [0, 0], [200])


@pytest.mark.parametrize("splits", CASES)
@pytest.mark.parametrize("num_cols", [1, 33, 130])
def test_every_split_is_summed_and_rows_past_the_last_are_not(splits: list[int], num_cols: int) -> None:
    from lighterage.kernels.triton.segment_sums import segment_sums as triton

    x = torch.randn(sum(splits) + 3, num_cols, device=DEVICE).to(torch.bfloat16)
    wanted = torch.stack([part.double().sum(0) for part in x[:-3].split(splits)])
    for function in (reference, triton):
        got = function(x, ends_of(splits))
        assert got.dtype == torch.float32 and got.shape == wanted.shape
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
