"""`Linear` in place of PyTorch's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lighterage.nn import GatedMLP, GroupedLinear, Linear, MoE
from lighterage.recipes import Float8BlockScaling, Float8CurrentScaling


def test_a_state_dict_fits_both_ways() -> None:
    ours, theirs = Linear(16, 32), nn.Linear(16, 32)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
    assert Linear(16, 32, bias=False).state_dict().keys() == nn.Linear(16, 32, bias=False).state_dict().keys()


def test_parameters_begin_within_the_bound_of_torchs() -> None:
    layer = Linear(100, 50)
    for parameter in layer.parameters():
        assert 0.05 < parameter.abs().max() <= 0.1


@pytest.mark.parametrize("recipe", [None, Float8BlockScaling(), Float8CurrentScaling()])
def test_it_trains(recipe: object) -> None:
    layer = Linear(32, 32, recipe=recipe, dtype=torch.bfloat16)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x = torch.randn(64, 32).to(torch.bfloat16)
    losses = []
    for _ in range(20):
        loss = (layer(x) - x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_copies_and_pickles_keep_the_recipe() -> None:
    layer = Linear(16, 16, recipe=Float8BlockScaling(power_of_2_scale=False), dtype=torch.bfloat16)
    x = torch.randn(16, 16).to(torch.bfloat16)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.recipe == layer.recipe and torch.equal(other(x), layer(x))
    assert "Float8BlockScaling(power_of_2_scale=False" in repr(layer)


def test_a_wrong_recipe_is_told_when_the_layer_is_made() -> None:
    with pytest.raises(TypeError, match="recipe"):
        Linear(16, 16, recipe="fp8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="bias must be True or False"):
        Linear(16, 16, bias="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda r: Linear(60, 64, recipe=r),
        lambda r: GroupedLinear(2, 64, 60, recipe=r),
        lambda r: GatedMLP(64, 60, recipe=r),
        lambda r: MoE(60, 64, 4, 2, recipe=r),
    ],
)
def test_a_width_that_the_recipe_cannot_have_is_refused_when_the_layer_is_made(make):
    with pytest.raises(ValueError, match=r"needs input and output features divisible by 16; got .*60"):
        make(Float8BlockScaling())
