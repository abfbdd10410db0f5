"""Law 1 where the world changes between a section's forward and its backward: never computed again, or told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import Offloader
from lighterage.engine.planning import checks, making
from lighterage.engine.steps import Steps
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, train
from tests.engine.test_plan_made import FAST, Layer, Model, everything, offload, pair, rows

SEVERAL = 9


@pytest.fixture(autouse=True)
def _fast_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SLOWER", 1e9)
    monkeypatch.setattr("lighterage.engine.offloader.measure_link", lambda *_: FAST)


class Drawing(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.generator = torch.Generator().manual_seed(5)

    def __deepcopy__(self, memo: Any) -> Drawing:
        made = type(self)()
        made.inner.load_state_dict(self.inner.state_dict())
        return made

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x).tanh()
        return y * torch.rand(x.shape, generator=self.generator)


OF_ALL = torch.Generator()


class DrawingFromOne(Drawing):
    """Draws from a generator that several have, and none holds."""

    def __init__(self) -> None:
        super().__init__()
        del self.generator

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x).tanh()
        return y * torch.rand(x.shape, generator=OF_ALL)


@pytest.mark.parametrize("kind", [Drawing, DrawingFromOne])
def test_a_generator_of_its_own_is_drawn_from_once(kind: type[nn.Module]) -> None:
    plain, model = pair(*[kind() for _ in range(4)])
    OF_ALL.manual_seed(3)
    expected = train(plain, rows(), SEVERAL)
    OF_ALL.manual_seed(3)
    with offload(model, max_slowdown=5.0) as offloader:
        assert_equal(expected, train(model, rows(), SEVERAL))
        assert offloader.timeline is not None
        assert "generator" in (offloader.timeline.sections[0].not_recomputed or "")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.by = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * self.by).sin()


def grads_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def scaled_twice(model: Model, steps: int) -> list[tuple[Tensor, list[Tensor]]]:
    results = []
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        losses = []
        for by in (1.0, 2.0):
            for layer in model.layers:
                layer.by = by
            losses.append(model(rows()[0]).square().mean())
        torch.stack(losses).sum().backward()
        results.append(
            (torch.stack(losses).detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    return results


def test_an_attribute_that_another_microbatch_changes_is_known_from_the_first_step() -> None:
    plain, model = pair(*[Scaled() for _ in range(4)])
    expected = scaled_twice(plain, SEVERAL)
    with offload(model, max_slowdown=5.0) as offloader:
        assert_equal(expected, scaled_twice(model, SEVERAL))
        assert offloader.timeline is not None
        assert "attribute by changes between" in (offloader.timeline.sections[0].not_recomputed or "")


def test_an_input_that_its_caller_goes_on_to_change_is_known_from_the_first_step() -> None:
    layers = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4)]
    plain, model = pair(*layers)

    def run(of: Model) -> list[tuple[Tensor, list[Tensor]]]:
        results = []
        for step in range(SEVERAL):
            x = torch.randn(256, 64, generator=torch.Generator().manual_seed(step))
            of.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                for layer in of.layers:
                    x += layer(x)  # autocast saves a copy, not x
            loss = x.float().square().mean()
            loss.backward()
            results.append((loss.detach(), grads_of(of)))
        return results

    expected = run(plain)
    with offload(model, max_slowdown=5.0):
        assert_equal(expected, run(model))


def recomputing(model: Model) -> Offloader:
    """An offloader that has every section of `model` computed again."""
    offloader = offload(model, recompute="auto")
    train(model, rows(), STEPS_TO_PLAN)
    assert offloader.timeline is not None
    offloader.use_plan(everything(offloader, "recompute"), offloader.timeline)
    train(model, rows(), 1)
    return offloader


def _weight(model: Model) -> None:
    with torch.no_grad():
        model.layers[1].down.weight.mul_(2)


def _attribute(model: Model) -> None:
    model.layers[1].by = 3.0


def _eval(model: Model) -> None:
    model.eval()


@pytest.mark.parametrize(
    ("change", "told"),
    [(_weight, "the parameter weight"), (_attribute, "the set of its attributes"), (_eval, "the attribute training")],
)
def test_what_changes_for_the_first_time_under_a_plan_is_told_and_the_next_step_is_right(
    change: Callable[[Model], None], told: str
) -> None:
    plain, model = pair()
    offloader = recomputing(model)
    with offloader:
        loss = model(rows()[0]).square().mean()
        change(model)
        with pytest.raises(
            RuntimeError, match=rf"section 'Layer\.\d' is computed again.*{told} changes between.*never"
        ):
            loss.backward()
        del loss
        plain.load_state_dict(model.state_dict())
        model.train()
        assert_equal(train(plain, rows(), 2), train(model, rows(), 2))
        assert offloader.sections == []


def test_a_plan_that_nobody_asked_for_computes_nothing_again() -> None:
    calls = []

    class Counted(Layer):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return super().forward(x)

    _, model = pair(*[Counted() for _ in range(4)])
    with offload(model):
        train(model, rows(), SEVERAL)
    assert len(calls) == 4 * SEVERAL


@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2, 3)])
def test_an_exception_in_backward_while_steps_are_measured_leaves_the_next_ones_right(failing: tuple[int, ...]) -> None:
    plain, model = pair()
    model_too = copy.deepcopy(plain)
    expected = train(model_too, rows(), 1)

    def step(fails: bool) -> None:
        x = model.layers[0](rows()[0])
        if fails:
            x.register_hook(_raise)
        for layer in model.layers[1:]:
            x = layer(x)
        x.square().mean().backward()

    with offload(model, max_slowdown=5.0) as offloader:
        for number in range(14):
            if number in failing:
                with pytest.raises(RuntimeError, match="boom"):
                    step(fails=True)
            else:
                step(fails=False)
        assert offloader.plan is not None
        assert_equal(expected, train(model, rows(), 1))


def _raise(_: Tensor) -> Tensor:
    raise RuntimeError("boom")


def test_a_layer_that_is_dropped_later_does_not_make_a_rule_an_error() -> None:
    plain, model = pair()
    dropped: set[int] = set()

    def run(of: Model) -> list[tuple[Tensor, list[Tensor]]]:
        results = []
        for step in range(30):
            torch.manual_seed(step)
            of.zero_grad(set_to_none=True)
            x = rows()[0]
            for number, layer in enumerate(of.layers):
                if step < 8 or number not in dropped:
                    x = layer(x)
            loss = x.square().mean()
            loss.backward()
            results.append((loss.detach(), grads_of(of)))
        return results

    dropped = {1}
    expected = run(plain)
    with offload(model, max_slowdown=5.0, rules=[("Layer.1", "keep")]) as offloader:
        assert_equal(expected, run(model))
        assert offloader.plan is not None


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.3])
def test_a_budget_that_a_step_broke_is_planned_for_anew_or_told(fraction: float) -> None:
    _, model = pair()
    with offload(model, device_budget=10**9) as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        assert offloader.timeline is not None
        whole = sum(a.held_bytes for s in offloader.timeline.sections for a in s.allocations if a.kept is None)
    _, model = pair()
    budget = int(fraction * whole)
    with offload(model, device_budget=budget) as offloader:
        train(model, rows(), STEPS_TO_PLAN + 14)
        assert offloader.sections == []
        report = offloader.report()
        assert report.measured_peak_bytes is not None
        assert report.measured_peak_bytes <= budget or "more than the budget" in str(report)


# --- what stops a plan ----------------------------------------------------------------------------------------------


def test_an_interrupt_while_the_plan_is_made_is_the_callers_and_a_plan_is_made_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, model = pair()
    make_plan, interrupts = making.make_plan, [True]

    def interrupted(*given: Any, **caution: Any) -> Any:
        if interrupts:
            interrupts.clear()
            raise KeyboardInterrupt
        return make_plan(*given, **caution)

    monkeypatch.setattr(making, "make_plan", interrupted)
    with offload(model, max_slowdown=5.0) as offloader:
        with pytest.raises(KeyboardInterrupt):
            train(model, rows(), STEPS_TO_PLAN)
        assert offloader.plan is None
        assert_equal(train(plain, rows(), SEVERAL), train(model, rows(), SEVERAL))
        assert offloader.plan is not None and offloader.plan.num_moves > 0


def test_a_note_of_an_ended_section_that_an_interrupt_swallowed_holds_no_step_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python ignores what is raised within a finalizer, and goes on without what the finalizer was to do."""
    plain, model = pair()
    when_over, swallowed = Steps._when_over, [0]

    def swallow(self: Steps, step: int, index: int) -> Callable[[object], None]:
        swallowed[0] += 1
        return when_over(self, step, index) if swallowed[0] != 7 else lambda _: None

    monkeypatch.setattr(Steps, "_when_over", swallow)
    with offload(model, max_slowdown=5.0) as offloader:
        assert_equal(train(plain, rows(), SEVERAL), train(model, rows(), SEVERAL))
        assert offloader.plan is not None and offloader.plan.num_moves > 0
        assert offloader.sections == []


# --- rules that have sections computed again ------------------------------------------------------------------------


def test_a_rule_over_layers_that_save_nothing_large_is_followed() -> None:
    """No peak is told of such steps: there is nothing to compare with."""
    plain, model = pair()
    rules = [("*", "recompute")]
    with offload(model, max_slowdown=5.0, rules=rules, min_bytes=1 << 30) as offloader:
        assert_equal(train(plain, rows(), SEVERAL), train(model, rows(), SEVERAL))
        assert offloader.plan is not None
        assert {section.mode for section in offloader.plan.sections} == {"recompute"}


def test_a_rule_that_has_all_computed_again_passes_over_what_is_saved_between_sections() -> None:
    class Between(Model):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).sin()
            return x

    torch.manual_seed(0)
    plain = Between()
    model = copy.deepcopy(plain)
    given = {"min_bytes": 64, "tier": "host", "max_slowdown": 5.0, "rules": [("*", "recompute")]}
    with lighterage.offload(model, **given) as offloader:
        assert_equal(train(plain, rows(), SEVERAL), train(model, rows(), SEVERAL))
        assert offloader.plan is not None and offloader.timeline is not None
        assert {(s.gap, p.mode) for s, p in zip(offloader.timeline.sections, offloader.plan.sections, strict=True)} == {
            (False, "recompute"),
            (True, "save"),
        }


def test_a_rule_over_layers_that_some_step_drops_stops_no_step() -> None:
    """Each step drops another layer, so that none tells of all of them."""

    def run(of: Model) -> list[tuple[Tensor, list[Tensor]]]:
        results = []
        for step in range(24):
            torch.manual_seed(step)
            of.zero_grad(set_to_none=True)
            x = rows()[0]
            for number, layer in enumerate(of.layers):
                if number != step % 5:
                    x = layer(x)
            loss = x.square().mean()
            loss.backward()
            results.append((loss.detach(), grads_of(of)))
        return results

    plain, model = pair()
    with offload(model, max_slowdown=5.0, rules=[("*", "recompute")]) as offloader:
        assert_equal(run(plain), run(model))
        assert offloader.plan is not None
        assert "recompute" in {section.mode for section in offloader.plan.sections}


def test_a_rule_wins_over_never() -> None:
    plain, model = pair()
    with offload(model, max_slowdown=0.0, recompute="never", rules=[("*.1", "recompute")]) as offloader:
        assert_equal(train(plain, rows(), SEVERAL), train(model, rows(), SEVERAL))
        assert offloader.plan is not None
        modes = [section.mode for section in offloader.plan.sections]
        assert modes == ["save", "recompute", "save", "save", "save"]
