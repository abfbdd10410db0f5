"""Ranks with the same sections make the same plan, of the most that any of them measured; others plan by themselves."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lighterage
from lighterage.engine import offloader as offloader_module
from lighterage.engine.planning import agree, making
from lighterage.planner.plan import Plan
from lighterage.planner.timeline import Link, Phase, SectionRecord, Timeline
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, train

Launch = Callable[[Callable[[int, int], None]], None]
WIDTH = 32


class Slow(nn.Module):
    """A layer that one rank takes longer for."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return x + self.down(torch.tanh(self.up(x)).sin())


class Layers(nn.Module):
    """Layers between which one rank takes its time, so that it has phases there that others have not."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[Slow(0.02 * rank) for _ in range(3)])
        self.pause = 0.02 * rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            time.sleep(self.pause)
        return x


def gathered(rank: int, num: int, value: str) -> list[str]:
    values: list[str] = [""] * num
    dist.all_gather_object(values, value)
    return values


def work_of_equal_ranks(rank: int, num: int) -> None:
    torch.manual_seed(0)
    # The link of one is a hundred times slower: planned for apart, the other would move more.
    rate = 1e9 / 100**rank
    link = Link(out_bytes_per_s=rate, in_bytes_per_s=rate, both_bytes_per_s=rate, name=f"of rank {rank}")
    model = Layers(rank)
    plain = copy.deepcopy(model)
    rows = [torch.randn(64, WIDTH)]
    expected = train(plain, rows, STEPS_TO_PLAN + 2)
    measured = mock.patch.object(offloader_module, "measure_link", return_value=link)
    with measured, lighterage.offload(model, min_bytes=64, tier="host", max_slowdown=1.0) as offloader:
        assert_equal(expected, train(model, rows, STEPS_TO_PLAN + 2))
        assert offloader.stats().bytes_out > 0
        plan, timeline, report = offloader.plan, offloader.timeline, offloader.report()
    assert plan is not None
    assert timeline is not None
    assert report.agreed_with == num
    assert f"made for {num} ranks together" in str(report)
    plans = [Plan.from_json(text) for text in gathered(rank, num, plan.to_json())]
    assert all(p.sections == plan.sections and p.fetches == plan.fetches for p in plans)
    timelines = [Timeline.from_json(text) for text in gathered(rank, num, timeline.to_json())]
    assert all(t.phases == timeline.phases for t in timelines)
    forward = [p.ms for p in timeline.phases if p.direction == "forward"]
    assert min(forward) >= 15, "the slowest rank decides"
    assert timeline.step_ms >= 3 * (20 + 20) * 0.9, "with what passes between its sections"


def work_of_unequal_ranks(rank: int, num: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Slow(0.0) for _ in range(2 + rank)])
    with lighterage.offload(model, min_bytes=64, tier="host", max_slowdown=1.0) as offloader:
        train(model, [torch.randn(64, WIDTH)], STEPS_TO_PLAN + 1)
        assert offloader.report().agreed_with == 1
        assert offloader.plan is not None
        assert len(offloader.plan.sections) == 2 + rank
    dist.barrier()


def work_of_one_rank_alone(rank: int, num: int) -> None:
    if rank == 0:
        model = nn.Sequential(*[Slow(0.0) for _ in range(2)])
        hasty = mock.patch.object(agree, "PATIENCE_S", 0.5)
        with hasty, lighterage.offload(model, min_bytes=64, tier="host", max_slowdown=1.0) as offloader:
            train(model, [torch.randn(64, WIDTH)], STEPS_TO_PLAN + 1)
            assert offloader.report().agreed_with == 1
            assert offloader.plan is not None
    else:  # the processes go on to other tests, in which they are to meet again
        dist.distributed_c10d._get_default_store().add(f"lighterage/rounds/{rank}", 1)
    dist.barrier()


def work_of_a_rank_whose_planner_fails(rank: int, num: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Slow(0.0) for _ in range(3)])
    plain = copy.deepcopy(model)
    rows = [torch.randn(64, WIDTH)]

    def steps(of: nn.Module) -> None:
        for expected, got in zip(
            train(plain, rows, STEPS_TO_PLAN + 3), train(of, rows, STEPS_TO_PLAN + 3), strict=True
        ):
            assert_equal([expected], [got])
            for grad in got[1]:
                dist.all_reduce(grad)  # as data parallelism does: whoever stopped would hold the others up

    with lighterage.offload(model, min_bytes=64, tier="host", max_slowdown=1.0) as offloader:
        if rank == 0:
            failing = mock.patch.object(making, "make_plan", side_effect=MemoryError("of rank 0"))
            with failing, pytest.warns(match="of rank 0"):
                steps(model)
        else:
            steps(model)
        assert (offloader.plan is None) == (rank == 0)
        assert offloader.report().agreed_with == (1 if rank == 0 else num)
    dist.barrier()


def test_ranks_with_the_same_sections_make_the_same_plan(launch: Launch) -> None:
    launch(work_of_equal_ranks)


def test_ranks_with_other_sections_plan_by_themselves(launch: Launch) -> None:
    launch(work_of_unequal_ranks)


def test_a_rank_whose_planner_fails_goes_on_and_holds_nobody_up(launch: Launch) -> None:
    launch(work_of_a_rank_whose_planner_fails)


def test_a_rank_without_an_offloader_holds_nobody_up(launch: Launch) -> None:
    launch(work_of_one_rank_alone)


@pytest.mark.parametrize("error", [dist.DistNetworkError("the server is gone"), ValueError("no process group")])
def test_a_rank_whose_store_is_gone_plans_by_itself(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise error

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", gone)
    torch.manual_seed(0)
    model = nn.Sequential(*[Slow(0.0) for _ in range(2)])
    with lighterage.offload(model, min_bytes=64, tier="host", max_slowdown=1.0) as offloader:
        train(model, [torch.randn(64, WIDTH)], STEPS_TO_PLAN)
        assert offloader.plan is not None
        assert offloader.report().agreed_with == 1


def test_a_rank_that_comes_late_does_not_plan_with_one_that_has_not_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    ranks = iter([0, 1])
    monkeypatch.setattr(agree, "PATIENCE_S", 0.05)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: next(ranks))
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    link = Link(out_bytes_per_s=1e9, in_bytes_per_s=1e9, both_bytes_per_s=1e9)
    timelines = [
        Timeline(
            sections=(SectionRecord(name="layer"),),
            phases=(Phase(direction="forward", section=0, ms=ms, work_bytes=0),),
        )
        for ms in (5.0, 1.0)
    ]
    for timeline in timelines:
        assert agree.agreed(timeline, link) == (timeline, link, 1)


def test_what_is_no_phase_in_some_rank_counts_to_the_phase_before_in_all() -> None:
    def timeline(*phases: tuple[str, int | None, float]) -> Timeline:
        sections = tuple(SectionRecord(name=f"layers.{index}") for index in range(2))
        made = tuple(Phase(direction=d, section=s, ms=ms, work_bytes=round(100 * ms)) for d, s, ms in phases)  # type: ignore[arg-type]
        return Timeline(sections=sections, phases=made)

    other = ("other", None, 1.0)
    backward = (("backward", 1, 8.0), ("backward", 0, 8.0))
    one = timeline(other, ("forward", 0, 4.0), other, ("forward", 1, 4.0), ("other", None, 3.0), *backward)
    two = timeline(other, ("forward", 0, 6.0), ("forward", 1, 3.0), ("other", None, 2.0), *backward, other)
    assert agree._form(one) == agree._form(two)
    for both in ([one, two], [two, one]):
        found = agree._most(both)
        assert [(p.direction, p.section, p.ms) for p in found.phases] == [
            ("other", None, 1.0),
            ("forward", 0, 6.0),
            ("forward", 1, 4.0),
            ("other", None, 3.0),
            ("backward", 1, 8.0),
            ("backward", 0, 9.0),
        ]
        assert [p.work_bytes for p in found.phases] == [100, 600, 400, 300, 800, 800]


def test_the_most_that_any_rank_says_of_its_host_counts() -> None:
    def timeline(forward_ms: float, backward_ms: float) -> Timeline:
        section = SectionRecord(name="layer", hooks_forward_ms=forward_ms, hooks_backward_ms=backward_ms)
        return Timeline(sections=(section,), phases=(Phase(direction="forward", section=0, ms=5.0, work_bytes=0),))

    assert agree._most([timeline(1.0, 4.0), timeline(2.0, 3.0)]) == timeline(2.0, 4.0)
    links = [Link(out_bytes_per_s=1e9, in_bytes_per_s=1e9, both_bytes_per_s=1e9, move_us=us) for us in (80.0, 120.0)]
    assert agree._slowest(links) == links[1]
