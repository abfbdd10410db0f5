"""What memory a price in time buys on your machine: one measurement, and a plan for each price.

    python examples/plan_for_a_price.py --layers 8

A few steps are measured, as `lighterage.offload` does anyway. Every further plan is computed from what was measured.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import lighterage
from lighterage.engine.link import measure_link

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    layers = nn.Sequential(
        *(nn.TransformerEncoderLayer(args.width, 8, batch_first=True, dropout=0.0) for _ in range(args.layers))
    ).to(device)
    x = torch.randn(1, args.tokens, args.width, device=device)

    with lighterage.offload(layers, max_slowdown=0.01) as offloader:
        while offloader.plan is None:
            layers(x).square().mean().backward()
            layers.zero_grad()
        print(offloader.plan, end="\n\n")
        timeline = offloader.timeline
    assert timeline is not None

    link = measure_link(device)
    print("price  step ms  peak GiB  moved GiB")
    for price in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0):
        plan = lighterage.plan(timeline, link, lighterage.Goal(max_slowdown=price))
        seen = lighterage.simulate(timeline, plan, link)
        print(f"{price:5.0%} {seen.step_ms:8.1f} {seen.peak_bytes / GIB:9.3f} {seen.bytes_out / GIB:10.3f}")


if __name__ == "__main__":
    main()
