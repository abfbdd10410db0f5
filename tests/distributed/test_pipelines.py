"""Claims about PyTorch's own pipeline schedules over two gloo processes: same bits, any order, nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.utils.checkpoint import checkpoint

import lighterage
from tests.distributed.crew import place, settle
from tests.engine.twin import Block, assert_nothing_left, same_bits

Launch = Callable[[Callable[[int, int], None]], None]

NUM_MICROBATCHES = 6
WIDTH = 16
STEPS = 4


class Stage(nn.Module):
    """A few layers of a model that is cut into stages."""

    def __init__(self, num_layers: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(num_layers))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def error(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (out - target).square().mean()


@dataclasses.dataclass
class Outcome:
    losses: list[torch.Tensor]
    grads: list[torch.Tensor]


def train(
    schedule: type[Any], modules: list[Stage], indices: list[int], num_stages: int, after_step: Callable[[int], None]
) -> Outcome:
    """Some steps of `schedule` over this process's stages."""
    device = place()
    stages = [PipelineStage(m, i, num_stages, device) for m, i in zip(modules, indices, strict=True)]
    several = issubclass(schedule, torch.distributed.pipelining.schedules.PipelineScheduleMulti)
    run = schedule(stages if several else stages[0], NUM_MICROBATCHES, loss_fn=error)
    outcome = Outcome([], [])
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2 * NUM_MICROBATCHES, 5, WIDTH, generator=generator).to(device)
        target = torch.randn(2 * NUM_MICROBATCHES, 5, WIDTH, generator=generator).to(device)
        losses: list[torch.Tensor] = []
        feed = (x,) if 0 in indices else ()
        ends = {"target": target, "losses": losses} if num_stages - 1 in indices else {}
        run.step(*feed, **ends)
        outcome.losses.extend(loss.detach() for loss in losses)
        del losses, ends
        for module in modules:
            for p in module.parameters():
                assert p.grad is not None
                outcome.grads.append(p.grad.clone())
                with torch.no_grad():
                    p -= 0.05 * p.grad
                p.grad = None
        after_step(step)
    return outcome


def compare_schedule(
    schedule: type[Any],
    indices: list[int],
    num_stages: int,
    *,
    checkpointed: bool = False,
    whole: bool = False,
) -> None:
    modules = [Stage(3, checkpointed).to(place()) for _ in indices]
    twins = copy.deepcopy(modules)
    expected = train(schedule, modules, indices, num_stages, lambda step: None)
    offloaders = [
        lighterage.offload(twin if whole else twin.layers, min_bytes=64, keep_last=0, release_after=0) for twin in twins
    ]
    misses: list[int] = []
    hits: list[int] = []

    def after_step(step: int) -> None:
        for offloader in offloaders:
            settle(offloader)
            assert_nothing_left(offloader)
        reports = [offloader.report() for offloader in offloaders]
        misses.append(sum(report.prefetch_misses for report in reports))
        hits.append(sum(report.prefetch_hits for report in reports))

    got = train(schedule, twins, indices, num_stages, after_step)
    assert len(got.losses) == (STEPS * NUM_MICROBATCHES if num_stages - 1 in indices else 0)
    for a, b in zip(expected.losses, got.losses, strict=True):
        assert same_bits(a, b)
    assert len(expected.grads) == STEPS * len(indices) * len(list(modules[0].parameters()))
    assert all(same_bits(a, b) for a, b in zip(expected.grads, got.grads, strict=True))
    for offloader in offloaders:
        total = offloader.stats(total=True)
        assert total.bytes_out > 0
        assert total.bytes_in > 0
        offloader.close()
        assert_nothing_left(offloader)
    if not checkpointed:
        assert hits[-1] > 0
    learned = misses[-1] - misses[0]
    assert learned <= (hits[-1] - hits[0]) // 10, f"misses by step {misses}, hits by step {hits}"
    assert num_forwards(twins) == num_forwards(modules)
    assert min(num_forwards(twins)) >= (2 if checkpointed else 1) * STEPS * NUM_MICROBATCHES


def num_forwards(stages: list[Stage]) -> list[int]:
    return [layer.num_forwards for stage in stages for layer in stage.layers]


def gpipe(rank: int, num_processes: int) -> None:
    compare_schedule(ScheduleGPipe, [rank], num_processes)


def one_forward_one_backward(rank: int, num_processes: int) -> None:
    compare_schedule(Schedule1F1B, [rank], num_processes)


def looped(rank: int, num_processes: int) -> None:
    compare_schedule(ScheduleLoopedBFS, [rank, rank + num_processes], 2 * num_processes)


def interleaved(rank: int, num_processes: int) -> None:
    compare_schedule(ScheduleInterleaved1F1B, [rank, rank + num_processes], 2 * num_processes)


def interleaved_zero_bubble(rank: int, num_processes: int) -> None:
    compare_schedule(ScheduleInterleavedZeroBubble, [rank, rank + num_processes], 2 * num_processes)


def v_shaped_zero_bubble(rank: int, num_processes: int) -> None:
    compare_schedule(ScheduleZBVZeroBubble, [rank, 2 * num_processes - 1 - rank], 2 * num_processes)


def checkpointed_one_forward_one_backward(rank: int, num_processes: int) -> None:
    compare_schedule(Schedule1F1B, [rank], num_processes, checkpointed=True, whole=True)


def one_offloader_for_all_stages(rank: int, num_processes: int) -> None:
    indices = [rank, rank + num_processes]
    modules = [Stage(2).to(place()) for _ in indices]
    twins = copy.deepcopy(modules)
    expected = train(ScheduleInterleaved1F1B, modules, indices, 2 * num_processes, lambda step: None)
    layers = [layer for twin in twins for layer in twin.layers]
    with lighterage.offload(layers, min_bytes=64, keep_last=1) as offloader:

        def after_step(step: int) -> None:
            settle(offloader)
            assert_nothing_left(offloader)

        got = train(ScheduleInterleaved1F1B, twins, indices, 2 * num_processes, after_step)
        assert all(same_bits(a, b) for a, b in zip(expected.grads, got.grads, strict=True))
        assert offloader.stats(total=True).bytes_out > 0


@pytest.mark.parametrize(
    "work",
    [
        gpipe,
        one_forward_one_backward,
        looped,
        interleaved,
        interleaved_zero_bubble,
        v_shaped_zero_bubble,
        checkpointed_one_forward_one_backward,
        one_offloader_for_all_stages,
    ],
)
def test_a_schedule_gives_the_same_bits_leaves_nothing_and_its_order_is_learned(
    work: Callable[[int, int], None], launch: Launch
) -> None:
    launch(work)
