"""`lighterage demo`: its options, its sizes, and the order of what it does."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lighterage.cli.demo_config import PRESETS, DemoConfig

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Train a byte-level language model on the sources of Python's standard library, first without and then with offload,
from the same seed. Compare every loss, gradient and weight bit for bit, and show what the device held.
Exits with 1 if a bit differs, nothing was freed, or an allocation took more than one copy.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `demo` to the subcommands."""
    parser = commands.add_parser(
        "demo",
        help="train a small model without and with offload, and compare",
        description=_DESCRIPTION,
        epilog=_sizes_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        choices=["moe", "dense"],
        default="moe",
        help="a mixture of experts in lighterage's layers, or a dense decoder in plain PyTorch (default: moe)",
    )
    parser.add_argument(
        "--recipe",
        choices=["fp8_block", "mxfp8", "nvfp4", "fp8_current", "none"],
        help="how the mixture of experts quantizes its products (default: fp8_block)",
    )
    for name, meaning in (
        ("steps", "training steps of each run"),
        ("layers", "decoder layers"),
        ("hidden", "width of the model; a multiple of 64"),
        ("seq", "bytes of text in a sequence"),
        ("batch", "sequences in a step"),
        ("experts", "experts of each layer"),
        ("top-k", "experts that each token goes to"),
        ("keep-last", "layers at the end whose saved tensors stay"),
    ):
        parser.add_argument(f"--{name}", type=_positive if name != "keep-last" else _count, metavar="N", help=meaning)
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="of weights and batches (default: 0)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument("--tier", choices=["host", "disk"], help="where it rests (default: disk for cpu, else host)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the results (default: demo-out)")
    parser.add_argument(
        "--plot", action="store_true", help="train once more under a plan of the library's own, and draw the step"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds instead of minutes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out the demo that `args` describe."""
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"lighterage demo needs {' and '.join(missing)}. Run: pip install 'lighterage[demo]'", file=sys.stderr)
        return 2
    from lighterage.cli import demo_run  # torch, rich and matplotlib load here, not for --help

    try:
        config = demo_run.choose(args)
        config.out.mkdir(parents=True, exist_ok=True)  # before minutes of training, not after
    except ValueError as error:
        print(f"lighterage demo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"lighterage demo: no folder for the results at {args.out}: {error}. Name another by --out.",
            file=sys.stderr,
        )
        return 2
    return demo_run.run(config)


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"must be less than 2147483648, got {text}")
    return value


def _positive(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _count(text: str) -> int:
    value = _whole(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def _sizes_table() -> str:
    names = ("steps", "layers", "hidden", "seq", "batch", "experts", "top_k", "keep_last")
    lines = ["sizes, unless given:", "  " + " " * 13 + "".join(f"{name:>10}" for name in names)]
    for model, presets in PRESETS.items():
        for preset, sizes in presets.items():
            figures = [
                "–" if model == "dense" and name in ("experts", "top_k") else getattr(sizes, name) for name in names
            ]
            lines.append(f"  {model:<6}{preset:<7}" + "".join(f"{figure:>10}" for figure in figures))
    return "\n".join([*lines, f"seed, unless given: {DemoConfig.seed}"])
