"""A mixture of experts: the sum of its experts, whatever falls to each, with the same bits when offloaded."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lighterage
from lighterage.nn import GatedMLP, MoE
from lighterage.ops import load_balancing_loss, route, router_z_loss
from tests.nn.layers import RECIPES

all_recipes = pytest.mark.parametrize("name", RECIPES)
H, FFN = 64, 32


def made(
    name: str = "none", num_experts: int = 4, top_k: int = 2, dtype: torch.dtype = torch.bfloat16, **options
) -> MoE:
    torch.manual_seed(0)
    return MoE(H, FFN, num_experts, top_k, recipe=RECIPES[name], dtype=dtype, **options)


def one_by_one(moe: MoE, x: Tensor) -> Tensor:
    """Each token through each of its experts, one after another."""
    routing = route(x.float() @ moe.router.float().t(), moe.top_k, score=moe.score, normalize=moe.normalize)
    rows = []
    for token, experts, weights in zip(x, routing.experts, routing.weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(experts.tolist(), weights, strict=True):
            gate, up = (moe.w1[expert] @ token).chunk(2)
            total = total + weight * (moe.w2[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_is_the_weighted_sum_of_each_tokens_experts_with_its_gradients(score, normalize):
    moe = made(dtype=torch.float32, score=score, normalize=normalize, balance_weight=0.0)
    x = torch.randn(21, H, requires_grad=True)
    toward = torch.randn(21, H)
    inputs = [x, *moe.parameters()]
    out, aux_loss = moe(x)
    wanted = one_by_one(moe, x)
    assert aux_loss.item() == 0
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-4)
    found = torch.autograd.grad((out * toward).sum(), inputs)
    for grad, by_hand in zip(found, torch.autograd.grad((wanted * toward).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, by_hand, atol=1e-5, rtol=1e-3)


@all_recipes
def test_every_recipe_is_near_the_sum(name):
    moe = made(name)
    x = torch.randn(48, H).bfloat16()
    wanted = one_by_one(copy.deepcopy(moe).float(), x.float())
    far = (moe(x).hidden.float() - wanted).norm() / wanted.norm()
    assert far < {"none": 0.01, "nvfp4": 0.3}.get(name, 0.08)


def test_the_auxiliary_loss_is_the_weighted_sum_of_its_terms():
    moe = made(dtype=torch.float32, balance_weight=0.5, z_weight=0.25)
    x = torch.randn(2, 20, H)
    logits = x.flatten(0, 1) @ moe.router.t()
    routing = route(logits, 2)
    counts = torch.bincount(routing.experts.flatten(), minlength=4)
    wanted = 0.5 * load_balancing_loss(routing.scores, counts) + 0.25 * router_z_loss(logits)
    out = moe(x)
    torch.testing.assert_close(out.aux_loss, wanted)
    assert out.hidden.shape == x.shape
    out.aux_loss.backward()
    assert moe.router.grad is not None and moe.router.grad.abs().sum() > 0


def test_a_shared_expert_sees_every_token():
    moe = made(shared_ffn_size=48)
    x = torch.randn(32, H).bfloat16()
    with_shared = moe(x).hidden
    shared, moe.shared = moe.shared, None
    assert shared is not None
    torch.testing.assert_close(with_shared, moe(x).hidden + shared(x))


@all_recipes
@pytest.mark.parametrize("num_experts", [1, 4, 64])
def test_same_bits_with_offload_whatever_falls_to_each_expert(name, num_experts):
    """Some experts of 64 have no token; the splits of the second step are others; one buffer is one copy."""
    moe = made(name, num_experts, min(2, num_experts))
    inputs = [torch.randn(64, H, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3)]

    def step(x: Tensor, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        x = x.clone().requires_grad_()
        out = moe(x * 1)
        (out.hidden.float().square().sum() + out.aux_loss).backward()
        found = [out.hidden.detach(), x.grad, *(parameter.grad for parameter in moe.parameters())]
        moe.zero_grad()
        return found

    wanted = [step(x, seed) for seed, x in enumerate(inputs)]
    with lighterage.offload([moe], keep_last=0, min_bytes=1024, release_after=0) as offloader:
        for seed, x in enumerate(inputs):
            assert all(torch.equal(a, b) for a, b in zip(step(x, seed), wanted[seed], strict=True))
            stats = offloader.stats()
            assert stats.bytes_in == stats.bytes_out > 0
            assert stats.copies_out == stats.copies_in <= 8
            assert stats.still_alive_bytes == 0


@all_recipes
def test_all_tokens_to_one_expert_and_none_at_all(name):
    moe = made(name, num_experts=8, top_k=1)
    with torch.no_grad():
        moe.router.zero_()
    for num_tokens in (33, 1, 0):
        x = torch.randn(num_tokens, H, dtype=torch.bfloat16, requires_grad=True)
        moe(x).hidden.float().square().sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
        assert moe.w1.grad is not None
        assert not moe.w1.grad[1:].any(), "ties go to expert 0"
        assert bool(moe.w1.grad[0].any()) == (num_tokens > 0)
        moe.zero_grad()


@all_recipes
def test_what_is_saved_does_not_grow_with_the_number_of_experts_but_for_padding(name):
    saves = []
    for num_experts in (4, 32):
        moe = made(name, num_experts)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            moe(torch.randn(64, H, dtype=torch.bfloat16, requires_grad=True))
        saves.append(len(saved))
    assert saves[0] == saves[1]


# Not NVFP4: which random bits round a gradient depends on the directions that are wanted.
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "nvfp4"])
def test_frozen_experts_still_pass_gradients_on(name):
    moe = made(name)
    wanted, x = None, torch.randn(32, H, dtype=torch.bfloat16, requires_grad=True)
    for frozen in (False, True):
        moe.w1.requires_grad_(not frozen)
        moe.w2.requires_grad_(not frozen)
        torch.manual_seed(1)
        (grad,) = torch.autograd.grad(moe(x).hidden.float().square().sum(), x)
        wanted = grad if wanted is None else wanted
        assert torch.equal(grad, wanted)


@all_recipes
@pytest.mark.parametrize("num_tokens", [1, 31, 64])
def test_a_gated_network_takes_any_number_of_tokens(name, num_tokens):
    torch.manual_seed(0)
    network = GatedMLP(H, 96, recipe=RECIPES[name], dtype=torch.bfloat16)
    x = torch.randn(2, num_tokens, H, dtype=torch.bfloat16, requires_grad=True)
    y = network(x)
    gate, up = (x.float() @ network.w1.float().t()).chunk(2, dim=-1)
    wanted = (F.silu(gate) * up) @ network.w2.float().t()
    assert y.shape == x.shape
    assert (y.float() - wanted).norm() / wanted.norm() < {"none": 0.01, "nvfp4": 0.3}.get(name, 0.08)
    y.float().sum().backward()
    assert x.grad is not None


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="from 1 to the 4 experts"):
        MoE(H, FFN, 4, 5)
