"""Plans are made from measured steps, carried out, refused, told, and made anew when the steps change."""

from __future__ import annotations

import copy
import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import lighterage
from lighterage import Offloader, Policy
from lighterage.engine.planning import autoplan, checks, own_saves, recompute
from lighterage.engine.stores import Stores
from lighterage.errors import BudgetError
from lighterage.planner.plan import Move, Plan, SectionPlan
from lighterage.planner.timeline import Link
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, train
from tests.engine.test_flat import eventually, held

WIDTH = 64
FAST = Link(out_bytes_per_s=1e12, in_bytes_per_s=1e12, both_bytes_per_s=2e12, copy_us=0.0, name="fast")
SLOW = Link(out_bytes_per_s=1e3, in_bytes_per_s=1e3, both_bytes_per_s=1e3, name="slow")


class Layer(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.down(torch.tanh(self.up(x)).sin()), 0.1, self.training)


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers or [Layer() for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def pair(*layers: nn.Module) -> tuple[Model, Model]:
    torch.manual_seed(0)
    model = Model(*layers)
    return model, copy.deepcopy(model)


def rows(num: int = 64) -> list[Tensor]:
    return [torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> list[Link]:
    """The link that is measured: the last of the list. It is not the real one, so that steps may well be slower."""
    links = [FAST]
    monkeypatch.setattr(checks, "SLOWER", 1e9)
    monkeypatch.setattr("lighterage.engine.offloader.measure_link", lambda *_: links[-1])
    return links


def offload(model: Model, **policy: Any) -> Offloader:
    return lighterage.offload(model.layers, **{"min_bytes": 64, "tier": "host", **policy})


# --- measuring ------------------------------------------------------------------------------------------------------


def test_a_plan_is_made_after_a_few_steps_with_the_same_bits_in_all_of_them(link: list[Link]) -> None:
    plain, model = pair()
    expected = train(plain, rows(), 10)
    with offload(model) as offloader:
        assert offloader.plan is None
        assert offloader.timeline is None
        got = train(model, rows(), 10)
        plan, timeline = offloader.plan, offloader.timeline
        assert offloader.stats().bytes_out > 0
    assert_equal(expected, got)
    assert plan is not None
    assert timeline is not None
    assert plan.num_moves > 0
    assert [s.name for s in plan.sections] == [s.name for s in timeline.sections] == [f"Layer.{i}" for i in range(5)]


def test_the_timeline_tells_what_each_section_saves_and_when_it_is_read(link: list[Link]) -> None:
    _, model = pair()
    with offload(model) as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        timeline = offloader.timeline
    assert timeline is not None
    order = [(p.direction, p.section) for p in timeline.phases if p.section is not None]
    assert order == [("forward", i) for i in range(5)] + [("backward", i) for i in reversed(range(5))]
    section = timeline.sections[2]
    # The layer's input, both activations (tanh saves what it gave, sin and down what they were given), and dropout's.
    by_kind = {a.kind: a for a in section.allocations}
    assert by_kind["input"].nbytes == 64 * WIDTH * 4
    wide = [a for a in section.allocations if a.nbytes == 64 * 4 * WIDTH * 4]
    assert [a.kind for a in wide] == ["pointwise", "pointwise"] or "product" in {a.kind for a in wide}
    for allocation in section.allocations:
        assert [use.section for use in allocation.uses] == [2]
        assert allocation.held_bytes >= allocation.nbytes > 0
        assert allocation.kept is None
    births = [a.born_ms for a in section.allocations]
    assert births == sorted(births)
    first, last = section.allocations[0], section.allocations[-1]
    assert first.uses[0].first_ms >= last.uses[0].first_ms, "backward reads what was saved last first"


def test_a_step_that_is_measured_moves_nothing(link: list[Link]) -> None:
    _, model = pair()
    with offload(model) as offloader:
        for _ in range(3):
            train(model, rows(), 1)
            assert offloader.stats().bytes_out == 0


def test_what_is_marked_or_named_keep_is_told_to_stay(link: list[Link]) -> None:
    class Marking(Layer):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.up(x))
            lighterage.mark_not_offload(h)
            return x + self.down(h.sin())

    _, model = pair(*[Marking() for _ in range(3)])
    with offload(model) as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        timeline = offloader.timeline
    assert timeline is not None
    assert [{a.kept for a in s.allocations} for s in timeline.sections] == [{None, "mark_not_offload"}] * 3


def test_only_what_is_marked_is_planned_for_where_marks_decide(link: list[Link]) -> None:
    class Marking(Layer):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.up(x))
            lighterage.mark_offload(h)
            return x + self.down(h.sin())

    plain, model = pair(*[Marking() for _ in range(3)])
    expected = train(plain, rows(), 8)
    with offload(model, select="marked", recompute="never", max_slowdown=1.0) as offloader:
        assert_equal(expected, train(model, rows(), 8))
        timeline = offloader.timeline
        assert 0 < offloader.stats().bytes_out <= 3 * 64 * 4 * WIDTH * 4
    assert timeline is not None
    assert [sum(a.kept is None for a in s.allocations) for s in timeline.sections] == [1, 1, 1]


# --- goals ----------------------------------------------------------------------------------------------------------


def test_where_nothing_is_to_be_gained_all_stays_and_the_report_says_so(link: list[Link]) -> None:
    link.append(SLOW)
    _, model = pair()
    with offload(model, recompute="never") as offloader:
        train(model, rows(), STEPS_TO_PLAN + 2)
        text = str(offloader.report())
        assert offloader.stats().bytes_out == 0
    assert "Nothing moves" in text or "Everything stays" in text or "stays" in text.split("plan: ")[1].splitlines()[0]


def test_a_budget_that_no_plan_keeps_to_is_refused_with_the_smallest_that_can(link: list[Link]) -> None:
    _, model = pair()
    with offload(model, device_budget=1000) as offloader:
        with pytest.raises(BudgetError, match="smallest peak") as refused:
            train(model, rows(), STEPS_TO_PLAN + 1)
        smallest = refused.value.smallest_bytes
        assert smallest > 1000
        # It goes on being refused, and nothing is left behind.
        with pytest.raises(BudgetError):
            train(model, rows(), 1)
        assert offloader.sections == []
    with offload(model, device_budget=int(1.2 * smallest)) as offloader:
        train(model, rows(), STEPS_TO_PLAN + 1)
        assert offloader.plan is not None


class Meter(TorchDispatchMode):
    """The most bytes of storages, made while it is active, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if type(tensor) is Tensor and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return out


def peak_of(model: Model, num: int) -> int:
    model.zero_grad(set_to_none=True)
    loss = None
    with Meter() as meter:
        loss = model(rows(num)[0]).square().mean()
        loss.backward()
    return meter.peak


def test_a_budget_is_kept_to_while_lanes_are_delayed(link: list[Link]) -> None:
    num = 512
    plain, model = pair(*[Layer() for _ in range(6)])
    before = peak_of(plain, num)
    policy = Policy(min_bytes=64, tier="host", device_budget=10**12, recompute="never")
    with Offloader(model.layers, policy) as offloader:
        train(model, rows(num), STEPS_TO_PLAN)
        assert offloader.timeline is not None
        saved = offloader.timeline.measured_peak_bytes
    assert saved is not None
    budget = saved // 2
    policy = Policy(min_bytes=64, tier="host", device_budget=budget, recompute="never")
    with Offloader(model.layers, policy, before_copies=lambda: time.sleep(0.002)) as offloader:
        train(model, rows(num), STEPS_TO_PLAN + 3)
        report = offloader.report()
        after = peak_of(model, num)
    assert report.predicted_peak_bytes is not None
    assert report.measured_peak_bytes is not None
    assert report.predicted_peak_bytes <= budget
    assert report.measured_peak_bytes <= budget
    # Another meter, which counts temporaries and gradients too: what the budget takes off has to be gone.
    assert before - after >= 0.8 * (saved - budget)


# --- computing again ------------------------------------------------------------------------------------------------


class Counted(Layer):
    """Counts its forward passes where no attribute shows it."""

    def __init__(self, calls: list[int]) -> None:
        super().__init__()
        self._calls = (calls,)

    def forward(self, x: Tensor) -> Tensor:
        self._calls[0].append(1)
        return super().forward(x)


def everything(offloader: Offloader, mode: str) -> Plan:
    timeline = offloader.timeline
    assert timeline is not None
    sections = tuple(
        SectionPlan(name=s.name, mode=mode, moves=tuple(Move(save=a.save, release_after=0) for a in s.allocations))  # type: ignore[arg-type]
        for s in timeline.sections
    )
    return Plan(sections=sections, fetches=((),) * len(timeline.phases))


@pytest.mark.parametrize("mode", ["selective", "recompute"])
def test_a_section_is_computed_again_with_the_same_dropout(link: list[Link], mode: str) -> None:
    calls: list[int] = []
    plain, _ = pair()
    model = Model(*[Counted(calls) for _ in range(5)])
    model.load_state_dict(plain.state_dict())
    expected = train(plain, rows(), 3)
    with offload(model, recompute="auto") as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        assert offloader.timeline is not None
        offloader.use_plan(everything(offloader, mode), offloader.timeline)
        calls.clear()
        assert_equal(expected, train(model, rows(), 3))
        runs = 2 if mode == "recompute" else 1  # what is cheap is derived, and no forward runs again
        assert len(calls) == runs * 5 * 3
        assert offloader.stats().bytes_out > 0
        assert offloader.sections == []


class Own(torch.autograd.Function):
    """Saves an empty tensor, as PyTorch's checkpoint did up to 2.12 before what it was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise AssertionError("nothing is made of it")


def test_the_inputs_of_what_is_computed_again_move_whatever_checkpoint_saves_of_its_own(
    link: list[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, alive = recompute.checkpoint, []

    def of_old(*args: Any, **options: Any) -> Any:
        alive.append(Own.apply(torch.empty(0, requires_grad=True)))
        return usual(*args, **options)

    own_saves.saves_before_inputs.cache_clear()
    before = own_saves.saves_before_inputs()
    monkeypatch.setattr(recompute, "checkpoint", of_old)
    monkeypatch.setattr(own_saves, "checkpoint", of_old)
    own_saves.saves_before_inputs.cache_clear()
    try:
        assert own_saves.saves_before_inputs() == before + 1
        plain, model = pair()
        expected = train(plain, rows(), 1)
        with offload(model, recompute="auto") as offloader:
            for _ in range(STEPS_TO_PLAN):
                train(model, rows(), 1)
                alive.clear()
            assert offloader.timeline is not None
            offloader.use_plan(everything(offloader, "recompute"), offloader.timeline)
            for wanted in expected[:1] * 3:
                assert_equal([wanted], train(model, rows(), 1))
                alive.clear()
            assert offloader.stats().copies_out == 4, "each input but the first, which the caller holds"
    finally:
        own_saves.saves_before_inputs.cache_clear()


class Normed(Layer):
    """Changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Remembering(Layer):
    """Sets an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.last = y.detach().mean()
        return y


class Writing(Layer):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0
        x.add_(1.0)
        return super().forward(y)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (again,) = ctx.saved_tensors
        return grad * x.cos() * (x == again)


class AskingTwice(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Twice.apply(x))


class Hooked(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.up.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Normed, "buffer"),
        (Remembering, "attribute"),
        (Writing, "input in place"),
        (AskingTwice, "twice"),
        (Hooked, "hooks"),
    ],
)
def test_what_a_second_forward_would_change_is_never_computed_again(
    link: list[Link], kind: type[nn.Module], reason: str
) -> None:
    layers = [kind() for _ in range(3)] if kind is not Writing else [Layer(), Writing()]
    plain, model = pair(*layers)
    expected = train(plain, rows(), STEPS_TO_PLAN) + train(plain, rows(), 5)
    with offload(model, recompute="auto") as offloader:
        got = train(model, rows(), STEPS_TO_PLAN)
        timeline = offloader.timeline
        assert timeline is not None
        assert timeline.sections[-1].not_recomputed is not None
        assert reason in timeline.sections[-1].not_recomputed
        # Not even where a plan says so.
        offloader.use_plan(everything(offloader, "recompute"), timeline)
        got += train(model, rows(), 5)
    assert_equal(expected, got)
    for (name, theirs), mine in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(theirs, mine), f"{name} differs"


def test_recompute_never_computes_nothing_again(link: list[Link]) -> None:
    calls: list[int] = []
    model = Model(*[Counted(calls) for _ in range(4)])
    link.append(SLOW)
    with offload(model, recompute="never", max_slowdown=5.0) as offloader:
        train(model, rows(), 8)
        timeline = offloader.timeline
    assert len(calls) == 4 * 8
    assert timeline is not None
    assert {s.not_recomputed for s in timeline.sections} == {'recompute="never"'}


# --- drift ----------------------------------------------------------------------------------------------------------


def test_larger_inputs_are_measured_and_planned_for_anew(link: list[Link], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoplan, "PATIENCE", 1)
    plain, model = pair()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        train(model, rows(64), STEPS_TO_PLAN + 2)
        before = offloader.timeline
        assert_equal(train(plain, rows(256), 8), train(model, rows(256), 8))
        after = offloader.timeline
        report = offloader.report()
    assert before is not None
    assert after is not None
    assert report.drifts == 1
    sizes = [t.sections[1].allocations[0].nbytes for t in (before, after)]
    assert sizes[1] == 4 * sizes[0]
    assert "measured anew 1 times" in str(report)


def test_another_number_of_sections_is_measured_anew(link: list[Link], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoplan, "PATIENCE", 1)
    plain, model = pair()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        train(model, rows(), STEPS_TO_PLAN + 2)
        two = rows() * 2
        assert_equal(train(plain, two, 8), train(model, two, 8))
        assert offloader.plan is not None
        assert len(offloader.plan.sections) == 10
        assert offloader.report().drifts == 1


def test_steps_that_take_longer_than_foreseen_are_measured_anew(
    link: list[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoplan, "PATIENCE", 1)
    monkeypatch.setattr(checks, "CHECK_EVERY", 4)
    monkeypatch.setattr(checks, "SLOWER", 5.0)
    link.append(SLOW)
    _, model = pair()
    with offload(model, recompute="never") as offloader:
        train(model, rows(), STEPS_TO_PLAN + 3)
        assert offloader.report().drifts == 0
        model.layers[2].register_forward_pre_hook(lambda *_: time.sleep(0.1))
        train(model, rows(), 20)
        report, timeline = offloader.report(), offloader.timeline
    assert report.drifts == 1
    assert timeline is not None
    measured_ms = max(p.ms for p in timeline.phases if p.direction == "forward") / report.times_scaled
    assert measured_ms >= 100 * (1 - 1e-9)


def test_an_evaluation_between_steps_is_no_drift(link: list[Link]) -> None:
    _, model = pair()
    with offload(model) as offloader:
        for _ in range(STEPS_TO_PLAN + 4):
            train(model, rows(), 1)
            with torch.no_grad():
                model(rows(200)[0])
        assert offloader.plan is not None
        assert offloader.report().drifts == 0


def test_steps_that_never_settle_are_planned_for_all_the_same(link: list[Link]) -> None:
    plain, model = pair()
    sizes = [16, 64, 200, 24, 90, 300] * 4
    with offload(model) as offloader:
        for size in sizes:
            assert_equal(train(plain, rows(size), 1), train(model, rows(size), 1))
        assert offloader.plan is not None


# --- report ---------------------------------------------------------------------------------------------------------


def test_the_report_tells_what_was_chosen_and_why_and_what_came_of_it(link: list[Link]) -> None:
    _, model = pair()
    with offload(model, recompute="never", max_slowdown=1.0) as offloader:
        train(model, rows(), 2)
        assert "none yet" in str(offloader.report())
        train(model, rows(), STEPS_TO_PLAN + 3)
        report, plan = offloader.report(), offloader.plan
    assert plan is not None
    text = str(report)
    assert plan.why in text
    for section in plan.sections:
        assert f"{section.name}: {section.why}" in text
    assert "foreseen" in text
    assert "measured" in text
    assert "exposed:" in text
    data = json.loads(report.to_json())
    assert data["plan"] == plan.why
    assert data["predicted_ms"] > 0
    assert data["measured_ms"] > 0
    assert data["sections"][0]["mode"] == "save"
    assert len(data["measured_phases_ms"]) >= 10


def test_a_plan_made_by_hand_has_no_timeline_and_takes_no_other(link: list[Link]) -> None:
    _, model = pair()
    with offload(model, keep_last=1) as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        assert offloader.plan is None
        assert offloader.timeline is None
        assert offloader.report().plan is None
        with pytest.raises(lighterage.OffloadError, match="made by hand"):
            offloader.use_plan(Plan(sections=(), fetches=()), None)  # type: ignore[arg-type]


# --- flat -------------------------------------------------------------------------------------------------------------


def test_fifty_planned_steps_hold_what_two_held(link: list[Link]) -> None:
    _, model = pair()
    with offload(model, max_slowdown=5.0) as offloader:
        train(model, rows(), 70)  # past the checks at the second and the fiftieth planned step
        eventually(lambda: offloader.stats().host_bytes_in_use == 0, "bytes stay at rest")
        before = held(offloader)
        train(model, rows(), 30)
        assert held(offloader) == before
        assert offloader.stats().bytes_out > 0


@pytest.mark.parametrize("recompute", ["auto", "never"])
def test_rules_name_modules_inside_sections(link: list[Link], recompute: str) -> None:
    _, model = pair()
    rules = [("Layer.1.down", "offload"), ("*", "keep")]
    with offload(model, max_slowdown=5.0, rules=rules, recompute=recompute) as offloader:
        train(model, rows(), STEPS_TO_PLAN + 2)
        plan, timeline = offloader.plan, offloader.timeline
    assert plan is not None
    assert timeline is not None
    moved = {m.save for m in plan.sections[1].moves}
    assert moved == {a.save for a in timeline.sections[1].allocations if a.module == "down"} != set()
    assert not any(s.moves for s in plan.sections if s.name != "Layer.1")


def test_what_was_seen_of_one_plan_is_not_told_of_the_next(link: list[Link]) -> None:
    _, model = pair()
    with offload(model, max_slowdown=5.0) as offloader:
        train(model, rows(), STEPS_TO_PLAN + checks.FIRST_CHECK + 1)
        assert offloader.report().measured_peak_bytes is not None
        assert offloader.plan is not None and offloader.timeline is not None
        offloader.use_plan(everything(offloader, "save"), offloader.timeline)
        train(model, rows(), 1)
        assert offloader.report().measured_peak_bytes is None


def test_what_is_no_plan_is_told(link: list[Link]) -> None:
    _, model = pair()
    told = r"use_plan takes a lighterage\.Plan .* got a str and a str"
    with offload(model) as offloader, pytest.raises(TypeError, match=told):
        offloader.use_plan("x", "y")  # type: ignore[arg-type]


def test_a_step_that_waited_for_host_memory_is_not_timed(link: list[Link], monkeypatch: pytest.MonkeyPatch) -> None:
    def steps_to_plan(sizes: list[int]) -> int:
        reserved = iter([*sizes, *[sizes[-1]] * 1000])
        monkeypatch.setattr(Stores, "host_bytes_reserved", property(lambda _: next(reserved)))
        _, model = pair()
        with offload(model, max_slowdown=1.0) as offloader:
            for count in range(40):
                if offloader.plan is not None:
                    return count
                train(model, rows(), 1)
        raise AssertionError("no plan")

    usual = steps_to_plan([7])
    # It is asked as each step begins, and as each ends that might be timed: three of them are passed over.
    assert steps_to_plan([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]) == usual + autoplan.MOST_RESTARTS


def test_memory_is_made_ready_anew_for_each_plan(link: list[Link], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []
    monkeypatch.setattr(Stores, "prepare", lambda stores: prepared.append(stores))
    _, model = pair()
    with offload(model, max_slowdown=1.0) as offloader:
        train(model, rows(), STEPS_TO_PLAN + 2)
        assert len(prepared) == 1
        assert offloader.plan is not None and offloader.timeline is not None
        offloader.use_plan(offloader.plan, offloader.timeline)
        train(model, rows(), 2)
        assert len(prepared) == 1, "it is the same plan"
        offloader.use_plan(Plan.from_json(offloader.plan.to_json()), offloader.timeline)
        train(model, rows(), 2)
        assert len(prepared) == 2
