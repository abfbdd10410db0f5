"""`GroupedLinear`: its parameters, in both forms, and that they are used where they lie."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from lighterage.formats.splits import Splits
from lighterage.nn import GroupedLinear
from lighterage.ops.stacking import are_side_by_side
from tests.ops import recipe_cases as cases
from tests.ops.recipe_cases import RECIPES, check_offload, ragged, same_bits

K, N = 32, 64
SPLITS = [32, 0, 64]
bf16 = torch.bfloat16


def _weights(layer: GroupedLinear) -> list[nn.Parameter]:
    return [getattr(layer, f"weight{index}") for index in range(layer.num_gemms)]


def _train(layer: GroupedLinear, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    y = layer(x, SPLITS)
    y.backward(torch.ones_like(y))
    return [y.detach(), *cases.gradients(layer.parameters())]


def test_both_forms_of_the_state_dict() -> None:
    stacked = GroupedLinear(3, K, N).state_dict()
    assert {name: tuple(value.shape) for name, value in stacked.items()} == {"weight": (3, N, K), "bias": (3, N)}
    separate = GroupedLinear(3, K, N, single_weight=False).state_dict()
    assert list(separate) == ["weight0", "weight1", "weight2", "bias0", "bias1", "bias2"]
    assert separate["weight1"].shape == (N, K) and separate["bias2"].shape == (N,)
    assert list(GroupedLinear(2, K, N, bias=False).state_dict()) == ["weight"]
    assert list(GroupedLinear(2, K, N, bias=False, single_weight=False).state_dict()) == ["weight0", "weight1"]


@pytest.mark.parametrize("name", RECIPES)
def test_both_forms_give_the_same_bits(name: str) -> None:
    stacked = GroupedLinear(3, K, N, recipe=RECIPES[name], dtype=bf16)
    separate = GroupedLinear(3, K, N, recipe=RECIPES[name], dtype=bf16, single_weight=False)
    for index in range(3):
        getattr(separate, f"weight{index}").data.copy_(stacked.weight[index])
        getattr(separate, f"bias{index}").data.copy_(stacked.bias[index])
    x = torch.randn(96, K).to(bf16)
    y, dw, db = _train(stacked, x)
    other_y, *rest = _train(separate, x)
    assert same_bits(y, other_y)
    assert same_bits(dw, torch.stack(rest[:3])) and same_bits(db, torch.stack(rest[3:]))


@pytest.mark.parametrize("single_weight", [True, False])
@pytest.mark.parametrize("num_gemms", [1, 4, 64])
def test_under_offload_one_copy_a_layer_and_the_same_bits(num_gemms: int, single_weight: bool) -> None:
    layers = nn.ModuleList(
        GroupedLinear(num_gemms, K, K, recipe=RECIPES["fp8_block"], dtype=bf16, single_weight=single_weight)
        for _ in range(2)
    )
    splits = ragged(num_gemms, num_gemms + 3)
    x = torch.randn(sum(splits), K).to(bf16).requires_grad_()

    def run(layers: nn.ModuleList) -> torch.Tensor:
        y = x.clone()
        for layer in layers:
            y = layer(y, splits)
        return y.float().square().mean()

    check_offload(layers, partial(run, layers), [x, *layers.parameters()], copies=2)


def test_without_a_recipe_separate_weights_stay_where_they_are() -> None:
    layers = nn.ModuleList([GroupedLinear(4, K, K, dtype=bf16, single_weight=False)])
    x = torch.randn(128, K).to(bf16).requires_grad_()

    def run() -> torch.Tensor:
        y: torch.Tensor = layers[0](x.clone(), [32, 32, 32, 32])
        return y.float().square().mean()

    assert check_offload(layers, run, [x, *layers.parameters()], copies=1).bytes_out == x.nbytes


def test_separate_parameters_lie_side_by_side_after_whatever_a_module_goes_through() -> None:
    layer = GroupedLinear(3, K, N, single_weight=False)
    assert are_side_by_side(_weights(layer))
    same = _weights(layer)
    layer.to(torch.float64).to(bf16)
    assert are_side_by_side(_weights(layer)) and [id(p) for p in same] == [id(p) for p in _weights(layer)]
    assert are_side_by_side(_weights(copy.deepcopy(layer)))
    layer.load_state_dict(GroupedLinear(3, K, N, single_weight=False).state_dict())
    assert are_side_by_side(_weights(layer))
    x = torch.randn(96, K).to(bf16)
    wanted = _train(layer, x)
    layer.weight1.data = layer.weight1.data.clone()
    assert not are_side_by_side(_weights(layer))
    assert all(same_bits(a, b) for a, b in zip(_train(layer, x), wanted, strict=True)), "only the speed depends on it"
    assert are_side_by_side(_weights(layer.pack_parameters()))


def test_an_optimizer_step_keeps_them_side_by_side() -> None:
    layer = GroupedLinear(3, K, N, recipe=RECIPES["fp8_block"], dtype=bf16, single_weight=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    before = layer.weight0.detach().clone()
    layer(torch.randn(96, K).to(bf16), SPLITS).sum().backward()
    optimizer.step()
    assert are_side_by_side(_weights(layer)) and not torch.equal(before, layer.weight0)


@pytest.mark.parametrize("single_weight", [True, False])
def test_weights_may_be_pruned_or_made_of_others(single_weight: bool) -> None:
    layer, x = GroupedLinear(2, K, N, single_weight=single_weight), torch.randn(64, K)
    name = "weight" if single_weight else "weight1"
    parametrize.register_parametrization(layer, name, nn.Tanh())
    prune.l1_unstructured(layer, "bias" if single_weight else "bias1", amount=0.5)
    y = layer.double().float()(x, [32, 32])  # casts pack what is there to be packed
    weight, bias = (getattr(layer, name)[1] if single_weight else getattr(layer, name) for name in _last(layer))
    assert torch.allclose(y[32:], x[32:] @ weight.t() + bias, atol=1e-6)
    y.sum().backward()
    assert getattr(layer.parametrizations, name).original.grad.any()


def _last(layer: GroupedLinear) -> tuple[str, str]:
    return ("weight", "bias") if layer.single_weight else ("weight1", "bias1")


def test_splits_are_integers_a_tensor_or_splits() -> None:
    layer = GroupedLinear(3, K, N, recipe=RECIPES["fp8_block"], dtype=bf16)
    x = torch.randn(96, K).to(bf16)
    wanted = layer(x, SPLITS)
    for splits in (torch.tensor(SPLITS), torch.tensor(SPLITS, dtype=torch.int32), Splits.of(SPLITS, 96, x.device)):
        assert torch.equal(layer(x, splits), wanted)


def test_wrong_use_is_told() -> None:
    with pytest.raises(ValueError, match="num_gemms"):
        GroupedLinear(0, K, N)
    with pytest.raises(TypeError, match="recipe"):
        GroupedLinear(2, K, N, recipe="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="each of the 2 experts"):
        GroupedLinear(2, K, N)(torch.randn(4, K), [1, 1, 2])


def test_it_shows_what_it_is() -> None:
    assert "num_gemms=3, in_features=32, out_features=64, bias=True" in repr(GroupedLinear(3, K, N))
