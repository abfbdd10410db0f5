"""A stack of layers for tests of graphs, and what is compared of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

WIDTH, ROWS, LAYERS = 512, 2048, 6
LONG = 100_000_000
"""Cycles: some 50 ms, longer than anything a test issues meanwhile."""
FORBIDDEN = pytest.param("forbidden", marks=pytest.mark.cuda_error)
"""An error that CUDA itself raises, for what no capture may do."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 8 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().pow(2).mean()


def make(layers: int = LAYERS) -> Model:
    torch.manual_seed(0)
    return Model(layers).cuda()


def batch(seed: int = 0, rows: int = ROWS) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(rows, WIDTH, device="cuda", generator=generator)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(x)
    loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted)
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(a, b), f"tensor {index} differs"


class CapturedStep:
    """Forward and backward of a model in one graph, as the PyTorch documentation has it."""

    def __init__(
        self, model: nn.Module, x: Tensor, pool: object = None, warm: int = 3, around: Callable[[], None] | None = None
    ) -> None:
        self.model = model
        self.x = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm):
                step(model, self.x)
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.loss = model(self.x)
            self.loss.backward()
            self.loss = self.loss.detach()
            if around is not None:
                around()
        self.grads = [p.grad for p in model.parameters() if p.grad is not None]

    def replay(self, x: Tensor) -> list[Tensor]:
        self.x.copy_(x)
        self.graph.replay()
        return [self.loss.clone(), *(grad.clone() for grad in self.grads)]


@contextlib.contextmanager
def captured_raw(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture on the current stream without waiting for the device before; over however the block ends."""
    graph.capture_begin()
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether `check` becomes true: what the driver does when a graph is gone it does on a thread of its own."""
    until = time.monotonic() + seconds
    while not check():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True
