"""Transformer Engine's offload schedules over lighterage: by default, by hand, and either of them in a CUDA graph.

    python examples/transformer_engine_schedules.py --schedule default
    python examples/transformer_engine_schedules.py --schedule manual
    python examples/transformer_engine_schedules.py --schedule graph

A program that was written for `transformer_engine.pytorch` changes its import; the loops below are as they were.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

import lighterage.compat.transformer_engine as te


def step_by_default(layers: nn.ModuleList, x: Tensor, num_offloaded: int) -> te.CpuOffloadContext:
    """The first `num_offloaded` layers' activations leave during forward and return during backward."""
    context, sync_function = te.get_cpu_offload_context(
        enabled=True, num_layers=num_offloaded, model_layers=len(layers)
    )
    for layer in layers:
        # Only what a layer saves for its backward is looked at, so the context goes around the layer alone.
        with context:
            x = layer(x)
        x = sync_function(x)
    x.square().mean().backward()
    assert isinstance(context, te.CpuOffloadContext)
    return context


def step_by_hand(layers: nn.ModuleList, x: Tensor) -> te.CpuOffloadContext:
    """Every layer's activations leave as soon as it has run; all return before backward begins."""
    context, sync_function, controller = te.get_cpu_offload_context(
        enabled=True, model_layers=len(layers), manual_synchronization=True
    )
    for index, layer in enumerate(layers):
        with context:
            x = layer(x)
        x = sync_function(x)
        controller.start_offload_layer(index)  # queues copies; the host goes on
    for index in range(len(layers)):
        controller.release_activation_forward_gpu_memory(index)  # memory is free once the copies are through
    for index in reversed(range(len(layers))):
        controller.start_reload_layer(index)  # what backward reads first comes first
    x.square().mean().backward()
    assert isinstance(context, te.CpuOffloadContext)
    return context


def step_in_a_graph(layers: nn.ModuleList, x: Tensor, num_offloaded: int) -> te.CpuOffloadContext:
    """The default schedule, captured with its backward pass on data that do not matter, and replayed on `x`."""
    context, sync_function = te.get_cpu_offload_context(
        enabled=True, num_layers=num_offloaded, model_layers=len(layers), retain_pinned_cpu_buffers=True
    )
    static_x = torch.zeros_like(x)

    def step() -> None:
        for parameter in layers.parameters():
            parameter.grad = None  # so that the graph writes gradients instead of adding to them
        h = static_x
        for layer in layers:
            with context:
                h = layer(h)
            h = sync_function(h)
        h.square().mean().backward()

    # Kernels are chosen and pinned memory grows in the first passes, on a stream of their own, as in any capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    static_x.copy_(x)
    graph.replay()  # copies out and back run inside, beside the layers, at each replay
    torch.cuda.synchronize()  # the graph is not kept here, so let it finish
    assert isinstance(context, te.CpuOffloadContext)
    return context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--schedule", choices=["default", "manual", "graph"], default="default")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--offloaded", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.schedule == "graph" and device == "cpu":
        parser.exit(1, "a CUDA graph needs a CUDA device, and there is none\n")
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(args.width, args.width) for _ in range(args.layers)).to(device)
    plain = copy.deepcopy(layers)
    x = torch.randn(16, 64, args.width, device=device)

    h = x
    for layer in plain:
        h = layer(h)
    h.square().mean().backward()

    if args.schedule == "manual":
        context = step_by_hand(layers, x)
    else:
        step = step_by_default if args.schedule == "default" else step_in_a_graph
        context = step(layers, x, args.offloaded)
    stats = context.offloader.stats()
    moved = sum(section.bytes_out > 0 for section in context.offloader.report().sections)
    context.close()
    same = all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), layers.parameters(), strict=True))
    print(f"{args.schedule}: {moved} of {args.layers} layers moved {stats.bytes_out / 2**20:.1f} MiB out")
    print(f"and {stats.bytes_in / 2**20:.1f} MiB in; gradients are those without offload: {same}")


if __name__ == "__main__":
    main()
