"""Where the host time of an offloaded step goes: microseconds a call of each part of the engine, and a layer in all.

    python -m benchmarks.hotpath [--device cuda] [--tier host] [--profile]

Layers of 24 cheap operations, each of which saves its own result: all of it moved by hand, moved the same way by a
plan, and kept. First the time that offload adds to a layer, measured without any instrument: steps with and without
offload take turns, and on an accelerator nothing is waited for, so that the host's own time is what is seen. Then the
same steps with the engine's parts timed from the inside; the cost of the clock is taken off. `self` is the time in the
part itself, without the parts that it calls.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import cProfile
import functools
import gc
import pstats
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lighterage
from benchmarks.environment import capture
from benchmarks.planner_host import same_moves
from lighterage.engine import (
    allocation,
    arena,
    cpu,
    cuda,
    handles,
    opening,
    packing,
    pinned_disk,
    pinned_host,
    steps,
    streams,
    traffic,
)
from lighterage.engine.planning import autoplan, events, run

SAVES = 24
MOST_SECONDS_TO_PLAN = 60
PARTS: list[tuple[object, str, str]] = [
    (opening.Opener, "_open_section", "section: open"),
    (steps.Steps, "close_section", "section: close"),
    (packing.Packer, "pack", "pack"),
    (traffic.Traffic, "gather", "gather"),
    (traffic.Traffic, "flush", "flush"),
    (traffic.Traffic, "release_some", "release"),
    (steps.Steps, "visit", "visit"),
    (traffic.Traffic, "come_back_for", "reload: choose"),
    (traffic.Traffic, "fetch", "reload: choose"),
    (traffic.Traffic, "_bring_back", "reload: start"),
    (traffic.Traffic, "load", "load"),
    (cpu.CpuTransport, "evict", "transport: evict"),
    (cpu.CpuTransport, "restore", "transport: restore"),
    (pinned_host.HostTransport, "evict", "transport: evict"),
    (pinned_host.HostTransport, "restore", "transport: restore"),
    (pinned_disk.DiskTransport, "evict", "transport: evict"),
    (pinned_disk.DiskTransport, "restore", "transport: restore"),
    (arena.Arena, "acquire", "arena: acquire"),
    (cuda.CopyBatches, "copy", "driver: a batch of copies"),
    (streams.Streams, "after", "lane: wait for the stream"),
    (streams.Streams, "fence", "lane: fence"),
    (events.Events, "opened", "plan: section opened"),
    (events.Events, "first_save", "plan: phase of forward"),
    (events.Events, "left", "plan: section left"),
    (events.Events, "visited", "plan: phase of backward"),
    (run.PlannedOrders, "why_kept", "plan: asked of a save"),
    (run.PlannedOrders, "took", "plan: told of an allocation"),
    (autoplan.Autoplan, "step_begins", "plan: step begins"),
    (autoplan.Autoplan, "step_ended", "plan: step ended"),
    (allocation.Allocation, "room", "allocation: room"),
    (allocation.Allocation, "copied", "allocation: copied"),
    (allocation.Allocation, "use", "allocation: use"),
    (allocation.Allocation, "__del__", "allocation: end"),
    (packing, "emptied_alias", "watch"),
    (packing, "describe", "view spec"),
]


class Layer(nn.Module):
    """`SAVES` operations in a row."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(SAVES):
            x = torch.sigmoid(x)
        return x


class Meter:
    """Times calls, each apart from the timed calls inside it."""

    def __init__(self) -> None:
        self.num_calls: collections.Counter[str] = collections.Counter()
        self.inclusive_ns: collections.Counter[str] = collections.Counter()
        self.self_ns: collections.Counter[str] = collections.Counter()
        self._threads = threading.local()
        self._clock_ns = 0
        self._clock_ns = self._cost_of_the_clock()

    def wrap(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        threads, clock_ns = self._threads, self._clock_ns

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inside = getattr(threads, "inside", None)
            if inside is None:
                inside = threads.inside = []
            inside.append(0)
            start = time.perf_counter_ns()
            result = None
            try:
                result = call(*args, **kwargs)
                return result
            finally:
                taken = time.perf_counter_ns() - start
                children = inside.pop()
                if inside:
                    inside[-1] += taken + clock_ns
                key = name
                if name == "pack":
                    key = "pack: offloaded" if isinstance(result, handles.Offloaded) else "pack: kept"
                self.num_calls[key] += 1
                self.inclusive_ns[key] += taken
                self.self_ns[key] += taken - children

        return timed

    def _cost_of_the_clock(self) -> int:
        empty = self.wrap(lambda: None, "empty")
        outer = self.wrap(lambda: [empty() for _ in range(20_000)], "outer")
        outer()
        cost = self.inclusive_ns["outer"] // 20_000
        for counter in (self.num_calls, self.inclusive_ns, self.self_ns):
            counter.clear()
        return cost

    @contextlib.contextmanager
    def on(self, parts: list[tuple[object, str, str]]) -> Iterator[None]:
        """Time `parts` in everything that is made inside this context."""
        found = [(owner, name, label) for owner, name, label in parts if name in vars(owner)]
        originals = [vars(owner)[name] for owner, name, _ in found]
        for (owner, name, label), original in zip(found, originals, strict=True):
            setattr(owner, name, self.wrap(original, label))
        try:
            yield
        finally:
            for (owner, name, _), original in zip(found, originals, strict=True):
                setattr(owner, name, original)


def step_us(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Host microseconds of one forward and of its backward, with the device idle before."""
    if x.is_cuda:
        torch.cuda.synchronize()
    gc.disable()
    start = time.perf_counter()
    out = model(x)
    between = time.perf_counter()
    torch.autograd.grad(out, x, x.detach())
    end = time.perf_counter()
    gc.enable()
    return (between - start) * 1e6, (end - between) * 1e6


@contextlib.contextmanager
def attached(model: nn.Sequential, x: Tensor, *, planned: bool = False, **policy: Any) -> Iterator[None]:
    """An offloader on `model`: by hand, or under a plan that does the same."""
    if not planned:
        with lighterage.offload(model, keep_last=0, **policy):
            yield
        return
    with lighterage.offload(model, recompute="never", **policy) as offloader:
        deadline = time.monotonic() + MOST_SECONDS_TO_PLAN
        while offloader.timeline is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no plan came within {MOST_SECONDS_TO_PLAN} s: {offloader.report().plan}")
            step_us(model, x)
            time.sleep(0.01)  # the plan is made beside the steps, which are short
        plan = same_moves(offloader.timeline, len(model), release_after=1, prefetch_ahead=1)
        offloader.use_plan(plan, offloader.timeline)
        yield


def added_us(args: argparse.Namespace, x: Tensor, **policy: Any) -> tuple[float, float]:
    """Microseconds that offload adds to a layer's forward and to its backward; medians over turns."""
    plain, ours = (nn.Sequential(*(Layer() for _ in range(args.layers))) for _ in range(2))
    with attached(ours, x, **policy):
        taken: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(-5, args.rounds):
            for is_ours in (False, True):
                times = step_us(ours if is_ours else plain, x)
                if turn >= 0:
                    taken[is_ours].append(times)
    with_it, without = (
        [statistics.median(column) for column in zip(*taken[one], strict=True)] for one in (True, False)
    )
    return (with_it[0] - without[0]) / args.layers, (with_it[1] - without[1]) / args.layers


def parts_of(args: argparse.Namespace, x: Tensor, **policy: Any) -> list[str]:
    """A table: each part's calls a layer, microseconds a call, and microseconds a layer."""
    meter = Meter()
    with meter.on(PARTS):
        model = nn.Sequential(*(Layer() for _ in range(args.layers)))
        with attached(model, x, **policy):
            for _ in range(5):
                step_us(model, x)
            for counter in (meter.num_calls, meter.inclusive_ns, meter.self_ns):
                counter.clear()
            for _ in range(args.rounds):
                step_us(model, x)
    num_layers = args.layers * args.rounds
    headings = ("part", "calls a layer", "µs a call", "self µs a call", "self µs a layer")
    lines = [f"| {' | '.join(headings)} |", "| --- | --- | --- | --- | --- |"]
    for name, self_ns in sorted(meter.self_ns.items(), key=lambda item: -item[1]):
        calls = meter.num_calls[name]
        lines.append(
            f"| {name} | {calls / num_layers:.2f} | {meter.inclusive_ns[name] / calls / 1e3:.2f} "
            f"| {self_ns / calls / 1e3:.2f} | {self_ns / num_layers / 1e3:.1f} |"
        )
    return lines


def profile(args: argparse.Namespace, x: Tensor, **policy: Any) -> None:
    """The functions of the engine that take most of the forward thread's time, by cProfile."""
    model = nn.Sequential(*(Layer() for _ in range(args.layers)))
    with attached(model, x, **policy):
        for _ in range(5):
            step_us(model, x)
        watch = cProfile.Profile()
        watch.enable()
        for _ in range(args.rounds):
            step_us(model, x)
        watch.disable()
    pstats.Stats(watch).sort_stats("tottime").print_stats(25)


def main(argv: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hotpath", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tier", choices=["host", "disk"], default="host")
    parser.add_argument("--kib", type=int, default=64, help="size of each saved tensor in KiB (default: 64)")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps (default: 30)")
    parser.add_argument("--profile", action="store_true", help="print a cProfile of the offloaded steps too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device(args.device)
    x = torch.randn(args.kib * 256, device=device, requires_grad=True)
    offloaded, kept = {"min_bytes": 1, "tier": args.tier}, {"min_bytes": 1 << 50}
    policies = {"offloaded": offloaded, "planned": offloaded | {"planned": True}, "kept": kept}
    print(capture(device, "benchmarks.hotpath").to_markdown(), "\n")
    for name, policy in policies.items():
        forward, backward = added_us(args, x, **policy)
        print(
            f"{name}: {forward + backward:.0f} µs added a layer of {SAVES} saves (forward {forward:.0f}, backward "
            f"{backward:.0f}), {(forward + backward) / SAVES:.1f} µs a save; "
            f"to reach: {'6 µs a save' if policy is kept else '400 µs a layer'}"
        )
    for name, policy in policies.items():
        print(f"\n{name}:\n")
        print("\n".join(parts_of(args, x, **policy)))
    if args.profile:
        profile(args, x, **offloaded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
