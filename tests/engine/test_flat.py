"""Law 7: what an offloader holds does not grow, over identical steps nor over steps of changing sizes."""

from __future__ import annotations

import collections
import gc
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lighterage
from lighterage import Offloader
from lighterage.engine.fenced_space import FencedSpace
from tests.engine.lockstep import eventually

WIDTH = 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight).sin()


def model_of(num_layers: int = 4) -> nn.Sequential:
    return nn.Sequential(*(Layer() for _ in range(num_layers)))


def live_objects() -> dict[str, int]:
    """Objects of the engine's own classes that the collector knows, by class."""
    gc.collect()
    for space in [one for one in gc.get_objects() if type(one) is FencedSpace]:
        with space._lock:  # a finished fence is dropped when its range is next taken: how many wait for that varies
            space._pending._sweep()
    kinds = (type(one) for one in gc.get_objects())
    count = collections.Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("lighterage"))
    del count["_HostWait"]  # one for each reload of the last steps that was late: that is up to the machine
    return dict(count)


def held(offloader: Offloader) -> dict[str, Any]:
    """What it holds once copies that nobody waited for are through: their fences are kept until that is known."""
    figures, last = _held(offloader), None
    while figures != last:
        time.sleep(0.02)
        figures, last = _held(offloader), figures
    return figures


def _held(offloader: Offloader) -> dict[str, Any]:
    offloader.stats(total=True)  # reads the fences of all the steps that it keeps
    stats = offloader.stats()
    return {
        "host_bytes_reserved": stats.host_bytes_reserved,
        "host_bytes_in_use": stats.host_bytes_in_use,
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "objects": live_objects(),
    }


def train(model: nn.Module, rows: int) -> None:
    x = torch.randn(rows, WIDTH)
    model(x).square().mean().backward()


def two_microbatches(model: nn.Module, rows: int) -> None:
    losses = [model(torch.randn(rows, WIDTH)).square().mean() for _ in range(2)]
    for loss in losses:
        loss.backward()


def dropped_graph(model: nn.Module, rows: int) -> None:
    model(torch.randn(rows, WIDTH))
    train(model, rows)


def crash(model: nn.Module, rows: int) -> None:
    def fail(*_: object) -> None:
        raise ValueError("on purpose")

    handle = model[2].register_forward_pre_hook(fail)  # type: ignore[index]
    try:
        model(torch.randn(rows, WIDTH))
    except ValueError:
        pass
    finally:
        handle.remove()
    train(model, rows)


def evaluate(model: nn.Module, rows: int) -> None:
    with torch.no_grad():
        model(torch.randn(rows, WIDTH))
    train(model, rows)


@pytest.mark.parametrize("step", [train, two_microbatches, dropped_graph, crash, evaluate])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_fifty_identical_steps_hold_what_two_held(tier: str, step: Callable[[nn.Module, int], None]) -> None:
    model = model_of()
    with lighterage.offload(model, keep_last=0, min_bytes=1, tier=tier, release_after=0) as offloader:
        for _ in range(3):
            step(model, 50)
        eventually(lambda: offloader.stats().host_bytes_in_use == 0, "bytes stay at rest")
        before = held(offloader)
        for _ in range(50):
            step(model, 50)
        after = held(offloader)
        if step in (dropped_graph, crash):  # how far copies get before their graph is gone is up to the threads
            assert after["host_bytes_reserved"] <= 2 * before["host_bytes_reserved"]
            before["host_bytes_reserved"] = after["host_bytes_reserved"]
        assert after == before
        assert offloader.stats(total=True).bytes_out > 0


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_two_hundred_steps_of_changing_sizes_stay_bounded(tier: str) -> None:
    model, chance = model_of(), random.Random(7)
    with lighterage.offload(model, keep_last=0, min_bytes=1, tier=tier) as offloader:
        sizes = [chance.randint(1, 400) for _ in range(200)]
        train(model, max(sizes))
        for rows in sizes[:20]:
            train(model, rows)
        before = held(offloader)
        for rows in sizes:
            train(model, rows)
        after, stats = held(offloader), offloader.stats()
        at_rest = stats.host_bytes_reserved if tier == "host" else offloader._stores._disk.bytes_reserved  # type: ignore[union-attr]
        assert stats.host_bytes_peak <= at_rest <= 1.5 * stats.host_bytes_peak
        for figures in (before, after):
            figures.pop("host_bytes_reserved")
        assert after == before


def test_fresh_offloaders_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()

    def one(tier: str) -> None:
        with lighterage.offload(model, keep_last=0, min_bytes=1, tier=tier):
            train(model, 20)

    for tier in ("host", "disk"):
        one(tier)
    before = live_objects(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        for tier in ("host", "disk"):
            one(tier)
    assert (live_objects(), threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_marks_do_not_pile_up() -> None:
    from lighterage.marks import _MARKS

    model = model_of()
    with lighterage.offload(model, keep_last=0, min_bytes=1, tier="host"):
        for _ in range(100):
            x = torch.randn(20, WIDTH)
            lighterage.mark_not_offload(x)
            model(x).sum().backward()
            for _ in range(10):
                lighterage.mark_offload(torch.ones(1))
    assert len(_MARKS._by_storage) <= 200
