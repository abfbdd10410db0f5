"""How many layers to keep: time and memory of a step for each `keep_last`, on your machine.

    python examples/find_keep_last.py --layers 8

While what moves fits into the time of one forward pass, a step takes no longer than without offload. Take the smallest
`keep_last` for which that is so, or the largest for which the memory suffices.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

import lighterage


def step_ms(layers: nn.Sequential, x: torch.Tensor) -> float:
    """Milliseconds of one forward and backward."""
    start = time.perf_counter()
    layers(x).float().square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    layers.zero_grad()
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = nn.Sequential(
        *(nn.TransformerEncoderLayer(args.width, 8, batch_first=True, dropout=0.0) for _ in range(args.layers))
    ).to(device)
    x = torch.randn(1, args.tokens, args.width, device=device)

    print(f"{'keep_last':>9}  {'ms a step':>9}  {'MiB moved':>9}  {'MiB kept':>9}  {'ms late':>8}")
    for keep_last in range(args.layers, -1, -1):
        with lighterage.offload(layers, keep_last=keep_last) as offloader:
            # The first step opens the tier and learns the order of backward.
            times = [step_ms(layers, x) for _ in range(args.steps + 1)][1:]
            stats = offloader.stats()
        moved, kept = stats.bytes_out / 2**20, stats.kept_bytes / 2**20
        print(f"{keep_last:>9}  {statistics.median(times):>9.1f}  {moved:>9.1f}  {kept:>9.1f}  {stats.late_ms:>8.1f}")


if __name__ == "__main__":
    main()
