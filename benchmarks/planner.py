"""Plans made from what was measured, beside what each has to reach, beside checkpointing and peers.

    python -m benchmarks.planner --out benchmarks/results/planner

writes planner.md and planner.json into the folder after each row, with the timelines and plans, and prints the former.
`--device cpu --tiny` only shows that everything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks import planner_cases as cases
from benchmarks.decoder_cases import Row
from benchmarks.environment import capture
from benchmarks.moe_block_model import BLOCKS, TINY_BLOCKS, Blocks
from benchmarks.moe_stack import STACK
from benchmarks.moe_stack import TINY as TINY_STACK
from benchmarks.moe_stack_model import RECIPES, Stack
from benchmarks.planner_bench import Bench, LayersBench
from benchmarks.planner_report import to_markdown
from benchmarks.shapes import LLAMA_8B_X8, TINY
from lighterage.recipes import Recipe

CASES = ("goals", "refused", "curve", "checkpoint", "peers", "host", "bits", "stack", "block")


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases; 0 if all ran, whatever they show."""
    args = _arguments().parse_args(argv)
    device = torch.device(args.device)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    environment = capture(device, "benchmarks.planner")
    results: Row = {"environment": dataclasses.asdict(environment), "seconds": {}}
    measure = _cases(args, device)
    failed = False

    def write() -> None:
        if args.out is not None:
            (args.out / "planner.json").write_text(json.dumps(results, indent=1) + "\n")
            (args.out / "planner.md").write_text(to_markdown(results, environment) + "\n")

    for case in args.cases:
        start = time.perf_counter()
        try:
            found = measure[case]()
            if isinstance(found, dict):
                results[case] = found
            else:
                results[case] = []
                for row in found:  # written down one by one: a run that is killed leaves what it has
                    results[case].append(row)
                    results["seconds"][case] = time.perf_counter() - start
                    write()
        except Exception:  # the others are still worth having
            failed = True
            traceback.print_exc()
        results["seconds"][case] = time.perf_counter() - start
        print(f"{case}: {results['seconds'][case]:.1f} s", file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        write()
    print(to_markdown(results, environment))
    return int(failed)


def _cases(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Row | Iterator[Row]]]:
    """What each case is. The decoder is made when the first case that needs it runs, and so with the others."""
    rounds = args.rounds or (1 if args.tiny else 3 if args.quick else 6)
    few = max(1, rounds // 3)
    small = {"min_bytes": 1024} if args.tiny else {}
    goals = [(name, policy | small) for name, policy in cases.GOALS]
    budgets = [(f"device_budget={gib}GiB", {"device_budget": f"{gib}GiB"}) for gib in args.budgets]
    if args.tiny:
        budgets = [("device_budget=6MB", {"device_budget": "6MB"} | small)]

    @functools.cache
    def decoder() -> Bench:
        return Bench(TINY if args.tiny else LLAMA_8B_X8, device)

    def layers(case: str, make: Callable[[Recipe | None], nn.Module], title: str) -> Iterator[Row]:
        for recipe in args.recipes:
            decoder.cache_clear()
            kept = None if args.out is None else args.out / f"{case}-{recipe}"
            for row in cases.layers(LayersBench(make(RECIPES[recipe])), rounds, tiny=args.tiny, out=kept):
                yield {"model": f"{title}, {recipe}", **row}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    stack = TINY_STACK if args.tiny else dataclasses.replace(STACK, experts=8)
    blocks = TINY_BLOCKS if args.tiny else BLOCKS
    return {
        "goals": lambda: cases.goals(decoder(), goals, rounds, args.out),
        "refused": lambda: cases.goals(decoder(), [("device_budget=6.5GiB", {"device_budget": "6.5GiB"})], 1),
        "curve": lambda: cases.goals(decoder(), budgets, rounds),
        "checkpoint": lambda: cases.checkpoint_mixes(decoder(), few),
        "peers": lambda: cases.peers(decoder(), 1),
        "host": lambda: cases.host_time(decoder(), device, 3 if args.tiny else 30),
        "bits": lambda: cases.bits(decoder(), [goal for goal in goals if "device_budget" not in goal[1]]),
        "stack": lambda: layers(
            "stack", lambda recipe: Stack(stack, recipe, device), f"{stack.name} of {stack.experts} experts"
        ),
        "block": lambda: layers("block", lambda recipe: Blocks(blocks, recipe, device), blocks.name),
    }


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for planner.md, planner.json, timelines and plans")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=["fp8_block", "bf16"])
    parser.add_argument(
        "--budgets", nargs="+", type=float, default=list(cases.BUDGETS_GIB), metavar="GIB", help="of the case curve"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="of each mode, two interleaved pairs in each (default: 6, --quick: 3)"
    )
    parser.add_argument("--quick", action="store_true", help="half as many rounds")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    return parser


if __name__ == "__main__":
    # cuBLAS reads it when it is first used; the comparison of bits needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
