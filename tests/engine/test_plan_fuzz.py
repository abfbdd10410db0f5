"""Laws 1 and 2 under plans: whatever a plan says, the bits are those of the run without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lighterage
from lighterage.engine.planning import measurements
from lighterage.engine.traffic import GATHER_BYTES
from lighterage.planner.plan import Plan
from lighterage.planner.timeline import Timeline
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, measured, random_plan, train

WIDTH = 32


class Attention(nn.Module):
    """Attention, products, dropout and views; saves inputs, outputs and masks."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(x.shape[0], x.shape[1], 3, 4, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(x.shape)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return x + self.drop(self.down(F.silu(gate) * up))


class Model(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x).sin()


def inputs(num: int = 1, rows: int = 16) -> list[Tensor]:
    return [torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(num)]


def models(layers: int = 4) -> tuple[Model, Model]:
    torch.manual_seed(0)
    model = Model(layers)
    return model, copy.deepcopy(model)


@pytest.fixture(autouse=True, scope="module", params=["derived", "run again"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The two ways of computing a section again selectively."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "run again":
            patch.setattr(measurements, "derives_enough", lambda section: False)
        yield


@pytest.fixture(autouse=True, params=[2500, GATHER_BYTES], ids=["large", "small"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of what is large start as it is saved, those of what is small together."""
    monkeypatch.setattr("lighterage.engine.traffic.GATHER_BYTES", request.param)


@pytest.fixture(scope="module", params=["layers", "model"])
def case(request: pytest.FixtureRequest, way: None) -> tuple[str, Timeline]:
    model, _ = models()
    given = model.layers if request.param == "layers" else model
    timeline = measured(model, given, inputs(), recompute="auto")
    assert all(section.gap or section.not_recomputed is None for section in timeline.sections)
    return request.param, timeline


def under(
    plan: Plan,
    timeline: Timeline,
    given: str,
    *,
    num: int = 1,
    rows: int = 16,
    layers: int = 4,
    learn: bool = False,
) -> int:
    """The bytes that moved while `plan` was carried out."""
    plain, model = models(layers)
    expected = train(plain, inputs(num, rows), 3)
    with lighterage.offload(model.layers if given == "layers" else model, min_bytes=64, tier="host") as offloader:
        if learn:
            train(model, inputs(), STEPS_TO_PLAN)
        offloader.use_plan(plan, timeline)
        assert_equal(expected, train(model, inputs(num, rows), 3))
        stats = offloader.stats(total=True)
        assert offloader.sections == []
        assert offloader.stats().host_bytes_in_use == 0
    return stats.bytes_out


@pytest.mark.parametrize("seed", range(12))
def test_any_plan_gives_the_same_bits(case: tuple[str, Timeline], seed: int) -> None:
    given, timeline = case
    plan = random_plan(timeline, seed)
    saved = [{a.save for a in s.allocations} for s in timeline.sections]
    moved = under(plan, timeline, given, learn=seed % 2 == 0)
    if any(s.mode == "save" and saved[i] & {m.save for m in s.moves} for i, s in enumerate(plan.sections)):
        assert moved > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_of_another_model_gives_the_same_bits(case: tuple[str, Timeline], seed: int) -> None:
    given, timeline = case
    under(random_plan(timeline, seed), timeline, given, layers=3)
    under(random_plan(timeline, seed), timeline, given, layers=6)


@pytest.mark.parametrize("seed", range(4))
def test_a_plan_for_another_size_or_another_number_of_microbatches_gives_the_same_bits(
    case: tuple[str, Timeline], seed: int
) -> None:
    given, timeline = case
    under(random_plan(timeline, seed), timeline, given, rows=40)
    under(random_plan(timeline, seed), timeline, given, num=3)


def test_a_plan_goes_through_json_and_is_carried_out(case: tuple[str, Timeline]) -> None:
    given, timeline = case
    plan = random_plan(timeline, 3)
    again, time_again = Plan.from_json(plan.to_json()), Timeline.from_json(timeline.to_json())
    assert again == plan
    assert time_again == timeline
    under(again, time_again, given)


class WritingOver(nn.Module):
    """Writes over its products, and gives one away that its caller goes on to change."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu_())
        return y


class WrittenOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WritingOver() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x.add_(1).mul_(0.5)
        return x


@pytest.mark.parametrize("learn", [False, True])
def test_products_that_are_written_over_are_computed_again_where_a_plan_would_have_them_saved(learn: bool) -> None:
    torch.manual_seed(0)
    plain = WrittenOver()
    model = copy.deepcopy(plain)
    timeline = measured(model, model.layers, inputs(), recompute="auto")
    assert all(s.not_recomputed is None and s.selective_ms is None for s in timeline.sections), "not for the planner"
    expected = train(plain, inputs(), 3)
    with lighterage.offload(model.layers, min_bytes=64, tier="host") as offloader:
        if learn:
            train(model, inputs(), STEPS_TO_PLAN)
        for seed in range(3):
            offloader.use_plan(random_plan(timeline, seed, modes=("selective",)), timeline)
            assert_equal(expected, train(model, inputs(), 3))
