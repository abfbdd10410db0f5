"""The command line: one module for each subcommand, loaded when it is asked for."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

import lighterage
from lighterage.cli import demo, doctor, whatif
from lighterage.cli.arguments import join_negatives


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status: 0 for success, 1 for a failed check, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        prog="lighterage",
        description="Activation offload for PyTorch that moves whole allocations, without changing one bit.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, whatif, doctor):
        command.add_parser(commands)
    args = parser.parse_args(join_negatives(sys.argv[1:] if argv is None else argv))
    status: int = args.run(args)
    return status


def _version() -> str:
    try:
        return importlib.metadata.version("lighterage")
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH that nobody installed
        return lighterage.__version__
