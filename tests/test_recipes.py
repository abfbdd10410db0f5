"""Recipes: which quantizer each operand gets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lighterage import formats, recipes
from lighterage.recipes import Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling, NVFP4BlockScaling

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
ALL = (Float8BlockScaling(), MXFP8BlockScaling(), NVFP4BlockScaling(), Float8CurrentScaling())


def _of(recipe: recipes.Recipe, role: recipes.Role) -> dict[str, object]:
    return vars(recipe.quantizer(role, rowwise=True, columnwise=False, seed=1))


def test_fp8_blocks_are_rows_for_tokens_and_squares_for_weights() -> None:
    recipe = Float8BlockScaling()
    for role, dim in (("input", 1), ("weight", 2), ("grad", 1)):
        found = _of(recipe, role)  # type: ignore[arg-type]
        assert (found["block_scaling_dim"], found["fp8_dtype"], found["power_of_2_scale"]) == (dim, E4M3, True)
    changed = _of(Float8BlockScaling(power_of_2_scale=False, amax_epsilon=0.5), "weight")
    assert (changed["power_of_2_scale"], changed["amax_epsilon"]) == (False, 0.5)


def test_mxfp8_is_e4m3_throughout() -> None:
    for role in ("input", "weight", "grad"):
        assert _of(MXFP8BlockScaling(), role)["fp8_dtype"] == E4M3  # type: ignore[arg-type]


def test_nvfp4_transforms_tokens_squares_weights_and_rounds_gradients_at_random() -> None:
    table = {
        "input": (True, False, False),
        "weight": (False, True, False),
        "grad": (True, False, True),
    }
    for role, wanted in table.items():
        found = _of(NVFP4BlockScaling(), role)  # type: ignore[arg-type]
        assert (found["with_rht"], found["with_2d_quantization"], found["stochastic_rounding"]) == wanted
    plain = NVFP4BlockScaling(random_hadamard_transform=False, stochastic_rounding=False)
    assert plain.draw_seed() is None
    assert not _of(plain, "grad")["with_rht"] and not _of(plain, "grad")["stochastic_rounding"]


def test_per_tensor_scaling_has_wide_gradients_unless_told() -> None:
    assert [_of(Float8CurrentScaling(), role)["fp8_dtype"] for role in ("input", "weight", "grad")] == [
        E4M3,
        E4M3,
        E5M2,
    ]  # type: ignore[arg-type]
    assert _of(Float8CurrentScaling(fp8_format="e4m3"), "grad")["fp8_dtype"] == E4M3


def test_a_seed_gives_the_same_roundings() -> None:
    recipe = NVFP4BlockScaling()
    x = torch.randn(32, 32).to(torch.bfloat16)

    def codes(seed: int) -> torch.Tensor:
        tensor = recipe.quantizer("grad", rowwise=True, columnwise=False, seed=seed)(x)
        assert isinstance(tensor, formats.NVFP4Tensor) and tensor.rowwise_data is not None
        return tensor.rowwise_data

    assert torch.equal(codes(1), codes(1)) and not torch.equal(codes(1), codes(2))
    with pytest.raises(ValueError, match="seed"):
        recipe.quantizer("grad", rowwise=True, columnwise=False)


def test_a_seed_is_drawn_from_the_default_generator() -> None:
    torch.manual_seed(7)
    first = NVFP4BlockScaling().draw_seed()
    torch.manual_seed(7)
    assert NVFP4BlockScaling().draw_seed() == first != NVFP4BlockScaling().draw_seed()


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_recipes_are_values(recipe: recipes.Recipe) -> None:
    assert recipe == type(recipe)() and hash(recipe) == hash(type(recipe)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.alignment = 1  # type: ignore[misc]
    assert recipe.alignment % recipe.row_multiple == 0
    assert recipes.alignment_of(recipe) == recipe.alignment and recipes.alignment_of(None) == 1
    for columnwise in (False, True):
        quantizer = recipe.quantizer("input", rowwise=True, columnwise=columnwise)
        assert (quantizer.rowwise, quantizer.columnwise) == (True, columnwise)
    with pytest.raises(ValueError, match="role"):
        recipe.quantizer("output", rowwise=True, columnwise=True)  # type: ignore[arg-type]


def test_wrong_fields_are_told() -> None:
    with pytest.raises(ValueError, match="amax_epsilon"):
        Float8BlockScaling(amax_epsilon=-1.0)
    with pytest.raises(ValueError, match="fp8_format"):
        Float8CurrentScaling(fp8_format="e5m2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Float8BlockScaling"):
        recipes.check_recipe(Float8BlockScaling)
