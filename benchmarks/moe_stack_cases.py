"""What is measured of the stack of experts, one function a case; each returns plain data."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

import lighterage
from benchmarks.decoder_cases import Row, spread, synchronize
from benchmarks.moe_stack_model import RECIPES, Rates, Stack, StackShape, limit_ms, saved_bytes_by_formula
from lighterage.ops import grouped_linear

KEPT_LAYERS = 2


def rates(device: torch.device) -> Rates:
    """The device's copy rate, and its best dense FP8 products with the scales that a step has."""
    if device.type != "cuda":
        return Rates(copy_bytes_per_s=1e10, product_flops=1e11, weight_gradient_flops=1e11)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(partial(target.copy_, source))
    from torch.nn.functional import ScalingType, scaled_mm

    m, n, k = 16384, 4096, 4096
    a = torch.randn(m, k, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(n, k, device=device).to(torch.float8_e4m3fn)
    a_scale = torch.ones(k // 128, m, device=device).t()
    row_scale = torch.ones(k // 128, n, device=device).t()
    square_scale = torch.ones(n // 128, k // 128, device=device).t()
    tile, square = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    products = [
        _best_s(partial(scaled_mm, a, b.t(), a_scale, tile, scale, kind, output_dtype=torch.bfloat16))
        for scale, kind in ((square_scale, square), (row_scale, tile))
    ]
    flops = 2 * m * n * k
    return Rates(
        copy_bytes_per_s=2 * (1 << 30) / copy_s,
        product_flops=flops / products[0],
        weight_gradient_flops=flops / products[1],
    )


def bf16_rates(device: torch.device, known: Rates) -> Rates:
    """The same with products in bf16."""
    if device.type != "cuda":
        return known
    a = torch.randn(16384, 4096, device=device, dtype=torch.bfloat16)
    b = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    flops = 2 * 16384 * 4096 * 4096 / _best_s(lambda: a @ b.t())
    return dataclasses.replace(known, product_flops=flops, weight_gradient_flops=flops)


def _best_s(call: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@contextlib.contextmanager
def _mode(stack: Stack, mode: str) -> Iterator[lighterage.Offloader | None]:
    if mode == "none":
        yield None
        return
    # Released as late as all of it still is gone when forward ends.
    with lighterage.offload(stack.layers, keep_last=KEPT_LAYERS, release_after=KEPT_LAYERS) as offloader:
        yield offloader


def steps(shape: StackShape, name: str, device: torch.device, known: Rates, *, rounds: int, warm: int) -> list[Row]:
    """Steps without offload, and with all layers but the last two offloaded."""
    stack = Stack(shape, RECIPES[name], device)
    x, gradient = stack.inputs()
    rows = []
    limit = limit_ms(shape, name, known)
    for mode in ("none", "offload") if shape.layers > KEPT_LAYERS else ("none",):
        row: Row = {"shape": shape.name, "experts": shape.experts, "recipe": name, "mode": mode, "limit_ms": limit}
        with _mode(stack, mode) as offloader:
            timed = [_step(stack, x, gradient) for _ in range(warm + rounds)][warm:]
            row["device"] = spread([step["device_ms"] for step in timed])
            row["host_forward"] = spread([step["forward_ms"] for step in timed])
            row["host"] = spread([step["host_ms"] for step in timed])
            row["held_bytes"] = _held_after_forward(stack, x)
            row["launches"] = _launches(stack, x, gradient)
            if offloader is not None:
                stats = offloader.stats()
                row["stats"] = dataclasses.asdict(stats)
        rows.append(row)
        if mode == "offload":
            moved = shape.layers - KEPT_LAYERS
            row["layers_moved"] = moved
            row["saved_by_them_bytes"] = moved * _saved_bytes(stack, x)
            row["freed_bytes"] = rows[0]["held_bytes"] - row["held_bytes"]
            row["copies_a_layer"] = row["stats"]["copies_out"] / moved
    return rows


def _step(stack: Stack, x: torch.Tensor, gradient: torch.Tensor) -> Row:
    stack.zero_grad(set_to_none=True)
    x.grad = None
    synchronize(x.device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if x.is_cuda else []
    if events:
        events[0].record()
    start = time.perf_counter()
    y = stack(x)
    forward = time.perf_counter()
    y.backward(gradient)
    done = time.perf_counter()
    if events:
        events[1].record()
    synchronize(x.device)
    wall = time.perf_counter()
    device_ms = events[0].elapsed_time(events[1]) if events else (wall - start) * 1e3
    return {"device_ms": device_ms, "forward_ms": (forward - start) * 1e3, "host_ms": (done - start) * 1e3}


def _held_after_forward(stack: Stack, x: torch.Tensor) -> int:
    """Bytes that a forward leaves allocated, its output apart."""
    if not x.is_cuda:
        return 0
    stack.zero_grad(set_to_none=True)
    gc.collect()
    synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    y = stack(x)
    synchronize(x.device)
    held = torch.cuda.memory_allocated(x.device) - before - y.nbytes
    y.backward(torch.zeros_like(y))
    stack.zero_grad(set_to_none=True)
    x.grad = None
    return held


def _launches(stack: Stack, x: torch.Tensor, gradient: torch.Tensor) -> int | None:
    """Kernels of one step; copies and fills are not kernels."""
    if not x.is_cuda:
        return None
    stack.zero_grad(set_to_none=True)
    x.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stack(x).backward(gradient)
        synchronize(x.device)
    return _kernels(profile)


def launches(device: torch.device) -> Row:
    """Kernels of one forward and backward of a grouped layer in FP8 blocks, on the grouped path."""
    counts: Row = {}
    for experts in (8, 64, 256) if device.type == "cuda" else ():
        weight = torch.randn(experts, 512, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
        x = torch.randn(32768, 512, device=device, dtype=torch.bfloat16, requires_grad=True)
        splits = [len(x) // experts] * experts
        for _ in range(2):  # the first time kernels are compiled
            weight.grad = x.grad = None
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                y = grouped_linear(x, weight, splits, recipe=RECIPES["fp8_block"], backend="triton")
                y.backward(x.detach())
                synchronize(device)
        counts[str(experts)] = _kernels(profile)
    return counts


def _kernels(profile: torch.profiler.profile) -> int:
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)


def _saved_bytes(stack: Stack, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd saves for one layer, parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    from lighterage.formats.splits import Splits

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = stack.layers[0](x, Splits.of(stack.shape.splits, len(x), x.device))
    del y
    return sum(storages.values())


def bytes_saved(shape: StackShape, device: torch.device) -> list[Row]:
    """Bytes that a layer saves for a token, of each recipe, beside what the formula says."""
    rows = []
    for name, recipe in RECIPES.items():
        stack = Stack(dataclasses.replace(shape, layers=1), recipe, device)
        x, _ = stack.inputs()
        measured, formula = _saved_bytes(stack, x), saved_bytes_by_formula(shape, name)
        rows.append({"recipe": name, "measured": measured / shape.tokens, "formula": formula / shape.tokens})
    return rows


def host_time(shape: StackShape, name: str, device: torch.device, *, rounds: int) -> Row:
    """Host time that offload adds to a moved layer's forward and backward, where the device is ahead of the host.

    Two stacks with the same weights, one of them offloaded, take turns step by step, and each goes first every other
    time. What is added is the median of the differences within a pair: whatever else the machine does to one step of a
    pair it does to the other, or else the pair is one outlier among many.
    """
    plain, moving = (Stack(shape, RECIPES[name], device) for _ in range(2))
    moving.load_state_dict(plain.state_dict())
    x, gradient = plain.inputs()
    stacks = {"none": plain, "offload": moving}
    steps: dict[str, list[Row]] = {mode: [] for mode in stacks}
    with _mode(moving, "offload") as offloader:
        assert offloader is not None
        for index in range(10 + 2 * rounds):
            for mode in ("none", "offload") if index % 2 else ("offload", "none"):
                gc.disable()  # a collection in one of the two would be taken for its cost
                step = _step(stacks[mode], x, gradient)
                gc.enable()
                if index >= 10:
                    steps[mode].append(step)
            if index % 10 == 0:
                gc.collect()
        copies = offloader.stats().copies_out
    moved = shape.layers - KEPT_LAYERS
    us = {
        mode: {part: [step[f"{part}_ms"] * 1e3 for step in found] for part in ("host", "forward")}
        for mode, found in steps.items()
    }
    added = [(after - before) / moved for before, after in zip(us["none"]["host"], us["offload"]["host"], strict=True)]
    quartiles = statistics.quantiles(added, n=4)
    return {
        "shape": dataclasses.asdict(shape),
        "recipe": name,
        "num_pairs": len(added),
        "host_us": {mode: statistics.median(found["host"]) for mode, found in us.items()},
        "forward_us": {mode: statistics.median(found["forward"]) for mode, found in us.items()},
        "copies_out": copies,
        "added_us_a_layer": quartiles[1],
        "added_us_a_layer_quartiles": [quartiles[0], quartiles[2]],
    }
