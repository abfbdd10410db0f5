"""Transformer Engine's two offload schedules over lighterage: by default, and by hand.

    python examples/transformer_engine_schedules.py --schedule default
    python examples/transformer_engine_schedules.py --schedule manual

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--schedule", choices=["default", "manual"], default="default")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--offloaded", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(args.width, args.width) for _ in range(args.layers)).to(device)
    plain = copy.deepcopy(layers)
    x = torch.randn(16, 64, args.width, device=device)

    h = x
    for layer in plain:
        h = layer(h)
    h.square().mean().backward()

    context = step_by_default(layers, x, args.offloaded) if args.schedule == "default" else step_by_hand(layers, x)
    stats = context.offloader.stats()
    moved = sum(section.bytes_out > 0 for section in context.offloader.report().sections)
    context.close()
    same = all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), layers.parameters(), strict=True))
    print(f"{args.schedule}: {moved} of {args.layers} layers moved {stats.bytes_out / 2**20:.1f} MiB out")
    print(f"and {stats.bytes_in / 2**20:.1f} MiB in; gradients are those without offload: {same}")


if __name__ == "__main__":
    main()
