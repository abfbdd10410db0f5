"""Several devices in one process: the same bits, each device's own lanes, and the current device as it was."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import Policy
from lighterage.cli.demo_measure import StepClock
from lighterage.engine.offloader import Offloader
from lighterage.engine.pinned_host import HostTransport
from lighterage.engine.stores import Stores
from tests.engine.twin import assert_nothing_left
from tests.gpu.graph_models import assert_equal, batch, make, step
from tests.gpu.test_moe_cuda import RECIPES, blocks
from tests.gpu.test_moe_cuda import batch as tokens
from tests.gpu.test_plans_cuda import everything
from tests.gpu.two_devices import DEVICES, Moved, Piped, Sided, pair, synchronize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    # PyTorch tells once a process of a parameter whose gradient comes on another stream than an earlier one.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning"),
]

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
POLICIES: list[dict[str, Any]] = [
    {"keep_last": 0},
    {"keep_last": 0, "release_after": 0, "prefetch_ahead": 0},
    {"keep_last": 0, "release_after": 2, "prefetch_ahead": 4},
    {"keep_last": 0, "tier": "disk"},
]


@pytest.fixture(autouse=True)
def _the_first_is_current() -> Iterator[None]:
    before = torch.cuda.current_device()
    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0
    synchronize()
    gc.collect()
    torch.cuda.set_device(before)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Moved:
    counted = Moved()
    counted.watch(monkeypatch)
    return counted


def delays(seed: int) -> Callable[[], None]:
    chance = random.Random(seed)
    return lambda: torch.cuda._sleep(chance.choice([0, 0, 200_000, 3_000_000]))


# --- plans by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delayed", [False, True], ids=["", "delayed lanes"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("kind", [Piped, Sided])
def test_layers_on_two_devices_have_the_same_bits(
    kind: type[Piped], policy: dict[str, Any], delayed: bool, moved: Moved
) -> None:
    model, twin = pair(kind)
    rows = 512 if policy.get("tier") == "disk" else 2048
    with Offloader(model.layers, Policy(**policy), before_copies=delays(5) if delayed else None) as offloader:
        for seed in range(5):
            moved.clear()
            assert_equal(step(model, batch(seed, rows)), step(twin, batch(seed, rows)))
            assert offloader.sections == []
            assert torch.cuda.current_device() == 0
        stats = offloader.stats()
        # Each device's layers save some 280 MiB, or a quarter of that.
        most = rows * MIB // 8
        assert 1.5 * most <= stats.bytes_out <= moved.out[0] + moved.out[1]
        assert stats.bytes_in == moved.back[0] + moved.back[1]
        assert min(moved.out[0], moved.out[1]) >= 0.75 * most, moved.out
        assert min(moved.back[0], moved.back[1]) >= most // 4, moved.back
        assert_nothing_left(offloader)
    assert_nothing_left(offloader)
    if kind is Piped:
        assert model.current == {0}, "a layer ran where another device was current than the program's"


def test_what_the_model_makes_on_the_current_device_is_made_on_the_program_s() -> None:
    """`torch.ones(..., device="cuda")` after a copy from the other device."""
    where: list[int] = []

    class Asks(Piped):
        def forward(self, x: Tensor) -> Tensor:
            for layer, device in zip(self.layers, self.places, strict=True):
                x = layer(x.to(device))
                where.append(torch.ones(1, device="cuda").get_device())
            return x.float().pow(2).mean()

    model, _ = pair(Asks)
    with lighterage.offload(model.layers, keep_last=0, release_after=0) as offloader:
        for seed in range(2):
            step(model, batch(seed))
        assert offloader.stats().bytes_out > 0
    assert set(where) == {0}


def test_each_device_s_memory_is_given_back(moved: Moved) -> None:
    """Law 5: what layers hold at the end of forward is less by what left, on each device."""
    model, twin = pair()
    x, held = batch(), []
    with lighterage.offload(model.layers, keep_last=0, release_after=0) as offloader:
        for one in (twin, model):
            for _ in range(4):
                step(one, x)  # gradients are made, host memory is there
            one.zero_grad(set_to_none=True)
            synchronize()
            before = [torch.cuda.memory_allocated(device) for device in DEVICES]
            moved.clear()
            loss = one(x)
            synchronize()
            held.append([torch.cuda.memory_allocated(device) - b for device, b in zip(DEVICES, before, strict=True)])
            out = dict(moved.out)
            loss.backward()
            del loss
        assert offloader.stats().still_alive_bytes == 0
        assert_nothing_left(offloader)
    for device in DEVICES:
        freed = held[0][device.index] - held[1][device.index]
        assert out[device.index] >= 200 * MIB
        assert freed >= 0.9 * out[device.index], f"{device}: {freed >> 20} MiB freed, {out[device.index] >> 20} left"


def test_dropped_graphs_and_exceptions_leave_nothing_on_either_device() -> None:
    model, twin = pair()
    with Offloader(model.layers, Policy(keep_last=0), before_copies=delays(1)) as offloader:
        for seed in range(4):
            loss = model(batch(seed))
            del loss
            with pytest.raises(RuntimeError, match=r"shape|size"):
                model(torch.randn(4, 7, device="cuda"))
            assert torch.cuda.current_device() == 0
            assert_equal(step(model, batch(seed)), step(twin, batch(seed)))
        assert_nothing_left(offloader)


# --- plans that are made ------------------------------------------------------------------------------------------


def until_planned(model: nn.Module, *offloaders: Offloader) -> None:
    for number in range(80):
        if all(offloader.plan is not None for offloader in offloaders):
            return
        step(model, batch(number))
        time.sleep(0.05)  # plans are made beside the steps
    raise AssertionError("\n".join(str(offloader.report()) for offloader in offloaders))


@pytest.mark.parametrize("mode", ["save", "recompute"])
def test_one_plan_for_both_devices_says_what_it_measures_and_keeps_the_bits(mode: Any, moved: Moved) -> None:
    model, twin = pair()
    with pytest.warns(UserWarning, match="on cuda:0 and cuda:1, and a plan is made from what .* here cuda:0"):
        offloader = lighterage.offload(model.layers, max_slowdown=0.5)
    with offloader:
        until_planned(model, offloader)
        for seed in range(3):
            assert_equal(step(model, batch(seed)), step(twin, batch(seed)))
        timeline = offloader.timeline
        assert timeline is not None
        assert len(timeline.sections) == len(model.layers)
        offloader.use_plan(everything(timeline, mode), timeline)
        for seed in range(4):
            moved.clear()
            assert_equal(step(model, batch(seed)), step(twin, batch(seed)))
        told = str(offloader.report())
        assert moved.out[0] + moved.out[1] > 0, told
        if mode == "save":
            assert min(moved.out[0], moved.out[1], moved.back[0], moved.back[1]) > 0, told
        assert_nothing_left(offloader)
    assert_nothing_left(offloader)
    assert model.current == {0}


def test_a_budget_of_two_devices_is_refused() -> None:
    model, twin = pair()
    with pytest.raises(ValueError, match=r"device_budget='1GiB' is of one device, .* cuda:0 and cuda:1\. Give the"):
        lighterage.offload(model.layers, device_budget="1GiB")
    assert_equal(step(model, batch()), step(twin, batch()))


def test_each_device_keeps_to_a_budget_of_its_own(moved: Moved) -> None:
    model, twin = pair()
    wanted = step(twin, batch(1))
    twin.zero_grad(set_to_none=True)
    options: dict[str, Any] = {"recompute": "never", "min_bytes": MIB}
    # What each device takes while all stays.
    offloaders = [lighterage.offload(model.on(device), device_budget=10**15, **options) for device in DEVICES]
    until_planned(model, *offloaders)
    budgets = []
    for offloader in offloaders:
        timeline, peak = offloader.timeline, offloader.report().predicted_peak_bytes
        assert timeline is not None and peak is not None
        saved = sum(a.held_bytes for section in timeline.sections for a in section.allocations)
        assert saved >= 200 * MIB
        budgets.append(peak - saved // 3)
        offloader.close()
    offloaders = [
        lighterage.offload(model.on(device), device_budget=budget, **options)
        for device, budget in zip(DEVICES, budgets, strict=True)
    ]
    until_planned(model, *offloaders)
    peaks = []
    for _ in range(6):
        moved.clear()
        synchronize()
        for device in DEVICES:
            torch.cuda.reset_peak_memory_stats(device)
        model.zero_grad(set_to_none=True)
        loss = model(batch(1))
        loss.backward()
        peaks.append([torch.cuda.max_memory_allocated(device) for device in DEVICES])
        assert_equal([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], wanted)
        del loss
    for offloader, device, budget in zip(offloaders, DEVICES, budgets, strict=True):
        report = offloader.report()
        assert report.predicted_peak_bytes is not None and report.predicted_peak_bytes <= budget
        # The step that is timed again begins the allocator's peak anew, so the others tell.
        most = max(peak[device.index] for peak in peaks)
        assert most <= 1.05 * budget, f"{device}: {most >> 20} MiB of {budget >> 20}\n{report}"
        assert moved.out[device.index] > 0 and moved.back[device.index] > 0, str(report)
        offloader.close()
        assert_nothing_left(offloader)
    assert model.current == {0}


# --- the lanes ----------------------------------------------------------------------------------------------------


def test_an_urgent_reload_on_the_second_device_is_read_by_a_kernel_there(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = Stores(Policy(tier="host"))
    transport = stores.open(DEVICES[1])
    assert isinstance(transport, HostTransport)
    monkeypatch.setattr(transport, "has_room", lambda: False)  # wait for host memory rather than stay
    reader, batches = transport._reader, transport._batches
    assert reader is not None and batches is not None
    reader.make_ready()
    assert torch.cuda.current_device() == 0
    read, copy, calls = reader._read, batches.copy, []
    assert read is not None

    def counted(to: Tensor, source: Tensor) -> None:
        calls.append((torch.cuda.current_device(), to.numel()))
        read(to, source)

    refused: list[int] = []

    def tried(*args: Any) -> bool:
        done = copy(*args)
        refused.extend([] if done else [torch.cuda.current_device()])
        return done

    monkeypatch.setattr(reader, "_read", counted)
    monkeypatch.setattr(batches, "copy", tried)
    try:
        generator = torch.Generator(DEVICES[1]).manual_seed(0)
        data = [
            torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=DEVICES[1], generator=generator)
            for nbytes in (512 * MIB, 3 * MIB + 5)
        ]
        rested = [transport.evict([(one.untyped_storage(), 0, one.nbytes)])[0] for one in data]
        assert torch.cuda.current_device() == 0
        backs = [torch.zeros_like(one) for one in data]
        assert all(one is not None for one in rested), transport.refusal
        synchronize()
        transport.restore([[(rested[0], backs[0])]])  # type: ignore[list-item]
        (fence,) = transport.restore([[(rested[1], backs[1])]], urgent=True)  # type: ignore[list-item]
        assert torch.cuda.current_device() == 0
        fence.order()
        seen = backs[1].clone()
        synchronize()
        assert torch.equal(seen, data[1]) and torch.equal(backs[0], data[0])
        assert {device for device, _ in calls} == {1}
        assert sum(nbytes for _, nbytes in calls) == data[1].nbytes
        assert refused == [], "copies went one by one: another device was current"
    finally:
        synchronize()
        transport.close()
        stores.close()


def test_backward_in_any_order_asks_for_what_is_away_on_either_device(moved: Moved) -> None:
    """Nothing is fetched ahead, so that each section's bytes are urgent; several graphs wait at once."""
    model, twin = pair()
    xs = [batch(seed) for seed in range(3)]
    expected = [torch.autograd.grad(twin(x), list(twin.parameters())) for x in xs]
    with lighterage.offload(model.layers, keep_last=0, release_after=0, prefetch_ahead=0) as offloader:
        for _ in range(3):
            losses = [model(x) for x in xs]
            for index in (1, 0, 2):
                got = torch.autograd.grad(losses[index], list(model.parameters()))
                assert_equal(list(got), list(expected[index]))
            del losses, got
        assert min(moved.urgent[0], moved.urgent[1]) > 0
        assert_nothing_left(offloader)


def test_the_clock_of_the_demo_is_that_of_the_device_that_it_is_given() -> None:
    model, x = make(3).to(DEVICES[1]), batch().to(DEVICES[1])
    clock = StepClock(list(model.layers), DEVICES[1])
    for _ in range(2):
        with clock.step():
            loss = model(x)
            clock.mark()
            loss.backward()
    times = clock.places_ms()
    assert len(times) == 2 * 3 + 3
    assert times == sorted(times) and times[-1] > 0


# --- graphs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES[:3], ids=str)
def test_a_graph_is_captured_and_replayed_on_the_second_device(policy: dict[str, Any], moved: Moved) -> None:
    model, twin = make(4).to(DEVICES[1]), make(4).to(DEVICES[1])
    with lighterage.offload(model.layers, **policy) as offloader:
        graphed = lighterage.make_graphed_callables(model, (batch().to(DEVICES[1]),))
        assert torch.cuda.current_device() == 0
        assert moved.out[1] > 0 and moved.back[1] > 0 and moved.out[0] == 0
        assert offloader.stats().bytes_out > 0
        for seed in (1, 2, 3, 1):
            x = batch(seed).to(DEVICES[1])
            assert_equal(step(graphed, x), step(twin, x))
            assert torch.cuda.current_device() == 0
        graphed.forward.reset()


def test_each_device_s_layers_may_have_graphs_of_their_own(moved: Moved) -> None:
    model, twin = pair()
    with lighterage.offload(model.layers, keep_last=0) as offloader:
        for device in DEVICES:
            layers = tuple(model.on(device))
            samples = tuple((batch().to(device).requires_grad_(),) for _ in layers)
            moved.clear()
            lighterage.make_graphed_callables(layers, samples)
            assert moved.out[device.index] > 0 and moved.back[device.index] > 0
            assert torch.cuda.current_device() == 0
        for seed in (1, 2, 3):
            x, y = (batch(seed).requires_grad_() for _ in range(2))
            assert_equal(step(model, x), step(twin, y))
        for layer in model.layers:
            layer.forward.reset()
        gc.collect()
        assert_equal(step(model, batch(4)), step(twin, batch(4)))
        assert offloader.sections == []


# --- kernels ------------------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention's backward adds with atomics unless told otherwise."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", RECIPES)
def test_quantized_layers_on_the_second_device_have_the_bits_of_those_on_the_first(name: str, moved: Moved) -> None:
    """Every kernel of theirs is launched where its tensors are, and not on the current device."""

    def run(layers: nn.ModuleList, device: torch.device, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        x = y = tokens(seed).to(device).requires_grad_()
        for layer in layers:
            y = layer(y)
        loss = y.float().square().mean()
        loss.backward()
        assert x.grad is not None
        found = [loss.detach(), x.grad, *(p.grad for p in layers.parameters() if p.grad is not None)]
        layers.zero_grad(set_to_none=True)
        return [one.cpu() for one in found]

    first, second = (blocks(name, num_layers=2).to(device) for device in DEVICES)
    with lighterage.offload(second, keep_last=0, min_bytes=1 << 16) as offloader:
        for seed in range(3):
            assert_equal(run(second, DEVICES[1], seed), run(first, DEVICES[0], seed))
            assert torch.cuda.current_device() == 0
        assert offloader.stats().bytes_out > 0
        assert moved.out[1] > 0 and moved.out[0] == 0


# --- what is left alone -------------------------------------------------------------------------------------------

ALONE = """
    import gc, torch, lighterage
    from torch import nn

    device = torch.device("cuda", 1)
    torch.cuda.set_device(device)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 256)) for _ in range(4)]).to(device)

    def train(model):
        for _ in range(12):
            loss = model(torch.ones(512, 256, device=device)).square().mean()
            loss.backward()
            del loss
        torch.cuda.synchronize(device)

    def tell(name):
        print(name, torch._C._cuda_hasPrimaryContext(0), flush=True)

    train(network())
    tell("plain")
    ways = {
        "host": {"keep_last": 0},
        "disk": {"keep_last": 0, "tier": "disk", "prefetch_ahead": 0},
        "planned": {"max_slowdown": 0.5, "recompute": "never"},
    }
    for name, policy in ways.items():
        model = network()
        with lighterage.offload(model, min_bytes=1024, **policy) as offloader:
            train(model)
            assert name == "planned" or offloader.stats().bytes_out > 0
        gc.collect()
        tell(name)
"""


def test_nothing_is_made_on_a_device_that_the_process_does_not_use() -> None:
    """A context is hundreds of MiB of the device of another rank. Threads begin with the first device as theirs."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split() for line in done.stdout.splitlines())
    if said["plain"] == "True":
        pytest.skip("PyTorch itself makes a context on the first device")
    assert said == {"plain": "False", "host": "False", "disk": "False", "planned": "False"}
