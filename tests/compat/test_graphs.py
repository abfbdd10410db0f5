"""`make_graphed_callables` by its name there: what cannot be honoured is refused or warned of, and the rest goes on."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import lighterage
import lighterage.compat.transformer_engine as te

X = torch.zeros(4, 4)


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches our own function, and the recipe that a module would use there."""
    seen: list[dict[str, Any]] = []

    def note(modules: Any, sample_args: Any, **options: Any) -> Any:
        linear = te.Linear(4, 4)
        seen.append({"modules": modules, **options, "recipe": linear._region.now(linear)})
        return modules

    monkeypatch.setattr(lighterage, "make_graphed_callables", note)
    return seen


def test_arguments_are_handed_on_inside_the_region(handed_on: list[dict[str, Any]]) -> None:
    module, recipe = nn.Linear(4, 4), te.recipe.Float8BlockScaling()
    assert te.make_graphed_callables(module, (X,), 5, True, enabled=True, recipe=recipe) is module
    te.make_graphed_callables(module, (X,), fp8_enabled=(True,), fp8_recipe=recipe)
    te.make_graphed_callables(module, (X,))
    assert [one["recipe"] for one in handed_on] == [recipe, recipe, None]
    assert handed_on[0]["num_warmup_iters"] == 5 and handed_on[0]["allow_unused_input"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_kwargs": {"x": X}}, "Pass tensors by position"),
        ({"sample_kwargs": ({}, {"x": X})}, "Pass tensors by position"),
        ({"_order": [1, -1]}, "for each microbatch in flight"),
        ({"retain_graph_in_backward": True}, "run each backward once"),
        ({"_reuse_graph_input_output_buffers": True}, "for each microbatch in flight"),
        ({"enabled": (True, False)}, "Call make_graphed_callables once for each kind"),
        ({"enabled": True}, "autocast needs a recipe"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        te.make_graphed_callables(nn.Linear(4, 4), (X,), **options)


@pytest.mark.parametrize("nothing", [{}, ({}, {}), [{}]])
def test_keywords_that_name_nothing_are_taken(nothing: Any, handed_on: list[dict[str, Any]]) -> None:
    te.make_graphed_callables(nn.Linear(4, 4), (X,), sample_kwargs=nothing)
    assert len(handed_on) == 1


@pytest.mark.parametrize("name", ["cache_quantized_params", "fp8_weight_caching", "calibrating", "fp8_calibrating"])
def test_what_has_no_effect_is_warned_of(name: str, handed_on: list[dict[str, Any]]) -> None:
    with pytest.warns(te.NotHonoured):
        te.make_graphed_callables(nn.Linear(4, 4), (X,), **{name: True})
    assert len(handed_on) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_it_says_so() -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(lighterage.GraphError, match="needs a CUDA device"))
        te.make_graphed_callables(nn.Linear(4, 4), (X,))
