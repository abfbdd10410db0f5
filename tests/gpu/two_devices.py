"""A stack of layers over two devices, and what each device's lanes are given, for tests of several devices."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lighterage.engine.pinned_disk import DiskTransport
from lighterage.engine.pinned_host import HostTransport
from tests.gpu.graph_models import Block

DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))
LAYERS = 8


class Piped(nn.Module):
    """The first half of the layers on one device and the second on the other; one thread runs one after another."""

    def __init__(self, devices: tuple[torch.device, ...] = DEVICES, layers: int = LAYERS) -> None:
        super().__init__()
        self.devices = devices
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        for layer, device in zip(self.layers, self.places, strict=True):
            layer.to(device)
        self.current: set[int] = set()
        """The devices that were current when a layer had run."""

    @property
    def places(self) -> list[torch.device]:
        """The device of each layer."""
        return [self.devices[number * len(self.devices) // len(self.layers)] for number in range(len(self.layers))]

    def on(self, device: torch.device) -> list[nn.Module]:
        """The layers on `device`."""
        return [layer for layer, place in zip(self.layers, self.places, strict=True) if place == device]

    def forward(self, x: Tensor) -> Tensor:
        for layer, device in zip(self.layers, self.places, strict=True):
            x = layer(x.to(device))
            self.current.add(torch.accelerator.current_device_index())
        return x.float().pow(2).mean()


class Sided(Piped):
    """The same, on a side stream of each device."""

    def forward(self, x: Tensor) -> Tensor:
        for device in self.devices:
            main, side = torch.cuda.current_stream(device), _side(device)
            x = x.to(device)  # on the main streams of both, which wait for each other
            side.wait_stream(main)
            x.record_stream(side)
            with torch.cuda.stream(side):
                for layer in self.on(device):
                    x = layer(x)
            main.wait_stream(side)
            x.record_stream(main)
        return x.float().pow(2).mean()


_sides: dict[torch.device, torch.cuda.Stream] = {}


def _side(device: torch.device) -> torch.cuda.Stream:
    # Not of the model, which is copied. Autograd remembers on which streams it saw a parameter.
    if device not in _sides:
        _sides[device] = torch.cuda.Stream(device)
    return _sides[device]


def pair(kind: type[Piped] = Piped, **options: Any) -> tuple[Piped, Piped]:
    """A model and its twin."""
    torch.manual_seed(0)
    model = kind(**options)
    return model, copy.deepcopy(model)


class Moved:
    """Bytes that the lanes of each device, by its index, were given, and reloads among them that were urgent."""

    def __init__(self) -> None:
        self.out: collections.Counter[int] = collections.Counter()
        self.back: collections.Counter[int] = collections.Counter()
        self.urgent: collections.Counter[int] = collections.Counter()

    def clear(self) -> None:
        for counted in (self.out, self.back, self.urgent):
            counted.clear()

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count from now on."""
        for kind in (HostTransport, DiskTransport):
            evict, restore = kind.evict, kind.restore

            def counted_out(one: Any, sources: Any, *, since: Any = None, evict: Any = evict) -> Any:
                self.out[one.device.index] += sum(hi - lo for _, lo, hi in sources)
                return evict(one, sources, since=since)

            def counted_back(one: Any, batches: Any, *, urgent: bool = False, restore: Any = restore) -> Any:
                nbytes = sum(resting.nbytes for batch in batches for resting, _ in batch)
                self.back[one.device.index] += nbytes
                self.urgent[one.device.index] += nbytes if urgent else 0
                return restore(one, batches, urgent=urgent)

            monkeypatch.setattr(kind, "evict", counted_out)
            monkeypatch.setattr(kind, "restore", counted_back)


def synchronize() -> None:
    """Wait for both devices."""
    for device in DEVICES:
        torch.cuda.synchronize(device)
