"""Plans made from what was measured, beside what each has to reach, beside checkpointing and peers.

    python -m benchmarks.planner --out benchmarks/results/planner

writes planner.md and planner.json into the folder after each case, with the timelines and plans, and prints the former.
`--device cpu --tiny` only shows that everything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import planner_cases as cases
from benchmarks.decoder_cases import Row
from benchmarks.environment import capture
from benchmarks.moe_stack import STACK
from benchmarks.moe_stack import TINY as TINY_STACK
from benchmarks.moe_stack_model import RECIPES
from benchmarks.planner_report import to_markdown
from benchmarks.shapes import LLAMA_8B_X8, TINY

CASES = ("goals", "refused", "curve", "checkpoint", "peers", "host", "bits", "stack")


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases; 0 if all ran, whatever they show."""
    args = _arguments().parse_args(argv)
    device = torch.device(args.device)
    environment = capture(device, "benchmarks.planner")
    results: Row = {"environment": dataclasses.asdict(environment)}
    bench = cases.Bench(TINY if args.tiny else LLAMA_8B_X8, device)
    rounds = 1 if args.tiny else 2 if args.quick else 4
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    tiny = {"min_bytes": 1024} if args.tiny else {}
    goals = [(name, policy | tiny) for name, policy in cases.GOALS]
    chosen = cases.FEW_BUDGETS_GIB if args.quick else cases.BUDGETS_GIB
    budgets = [(f"device_budget={gib}GiB", {"device_budget": f"{gib}GiB"} | tiny) for gib in chosen]
    if args.tiny:
        budgets = [("device_budget=6MB", {"device_budget": "6MB"} | tiny)]
    shape = TINY_STACK if args.tiny else STACK
    measure = {
        "goals": lambda: cases.goals(bench, goals, rounds, args.out),
        "refused": lambda: cases.goals(bench, [("device_budget=6.5GiB", {"device_budget": "6.5GiB"})], 1, None),
        "curve": lambda: cases.goals(bench, budgets, max(1, rounds // 2), None),
        "checkpoint": lambda: cases.checkpoint_mixes(bench, max(1, rounds // 2)),
        "peers": lambda: cases.peers(bench, 1),
        "host": lambda: cases.host_time(bench, device, 3 if args.tiny else 30),
        "bits": lambda: cases.bits(bench, [goal for goal in goals if "device_budget" not in goal[1]]),
        "stack": lambda: [
            row
            for recipe in args.recipes
            for row in cases.stack(dataclasses.replace(shape, experts=min(shape.experts, 8)), recipe, device, rounds)
        ],
    }
    failed = False
    for case in args.cases:
        start = time.perf_counter()
        try:
            results[case] = measure[case]()
        except Exception:  # the others are still worth having
            failed = True
            traceback.print_exc()
        print(f"{case}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if args.out is not None:
            (args.out / "planner.json").write_text(json.dumps(results, indent=1) + "\n")
            (args.out / "planner.md").write_text(to_markdown(results, environment) + "\n")
    print(to_markdown(results, environment))
    return int(failed)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for planner.md, planner.json, timelines and plans")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=["fp8_block", "bf16"])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and fewer budgets")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    return parser


if __name__ == "__main__":
    # cuBLAS reads it when it is first used; the comparison of bits needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
