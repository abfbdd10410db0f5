"""Runs one program without and with offload, and demands the same bits, bytes that moved, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import lighterage

Given = Callable[[nn.Module], nn.Module | Iterable[nn.Module]]
Prepare = Callable[[nn.Module], nn.Module]
Step = Callable[[nn.Module, int], torch.Tensor]


class Block(nn.Module):
    """A residual layer that saves inputs, outputs, masks and views."""

    def __init__(self, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = dropout
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count()
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * value
        h = torch.nn.functional.dropout(h, self.dropout, self.training)
        return x + self.down(h)

    @torch._dynamo.disable
    def count(self) -> None:
        self.num_forwards += 1


class CleanBlock(Block):
    """The same, with nothing that breaks a graph."""

    def count(self) -> None:
        pass


class Model(nn.Module):
    """Embedding-like stem, a list of layers, a head."""

    def __init__(
        self, num_layers: int = 4, width: int = 16, dropout: float = 0.0, block: type[nn.Module] = Block
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.layers = nn.ModuleList(block(width, dropout) for _ in range(num_layers))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            x = layer(x)
        return self.head(x).log_softmax(-1)


def batch(seed: int, rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 5, 8, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    parameter = next(model.parameters(), None)  # replicas of data parallelism have none
    x = batch(seed) if parameter is None else batch(seed).to(parameter.device)
    out: torch.Tensor = model(x)
    return (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum()


def train_step(model: nn.Module, seed: int) -> torch.Tensor:
    loss = loss_of(model, seed)
    loss.backward()
    return loss.detach()


def identity(model: nn.Module) -> nn.Module:
    return model


def layers_of(model: nn.Module) -> nn.Module:
    layers = model.layers
    assert isinstance(layers, nn.Module)
    return layers


@dataclasses.dataclass
class Trace:
    """All bits that a training shows: losses, gradients after each step, state at the end."""

    losses: list[torch.Tensor]
    grads: list[dict[str, torch.Tensor]]
    state: dict[str, torch.Tensor]


def train(model: nn.Module, step: Step, named: nn.Module, steps: int) -> Trace:
    losses, grads = [], []
    for seed in range(steps):
        torch.manual_seed(seed)
        losses.append(step(model, seed).clone())
        grads.append({name: p.grad.clone() for name, p in named.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for p in named.parameters():
                if p.grad is not None:
                    p -= 0.05 * p.grad
                    p.grad = None
    return Trace(losses, grads, {name: t.clone() for name, t in named.state_dict().items()})


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the tensors are equal bit by bit; NaN equals itself, 0.0 differs from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def assert_same(plain: Trace, offloaded: Trace) -> None:
    for step, (a, b) in enumerate(zip(plain.losses, offloaded.losses, strict=True)):
        assert same_bits(a, b), f"loss of step {step}: {a} without offload, {b} with it"
    for step, (before, after) in enumerate(zip(plain.grads, offloaded.grads, strict=True)):
        assert before.keys() == after.keys()
        different = [name for name in before if not same_bits(before[name], after[name])]
        assert before and not different, f"gradients of step {step} differ: {different}"
    different = [name for name in plain.state if not same_bits(plain.state[name], offloaded.state[name])]
    assert not different, f"state differs: {different}"


def assert_nothing_left(offloader: lighterage.Offloader) -> None:
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert offloader.sections == []
    # A copy that nobody waits for, of what backward wanted before it had left, may still be under way.
    deadline = time.monotonic() + 5
    while offloader.stats().host_bytes_in_use > 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    stats = offloader.stats()
    assert stats.host_bytes_in_use == 0
    assert stats.disk_bytes_in_use == 0


@dataclasses.dataclass
class Run:
    """What a compared pair leaves for further claims."""

    plain: nn.Module
    offloaded: nn.Module
    total: lighterage.OffloadStats
    report: lighterage.Report


def compare(
    make: Callable[[], nn.Module],
    *,
    given: Given = layers_of,
    before: Prepare = identity,
    after: Prepare = identity,
    step: Step = train_step,
    steps: int = 3,
    moves: bool = True,
    **policy: Any,
) -> Run:
    """Train two equal models, the second with offload, and compare every bit.

    Args:
        make: a fresh model; it is seeded here.
        given: what `offload` is given of the model.
        before, after: what is done to the model before and after `offload`, as `torch.compile`; both are done to the
            plain model too.
        step: forward and backward with a seed; the loss.
        moves: whether bytes must have moved.
    """
    torch.manual_seed(0)
    plain = make()
    model = copy.deepcopy(plain)
    expected = train(after(before(plain)), step, plain, steps)
    prepared = before(model)
    options: dict[str, Any] = {"min_bytes": 64, "keep_last": 1} | policy
    with lighterage.offload(given(model), **options) as offloader:
        got = train(after(prepared), step, model, steps)
        assert_same(expected, got)
        assert_nothing_left(offloader)
        total, report = offloader.stats(total=True), offloader.report()
    if moves:
        assert total.bytes_out > 0
        assert total.bytes_in > 0
    assert_nothing_left(offloader)
    return Run(plain, model, total, report)


def stood_aside(report: lighterage.Report, word: str) -> int:
    """How often sections stood aside for a reason that names `word`."""
    return sum(count for _, reason, count in report.stood_aside if word in reason)
