"""The kernels of the permutation place, gather and sum as the plain-torch reference does, to the bit."""

from __future__ import annotations

import pytest
import torch

from lighterage.kernels.reference import permute as reference
from lighterage.kernels.triton import permute as triton
from lighterage.ops.permute import capacity
from tests.kernels.triton_cases import DEVICE


def routed(num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k].to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "alignment"),
    [(700, 5, 2, 16), (37, 1, 1, 32), (300, 64, 3, 128), (90, 200, 4, 1), (0, 4, 2, 16), (3, 17, 2, 16)],
)
def test_copies_are_placed_as_by_a_stable_sort(num_tokens, num_experts, top_k, alignment, dtype):
    experts = routed(num_tokens, num_experts, top_k).to(dtype)
    num_rows = capacity(experts.numel(), num_experts, alignment)
    found = triton.place_copies(experts, num_experts, alignment, num_rows)
    for a, b in zip(found, reference.place_copies(experts, num_experts, alignment, num_rows), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_all_copies_to_the_last_expert():
    experts = torch.full((600, 1), 6, device=DEVICE)
    found = triton.place_copies(experts, 7, 16, capacity(600, 7, 16))
    assert found[2].tolist() == [0] * 6 + [608]
    assert torch.equal(found[0][:, 0].cpu(), torch.arange(600, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_cols", [8, 100, 2500])
@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_are_gathered_and_summed_to_the_bit(dtype, num_cols, top_k):
    x = torch.randn(20, num_cols, device=DEVICE).to(dtype)
    rows, tokens, _, _ = reference.place_copies(routed(20, 6, top_k), 6, 4, capacity(20 * top_k, 6, 4))
    gathered = triton.gather_rows(x, tokens)
    assert torch.equal(gathered, reference.gather_rows(x, tokens))
    assert not gathered[tokens < 0].any()
    y = torch.randn(len(tokens), num_cols, device=DEVICE).to(dtype)
    summed, wanted = triton.sum_rows(y, rows), reference.sum_rows(y, rows)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts bits off where a GPU rounds
        torch.testing.assert_close(summed, wanted, rtol=2**-7, atol=0.0)
    else:
        assert torch.equal(summed, wanted)


def test_rows_need_not_be_contiguous_nor_any():
    x = torch.randn(8, 20, device=DEVICE).t()
    tokens = torch.tensor([3, -1, 0], dtype=torch.int32, device=DEVICE)
    assert torch.equal(triton.gather_rows(x, tokens), reference.gather_rows(x, tokens))
    empty = torch.zeros(0, 8, device=DEVICE)
    assert triton.gather_rows(empty, tokens[:0]).shape == (0, 8)
    assert triton.sum_rows(empty, torch.zeros(0, 2, dtype=torch.int32, device=DEVICE)).shape == (0, 8)
