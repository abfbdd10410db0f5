"""The laws on an accelerator: bits, fences, freed memory, a hot path that never waits for the device."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import lighterage
from lighterage.engine.cuda import CudaPinner
from lighterage.engine.offloader import Offloader
from lighterage.engine.policy import Policy

pytestmark = pytest.mark.gpu

WIDTH, ROWS, LAYERS = 512, 2048, 6
POLICIES = [
    {"keep_last": 0},
    {"keep_last": 1, "release_after": 0, "prefetch_ahead": 0},
    {"keep_last": 1, "release_after": 3, "prefetch_ahead": 3},
    {"keep_last": 0, "tier": "disk"},
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 8 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().pow(2).mean()


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """Make PyTorch raise where the host would wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def batch(rows: int = ROWS, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(rows, WIDTH, device="cuda", generator=generator)


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(x)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_gradients_are_bitwise_equal_and_bytes_move(policy: dict[str, object]) -> None:
    """Law 1."""
    model = Model().cuda()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, **policy) as offloader:
        for seed in range(4):
            x = batch(seed=seed)
            assert_equal(step(model, x), step(twin, x))
        stats = offloader.stats()
        assert stats.bytes_out > 0
        assert stats.bytes_in > 0
        assert stats.host_bytes_in_use == 0


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_delayed_lanes_give_the_same_bits(policy: dict[str, object]) -> None:
    """Law 6: every block has a fence. The lanes are held up at random while blocks are used again and again."""
    rng = random.Random(7)
    model = Model().cuda()
    twin = copy.deepcopy(model)
    wanted = [step(twin, batch(256 + 64 * (seed % 5), seed)) for seed in range(10)]
    offloader = Offloader(
        model.layers, Policy(**policy), before_copies=lambda: torch.cuda._sleep(rng.randrange(2_000_000))
    )
    with offloader:
        for _ in range(2):
            for seed in range(10):
                assert_equal(step(model, batch(256 + 64 * (seed % 5), seed)), wanted[seed])
        assert offloader.stats().bytes_in > 0


@pytest.mark.undisturbed
def test_forward_holds_less_by_what_was_moved() -> None:
    """Law 5: freed means freed."""
    model = Model().cuda()
    x = batch()

    def held_after_forward() -> int:
        loss = model(x)
        held = torch.cuda.memory_allocated()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return held

    held_after_forward()
    plain = held_after_forward()
    with lighterage.offload(model.layers, keep_last=1, release_after=1) as offloader:
        held_after_forward()
        held = held_after_forward()
        stats = offloader.stats()
    assert stats.still_alive_bytes == 0
    assert plain - held >= 0.97 * stats.bytes_out


@pytest.mark.undisturbed
def test_peak_memory_falls() -> None:
    model = Model(12).cuda()
    x = batch()

    def peak() -> int:
        step(model, x)
        torch.cuda.reset_peak_memory_stats()
        step(model, x)
        return torch.cuda.max_memory_allocated()

    plain = peak()
    with lighterage.offload(model.layers, keep_last=1, prefetch_ahead=1) as offloader:
        peak()
        offloaded = peak()
        assert plain - offloaded > offloader.stats().bytes_out // 2


@pytest.mark.undisturbed
def test_a_warm_step_never_waits_for_the_device() -> None:
    """Law 7."""
    model = Model().cuda()
    x = batch()
    with lighterage.offload(model.layers, keep_last=1) as offloader:
        for _ in range(4):
            step(model, x)
        reserved = offloader.stats().host_bytes_reserved
        torch.cuda.synchronize()
        with waits_are_errors():
            model.zero_grad(set_to_none=True)
            model(x).backward()
        assert offloader.stats().host_bytes_reserved == reserved


@pytest.mark.undisturbed
def test_memory_stays_flat_while_sizes_change() -> None:
    model = Model(4).cuda()
    rng = random.Random(3)
    with lighterage.offload(model.layers, keep_last=0) as offloader:
        sizes = [256 * rng.randrange(1, 17) for _ in range(20)]
        for rows in sizes * 2:
            step(model, batch(rows))
        device, host = torch.cuda.memory_allocated(), offloader.stats().host_bytes_reserved
        for rows in sizes * 4:
            step(model, batch(rows))
        assert offloader.stats().host_bytes_reserved == host
        assert torch.cuda.memory_allocated() <= device + (1 << 20)


def test_reloaded_tensors_keep_their_address_modulo_512() -> None:
    seen: list[tuple[int, int]] = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, view):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(view)
            ctx.address = view.data_ptr()
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):  # type: ignore[no-untyped-def]
            (view,) = ctx.saved_tensors
            seen.append((ctx.address % 512, view.data_ptr() % 512))
            return gradient, None

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Save.apply(x, torch.randn(100_000, device="cuda")[37:90_000])

    layers = nn.ModuleList(Layer() for _ in range(4))
    x = torch.randn(8, device="cuda", requires_grad=True)
    with lighterage.offload(layers, keep_last=0, release_after=0) as offloader:
        y = x
        for layer in layers:
            y = layer(y)
        y.sum().backward()
        del y
        assert offloader.stats().copies_in >= 3
    assert len(seen) == 4
    assert all(before == after != 0 for before, after in seen)


@pytest.mark.parametrize("how", ["all on a side stream", "changing streams"])
def test_side_streams_give_the_same_bits(how: str) -> None:
    model = Model().cuda()
    twin = copy.deepcopy(model)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with lighterage.offload(model.layers, keep_last=0, release_after=1):
        for seed in range(9):
            x = batch(seed=seed)
            wanted = step(twin, x)
            stream = streams[0] if how.startswith("all") else streams[seed % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = step(model, x)
            torch.cuda.current_stream().wait_stream(stream)
            assert_equal(got, wanted)


def test_dropped_graphs_and_exceptions_leave_nothing() -> None:
    """Law 3, with copies in flight when the graph goes."""
    model = Model().cuda()
    twin = copy.deepcopy(model)
    offloader = Offloader(model.layers, Policy(keep_last=0), before_copies=lambda: torch.cuda._sleep(5_000_000))
    with offloader:
        for seed in range(12):
            loss = model(batch(seed=seed))
            del loss
            x = batch(seed=100 + seed)
            assert_equal(step(model, x), step(twin, x))
            with pytest.raises(RuntimeError):
                model(torch.randn(4, WIDTH + 1, device="cuda"))
        assert offloader.stats().host_bytes_in_use == 0
        assert offloader.sections == []


def test_a_spent_budget_keeps_tensors_on_the_device() -> None:
    model = Model().cuda()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, keep_last=0, host_budget="20MiB") as offloader:
        x = batch()
        assert_equal(step(model, x), step(twin, x))
        assert "budget" in str(offloader.report())
        assert offloader.stats().host_bytes_peak <= 20 << 20


def test_failing_to_pin_keeps_tensors_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CudaPinner, address: int, nbytes: int) -> None:
        raise OSError("no more page-locked memory")

    monkeypatch.setattr(CudaPinner, "pin", refuse)
    model = Model().cuda()
    twin = copy.deepcopy(model)
    with lighterage.offload(model.layers, keep_last=0) as offloader:
        x = batch()
        assert_equal(step(model, x), step(twin, x))
        assert offloader.stats().bytes_out == 0
        assert "no more page-locked memory" in str(offloader.report())


def test_several_backwards_and_threads() -> None:
    """Law 2: any number of times, in any order, from any thread."""
    model = Model().cuda()
    twin = copy.deepcopy(model)
    xs = [batch(seed=seed) for seed in range(3)]
    wanted = [torch.autograd.grad(twin(x), list(twin.parameters())) for x in xs]
    with lighterage.offload(model.layers, keep_last=0):
        losses = [model(x) for x in xs]
        results: dict[int, tuple[torch.Tensor, ...]] = {}

        def work(index: int) -> None:
            results[index] = torch.autograd.grad(losses[index], list(model.parameters()), retain_graph=True)

        threads = [threading.Thread(target=work, args=(index,)) for index in (1, 0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(3):
            assert_equal(list(results[index]), list(wanted[index]))
            again = torch.autograd.grad(losses[index], list(model.parameters()))
            assert_equal(list(again), list(wanted[index]))


@pytest.mark.undisturbed
def test_copies_run_beside_compute_and_in_both_directions_at_once() -> None:
    model = Model(8).cuda()
    x = batch(8192)
    with lighterage.offload(model.layers, keep_last=1, release_after=4, prefetch_ahead=3):
        for _ in range(3):
            step(model, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(model, x)
            torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {"out": [], "in": [], "compute": []}
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kind = "out" if "DtoH" in event.name else "in" if "HtoD" in event.name else "compute"
        spans[kind].append((event.time_range.start, event.time_range.end))

    def overlap(a: str, b: str) -> bool:
        return any(lo < y and x_ < hi for lo, hi in spans[a] for x_, y in spans[b])

    assert overlap("out", "compute")
    assert overlap("in", "compute")


def test_tensors_of_the_host_stay_where_they_are() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()
            self.host = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            on_host = (self.host * self.host).exp()
            return self.inner(x) * on_host.sum().to(x.device)

    layers = nn.ModuleList(Mixed() for _ in range(3))
    for layer in layers:
        layer.inner.cuda()
    twin = copy.deepcopy(layers)
    run: Callable[[nn.ModuleList], list[torch.Tensor]]

    def run(stack: nn.ModuleList) -> list[torch.Tensor]:
        y = batch()
        for layer in stack:
            y = layer(y)
        return list(torch.autograd.grad(y.mean(), list(stack.parameters())))

    with lighterage.offload(layers, keep_last=0) as offloader:
        assert_equal(run(layers), run(twin))
        assert "on another device" in str(offloader.report())
        assert offloader.stats().bytes_out > 0
