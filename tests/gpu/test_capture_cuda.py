"""Offload inside a graph's capture: the same bits at each replay, blocks that belong to the graph, and nothing left."""

from __future__ import annotations

import contextlib
import copy
import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import Policy
from lighterage.engine.cuda import CudaPinner
from lighterage.engine.graph_driver import CudaGraphDriver
from lighterage.engine.offloader import Offloader
from lighterage.nn import GroupedLinear, MoE, TransformerBlock
from lighterage.recipes import Float8BlockScaling
from tests.gpu.graph_models import (
    FORBIDDEN,
    LONG,
    CapturedStep,
    assert_equal,
    batch,
    captured_raw,
    eventually,
    make,
    step,
)

pytestmark = pytest.mark.gpu

POLICIES: list[dict[str, Any]] = [
    {"keep_last": 0},
    {"keep_last": 1, "release_after": 0, "prefetch_ahead": 0},
    {"keep_last": 1, "release_after": 3, "prefetch_ahead": 3},
    {"keep_last": 0, "release_after": 99},
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    gc.collect()


@pytest.mark.parametrize("delayed", [False, True], ids=["", "delayed lanes"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_whole_step_in_one_graph_has_the_same_bits_at_each_replay(policy: dict[str, Any], delayed: bool) -> None:
    chance = random.Random(3)
    model = make()
    twin = copy.deepcopy(model)
    hold_up = (lambda: torch.cuda._sleep(chance.randrange(3_000_000))) if delayed else None
    with Offloader(model.layers, Policy(**policy), before_copies=hold_up) as offloader:
        captured = CapturedStep(model, batch())
        stats = offloader.stats()
        assert stats.bytes_out > 0
        assert (stats.bytes_in > 0) == (policy.get("release_after") != 99)
        for seed in (1, 2, 3, 1):
            assert_equal(captured.replay(batch(seed)), step(twin, batch(seed)))


@pytest.mark.undisturbed
def test_a_graph_with_offload_takes_less_memory() -> None:
    taken = []
    for offload in (False, True):
        model = make(12)
        torch.cuda.synchronize()
        step(model, batch())
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        offloader = lighterage.offload(model.layers, keep_last=1) if offload else None
        step(model, batch())
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        captured = CapturedStep(model, batch(), warm=0)
        taken.append(torch.cuda.memory_reserved() - before)
        if offloader is not None:
            stats = offloader.stats()
            assert taken[0] - taken[1] > stats.bytes_out // 2, (taken, stats)
            offloader.close()
        del captured, model
    assert taken[1] < taken[0]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_forward_and_backward_graphs_apart_have_the_same_bits(policy: dict[str, Any]) -> None:
    model = make()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, **policy) as offloader:
        graphed = lighterage.make_graphed_callables(model, (batch(),))
        stats = offloader.stats()
        assert stats.bytes_out > 0 and (stats.bytes_in > 0) == (policy.get("release_after") != 99)
        for seed in (1, 2, 3, 1):
            assert_equal(step(graphed, batch(seed)), step(twin, batch(seed)))
        graphed.forward.reset()


def test_each_layer_may_have_graphs_of_its_own() -> None:
    model = make()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, keep_last=1) as offloader:
        samples = tuple((batch().requires_grad_(),) for _ in model.layers)
        lighterage.make_graphed_callables(tuple(model.layers), samples)
        stats = offloader.stats()
        assert stats.bytes_out > 0 and stats.bytes_in > 0
        for seed in (1, 2, 3):
            assert_equal(
                step(model, batch(seed).requires_grad_()),
                step(twin, batch(seed).requires_grad_()),
            )
        # One layer left out: each backward graph reads what its own forward graph wrote, and no other's.
        short, short_twin = (nn.Sequential(*m.layers[:2], *m.layers[3:]) for m in (model, twin))

        def run(layers: nn.Sequential, seed: int) -> list[Tensor]:
            for p in layers.parameters():
                p.grad = None
            loss = layers(batch(seed).requires_grad_()).float().pow(2).mean()
            loss.backward()
            return [p.grad.clone() for p in layers.parameters() if p.grad is not None]

        assert_equal(run(short, 4), run(short_twin, 4))


@pytest.mark.undisturbed
def test_memory_falls_with_graphs_apart() -> None:
    taken = []
    for offload in (False, True):
        model = make(12)
        step(model, batch())
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        offloader = lighterage.offload(model.layers, keep_last=1) if offload else None
        before = torch.cuda.memory_reserved()
        graphed = lighterage.make_graphed_callables(model, (batch(),))
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved() - before)
        if offloader is not None:
            stats = offloader.stats()
            assert taken[0] - taken[1] > stats.bytes_out // 2, (taken, stats)
        graphed.forward.reset()
        if offloader is not None:
            offloader.close()
        del graphed, model


def test_a_captured_forward_may_be_followed_by_an_eager_backward() -> None:
    model = make()
    twin = copy.deepcopy(model)
    x = batch()
    with lighterage.offload(model.layers, keep_last=0) as offloader:
        step(model, x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = model(x)
        for seed in (1, 2):
            x.data.copy_(batch(seed))  # unseen by version counters, as is what the replay writes
            graph.replay()
            model.zero_grad(set_to_none=True)
            loss.backward(retain_graph=True)
            got = [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            assert_equal(got, step(twin, batch(seed)))
        del loss
        assert offloader.stats().bytes_in > 0


def test_what_was_saved_eagerly_comes_back_at_each_replay_of_a_backward() -> None:
    model = make()
    twin = copy.deepcopy(model)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(twin(batch(1)), list(twin.parameters()))
    with lighterage.offload(model.layers, keep_last=0, release_after=0) as offloader:
        step(model, batch(1))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = model(batch(1))
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            for _ in range(2):
                for grad in grads:
                    grad.zero_()
                graph.replay()
                assert_equal(list(grads), list(wanted))
            # What came back inside the capture is not taken for what comes back outside of it.
            graph.reset()
            del grads
            assert_equal(list(torch.autograd.grad(loss, parameters)), list(wanted))
            del loss
        torch.cuda.synchronize()
        assert eventually(lambda: offloader.stats().host_bytes_in_use == 0)


def test_blocks_belong_to_the_graph_until_it_is_destroyed() -> None:
    model = make()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, keep_last=1) as offloader:
        captured = CapturedStep(model, batch())
        held = offloader.stats().host_bytes_in_use
        assert held >= offloader.stats().bytes_out > 0
        for seed in (1, 2):
            # Eager steps between replays must not take the graph's blocks.
            assert_equal(step(model, batch(7)), step(twin, batch(7)))
            assert_equal(captured.replay(batch(seed)), step(twin, batch(seed)))
        assert offloader.stats().host_bytes_in_use == held
        captured.replay(batch(3))
        captured.graph.reset()
        assert eventually(lambda: offloader.stats().host_bytes_in_use == 0)
        reserved = offloader.stats().host_bytes_reserved
        again = CapturedStep(model, batch())
        assert_equal(again.replay(batch(5)), step(twin, batch(5)))
        assert offloader.stats().host_bytes_reserved == reserved


def test_blocks_of_graphs_apart_come_back_too() -> None:
    model = make()
    with lighterage.offload(model.layers, keep_last=1) as offloader:
        graphed = lighterage.make_graphed_callables(model, (batch(),))
        assert offloader.stats().host_bytes_in_use > 0
        graphed.forward.reset()
        assert eventually(lambda: offloader.stats().host_bytes_in_use == 0)


def test_a_graph_outlives_its_offloader() -> None:
    model = make()
    twin = copy.deepcopy(model)
    offloader = lighterage.offload(model.layers, keep_last=0)
    captured = CapturedStep(model, batch())
    offloader.close()
    assert offloader.stats().host_bytes_reserved > 0
    for seed in (1, 2):
        assert_equal(captured.replay(batch(seed)), step(twin, batch(seed)))
    del captured
    assert eventually(lambda: offloader.stats().host_bytes_reserved == 0)


def test_the_arena_grows_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    pins: list[bool] = []
    pin = CudaPinner.pin

    def counted(self: CudaPinner, address: int, nbytes: int) -> None:
        pins.append(torch.cuda.is_current_stream_capturing())
        pin(self, address, nbytes)

    monkeypatch.setattr(CudaPinner, "pin", counted)
    model = make()
    twin = copy.deepcopy(model)
    step(model, batch())
    model.zero_grad(set_to_none=True)
    with lighterage.offload(model.layers, keep_last=0) as offloader:
        captured = CapturedStep(model, batch(), warm=0)
        assert any(pins)
        assert offloader.stats().bytes_in > 0
        assert_equal(captured.replay(batch(1)), step(twin, batch(1)))


def test_blocks_with_copies_under_way_are_waited_for_before_a_capture_uses_them() -> None:
    """The eager copies are held up; their graph is dropped; the capture takes their blocks at once."""
    model = make()
    twin = copy.deepcopy(model)
    hold = [0]
    offloader = Offloader(
        model.layers,
        Policy(keep_last=0),
        before_copies=lambda: torch.cuda._sleep(hold[0]) if hold[0] else None,
    )
    with offloader:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = batch(1)
            for _ in range(3):
                step(model, x)
            stream.synchronize()
            hold[0] = LONG // 4
            loss = model(batch(2))
            del loss
            hold[0] = 0
            model.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with captured_raw(graph):
                loss = model(x)
                loss.backward()
            graph.replay()
            got = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            assert_equal(got, step(twin, batch(1)))
            assert offloader.stats().bytes_in > 0


@pytest.mark.parametrize("error", ["python", FORBIDDEN])
def test_an_error_inside_a_capture_leaves_the_engine_usable(error: str) -> None:
    model = make()
    twin = copy.deepcopy(model)

    def fail() -> None:
        if error == "python":
            raise KeyError("stop")
        torch.cuda.current_stream().synchronize()

    with lighterage.offload(model.layers, keep_last=1) as offloader:
        pool = torch.cuda.graph_pool_handle()
        with pytest.raises((KeyError, RuntimeError)):
            CapturedStep(model, batch(), pool, around=fail)
        # PyTorch's own context manager leaves its stream current where the capture has failed, and its allocator in the
        # capture, which other tests of this process would see.
        torch.cuda.set_stream(torch.cuda.default_stream())
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch.cuda.synchronize()
        gc.collect()
        for seed in (1, 2):
            assert_equal(step(model, batch(seed)), step(twin, batch(seed)))
        assert eventually(lambda: offloader.stats().host_bytes_in_use == 0)
        captured = CapturedStep(model, batch())
        assert_equal(captured.replay(batch(3)), step(twin, batch(3)))


def test_the_disk_tier_stays_on_the_device_in_a_capture_and_says_so() -> None:
    model = make()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, keep_last=0, tier="disk") as offloader:
        captured = CapturedStep(model, batch())
        assert "replays could not write to disk" in str(offloader.report())
        assert_equal(captured.replay(batch(1)), step(twin, batch(1)))


def test_without_the_driver_s_word_nothing_moves_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaGraphDriver, "own", lambda self, graph: None)
    model = make()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, keep_last=0) as offloader:
        captured = CapturedStep(model, batch())
        assert offloader.stats().bytes_out == 0
        assert "does not say when it is destroyed" in str(offloader.report())
        assert_equal(captured.replay(batch(1)), step(twin, batch(1)))


def test_two_whole_steps_may_share_a_pool() -> None:
    models = [make(), make(4)]
    twins = copy.deepcopy(models)
    pool = torch.cuda.graph_pool_handle()
    offloaders = [lighterage.offload(model.layers, keep_last=1) for model in models]
    captured = [CapturedStep(model, batch(), pool=pool) for model in models]
    for seed in (1, 2, 3):
        for one, twin in zip(captured, twins, strict=True):
            assert_equal(one.replay(batch(seed)), step(twin, batch(seed)))
    for offloader in offloaders:
        assert offloader.stats().bytes_out > 0
        offloader.close()


@pytest.mark.undisturbed
@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
def test_copies_run_beside_compute_inside_a_replay() -> None:
    model = make(8)
    x = batch(rows=8192)
    with lighterage.offload(model.layers, keep_last=1, release_after=4, prefetch_ahead=3):
        captured = CapturedStep(model, x)
        captured.replay(x)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            captured.graph.replay()
            torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {"out": [], "in": [], "compute": []}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kind = "out" if "DtoH" in event.name else "in" if "HtoD" in event.name else "compute"
            spans[kind].append((event.time_range.start, event.time_range.end))

    def overlap(a: str, b: str) -> bool:
        return any(lo < y and x_ < hi for lo, hi in spans[a] for x_, y in spans[b])

    assert overlap("out", "compute") and overlap("in", "compute")


# --- quantized modules --------------------------------------------------------------------------------------------


def test_grouped_linear_replays_with_splits_that_change_on_the_device() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(GroupedLinear(4, 256, 256, recipe=Float8BlockScaling()) for _ in range(3))
    layers = layers.to("cuda", torch.bfloat16)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor, splits: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, splits)
            return x

    model = Stack()
    twin = copy.deepcopy(model)
    generator = torch.Generator("cuda").manual_seed(1)
    inputs = [torch.randn(1024, 256, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)]
    splits = [torch.tensor(s, device="cuda") for s in ([256, 256, 256, 256], [0, 1024, 0, 0], [128, 384, 512, 0])]

    def run(stack: nn.Module, x: Tensor, m_splits: Tensor) -> list[Tensor]:
        for p in stack.parameters():
            p.grad = None
        x = x.clone().requires_grad_()
        out = stack(x, m_splits)
        out.float().pow(2).mean().backward()
        assert x.grad is not None
        return [out.detach().clone(), x.grad, *(p.grad.clone() for p in stack.parameters() if p.grad is not None)]

    with lighterage.offload(model.layers, keep_last=1, min_bytes=4096) as offloader:
        lighterage.make_graphed_callables(model, (inputs[0].clone().requires_grad_(), splits[0]))
        assert offloader.stats().bytes_in > 0
        for x, m_splits in zip(inputs, splits, strict=True):
            assert_equal(run(model, x, m_splits), run(twin, x, m_splits))


def test_a_mixture_of_experts_in_fp8_replays_as_it_routes() -> None:
    torch.manual_seed(0)
    recipe = Float8BlockScaling()
    blocks = nn.Sequential(
        *(TransformerBlock(256, 4, MoE(256, 512, 8, 2, recipe=recipe), recipe=recipe) for _ in range(3))
    ).to("cuda", torch.bfloat16)
    twin = copy.deepcopy(blocks)
    generator = torch.Generator("cuda").manual_seed(2)
    inputs = [torch.randn(2, 256, 256, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4)]

    def run(model: nn.Module, x: Tensor) -> list[Tensor]:
        for p in model.parameters():
            p.grad = None
        out = model(x.clone())
        out.float().square().mean().backward()
        return [out.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with lighterage.offload(blocks, keep_last=1, min_bytes=4096) as offloader:
        lighterage.make_graphed_callables(blocks, (inputs[0],))
        assert offloader.stats().bytes_in > 0
        for x in inputs:
            got, wanted = run(blocks, x), run(twin, x)
            assert torch.equal(got[0], wanted[0])
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)
