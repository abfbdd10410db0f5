"""One run of the demo: trains the model, with or without offload, and keeps what the comparison needs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lighterage
from lighterage.cli.demo_config import DemoConfig
from lighterage.cli.demo_measure import LiveBytes, SavedAllocations, StepClock, over_time
from lighterage.cli.demo_model import Decoder
from lighterage.cli.demo_moe import MoEDecoder
from lighterage.cli.demo_text import batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one run left behind; every tensor of it is gone."""

    losses: list[float]
    """Of each step, in float32's own value."""

    gradients: list[dict[str, str]]
    """For each step, a digest of each parameter's gradient."""

    weights: dict[str, str]
    """A digest of each parameter after the last step."""

    step_ms: list[float]
    """Of the timed steps."""

    peak_bytes: int
    """Most bytes of activations and temporaries on the device at once."""

    times_ms: list[float]
    """Where in the step each of `live_bytes` was."""

    live_bytes: list[int]
    """Bytes of activations and temporaries on the device, after every operation of one step."""

    backward_ms: float
    """Where in the step backward began."""

    num_allocations: int | None
    """Without offload: allocations worth moving that one step saved in the layers whose saved tensors are to move."""

    stats: lighterage.OffloadStats | None
    """Of the last timed step, with offload."""

    report: str | None
    """The offloader's own report, with offload."""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)


def train(config: DemoConfig, text: Tensor, *, offload: bool, on_step: Callable[[int, float], None]) -> RunResult:
    """Train `config.steps` steps from `config.seed`, and call `on_step(step, loss)` after each."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    moving = list(model.layers)[: config.layers - config.keep_last]
    saved = SavedAllocations(model, moving, lighterage.Policy.min_bytes)
    clock = StepClock(list(model.layers), device)
    live: LiveBytes | None = None
    losses: list[float] = []
    gradients: list[dict[str, str]] = []
    step_ms: list[float] = []
    places_ms: list[list[float]] = []
    peak_bytes = 0
    stats = report = None

    with contextlib.ExitStack() as stack:
        if offload:
            offloader = stack.enter_context(
                lighterage.offload(model.layers, keep_last=config.keep_last, tier=config.tier)
            )
        source = batches(text, batch=config.batch, seq=config.seq, seed=config.seed)
        for step, (text_BT, next_BT) in zip(range(config.steps), source, strict=False):
            text_BT, next_BT = text_BT.to(device), next_BT.to(device)
            # Gradients are zeroed, not dropped: so every step but the first finds them there already.
            optimizer.zero_grad(set_to_none=False)
            base = _start_peak(device)
            watched = step == config.steps - 1
            live = LiveBytes(clock, device, [*_resident(model, optimizer), text_BT, next_BT]) if watched else None
            start = time.perf_counter()
            with live or contextlib.nullcontext(), clock.step():
                with saved if step == 0 and not offload else contextlib.nullcontext():
                    loss = model(text_BT, next_BT)
                clock.mark()
                loss.backward()
            step_peak = _end_peak(device, base)
            optimizer.step()
            _synchronize(device)
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if step > 0 and not watched:
                step_ms.append(elapsed_ms)
                places_ms.append(clock.places_ms())
                peak_bytes = max(peak_bytes, step_peak)
                stats = offloader.stats() if offload else None
            losses.append(loss.item())
            del loss
            gradients.append({name: digest(_gradient(parameter)) for name, parameter in model.named_parameters()})
            on_step(step, losses[-1])
        if offload:
            report = str(offloader.report())

    assert live is not None, "the last step is watched"
    if device.type != "cuda":
        peak_bytes = max(nbytes for _, nbytes in live.samples)
    median_places_ms = [statistics.median(at) for at in zip(*places_ms, strict=True)]
    times_ms, live_bytes = over_time(live.samples, median_places_ms)
    return RunResult(
        losses=losses,
        gradients=gradients,
        weights={name: digest(parameter) for name, parameter in model.named_parameters()},
        step_ms=step_ms,
        peak_bytes=peak_bytes,
        times_ms=times_ms,
        live_bytes=live_bytes,
        backward_ms=median_places_ms[config.layers + 1],
        num_allocations=None if offload else saved.count,
        stats=stats,
        report=report,
    )


def make_model(config: DemoConfig) -> Decoder | MoEDecoder:
    """The model of `config`, on its device and in its dtype."""
    return _make(config).to(torch.device(config.device), _dtype(config))


def _make(config: DemoConfig) -> Decoder | MoEDecoder:
    if config.model == "dense":
        return Decoder(layers=config.layers, width=config.hidden, tokens=config.seq)
    return MoEDecoder(
        layers=config.layers,
        width=config.hidden,
        tokens=config.seq,
        experts=config.experts,
        top_k=config.top_k,
        recipe=config.recipe,
    )


def _dtype(config: DemoConfig) -> torch.dtype:
    on_cpu = torch.device(config.device).type == "cpu"
    return torch.float32 if on_cpu and config.model == "dense" else torch.bfloat16


def digest(tensor: Tensor) -> str:
    """A fingerprint of every bit of `tensor`: zeros of different sign differ, and equal NaNs are equal."""
    data = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Have PyTorch choose kernels whose results do not depend on the order of atomics.

    Without it, two runs on a GPU differ with no offload at all: attention's backward adds in any order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fill: Any = torch.utils.deterministic
    was, filled = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        fill.fill_uninitialized_memory = filled


def _resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What stays from step to step."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        yield _gradient(parameter)
        yield from (value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "every parameter takes part in the loss"
    return parameter.grad


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _end_peak(device: torch.device, base: int) -> int:
    return torch.cuda.max_memory_allocated(device) - base if device.type == "cuda" else 0
