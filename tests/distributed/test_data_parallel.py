"""Claims about DDP and FSDP2 over two gloo processes: same bits as without offload, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lighterage
from tests.distributed.crew import place, settle
from tests.engine.twin import (
    Block,
    Model,
    Trace,
    assert_nothing_left,
    assert_same,
    identity,
    layers_of,
    loss_of,
    stood_aside,
    train,
    train_step,
)

Given = Callable[[nn.Module], nn.Module]
Launch = Callable[[Callable[[int, int], None]], None]


class CheckpointedModel(Model):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x).log_softmax(-1)


def local_step(model: nn.Module, seed: int) -> torch.Tensor:
    return train_step(model, 100 * dist.get_rank() + seed)


def accumulating_step(model: nn.Module, seed: int) -> torch.Tensor:
    """Two microbatches, both forwards first; only the last backward synchronises."""
    rank = dist.get_rank()
    losses = [loss_of(model, 100 * rank + 10 * seed + i) for i in range(2)]
    for i, loss in enumerate(losses):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == 1)
        loss.backward()
    return torch.stack(losses).sum().detach()


def plain_values(trace: Trace) -> Trace:
    def local(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}

    return Trace(trace.losses, [local(grads) for grads in trace.grads], local(trace.state))


def compare_wrapped(
    make: Callable[[], nn.Module],
    wrap: Callable[[nn.Module], nn.Module],
    given: Given,
    offload_first: bool,
    step: Callable[[nn.Module, int], torch.Tensor] = local_step,
) -> lighterage.Report:
    torch.manual_seed(0)
    plain = make().to(place())
    model = copy.deepcopy(plain)
    classes = [type(m) for m in plain.modules()]
    expected = train(wrap(plain), step, plain, 3)
    if offload_first:
        offloader = lighterage.offload(given(model), min_bytes=64, keep_last=0)
        wrapped = wrap(model)
    else:
        wrapped = wrap(model)
        offloader = lighterage.offload(given(model), min_bytes=64, keep_last=0)
    got = train(wrapped, step, model, 3)
    assert_same(plain_values(expected), plain_values(got))
    settle(offloader)
    assert_nothing_left(offloader)
    assert offloader.stats(total=True).bytes_out > 0
    assert offloader.stats(total=True).bytes_in > 0
    report = offloader.report()
    offloader.close()
    assert_nothing_left(offloader)
    # What another library made of the class on top of ours stays, and is inert.
    for module, plain_module, original in zip(model.modules(), plain.modules(), classes, strict=True):
        assert isinstance(module, original)
        if not offload_first:
            assert type(module) is type(plain_module)
    before = offloader.stats(total=True).bytes_out
    step(wrapped, 9)
    assert offloader.stats(total=True).bytes_out == before
    return report


# --- DDP ----------------------------------------------------------------------------------------------------------


def ddp(rank: int, num_processes: int) -> None:
    wrap = partial(DistributedDataParallel, bucket_cap_mb=0.001)
    for given in (layers_of, identity):
        for offload_first in (True, False):
            compare_wrapped(Model, wrap, given, offload_first)
    compare_wrapped(Model, partial(wrap, static_graph=True), identity, False)
    compare_wrapped(Model, partial(wrap, find_unused_parameters=True), identity, False)
    compare_wrapped(Model, partial(wrap, gradient_as_bucket_view=True), identity, False)


def ddp_without_synchronisation(rank: int, num_processes: int) -> None:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        assert isinstance(model, DistributedDataParallel)
        with model.no_sync():
            first = local_step(model, 10 * seed)
        return first + local_step(model, 10 * seed + 1)

    compare_wrapped(Model, DistributedDataParallel, identity, True, step)


def ddp_given_itself(rank: int, num_processes: int) -> None:
    torch.manual_seed(0)
    plain = Model().to(place())
    model = copy.deepcopy(plain)
    expected = train(DistributedDataParallel(plain), local_step, plain, 3)
    wrapped = DistributedDataParallel(model)
    with lighterage.offload(wrapped, min_bytes=64, keep_last=0) as offloader:
        assert_same(expected, train(wrapped, local_step, model, 3))
        assert_nothing_left(offloader)
        assert "layers" in offloader.report().sections_from
        assert offloader.stats(total=True).bytes_out > 0


# --- FSDP2 --------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh(place().type, (dist.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **options)  # type: ignore[call-overload]
    fully_shard(model, mesh=mesh, **options)  # type: ignore[call-overload]
    return model


def fsdp(rank: int, num_processes: int) -> None:
    for given in (layers_of, identity):
        for offload_first in (True, False):
            report = compare_wrapped(Model, shard, given, offload_first)
            kept = [s.kept for s in report.sections if "," not in s.name]
            # up: 16x64, down: 32x16: the unsharded parameters are parameters still.
            assert kept
            assert all(reasons.get("parameter", 0) >= (16 * 64 + 32 * 16) * 4 for reasons in kept)


def fsdp_that_keeps_parameters_gathered(rank: int, num_processes: int) -> None:
    for offload_first in (True, False):
        compare_wrapped(Model, partial(shard, reshard_after_forward=False), identity, offload_first)


def fsdp_with_mixed_precision(rank: int, num_processes: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for offload_first in (True, False):
        compare_wrapped(Model, partial(shard, mp_policy=policy), identity, offload_first)


def fsdp_with_microbatches(rank: int, num_processes: int) -> None:
    for offload_first in (True, False):
        compare_wrapped(Model, shard, identity, offload_first, accumulating_step)


def fsdp_with_checkpoints(rank: int, num_processes: int) -> None:
    for offload_first in (True, False):
        report = compare_wrapped(CheckpointedModel, shard, identity, offload_first)
        assert stood_aside(report, "checkpoint") > 0


def fsdp_sections_are_where_its_hooks_are(rank: int, num_processes: int) -> None:
    model = shard(Model(block=Block).to(place()))
    with lighterage.offload(model, min_bytes=64, keep_last=0) as offloader:
        for layer in layers_of(model):
            assert isinstance(layer, FSDPModule)
            layer.unshard()
            layer.reshard()
        local_step(model, 0)
        assert offloader.stats().bytes_out > 0
        state = model.state_dict()
        assert all(isinstance(value, DTensor) for value in state.values())


def test_ddp_gives_the_same_bits_whichever_comes_first(launch: Launch) -> None:
    launch(ddp)


def test_ddp_accumulates_the_same_bits_without_synchronisation(launch: Launch) -> None:
    launch(ddp_without_synchronisation)


def test_a_ddp_module_can_be_given_itself(launch: Launch) -> None:
    launch(ddp_given_itself)


@pytest.mark.parametrize(
    "work",
    [
        fsdp,
        fsdp_that_keeps_parameters_gathered,
        fsdp_with_mixed_precision,
        fsdp_with_microbatches,
        fsdp_with_checkpoints,
    ],
)
def test_fully_sharded_layers_give_the_same_bits_whichever_comes_first(
    work: Callable[[int, int], None], launch: Launch
) -> None:
    launch(work)


def test_methods_of_fully_sharded_layers_still_work(launch: Launch) -> None:
    launch(fsdp_sections_are_where_its_hooks_are)
