"""Host cost of one saved tensor, packed and unpacked, beside `torch.autograd.graph.save_on_cpu`.

    python -m benchmarks.overhead

One chain of cheap operations saves many tensors; what a step takes longer under hooks, divided by the number of saves,
is the cost of a save. The ways take turns, so that drift of the machine falls on all of them.

For CPU tensors `save_on_cpu` has nothing to do: it hands back the tensor it was given. What moving bytes costs at the
least is seen in the row that copies each tensor once each way.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import lighterage
from benchmarks.environment import capture

NUM_SAVES = 200
SIZES = {"1 KiB": 1024, "64 KiB": 64 * 1024, "1 MiB": 1024**2}


class Chain(nn.Module):
    """`NUM_SAVES` operations in a row, each of which saves its own result and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(NUM_SAVES):
            x = torch.sigmoid(x)
        return x


@contextlib.contextmanager
def plain_hooks() -> Iterator[None]:
    """The least that hooks can cost in Python: a detached tensor out, the same one back."""
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
        yield


@contextlib.contextmanager
def copying_hooks() -> Iterator[None]:
    """A copy out and a copy back, by whoever packs and unpacks."""
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor.detach().clone(), lambda tensor: tensor.clone()
    ):
        yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to save."""

    name: str
    chain: Chain
    around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    offloader: lighterage.Offloader | None = None


def ways() -> list[Way]:
    """No hooks, empty ones, ones that copy, PyTorch's own; then ours: kept, to memory, to disk."""
    found = [
        Way(name="no hooks", chain=Chain()),
        Way(name="empty Python hooks", chain=Chain(), around=plain_hooks),
        Way(name="hooks that copy", chain=Chain(), around=copying_hooks),
        Way(name="save_on_cpu", chain=Chain(), around=torch.autograd.graph.save_on_cpu),
    ]
    for name, fields in (
        ("lighterage, kept", {"min_bytes": 1 << 50}),
        ("lighterage, to memory", {"min_bytes": 0, "tier": "host"}),
        ("lighterage, to disk", {"min_bytes": 0, "tier": "disk"}),
    ):
        chain = Chain()
        found.append(Way(name=name, chain=chain, offloader=lighterage.offload([chain], keep_last=0, **fields)))
    return found


def step_us(way: Way, x: Tensor) -> tuple[float, float]:
    """Microseconds of one forward and of its backward."""
    gc.disable()
    start = time.perf_counter()
    with way.around():
        out = way.chain(x)
    between = time.perf_counter()
    out.backward(gradient=x.detach())
    end = time.perf_counter()
    gc.enable()
    x.grad = None
    return (between - start) * 1e6, (end - between) * 1e6


def measure(nbytes: int, rounds: int) -> list[dict[str, object]]:
    """For each way, the microseconds that a save adds to forward and to backward, and the ratio to `save_on_cpu`."""
    x = torch.randn(nbytes // 4, requires_grad=True)
    every = ways()
    times: dict[str, list[tuple[float, float]]] = {way.name: [] for way in every}
    for turn in range(-3, rounds):
        for way in every:
            taken = step_us(way, x)
            if turn >= 0:
                times[way.name].append(taken)
    for way in every:
        if way.offloader is not None:
            way.offloader.close()
    medians = {
        name: tuple(statistics.median(column) for column in zip(*taken, strict=True)) for name, taken in times.items()
    }
    base, peer = medians["no hooks"], medians["save_on_cpu"]
    peer_us = (sum(peer) - sum(base)) / NUM_SAVES
    rows: list[dict[str, object]] = []
    for name, (forward, backward) in medians.items():
        pack_us, unpack_us = (forward - base[0]) / NUM_SAVES, (backward - base[1]) / NUM_SAVES
        rows.append(
            {
                "way": name,
                "step_us": forward + backward,
                "pack_us": pack_us,
                "unpack_us": unpack_us,
                "ratio": (pack_us + unpack_us) / peer_us if peer_us > 0 else None,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print the table; with `--out`, keep it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each way (default: 30)")
    parser.add_argument("--out", type=Path, help="folder for overhead.md and overhead.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    environment = capture(torch.device("cpu"), "benchmarks.overhead")
    results = {size: measure(nbytes, args.rounds) for size, nbytes in SIZES.items()}
    lines = ["# Host cost of a saved tensor", "", environment.to_markdown(), ""]
    lines += ["| each saved tensor | way | pack µs | unpack µs | × save_on_cpu |", "| --- | --- | --- | --- | --- |"]
    for size, rows in results.items():
        for row in rows[1:]:
            ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
            lines.append(f"| {size} | {row['way']} | {row['pack_us']:.1f} | {row['unpack_us']:.1f} | {ratio} |")
    text = "\n".join(lines)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "overhead.md").write_text(text + "\n")
        kept = {"environment": dataclasses.asdict(environment), "num_saves": NUM_SAVES, "results": results}
        (args.out / "overhead.json").write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
