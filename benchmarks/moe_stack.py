"""A stack of experts with quantized operands, without offload and with it, beside what each figure has to reach.

    python -m benchmarks.moe_stack --out benchmarks/results/moe_stack

writes moe_stack.md and moe_stack.json into the folder and prints the former. `--device cpu --tiny` only shows that
everything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks import moe_stack_cases as cases
from benchmarks.decoder_cases import Row
from benchmarks.decoder_links import link_rates
from benchmarks.environment import capture
from benchmarks.moe_stack_model import RECIPES, StackShape
from benchmarks.moe_stack_report import to_markdown

CASES = ("steps", "launches", "host", "bytes", "models")
STACK = StackShape(name="6 grouped MLPs", layers=6, experts=64, tokens=32768, hidden=4096, features=2048)
HOST_BOUND = StackShape(name="6 narrow MLPs", layers=6, experts=64, tokens=2048, hidden=256, features=128)
TINY = StackShape(name="3 tiny MLPs", layers=3, experts=4, tokens=512, hidden=64, features=32)
MODELS = (
    StackShape(name="Mixtral-8x7B", layers=2, experts=8, tokens=32768, hidden=4096, features=14336),
    StackShape(name="Qwen3-30B-A3B", layers=2, experts=128, tokens=65536, hidden=2048, features=768),
    StackShape(name="DeepSeek-V3, 32 local experts", layers=2, experts=32, tokens=32768, hidden=7168, features=2048),
)


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases; 0 if all ran, whatever they show."""
    args = _arguments().parse_args(argv)
    device = torch.device(args.device)
    quick = args.quick or args.tiny
    environment = capture(device, "benchmarks.moe_stack")
    known = cases.rates(device)
    rates = {name: known if recipe is not None else cases.bf16_rates(device, known) for name, recipe in RECIPES.items()}
    results: Row = {"environment": dataclasses.asdict(environment), "rates": dataclasses.asdict(known)}
    results["bf16_flops"] = rates["bf16"].product_flops
    results["links"] = link_rates(device, rounds=4)
    stack = TINY if args.tiny else STACK
    experts = [stack.experts] if args.tiny else args.experts
    counts = {"rounds": 2 if args.tiny else 5 if quick else 15, "warm": 1 if args.tiny else 3}

    def steps(shapes: list[StackShape]) -> list[Row]:
        rows: list[Row] = []
        for shape in shapes:
            for name in args.recipes:
                rows += cases.steps(shape, name, device, rates[name], **counts)
                for row in rows[-2:]:
                    print(shape.name, shape.experts, name, row["mode"], row["device"], file=sys.stderr, flush=True)
                _empty(device)
        return rows

    measure = {
        "steps": lambda: steps([dataclasses.replace(stack, experts=num) for num in experts]),
        "launches": lambda: cases.launches(device),
        "models": lambda: steps([] if args.tiny else list(MODELS)),
        "bytes": lambda: cases.bytes_saved(stack, device),
        "host": lambda: [
            cases.host_time(
                TINY if args.tiny else dataclasses.replace(HOST_BOUND, experts=num),
                "fp8_block",
                device,
                rounds=2 if args.tiny else 40 if quick else 80,
            )
            for num in experts
        ],
    }
    for case in CASES:
        if case in args.cases:
            start = time.perf_counter()
            results[case] = measure[case]()
            _empty(device)
            print(f"{case}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            text = to_markdown(results, environment)
            if args.out is not None:  # after each case, so that a run that is cut short leaves what it has
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / "moe_stack.md").write_text(text + "\n")
                (args.out / "moe_stack.json").write_text(json.dumps(results, indent=1) + "\n")
    print(to_markdown(results, environment))
    return 0


def _empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe_stack", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for moe_stack.md and moe_stack.json")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=["fp8_block", "bf16"])
    parser.add_argument("--experts", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="a tiny stack, to see that it runs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
