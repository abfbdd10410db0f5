"""Steps replayed as CUDA graphs beside the same steps run eagerly, both with offload, and what a replay overlaps with.

    python -m benchmarks.graphs --out benchmarks/results/graphs

writes graphs.md and graphs.json into the folder and prints the former. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lighterage
from benchmarks.decoder_cases import spread
from benchmarks.decoder_model import build, inputs, twin
from benchmarks.decoder_modes import parse_policy
from benchmarks.environment import Environment, capture
from benchmarks.shapes import LLAMA_8B_X8, NARROW_DECODER, NARROW_MOE, ExpertsShape
from lighterage.nn import MoE, TransformerBlock
from lighterage.recipes import Float8BlockScaling

GIB = 1024**3
Row = dict[str, Any]
CASES = ("narrow", "overlap", "decoder")
POLICIES = (
    "keep_last=7,release_after=5,prefetch_ahead=4",
    "keep_last=6,release_after=5,prefetch_ahead=4",
    "keep_last=4,release_after=3,prefetch_ahead=2",
)


class Step:
    """Forward and backward of a model, by turns eagerly or as one graph; gradients stay in place."""

    def __init__(self, model: nn.Module, args: Sequence[Tensor], *, graph: bool) -> None:
        self.model, self.args, self.graph = model, args, None
        if not graph:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = model(*args)
            self.loss.backward()
            self.loss = self.loss.detach()

    def _run(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.loss = self.model(*self.args)
        self.loss.backward()
        self.loss = self.loss.detach()

    def __call__(self) -> None:
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()


def milliseconds(run: Callable[[], object]) -> float:
    """One run, on the device's clock."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def by_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, Row]:
    """Each in turn, again and again, so that drift falls on all; the first of three runs in a row is not counted."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, rounds):
        for name, run in steps.items():
            measured = [milliseconds(run) for _ in range(3)][1:]
            if turn >= 0:
                found[name] += measured
    return {name: spread(values) for name, values in found.items()}


def decoder(rounds: int) -> Iterator[Row]:
    """The decoder of eight Llama-8B layers under each policy: eager, and one graph."""
    device = torch.device("cuda")
    model = build(LLAMA_8B_X8, device)
    args = inputs(LLAMA_8B_X8, device)
    for policy in POLICIES:
        eager, graphed = twin(model), twin(model)
        with (
            lighterage.offload(eager.layers, **parse_policy(policy)),
            lighterage.offload(graphed.layers, **parse_policy(policy)) as offloader,
        ):
            one = Step(eager, args, graph=False)
            for _ in range(2):
                one()
            other = Step(graphed, args, graph=True)
            stats = offloader.stats()
            found = by_turns({"eager": one, "graph": other}, rounds)
            one()
            other()
            equal = bool(torch.equal(one.loss, other.loss))
        yield {"policy": policy, **found, "bytes_out": stats.bytes_out, "bytes_in": stats.bytes_in, "loss_equal": equal}
        del one, other, eager, graphed
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


class Narrow(nn.Module):
    """Transformer blocks with a mixture of experts each, in FP8."""

    def __init__(self, shape: ExpertsShape) -> None:
        super().__init__()
        recipe = Float8BlockScaling()
        self.layers = nn.ModuleList(
            TransformerBlock(
                shape.hidden,
                shape.hidden // 128,
                MoE(shape.hidden, shape.ffn, shape.experts, 2, recipe=recipe),
                recipe=recipe,
            )
            for _ in range(shape.layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.float().square().mean()


def narrow_model(shape: ExpertsShape) -> tuple[Narrow, Tensor]:
    torch.manual_seed(0)
    model = Narrow(shape).to("cuda", torch.bfloat16)
    return model, torch.randn(1, shape.rows // 2, shape.hidden, device="cuda", dtype=torch.bfloat16)


def narrow(rounds: int) -> Iterator[Row]:
    """A model that waits for its host: eager, one graph, and forward and backward graphs apart."""
    steps: dict[str, Callable[[], object]] = {}
    offloaders = []
    for name in ("eager", "graph", "graphs apart"):
        model, x = narrow_model(NARROW_MOE)
        offloaders.append(lighterage.offload(model.layers, keep_last=1, min_bytes=4096))
        if name == "graphs apart":
            lighterage.make_graphed_callables(model, (x,))
        steps[name] = Step(model, (x,), graph=name == "graph")
        steps[name]()
    moved = [offloader.stats(total=True).bytes_in for offloader in offloaders]
    found = by_turns(steps, 4 * rounds)
    for offloader in offloaders:
        offloader.close()
    yield {"shape": dataclasses.asdict(NARROW_MOE), **found, "bytes_in": moved}


class Early(nn.Module):
    """A model whose graph records an event before anything else that takes time."""

    def __init__(self, model: nn.Module, event: torch.cuda.Event) -> None:
        super().__init__()
        self.model, self.event = model, event

    def forward(self, x: Tensor, probe: Tensor) -> Tensor:
        x = x + 0
        self.event.record()
        return self.model(x, probe)


class Beside:
    """A replay on a side stream, and a kernel of the main stream that fills at most half of the multiprocessors.

    The caller's stream waits for the replay, so the main stream stays free in one of two ways: the caller is on a third
    stream, or the graph itself records the event that the caller's stream waits for.
    """

    def __init__(self, way: str, *, in_pairs: bool) -> None:
        from benchmarks.graphs_filler import fill  # needs Triton

        self.early = way == EARLY
        device = torch.device("cuda")
        model = build(NARROW_DECODER, device)
        self.args = inputs(NARROW_DECODER, device)
        self.offloader = lighterage.offload(model.layers, keep_last=2)
        self.event = torch.cuda.Event(external=True)
        self.graphed = lighterage.make_graphed_callables(Early(model, self.event) if self.early else model, self.args)
        self.side, self.third = torch.cuda.Stream(), torch.cuda.Stream()
        self.main = torch.cuda.current_stream()
        self.in_pairs = in_pairs
        self.num_multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count // 4 * 2
        self.loops = 1000
        self._fill = fill

    def _replay(self) -> None:
        with torch.cuda.stream(self.main if self.early else self.third):
            self.graphed(*self.args, cuda_graph_stream=self.side, cuda_graph_event=self.event)

    def replay(self) -> None:
        self.third.wait_stream(self.main)
        self._replay()
        self.main.wait_stream(self.side)

    def kernel(self) -> None:
        self._fill(self.loops, self.num_multiprocessors, in_pairs=self.in_pairs)

    def both(self) -> None:
        self.third.wait_stream(self.main)
        if self.early:
            self._replay()
            self.kernel()
        else:
            self.kernel()
            self._replay()
        self.main.wait_stream(self.side)

    def calibrate(self) -> None:
        """Let the kernel take as long as the replay."""
        wanted = statistics.median(milliseconds(self.replay) for _ in range(10))
        for _ in range(3):
            taken = statistics.median(milliseconds(self.kernel) for _ in range(5))
            self.loops = max(1, round(self.loops * wanted / taken))


EARLY = "an external event, recorded inside the graph"
WAYS = ("the replay is called from a third stream", EARLY)


def overlap(rounds: int) -> Iterator[Row]:
    """A replay beside an independent kernel, for both ways in which the main stream stays free.

    Last with a kernel that takes one of each pair of multiprocessors: see Note [Pairs of multiprocessors].
    """
    for way, in_pairs in ((WAYS[0], True), (WAYS[1], True), (WAYS[0], False)):
        beside = Beside(way, in_pairs=in_pairs)
        beside.calibrate()
        found = by_turns({"replay": beside.replay, "kernel": beside.kernel, "both": beside.both}, 2 * rounds)
        moved = beside.offloader.stats(total=True).bytes_out
        yield {
            "way": way,
            "in_pairs": in_pairs,
            "num_multiprocessors": beside.num_multiprocessors,
            **found,
            "bytes_out": moved,
        }
        beside.offloader.close()


def to_markdown(results: Row, environment: Environment) -> str:
    """The tables, each figure beside what it has to reach."""
    lines = ["# Graphs", "", environment.to_markdown(), ""]
    if "decoder" in results:
        lines += [
            "## Decoder of 8 Llama-8B layers, whole step in one graph, with offload",
            "",
            "| policy | eager ms | graph ms | graph / eager | to reach | bytes out, in | same loss |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in results["decoder"]:
            ratio = row["graph"]["median"] / row["eager"]["median"]
            lines.append(
                f"| `{row['policy']}` | {_ms(row['eager'])} | {_ms(row['graph'])} | {ratio:.3f} | "
                f"{_verdict(ratio <= 1.02, '≤ 1.02')} | {row['bytes_out'] / GIB:.2f}, {row['bytes_in'] / GIB:.2f} "
                f"GiB | {'yes' if row['loss_equal'] else 'no'} |"
            )
        lines.append("")
    if "narrow" in results:
        lines += [
            "## A model that waits for its host, with offload",
            "",
            f"{NARROW_MOE.name}, H {NARROW_MOE.hidden}, {NARROW_MOE.rows // 2} tokens, FP8 block scaling.",
            "",
            "| eager ms | one graph ms | graphs apart ms | eager / one graph | to reach |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in results["narrow"]:
            times = row["eager"]["median"] / row["graph"]["median"]
            lines.append(
                f"| {_ms(row['eager'])} | {_ms(row['graph'])} | {_ms(row['graphs apart'])} | {times:.2f} | "
                f"{_verdict(times >= 1.5, '≥ 1.5')} |"
            )
        lines.append("")
    if "overlap" in results:
        lines += [
            "## A replay on a side stream beside a kernel of the main stream",
            "",
            f"{NARROW_DECODER.name}, H {NARROW_DECODER.hidden}, {NARROW_DECODER.seq} tokens, forward, with offload.",
            "",
            "| how the main stream stays free | replay ms | kernel ms | it takes | both ms | both / sum | to reach |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in results["overlap"]:
            ratio = row["both"]["median"] / (row["replay"]["median"] + row["kernel"]["median"])
            lines.append(
                f"| {row['way']} | {_ms(row['replay'])} | {_ms(row['kernel'])} | {row['num_multiprocessors']} "
                f"multiprocessors, {'whole pairs' if row['in_pairs'] else 'one of each pair'} | "
                f"{_ms(row['both'])} | {ratio:.2f} | "
                f"{_verdict(ratio <= 0.75, '≤ 0.75') if row['in_pairs'] else 'no pair is left for clusters'} |"
            )
        lines.append("")
    return "\n".join(lines)


def _ms(row: Row) -> str:
    return f"{row['median']:.2f} ({row['min']:.2f}–{row['max']:.2f})"


def _verdict(reached: bool, target: str) -> str:
    return f"{target}: {'reached' if reached else 'missed'}"


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases; 0 if all ran, whatever they show."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graphs", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for graphs.md and graphs.json")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.graphs needs a CUDA device, and there is none.", file=sys.stderr)
        return 1
    environment = capture(torch.device("cuda"), "benchmarks.graphs")
    results: Row = {"environment": dataclasses.asdict(environment)}
    measures = {"narrow": narrow, "overlap": overlap, "decoder": decoder}
    for name, measure in measures.items():
        if name in args.cases:
            start = time.perf_counter()
            results[name] = []
            for row in measure(args.rounds):
                results[name].append(row)
                if args.out is not None:  # after each row: what was measured is not lost if another fails
                    args.out.mkdir(parents=True, exist_ok=True)
                    (args.out / "graphs.md").write_text(to_markdown(results, environment) + "\n")
                    (args.out / "graphs.json").write_text(json.dumps(results, indent=1) + "\n")
                torch.cuda.empty_cache()
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(to_markdown(results, environment))
    return 0


if __name__ == "__main__":
    sys.exit(main())
