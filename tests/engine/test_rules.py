"""Rules that match none of the modules are told where they are written, not some steps later."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lighterage
from lighterage.engine.rules import check_rules


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))


def test_a_misspelt_rule_is_told_at_the_call_with_what_was_meant() -> None:
    with pytest.warns(UserWarning, match=r"no section or module inside one has a name like '\*\.mpl'") as told:
        lighterage.offload(Model().layers, rules=[("*.mpl", "offload")]).close()
    (warning,) = told
    text = str(warning.message)
    assert "Perhaps '*.mlp' was meant." in text
    assert "Block.0, Block.0.norm, Block.0.mlp, Block.0.mlp.0, Block.0.mlp.1, Block.1, Block.1.norm" in text
    assert "and 7 more" in text and "offloader.section()" in text
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "pattern",
    ["*", "Block.1", "Block.*", "*.mlp", "*.mlp.0", "Block.[02].norm", "*.norm*"],
)
@pytest.mark.parametrize("more", [(), ("(8192, *) bfloat16",)], ids=["plain", "by shape"])
def test_a_rule_that_matches_a_name_is_taken_in_silence(pattern: str, more: tuple[str, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lighterage.offload(Model().layers, rules=[(pattern, "keep", *more)]).close()


def test_of_a_whole_model_what_is_saved_between_its_sections_has_names_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pattern in ("layers.2", "layers.*.mlp", "Model, before layers.0", "Model, after layers.2", "Model, *"):
            lighterage.offload(Model(), rules=[(pattern, "keep")]).close()
    with pytest.warns(UserWarning, match="Perhaps 'layers.1.norm' was meant"):
        lighterage.offload(Model(), rules=[("layer.1.norm", "keep")]).close()


def test_a_shape_does_not_save_a_rule_whose_pattern_matches_nothing() -> None:
    with pytest.warns(UserWarning, match=r"'\*\.attention'.*'\(8, 8\) float32'"):
        lighterage.offload(Model().layers, rules=[("*.attention", "keep", "(8, 8) float32")]).close()


@pytest.mark.parametrize(("pattern", "meant"), [("Blok.1", "Block.1"), ("*.mlp", None), ("encoder", None)])
def test_what_cannot_be_computed_again_is_refused_at_the_call(pattern: str, meant: str | None) -> None:
    """Sections that code opens, and parts of sections, are never computed again: nothing can match it later."""
    layers = Model().layers
    classes = [type(layer) for layer in layers]
    with pytest.raises(ValueError, match="no section has a name like") as refused:
        lighterage.offload(layers, rules=[(pattern, "recompute")])
    assert [type(layer) for layer in layers] == classes, "nothing was attached"
    assert "The sections are: Block.0, Block.1, Block.2." in str(refused.value)
    assert ("Perhaps" in str(refused.value)) == (meant is not None)
    assert meant is None or f"Perhaps {meant!r} was meant" in str(refused.value)
    lighterage.offload(layers, rules=[("Block.[01]", "recompute")]).close()


def test_a_rule_for_a_section_of_the_users_own_binds_it_after_the_warning() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="a section that your code opens"):
        offloader = lighterage.offload(
            Model().layers, rules=[("mine", "offload")], max_slowdown=50.0, min_bytes=64, tier="host"
        )
    with offloader:
        for _ in range(8):
            with offloader.section("mine"):
                y = (weight @ weight).sigmoid() * weight
            y.square().sum().backward()
        assert offloader.plan is not None and offloader.plan.num_moves > 0


def test_without_rules_no_name_is_looked_at() -> None:
    check_rules(lighterage.Policy(), None, stacklevel=1)  # type: ignore[arg-type]
