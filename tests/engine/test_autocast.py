"""Claims about autocast: same bits, what it made of parameters never moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.engine.twin import Block, Model, batch, compare, layers_of

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def whole(model: nn.Module) -> nn.Module:
    return model


def autocast_step(dtype: torch.dtype, **options: bool) -> Callable[[nn.Module, int], torch.Tensor]:
    def step(model: nn.Module, seed: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype, **options):
            out = model(batch(seed))
        loss = (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        loss.backward()
        return loss.detach()

    return step


@dtypes
@pytest.mark.parametrize("cache_enabled", [True, False], ids=["weight cache", "no weight cache"])
@pytest.mark.parametrize("given", [layers_of, whole], ids=["layers", "whole model"])
def test_training_under_autocast_gives_the_same_bits(
    given: Callable[[nn.Module], nn.Module], cache_enabled: bool, dtype: torch.dtype
) -> None:
    compare(Model, given=given, step=autocast_step(dtype, cache_enabled=cache_enabled), keep_last=0)


@dtypes
def test_casts_of_parameters_never_move(dtype: torch.dtype) -> None:
    # No activation reaches 1 KiB; the weights do, and their casts. The first is not needed.
    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    def step(model: nn.Module, seed: int) -> torch.Tensor:
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", dtype):
            loss = model(x).float().square().sum()
        loss.backward()
        return loss.detach()

    run = compare(Thin, step=step, keep_last=0, min_bytes=1024, moves=False)
    assert run.total.bytes_out == 0
    assert sum(s.kept.get("cast of a parameter", 0) for s in run.report.sections) == 3 * 64 * 64 * 2


def test_the_engine_moves_no_byte_of_any_parameter_or_its_cast() -> None:
    run = compare(Model, given=whole, step=autocast_step(torch.bfloat16), keep_last=0)
    for section in run.report.sections:
        if section.name.startswith("layers."):
            # up: 16x64, down: 32x16, both in bf16.
            assert section.kept["cast of a parameter"] == (16 * 64 + 32 * 16) * 2


@dtypes
def test_autocast_inside_a_section_gives_the_same_bits(dtype: torch.dtype) -> None:
    class Inside(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype):
                return super().forward(x).float()

    compare(lambda: Model(block=Inside), keep_last=0)


def test_autocast_around_checkpointed_sections_gives_the_same_bits() -> None:
    class Checkpointed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.head(x).log_softmax(-1)

    run = compare(Checkpointed, given=whole, step=autocast_step(torch.bfloat16), keep_last=0)
    assert [layer.num_forwards for layer in run.offloaded.layers] == [6, 6, 6, 6]
