"""Transformer Engine's schedules and graphed modules on a device: captured with offload, the bits of no offload."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lighterage
import lighterage.compat.transformer_engine as te
from tests.gpu.graph_models import assert_equal

pytestmark = pytest.mark.gpu

WIDTH, ROWS, LAYERS = 256, 512, 5


def batch(seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16, generator=generator)


def make() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(te.Linear(WIDTH, WIDTH, params_dtype=torch.bfloat16) for _ in range(LAYERS)).cuda()


def by_default(layers: nn.ModuleList) -> tuple[Callable[[Tensor], Tensor], te.CpuOffloadContext]:
    context, sync_function = te.get_cpu_offload_context(enabled=True, num_layers=3, model_layers=LAYERS)

    def forward(h: Tensor) -> Tensor:
        for layer in layers:
            with context:
                h = layer(h).relu()
            h = sync_function(h)
        return h

    return forward, context


def by_hand(layers: nn.ModuleList) -> tuple[Callable[[Tensor], Tensor], te.CpuOffloadContext]:
    context, sync_function, controller = te.get_cpu_offload_context(
        enabled=True, model_layers=LAYERS, manual_synchronization=True
    )

    def forward(h: Tensor) -> Tensor:
        for index, layer in enumerate(layers):
            with context:
                h = layer(h).relu()
            h = sync_function(h)
            controller.start_offload_layer(index)
        for index in range(LAYERS - 1):
            controller.release_activation_forward_gpu_memory(index)
        for index in reversed(range(LAYERS - 1)):
            controller.start_reload_layer(index)
        return h

    return forward, context


def step(layers: nn.ModuleList, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    layers.zero_grad(set_to_none=True)
    y = forward(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in layers.parameters() if p.grad is not None)]


@pytest.mark.parametrize("schedule", [by_default, by_hand])
def test_a_schedule_is_captured_as_it_is(schedule: Callable[..., object]) -> None:
    layers = make()
    twin = copy.deepcopy(layers)
    forward, context = schedule(layers)  # type: ignore[misc]

    def plain(h: Tensor) -> Tensor:
        for layer in twin:
            h = layer(h).relu()
        return h

    x = batch(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layers, forward, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layers, forward, x)
    stats = context.offloader.stats()
    assert stats.bytes_out > 0 and stats.bytes_in > 0
    for seed in (1, 2, 3):
        x.copy_(batch(seed))
        graph.replay()
        assert_equal(results, step(twin, plain, batch(seed)))
    context.close()


def test_graphed_modules_quantize_as_their_region_says() -> None:
    recipe = te.recipe.Float8BlockScaling()
    model = nn.Sequential(*make())
    twin = copy.deepcopy(model)
    with lighterage.offload(model, keep_last=1, min_bytes=4096) as offloader:
        te.make_graphed_callables(model, (batch(0),), enabled=True, recipe=recipe)
        assert offloader.stats().bytes_in > 0
        for seed in (1, 2):
            got = step(model, model, batch(seed))  # type: ignore[arg-type]
            with te.autocast(recipe=recipe):
                wanted = step(twin, twin, batch(seed))  # type: ignore[arg-type]
            assert_equal(got, wanted)
        unquantized = step(twin, twin, batch(1))  # type: ignore[arg-type]
        assert not torch.equal(step(model, model, batch(1))[0], unquantized[0])  # type: ignore[arg-type]
