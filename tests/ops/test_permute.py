"""Permutation by expert: no token is lost, padding is zero, gradients are exact, and little is saved."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lighterage.ops.permute import (
    capacity,
    pad_rows,
    permute,
    plan_permutation,
    unpad_rows,
    unpermute,
    weights_of_rows,
)


def routed(num_tokens: int, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """Experts of each token, all different."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]


@settings(max_examples=60)
@given(
    num_tokens=st.integers(0, 40),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    alignment=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 9),
)
def test_every_copy_has_a_row_of_its_expert_in_the_order_of_tokens(num_tokens, num_experts, top_k, alignment, seed):
    experts = routed(num_tokens, num_experts, min(top_k, num_experts), seed)
    plan = plan_permutation(experts, num_experts, alignment)
    x = torch.arange(1.0, num_tokens + 1)[:, None]
    rows = permute(x, plan)[:, 0]
    expected = []
    for expert in range(num_experts):
        tokens = [t + 1.0 for t in range(num_tokens) if expert in experts[t]]
        assert int(plan.num_tokens_of[expert]) == len(tokens)
        padded = -(-len(tokens) // alignment) * alignment
        assert int(plan.m_splits[expert]) == padded
        expected += tokens + [0.0] * (padded - len(tokens))
    assert plan.num_rows == capacity(experts.numel(), num_experts, alignment)
    assert rows.tolist() == expected + [0.0] * (plan.num_rows - len(expected))


def test_capacity_is_what_the_worst_distribution_takes():
    """One copy in each of as many experts as leave the rest in whole runs and one more."""
    for num_copies in range(20):
        for num_experts in (1, 2, 3):
            worst = max(
                sum(-(-size // 8) * 8 for size in sizes)
                for sizes in itertools.product(range(num_copies + 1), repeat=num_experts)
                if sum(sizes) == num_copies
            )
            assert capacity(num_copies, num_experts, 8) == worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_there_and_back_is_the_weighted_sum_of_each_tokens_copies(dtype, weighted):
    x = torch.randn(30, 8, dtype=dtype, requires_grad=True)
    plan = plan_permutation(routed(30, 5, 3), 5, 16)
    weights = torch.rand(30, 3, requires_grad=True) if weighted else None
    out = unpermute(permute(x, plan), plan, weights)
    wanted = x.double() * (3 if weights is None else weights.double().sum(1, keepdim=True))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    plan = plan_permutation(routed(7, 4, 2), 4, 4)
    weights = torch.rand(7, 2, dtype=torch.float32)
    assert torch.autograd.gradcheck(lambda x: unpermute(permute(x, plan).sin(), plan), x)
    h = permute(x.detach(), plan).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: permute(unpermute(h, plan).cos(), plan), h)
    weights = weights.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: weights_of_rows(w, plan).sin(), weights)
    assert torch.autograd.gradcheck(lambda h, w: unpermute(h, plan, w).cos(), (h, weights))


def test_weighting_rows_before_a_linear_layer_is_weighting_its_output():
    """And the gradient of the weights is the same, though what the layer gave is not saved."""
    x, layer = torch.randn(9, 6, requires_grad=True), torch.nn.Linear(6, 5, bias=False)
    plan = plan_permutation(routed(9, 4, 2), 4, 8)
    grads = []
    for before in (True, False):
        weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        rows = permute(x, plan)
        if before:
            out = unpermute(layer(rows * weights_of_rows(weights, plan)[:, None]), plan)
        else:
            out = unpermute(layer(rows), plan, weights)
        grads.append(torch.autograd.grad(out.square().sum(), (weights, x, layer.weight)))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_backward_needs_no_token():
    """What is saved are whole numbers, four bytes each."""
    x = torch.randn(64, 256, requires_grad=True)
    plan = plan_permutation(routed(64, 4, 2), 4, 16)
    weights = torch.rand(64, 2, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = unpermute(permute(x, plan), plan)
        weights_of_rows(weights, plan)
    assert {t.dtype for t in saved} == {torch.int32}
    assert sum(t.nbytes for t in saved) < 20 * x.shape[0] * 2 < x.nbytes
    out.sum().backward()


def test_a_second_backward_and_a_frozen_input_work():
    plan = plan_permutation(routed(9, 4, 2), 4, 8)
    weights = torch.rand(9, 2, requires_grad=True)
    out = unpermute(permute(torch.randn(9, 6), plan), plan, weights)
    first = torch.autograd.grad(out.sum(), weights, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.sum(), weights)[0])
    rows = permute(torch.randn(9, 6), plan)
    assert not rows.requires_grad


def test_no_token_and_experts_without_tokens_work():
    plan = plan_permutation(torch.empty(0, 2, dtype=torch.int64), 4, 16)
    x = torch.randn(0, 8, requires_grad=True)
    out = unpermute(permute(x, plan), plan)
    assert out.shape == (0, 8)
    out.sum().backward()
    one = plan_permutation(torch.full((5, 1), 3), 64, 16)
    assert one.m_splits.tolist() == [0, 0, 0, 16] + [0] * 60


@pytest.mark.parametrize(
    ("experts", "match"),
    [
        (torch.tensor([[0, 4]]), "from 0 to 3; got 0 to 4"),
        (torch.tensor([[-1, 2]]), "got -1 to 2"),
        (torch.tensor([0, 1]), r"shape \(T, k\)"),
        (torch.tensor([[0.0]]), "whole numbers"),
        (torch.empty(4, 0, dtype=torch.int64), "k 1 or more"),
    ],
)
def test_wrong_experts_are_refused(experts, match):
    with pytest.raises(ValueError, match=match):
        plan_permutation(experts, 4, 16)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("num_experts", [3, 256])
def test_experts_may_be_any_whole_numbers(dtype, num_experts):
    experts = torch.tensor([[2, 1], [0, 2]])  # as many copies as there are entries of a mask for three experts
    wanted, plan = (plan_permutation(x, num_experts, 4) for x in (experts, experts.to(dtype)))
    assert torch.equal(plan.rows, wanted.rows) and torch.equal(plan.tokens, wanted.tokens)
    assert torch.equal(plan.m_splits, wanted.m_splits) and torch.equal(plan.num_tokens_of, wanted.num_tokens_of)


def test_tensors_of_another_plan_are_refused():
    plan = plan_permutation(routed(9, 4, 2), 4, 8)
    with pytest.raises(ValueError, match=r"permute takes \(9, H\)"):
        permute(torch.randn(8, 3), plan)
    with pytest.raises(ValueError, match="unpermute takes"):
        unpermute(torch.randn(8, 3), plan)
    with pytest.raises(ValueError, match="one for each copy"):
        unpermute(torch.randn(plan.num_rows, 3), plan, torch.rand(9, 1))


# --- rows that are sorted already ------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), rest=st.integers(0, 3), on_device=st.booleans())
def test_padding_puts_zeros_behind_each_split_and_unpadding_takes_them_out(sizes, rest, on_device):
    num_rows = sum(sizes) + rest
    x = torch.arange(1.0, num_rows + 1)[:, None].requires_grad_()
    splits = torch.tensor(sizes) if on_device else sizes
    padded, m_splits = pad_rows(x, splits, 4)
    assert isinstance(m_splits, Tensor) == on_device
    expected, row = [], 0
    for size in sizes:
        expected += [float(i + 1) for i in range(row, row + size)] + [0.0] * (-size % 4)
        row += size
    expected += [float(i + 1) for i in range(row, num_rows)]
    assert list(m_splits) == [size + -size % 4 for size in sizes]
    assert padded[: len(expected), 0].tolist() == expected
    assert not padded[len(expected) :].any()
    assert on_device or padded.shape[0] == len(expected)
    back = unpad_rows(padded, splits, 4, num_rows)
    assert torch.equal(back, x)
    back.backward(back.detach())
    assert torch.equal(x.grad, x)


def test_unpadding_takes_the_number_of_rows_from_sizes_on_the_host():
    x = torch.randn(7, 3)
    assert torch.equal(unpad_rows(pad_rows(x, [3, 4], 16)[0], [3, 4], 16), x)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most the 3 rows"):
        pad_rows(torch.randn(3, 2), [2, 2], 16)
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        pad_rows(torch.randn(3, 2), [-1, 4], 16)
    with pytest.raises(ValueError, match="alignment"):
        pad_rows(torch.randn(3, 2), [3], 0)
