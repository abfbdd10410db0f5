"""The decoder without offload, under its peers and under lighterage, beside what each figure has to reach.

    python -m benchmarks.decoder --out benchmarks/results/decoder

writes decoder.md and decoder.json into the folder and prints the former. Modes run in turn in one process (steps) or in
a fresh process each (first steps). `--device cpu --tiny` only shows that everything runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import decoder_cases as cases
from benchmarks import decoder_links as links
from benchmarks.decoder_cases import Row
from benchmarks.decoder_modes import PEERS, parse_policy
from benchmarks.decoder_report import to_markdown
from benchmarks.environment import capture
from benchmarks.shapes import LLAMA_8B_X8, TINY

POLICIES = (
    "keep_last=6,release_after=5,prefetch_ahead=4",
    "keep_last=4,release_after=3,prefetch_ahead=2",
    "keep_last=2",
    "keep_last=1,release_after=1,prefetch_ahead=1",
    "keep_last=1,release_after=2,prefetch_ahead=1",
    "keep_last=1,release_after=3,prefetch_ahead=1",
)
CASES = ("links", "beside", "steps", "first", "host", "lanes", "sizes", "bits")


def main(argv: list[str] | None = None) -> int:
    """Measure the chosen cases; 0 if all ran, whatever they show."""
    args = _arguments().parse_args(argv)
    device = torch.device(args.device)
    shape = TINY if args.tiny else LLAMA_8B_X8
    if args.first_step is not None:
        print(json.dumps(cases.first_step_here(args.first_step, shape, device)))
        return 0
    policies = args.policy or list(POLICIES)
    for policy in policies:
        parse_policy(policy)
    if args.tiny:
        policies = [
            f"{policy},min_bytes=1024"
            for policy in policies
            if not policy.startswith(("keep_last=6", "keep_last=5", "keep_last=4"))
        ]
    modes = [*args.peers, *policies]
    results: Row = {"environment": dataclasses.asdict(environment := capture(device, "benchmarks.decoder"))}
    results["shape"] = dataclasses.asdict(shape)
    quick = args.quick or args.tiny
    measure = {
        "links": lambda: links.link_rates(device),
        "beside": lambda: links.beside_copies(shape, device, rounds=4 if quick else 12),
        "steps": lambda: cases.side_by_side(shape, device, modes, rounds=2 if quick else 6, warm=1),
        "first": lambda: cases.first_steps(
            [*args.peers, *(policies[:1] if quick else policies[:2])], device, tiny=args.tiny, repeats=1 if quick else 2
        ),
        "host": lambda: cases.host_time(device, rounds=10 if quick else 60),
        "lanes": lambda: links.both_lanes(device),
        "sizes": lambda: cases.changing_sizes(shape, device, steps=20 if quick else 200, policy=policies[-1]),
        "bits": lambda: cases.same_bits(shape, device, policies),
    }
    for name in CASES:
        if name in args.cases:
            start = time.perf_counter()
            results[name] = measure[name]()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    text = to_markdown(results, environment)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decoder.md").write_text(text + "\n")
        (args.out / "decoder.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for decoder.md and decoder.json")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument(
        "--policy",
        action="append",
        help="fields of lighterage.Policy, e.g. keep_last=2,release_after=1; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--first-step", help=argparse.SUPPRESS)  # what a fresh process is told to time
    return parser


if __name__ == "__main__":
    # cuBLAS reads it when it is first used; the comparison of bits needs it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.exit(main())
