"""A stack of layers under an offload context, and the same without one."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lighterage.compat.transformer_engine as te
from lighterage import Policy
from tests.engine.twin import Block

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
"""Where tensors have to be for the context to move them: with an accelerator there, CPU tensors stay."""
WIDTH = 16
NUM_LAYERS = 6
SMALL = Policy(min_bytes=64)
Forward = Callable[[Tensor], Tensor]
Program = Callable[[nn.ModuleList, "Runner"], list[Tensor]]


class Runner:
    """Runs layers, each in the context where there is one."""

    def __init__(self, context: Any = None, sync: Callable[[Tensor], Tensor] = lambda x: x, controller: Any = None):
        self.context, self.sync, self.controller = context, sync, controller

    def run(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.context is None:
            return layer(x)
        with self.context:
            x = layer(x)
        return self.sync(x)

    def forward(self, layers: Any, x: Tensor) -> Tensor:
        for layer in layers:
            x = self.run(layer, x)
        return x


def make_layers(num_layers: int = NUM_LAYERS) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Block(WIDTH) for _ in range(num_layers)).to(DEVICE)


def batch(seed: int, rows: int = 6) -> Tensor:
    x = torch.randn(rows, 5, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return x.requires_grad_()


def get_context(**options: Any) -> tuple[Any, ...]:
    """An enabled context with room for tiny tensors."""
    given = {"enabled": True, "num_layers": 3, "model_layers": NUM_LAYERS, "policy": SMALL} | options
    return te.get_cpu_offload_context(**given)


def compare(program: Program, *, moves: bool = True, **options: Any) -> Any:
    """Run `program` without and with offload; every bit is the same, bytes moved, nothing stays behind.

    Returns the figures of the run since its start.
    """
    plain = make_layers()
    layers = copy.deepcopy(plain)
    expected = [*program(plain, Runner()), *gradients(plain)]
    context, *rest = get_context(**options)
    got = [*program(layers, Runner(context, *rest)), *gradients(layers)]
    assert len(got) == len(expected) > 0
    for position, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"value {position} differs"
    assert_nothing_left(context)
    total = context.offloader.stats(total=True)
    context.close()
    if moves:
        assert total.bytes_out > 0
        assert total.bytes_in > 0
    return total


def gradients(layers: nn.Module) -> list[Tensor]:
    return [p.grad for p in layers.parameters() if p.grad is not None]


def assert_nothing_left(context: Any) -> None:
    gc.collect()
    assert context.offloader.sections == []
    assert not te.is_cpu_offload_enabled()
    deadline = time.monotonic() + 5
    while context.offloader.stats().host_bytes_in_use > 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    stats = context.offloader.stats()
    assert stats.host_bytes_in_use == 0
    assert stats.disk_bytes_in_use == 0
