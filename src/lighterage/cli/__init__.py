"""The command line: one module for each subcommand, loaded when it is asked for."""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Sequence

from lighterage.cli import demo, doctor, whatif


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit status: 0 for success, 1 for a failed check, 2 for wrong use."""
    parser = argparse.ArgumentParser(
        prog="lighterage",
        description="Activation offload for PyTorch that moves whole allocations, without changing one bit.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {importlib.metadata.version('lighterage')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, whatif, doctor):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status
