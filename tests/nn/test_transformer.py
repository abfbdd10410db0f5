"""Decoder layers: the same bits with offload in every recipe: checkpointed, compiled, over microbatches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lighterage.nn import GatedMLP, MoE, TransformerBlock
from tests.engine.twin import compare, identity, layers_of, stood_aside
from tests.nn.layers import BATCH, RECIPES, TOKENS, WIDTH, Stack, dense, loss_of, sparse, train_step

all_recipes = pytest.mark.parametrize("name", RECIPES)
both = pytest.mark.parametrize("kind", [dense, sparse], ids=["dense", "moe"])
POLICY = {"min_bytes": 1024, "keep_last": 1, "step": train_step}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Checkpointed(Stack):
    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, x, use_reentrant=False)
        return out


class Reentrant(Stack):
    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, x, use_reentrant=True)
        return out


@all_recipes
@both
def test_same_bits_each_buffer_one_copy(name, kind):
    run = compare(lambda: Stack(kind(RECIPES[name]), RECIPES[name]), **POLICY)
    assert run.total.still_alive_bytes == 0
    assert run.total.copies_in == run.total.copies_out


@all_recipes
@pytest.mark.parametrize("model", [Checkpointed, Reentrant])
def test_same_bits_when_layers_are_checkpointed(name, model):
    """The random roundings of NVFP4 are drawn again with the seed that the first forward had."""
    recipe = RECIPES[name]
    run = compare(lambda: model(sparse(recipe), recipe), given=identity, **POLICY)
    assert stood_aside(run.report, "checkpoint" if model is Checkpointed else "backward") > 0


@all_recipes
def test_checkpointing_changes_no_bit(name):
    recipe = RECIPES[name]
    found = []
    for model in (Stack, Checkpointed, Reentrant):
        torch.manual_seed(0)
        made = model(sparse(recipe), recipe)
        torch.manual_seed(1)
        loss = train_step(made, 0)
        found.append([loss, *(p.grad for p in made.parameters())])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


# Quantized layers end a graph where they are called, and compile what is between them.
# The compiler itself makes an object of each autograd Function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["none", "fp8_block", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_same_bits_when_layers_are_compiled(name):
    def compiled(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        for layer in layers_of(model):
            layer.compile(backend="aot_eager")
        return model

    recipe = RECIPES[name]
    compare(lambda: Stack(sparse(recipe), recipe, num_layers=2), after=compiled, **POLICY)


@all_recipes
def test_same_bits_over_microbatches(name):
    """Two forwards before their backwards, which run in the order of the forwards, and gradients that add up."""

    def step(model: nn.Module, seed: int) -> Tensor:
        losses = [loss_of(model, 10 * seed + part) for part in range(2)]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).detach()

    recipe = RECIPES[name]
    compare(lambda: Stack(sparse(recipe), recipe), **(POLICY | {"step": step}))


@all_recipes
@both
def test_same_bits_under_autocast(name, kind):
    def step(model: nn.Module, seed: int) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, seed)
        loss.backward()
        return loss.detach()

    recipe = RECIPES[name]
    compare(lambda: Stack(kind(recipe), recipe).float(), **(POLICY | {"step": step}))


def test_gradients_are_those_of_the_loss_and_the_auxiliary_losses_of_all_layers():
    torch.manual_seed(0)
    moes = [MoE(WIDTH, 32, 4, 2, balance_weight=0.3, z_weight=0.1) for _ in range(2)]
    model = nn.Sequential(*(TransformerBlock(WIDTH, 4, moe) for moe in moes))
    x = torch.randn(BATCH, TOKENS, WIDTH)
    found = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    total = torch.zeros(())
    for block in model:
        x = x + block.attention(block.attention_norm(x))
        hidden, aux_loss = block.feed_forward(block.feed_forward_norm(x))
        x, total = x + hidden, total + aux_loss
    wanted = torch.autograd.grad(x.square().mean() + total, list(model.parameters()))
    for grad, by_hand in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, by_hand, atol=1e-6, rtol=1e-4)


def test_packed_sequences_reach_attention():
    torch.manual_seed(0)
    block = TransformerBlock(WIDTH, 4, GatedMLP(WIDTH, 96))
    x = torch.randn(1, 12, WIDTH)
    out = block(x[0], cu_seqlens=torch.tensor([0, 5, 12]), max_seqlen=7)
    torch.testing.assert_close(out, torch.cat([block(x[:, :5]), block(x[:, 5:])], dim=1)[0], atol=1e-5, rtol=1e-4)


def test_any_module_may_stand_behind_attention():
    block = TransformerBlock(WIDTH, 4, nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)))
    assert block(torch.randn(1, 3, WIDTH)).shape == (1, 3, WIDTH)


def test_evaluation_saves_nothing():
    model = Stack(sparse(None), None)
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        partial(loss_of, model)(0)
    assert not saved
