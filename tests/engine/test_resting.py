"""Sections of which nothing leaves run without hooks; what the plan says of the others is carried out as ever."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import OffloadError
from lighterage.engine import resting
from lighterage.engine.packing import Packer
from lighterage.engine.planning import checks
from lighterage.engine.planning.run import Run
from lighterage.engine.sections import Section
from lighterage.engine.traffic import Traffic
from lighterage.planner.plan import Fetch, Move, Plan, SectionPlan
from lighterage.planner.timeline import Timeline
from tests.engine.planned import assert_equal, measured, train
from tests.engine.programs import no_hook_is_pushed

WIDTH, LAYERS = 32, 5


@pytest.fixture(autouse=True)
def _no_step_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SLOWER", 1e9)  # steps of microseconds are, on a busy machine


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).sin())


class Model(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).sin()
        return x


def batch(seed: int = 0) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed))


def pair(make: Callable[[], nn.Module] = Model) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = make()
    return model, copy.deepcopy(model)


def moves_of(timeline: Timeline, sections: set[int]) -> Plan:
    """All that these sections saved leaves at once, and comes back as backward comes to the section after."""
    moved = [
        tuple(Move(save=a.save, release_after=0) for a in s.allocations) if index in sections else ()
        for index, s in enumerate(timeline.sections)
    ]
    fetches = tuple(
        tuple(Fetch(section=s, save=m.save) for s in sections if p.section == s + 1 for m in moved[s])
        if p.direction == "backward"
        else ()
        for p in timeline.phases
    )
    plans = (SectionPlan(name=s.name, moves=m) for s, m in zip(timeline.sections, moved, strict=True))
    return Plan(sections=tuple(plans), fetches=fetches)


def timeline_of(model: Any, *, whole: bool = False) -> Timeline:
    """What is measured of a copy of `model`, whose layers or which as a whole is offloaded."""
    twin = copy.deepcopy(model)
    return measured(twin, twin if whole else twin.layers, [batch()], recompute="never")


class Seen:
    """Which sections' saves the engine's hook has seen."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        pack = Packer.pack

        def seen(packer: Packer, tensor: Tensor, section: Section) -> Any:
            self.names.append(section.name)
            return pack(packer, tensor, section)

        monkeypatch.setattr(Packer, "pack", seen)


def steps(model: nn.Module, num: int = 1, seed: int = 0) -> list[tuple[Tensor, list[Tensor]]]:
    return train(model, [batch(seed)], num)


def under(model: Any, given: Any, plan: Plan, timeline: Timeline) -> lighterage.Offloader:
    offloader = lighterage.offload(given, min_bytes=64, tier="host")
    offloader.use_plan(plan, timeline)
    steps(model, 2)  # the second is timed, save by save on a CPU
    return offloader


def test_a_section_that_keeps_all_is_seen_by_no_hook_and_told_as_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain = pair()
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {0}), timeline) as offloader:
        seen = Seen(monkeypatch)
        ended = offloader.report().steps
        assert_equal(steps(plain, 3), steps(model, 3))
        assert set(seen.names) == {"Layer.0"}
        stats, report = offloader.stats(), offloader.report()
        assert report.steps == ended + 3 and stats.bytes_in == stats.bytes_out > 0
        for section, record in zip(report.sections[1:], timeline.sections[1:], strict=True):
            nbytes = sum(a.nbytes for a in record.allocations)
            assert section.kept == {"plan: it stays": nbytes} and section.unique_bytes == nbytes > 0
            assert section.saves == len(record.allocations)
        assert stats.host_bytes_in_use == 0


def test_where_all_rests_steps_end_though_the_loss_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, set()), timeline) as offloader:
        seen = Seen(monkeypatch)
        before = offloader.report().steps
        held = []
        model.zero_grad()
        for seed in range(3):
            loss, expected = model(batch(seed)).sum(), plain(batch(seed)).sum()
            loss.backward()
            expected.backward()
            held.append(loss)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        last = model(batch())  # the third has ended when the next one begins
        assert offloader.report().steps == before + 3 and not seen.names
        del last


def test_releases_and_reloads_are_due_when_backward_comes_to_a_section_at_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = pair()
    timeline = timeline_of(model)
    plan = moves_of(timeline, {1})  # back as backward comes to section 2, which rests
    with under(model, model.layers, plan, timeline) as offloader:
        told: list[str] = []
        fetch = Traffic.fetch

        def fetched(traffic: Traffic, allocations: list[Any]) -> None:
            told.append("fetched")
            fetch(traffic, allocations)

        monkeypatch.setattr(Traffic, "fetch", fetched)
        loss = model(batch()).sum()
        for index in (3, 2):
            model.layers[index].down.weight.register_hook(lambda _, index=index: told.append(f"in {index}"))
        loss.backward()
        assert told == ["in 3", "fetched", "in 2"]
        assert offloader.report().drifts == 0


class Pausing(Model):
    """Computes between its layers what saves nothing."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            with torch.no_grad():
                between = torch.randn(256, 256) @ torch.randn(256, 256)
            x = x + 0 * between[0, 0]
        return x


def test_what_is_due_after_a_stretch_between_sections_is_let_go_of_before_one_at_rest_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain = pair(Pausing)
    timeline = timeline_of(model)
    begins = {p.section: number for number, p in enumerate(timeline.phases) if p.direction == "forward"}
    assert begins[2] == begins[1] + 2, "there is no phase between"
    moved = moves_of(timeline, {1})
    sections = [
        dataclasses.replace(s, moves=tuple(dataclasses.replace(m, release_after=1) for m in s.moves))
        for s in moved.sections
    ]
    with under(model, model.layers, dataclasses.replace(moved, sections=tuple(sections)), timeline) as offloader:
        told: list[str] = []
        release = Traffic.release_some

        def released(traffic: Traffic, section: Section, allocations: list[Any]) -> None:
            told.append("released")
            release(traffic, section, allocations)

        monkeypatch.setattr(Traffic, "release_some", released)
        handle = model.layers[2].up.register_forward_hook(lambda *_: told.append("in 2"))
        model(batch()).sum().backward()
        handle.remove()
        assert told == ["released", "in 2"]
        model.zero_grad()
        assert_equal(steps(plain, 2), steps(model, 2))
        assert offloader.report().drifts == 0


class Sharing(nn.Module):
    """Each layer saves what the one before it saved last, which no other of its saves shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).exp().clamp(max=2.0).sigmoid()  # sigmoid saves its result, the next product too


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sharing() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_leaves_and_is_read_in_another_section_too_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair(Chain)
    timeline = timeline_of(model)
    assert any(use.section == 2 for a in timeline.sections[1].allocations for use in a.uses), "nothing is shared"
    with under(model, model.layers, moves_of(timeline, {1}), timeline) as offloader:
        seen = Seen(monkeypatch)
        assert_equal(steps(plain, 2), steps(model, 2))
        assert set(seen.names) == {"Sharing.1", "Sharing.2"}  # what 2 saves has to be recognised
        assert offloader.stats().still_alive_bytes == 0 < offloader.stats().bytes_out


def test_the_model_s_own_hooks_come_back_after_a_section_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    timeline = timeline_of(model, whole=True)
    gaps = {index for index, section in enumerate(timeline.sections) if section.gap}
    assert gaps
    with under(model, model, moves_of(timeline, gaps), timeline) as offloader:
        seen = Seen(monkeypatch)
        assert_equal(steps(plain, 2), steps(model, 2))
        assert set(seen.names) == {timeline.sections[index].name for index in gaps}
        assert offloader.stats().bytes_out > 0 and no_hook_is_pushed()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "model"])
def test_an_exception_in_a_section_at_rest_leaves_hooks_as_they_were(error: type[BaseException], whole: bool) -> None:
    model, plain = pair()
    given = model if whole else model.layers
    timeline = timeline_of(model, whole=whole)
    with under(model, given, moves_of(timeline, {0}), timeline) as offloader:

        def stop(*_: object) -> None:
            raise error("stop")

        handle = model.layers[2].up.register_forward_hook(stop)
        with pytest.raises(error):
            model(batch())
        handle.remove()
        assert no_hook_is_pushed()
        assert_equal(steps(plain, 2), steps(model, 2))
        assert offloader.stats().host_bytes_in_use == 0


def test_without_gradients_and_for_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {0, 1}), timeline) as offloader:
        for one in (model, plain):
            one.zero_grad()
            with torch.no_grad():
                one(batch(7))
            loss = one(batch(1)).sum()
            loss.backward(retain_graph=True)
            loss.backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert_equal(steps(plain, 2), steps(model, 2))
        assert offloader.report().drifts == 0


def test_what_is_changed_in_place_is_told_by_autograd_itself() -> None:
    model, _ = pair()
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {0}), timeline):
        changed: list[Tensor] = []
        handle = model.layers[3].up.register_forward_hook(lambda *given: changed.append(given[2]))
        loss = model(batch()).sum()
        handle.remove()
        with torch.no_grad():
            changed[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        del loss
        changed.clear()
        steps(model)


@dataclasses.dataclass
class Wrapped:
    value: Tensor


class Opaque(Layer):
    """Returns what no look into containers shows."""

    def forward(self, x: Any) -> Any:
        return Wrapped(super().forward(x.value if isinstance(x, Wrapped) else x))


class OpaqueModel(Model):
    def __init__(self) -> None:
        super().__init__(Opaque)

    def forward(self, x: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.value


def test_a_section_whose_result_shows_no_tensor_is_hooked_from_the_next_step_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain = pair(OpaqueModel)
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {0}), timeline) as offloader:
        seen = Seen(monkeypatch)
        assert_equal(steps(plain, 3), steps(model, 3))
        assert set(seen.names) == {f"Opaque.{index}" for index in range(LAYERS)}
        assert offloader.stats().bytes_out > 0


def test_an_offloader_that_found_nothing_to_gain_leaves_all_sections_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    with lighterage.offload(model.layers, device_budget="1GiB", min_bytes=64, tier="host") as offloader:
        steps(model, 6)
        assert offloader.plan is not None and not offloader.plan.num_moves
        steps(model, 2)  # what is timed of a new plan is over
        seen = Seen(monkeypatch)
        assert_equal(steps(plain, 2), steps(model, 2))
        assert not seen.names


def test_an_error_as_a_section_opens_is_no_section_that_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {0}), timeline) as offloader:

        def fails(*_: object) -> Any:
            raise OffloadError("a copy failed")

        with monkeypatch.context() as patch:
            patch.setattr(Run, "approached", fails)
            with pytest.raises(OffloadError, match="a copy failed"):
                model(batch())
        assert no_hook_is_pushed()
        seen = Seen(monkeypatch)
        assert_equal(steps(plain, 2), steps(model, 2))
        assert set(seen.names) == {"Layer.0"} and offloader.stats().host_bytes_in_use == 0


# --- odd modules --------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer that ends in `end`, and gives `pick` of what that returns to the next one."""

    def __init__(self, end: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.end = end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.up(x).sin())


class OddModel(nn.Module):
    def __init__(self, end: Callable[[Tensor], Any], pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Odd(end) for _ in range(LAYERS))
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.pick(layer(x))
        return x


def stale_view(y: Tensor) -> Any:
    with torch.no_grad():
        view = y.view(-1)
    return y.mul_(1.5), view


def endless(y: Tensor) -> Any:
    inside: dict[str, Any] = {"y": y}
    inside["itself"] = inside
    return inside


def written_to(y: Tensor) -> Tensor:
    y += 1
    return y.reshape(16, WIDTH)


@pytest.mark.parametrize(
    ("end", "pick"),
    [
        (stale_view, lambda out: out[0]),
        (endless, lambda out: out["y"]),
        (lambda y: y.view(8, 2, WIDTH), written_to),
        (lambda y: {"y": y, "twice": [y, None, 3]}, lambda out: out["y"]),
    ],
    ids=["a view that has no node", "what contains itself", "a view that is written to", "containers"],
)
def test_what_a_section_at_rest_returns_may_be_odd(
    end: Callable[[Tensor], Any], pick: Callable[[Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = pair(lambda: OddModel(end, pick))
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {1}), timeline) as offloader:
        seen: list[str] = []
        visit = Section.visit

        def visited(section: Section, *asked: Any) -> None:
            seen.append(section.name)
            visit(section, *asked)

        monkeypatch.setattr(Section, "visit", visited)
        assert_equal(steps(plain, 2), steps(model, 2))
        report = offloader.report()
        assert report.drifts == 0 and offloader.stats().host_bytes_in_use == 0
    assert seen == [f"Odd.{index}" for _ in range(2) for index in reversed(range(LAYERS))]


def test_an_error_that_is_kept_keeps_no_step_from_ending() -> None:
    model, _ = pair()
    timeline = timeline_of(model)
    kept: list[BaseException] = []
    with under(model, model.layers, moves_of(timeline, set()), timeline) as offloader:
        try:
            model.layers[0](torch.randn(4, WIDTH + 1))
        except RuntimeError as error:
            kept.append(error)
        before = offloader.report().steps
        steps(model, 4)
        assert offloader.report().steps >= before + 3
    assert offloader.stats().host_bytes_reserved == 0
    kept.clear()


def test_a_forward_in_which_nothing_needs_a_gradient_is_none_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair()
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {0}), timeline) as offloader:
        before = offloader.report().steps
        for one in (model, plain):
            one.requires_grad_(False)
            one(batch(3))
            one.requires_grad_(True)
        assert_equal(steps(plain, 3), steps(model, 3))
        assert offloader.report().steps == before + 3 and offloader.report().drifts == 0
        seen = Seen(monkeypatch)
        assert_equal(steps(plain), steps(model))
        assert set(seen.names) == {"Layer.0"}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.post = nn.Linear(WIDTH, WIDTH)
        self.inner = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.post(x).sin())


def test_sections_inside_of_others_do_not_rest_and_are_visited_as_they_were_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, plain = pair(lambda: Model(Outer))
    with lighterage.offload(
        [part for layer in model.layers for part in (layer.inner, layer)],
        device_budget="1GiB",
        min_bytes=64,
        tier="host",
    ) as offloader:
        assert_equal(steps(plain, 24), steps(model, 24))
        assert offloader.plan is not None and offloader.report().drifts == 0
        names = {section.name for section in offloader.report().sections}
        seen = Seen(monkeypatch)
        steps(model)
        assert set(seen.names) == names


@pytest.mark.parametrize("idle", [nn.Identity, lambda: nn.Dropout(0.0)], ids=["identity", "no dropout"])
def test_a_section_that_saves_nothing_is_no_stranger_to_the_plan(idle: Callable[[], nn.Module]) -> None:
    model, plain = pair()
    for one in (model, plain):
        one.layers.insert(2, idle())
    with lighterage.offload(model.layers, device_budget="1GiB", min_bytes=64, tier="host") as offloader:
        assert_equal(steps(plain, 24), steps(model, 24))
        assert offloader.plan is not None and offloader.report().drifts == 0


class Handing(Layer):
    """Returns something that was computed before the step, too."""

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super().forward(given[0]), given[1]


def test_nothing_piles_up_on_a_node_that_outlives_the_steps() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(Handing() for _ in range(3))
    handed = nn.Parameter(torch.ones(WIDTH)) * 2

    def step() -> None:
        x = batch()
        for layer in layers:
            x, _ = layer((x, handed))
        (x + handed).sum().backward(retain_graph=True)

    with lighterage.offload(layers, device_budget="1GiB", min_bytes=64, tier="host") as offloader:
        for _ in range(9):
            step()
        assert offloader.plan is not None
        made: list[weakref.ref[Any]] = []
        init = resting._Visit.__init__

        class Visit(resting._Visit):
            __slots__ = ("__weakref__",)

            def __init__(self, *given: Any) -> None:
                made.append(weakref.ref(self))
                init(self, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resting, "_Visit", Visit)
            for _ in range(4):
                step()
        assert len(made) > 3 and all(ref() is None for ref in made)


class Sines(nn.Module):
    """Two small layers: what compiled autograd has to trace takes it seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Odd(torch.sin) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def test_compiled_backward_brings_back_what_a_section_at_rest_is_due_for() -> None:
    model, plain = pair(Sines)
    timeline = timeline_of(model)
    with under(model, model.layers, moves_of(timeline, {0}), timeline) as offloader:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            got = steps(model)
        assert_equal(steps(plain), got)
        assert offloader.stats(total=True).bytes_in > 0
