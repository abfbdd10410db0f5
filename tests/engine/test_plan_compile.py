"""Plans beside torch.compile: the same bits, compiled once, and nothing compiled is computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lighterage
from tests.engine.test_compile import make_clean
from tests.engine.twin import assert_same, layers_of, train, train_step

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

STEPS = 9


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def each_layer(model: nn.Module) -> nn.Module:
    for layer in layers_of(model):
        layer.compile(backend="aot_eager", fullgraph=True)
    return model


def whole_model(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


@pytest.mark.parametrize("prepare", [each_layer, whole_model])
@pytest.mark.parametrize("before", [True, False], ids=["compile then offload", "offload then compile"])
def test_compiled_layers_are_planned_for_with_the_same_bits_and_compiled_once(
    prepare: Callable[[nn.Module], nn.Module], before: bool
) -> None:
    torch.manual_seed(0)
    plain = make_clean()
    model = copy.deepcopy(plain)
    expected = train(prepare(plain), train_step, plain, STEPS)
    torch._dynamo.reset()
    prepared = prepare(model) if before else model
    with lighterage.offload(layers_of(model), min_bytes=64, tier="host", max_slowdown=5.0) as offloader:
        prepared = prepared if before else prepare(model)
        got = train(prepared, train_step, model, 1)
        graphs = counters["stats"]["unique_graphs"]
        rest = train(prepared, lambda m, seed: train_step(m, seed + 1), model, STEPS - 1)
        assert counters["stats"]["unique_graphs"] == graphs
        timeline = offloader.timeline
        assert offloader.plan is not None
        assert offloader.stats().bytes_out > 0
    assert timeline is not None
    assert {s.not_recomputed for s in timeline.sections} == {"it is compiled"}
    got.losses += rest.losses
    got.grads += rest.grads
    got.state = rest.state
    assert_same(expected, got)
