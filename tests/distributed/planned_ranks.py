"""What ranks do in tests of plans that they make together, on the CPU over gloo and on CUDA devices over NCCL."""

from __future__ import annotations

import copy
import gc
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lighterage
from lighterage.planner.plan import Move, Plan, SectionPlan
from lighterage.planner.simulate import simulate
from lighterage.planner.timeline import Link
from tests.distributed.crew import LIMIT_S, begin, place, settle
from tests.engine.twin import assert_nothing_left, same_bits

Wrap = Callable[[nn.Module], nn.Module]

WIDTH, LAYERS = 64, 4
MOST_STEPS = 150


class Layer(nn.Module):
    """A residual layer, for which one rank takes longer."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return x + self.down(torch.tanh(self.up(x)).sin())


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(place().type, (dist.get_world_size(),))
    assert isinstance(model, nn.Sequential)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def num_collectives() -> int:
    """How many collectives this process has begun, on the job's process group and those that were made of it."""
    groups: Any = dist.distributed_c10d._world.pg_map
    return sum(int(group._get_sequence_number_for_group()) for group in groups)


def step(wrapped: nn.Module, model: nn.Module, seed: int, rank: int) -> list[Tensor]:
    """Loss and gradients of a step on rows of this rank's own."""
    model.zero_grad(set_to_none=True)
    rows = 1024 if place().type == "cpu" else 8192
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 * rank + seed)).to(place())
    loss = wrapped(x).square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 4 * LAYERS
    return [loss.detach(), *[(g.to_local() if isinstance(g, DTensor) else g).clone() for g in grads]]


def all_say(yes: bool) -> bool:
    """Whether every rank says yes."""
    said = torch.tensor(int(yes), device=place())
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return bool(said)


def gathered(value: str) -> list[str]:
    values = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Ranks:
    """A model under an offloader and its twin without, both wrapped, in every process of the job."""

    def __init__(self, rank: int, num: int, wrap: Wrap) -> None:
        self.rank, self.num = rank, num
        torch.manual_seed(0)
        self.model = nn.Sequential(*[Layer(0.004 * rank) for _ in range(LAYERS)]).to(place())
        self.plain = copy.deepcopy(self.model)
        self.wrapped_plain = wrap(self.plain)
        self.wrap = wrap
        self.wrapped: nn.Module | None = None

    def compare(self, seed: int) -> None:
        """One step of each: the same bits, with as many collectives."""
        assert self.wrapped is not None
        before = num_collectives()
        wanted = step(self.wrapped_plain, self.plain, seed, self.rank)
        between = num_collectives()
        got = step(self.wrapped, self.model, seed, self.rank)
        after = num_collectives()
        assert all(same_bits(a, b) for a, b in zip(wanted, got, strict=True)), f"step {seed}"
        assert between > before, "nothing is counted"
        assert after - between == between - before, "the offloader, or its planning, began a collective"

    def plan(self, **policy: Any) -> lighterage.Offloader:
        """An offloader whose plan is made, and was carried out in some steps."""
        offloader = lighterage.offload(self.model, min_bytes=1024, tier="host", recompute="never", **policy)
        if self.wrapped is None:
            self.wrapped = self.wrap(self.model)
        plan: Plan | None = None
        for seed in range(MOST_STEPS):
            self.compare(seed)
            if plan is None:  # the first one: a rank whose steps take more than a budget mends its own later
                plan, timeline, agreed_with = offloader.plan, offloader.timeline, offloader.report().agreed_with
            if all_say(plan is not None):
                break
            time.sleep(0.02)  # on a device plans are made beside the steps
        assert plan is not None and timeline is not None, str(offloader.report())
        for seed in range(3):
            self.compare(1000 + seed)
        assert agreed_with == self.num
        assert set(gathered(plan.to_json())) == {plan.to_json()}
        assert set(gathered(timeline.to_json())) == {timeline.to_json()}
        forward = sum(phase.ms for phase in timeline.phases if phase.direction == "forward")
        assert forward >= 0.9 * LAYERS * 4 * (self.num - 1), "the slowest rank decides"
        settle(offloader)
        assert_nothing_left(offloader)
        return offloader


def work(rank: int, num: int, wrap: Wrap) -> None:
    """Plans for a price and within a budget, which are the same in every rank."""
    others = [index for index in range(num) if index != rank and place().type == "cuda"]
    contexts = [torch._C._cuda_hasPrimaryContext(index) for index in others]
    ranks = Ranks(rank, num, wrap)
    with ranks.plan(max_slowdown=1.0) as offloader:
        timeline = offloader.timeline
        assert timeline is not None
        saved = sum(a.held_bytes for section in timeline.sections for a in section.allocations)
        link = Link(out_bytes_per_s=1e9, in_bytes_per_s=1e9, both_bytes_per_s=1e9)
        nothing = Plan(
            sections=tuple(SectionPlan(name=s.name) for s in timeline.sections), fetches=((),) * len(timeline.phases)
        )
        most = simulate(timeline, nothing, link).peak_bytes
        assert most >= saved > 0
    # What was measured was made the same in all ranks, so all of them ask for the same.
    with ranks.plan(device_budget=most - saved // 3) as offloader:
        assert offloader.plan is not None
        assert any(isinstance(move, Move) for section in offloader.plan.sections for move in section.moves)
        assert offloader.stats().bytes_out > 0, str(offloader.report())
        assert offloader.stats().bytes_in > 0
        assert offloader.report().predicted_peak_bytes is not None
    assert_nothing_left(offloader)
    now = [torch._C._cuda_hasPrimaryContext(index) for index in others]
    assert now == contexts, "something was made on another rank's device"


def work_under_ddp(rank: int, num: int) -> None:
    work(rank, num, ddp)


def work_under_fsdp(rank: int, num: int) -> None:
    work(rank, num, fsdp)


def work_after_another_process_group(rank: int, num: int) -> None:
    """A process group is made anew, on another store, and plans are made by way of that one."""
    backend = dist.get_backend()
    for _ in range(2):
        ranks = Ranks(rank, num, ddp)
        ranks.plan(max_slowdown=1.0).close()
        del ranks
        gc.collect()
        address = [""]
        if rank == 0:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = [f"tcp://127.0.0.1:{free.getsockname()[1]}"]
        dist.broadcast_object_list(address)
        dist.barrier()
        dist.destroy_process_group()
        begin(backend, rank, num, LIMIT_S, init_method=address[0])
    ranks = Ranks(rank, num, ddp)
    ranks.plan(max_slowdown=1.0).close()
