"""`lighterage doctor`: what this machine's links can and cannot hide, in words."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lighterage.cli.arguments import check_writable
from lighterage.planner.figures import rate, size

if TYPE_CHECKING:
    from lighterage.cli.doctor_measure import Findings

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_DESCRIPTION = """\
Measure what offload depends on, and say what it means: the links between the device and where bytes rest, each way and
both at once, by size; pinning of host memory; the limit of locked memory; whether this process runs beside its device;
free memory; the disk tier. Takes some seconds. Without a GPU the disk tier is measured.
"""


def add_parser(commands: Subparsers) -> None:
    """Add `doctor` to the subcommands."""
    parser = commands.add_parser(
        "doctor",
        help="measure this machine's links, and say what offload can hide here",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the accelerator if there is one)")
    parser.add_argument("--disk-dir", metavar="DIR", help="folder of the disk tier (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON instead")
    parser.add_argument("--link", type=Path, metavar="FILE.json", help="write the link, for `lighterage whatif --link`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out what `args` describe."""
    import torch  # not for --help

    from lighterage.cli.doctor_measure import examine

    accelerator = torch.accelerator.current_accelerator()
    there = torch.accelerator.is_available() and accelerator is not None
    try:
        device = torch.device(args.device or (accelerator.type if there and accelerator else "cpu"))
    except RuntimeError as error:
        print(f"lighterage doctor: --device {args.device}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if device.type != "cpu" and (accelerator is None or not there or device.type != accelerator.type):
        print(
            f"lighterage doctor: --device {device}: PyTorch finds no such device here. Leave --device out to measure "
            "what there is.",
            file=sys.stderr,
        )
        return 2
    if device.type != "cpu" and device == torch.device(device.type):
        device = torch.device(device.type, torch.accelerator.current_device_index())
    if device.type != "cpu" and not 0 <= device.index < torch.accelerator.device_count():
        print(
            f"lighterage doctor: --device {device}: there are {torch.accelerator.device_count()} here, from 0.",
            file=sys.stderr,
        )
        return 2
    if args.link is not None:
        try:
            if device.type == "cpu":
                raise ValueError("--link: there is no link of an accelerator to write here.")
            check_writable("--link", args.link, endings=(".json",))  # before the measuring, not after
        except ValueError as error:
            print(f"lighterage doctor: {error}", file=sys.stderr)
            return 2
    found = examine(device, args.disk_dir)
    if args.link is not None and found.link is not None:
        args.link.write_text(found.link.to_json() + "\n")
    print(json.dumps(dataclasses.asdict(found), indent=1) if args.json else describe(found))
    return 1 if found.failures else 0


def describe(found: Findings) -> str:
    """The findings in words."""
    lines = [f"Device: {found.device}" + (f", {size(found.device_bytes)}." if found.device_bytes else ".")]
    lines += _link(found)
    lines += _memory(found)
    lines += _near(found)
    lines += _disk(found)
    lines += [f"FAILED: {failure}" for failure in found.failures]
    return "\n".join(lines)


def _link(found: Findings) -> list[str]:
    if not found.is_accelerator:
        return [
            "Link: none; there is no accelerator here. What a CPU's tensors are moved to is the disk tier below "
            '(tier="host" copies memory to memory, which frees none).'
        ]
    lines = []
    if found.by_size:
        lines.append(f"{'copies of':>12} {'out':>10} {'in':>10} {'both':>10}")
        lines += [
            f"{size(row.nbytes):>12} {rate(row.out_bytes_per_s):>10} {rate(row.in_bytes_per_s):>10} "
            f"{rate(row.both_bytes_per_s):>10}"
            for row in found.by_size
        ]
        best = found.by_size[-1]
        fast = next(
            row.nbytes
            for row in found.by_size
            if row.out_bytes_per_s >= 0.9 * best.out_bytes_per_s or row.nbytes == best.nbytes
        )
        lines.append(f"Copies of {size(fast)} and more use nine tenths of the link or more; smaller ones waste it.")
    out = found.by_size[-1].out_bytes_per_s if found.by_size else found.link.out_bytes_per_s if found.link else None
    if out is not None:
        hidden = out * 0.01
        lines.append(
            f"It can hide {hidden / 1e9:.2f} GB ({size(hidden)}) for each 10 ms that forward takes: a forward of 100 "
            f"ms hides {10 * hidden / 1e9:.1f} GB. What goes beyond that is waited for, and computing it again may "
            "then be cheaper: `recompute` is for that."
        )
    if found.by_size:
        best = found.by_size[-1]
        share = best.both_bytes_per_s / (best.out_bytes_per_s + best.in_bytes_per_s)
        lines.append(
            f"Both ways at once carry {share:.0%} of what they carry alone."
            + ("" if share > 0.8 else " Where both are busy, as in pipelines, count on that.")
        )
    if found.link is not None:
        lines.append(f"A copy costs {found.link.copy_us:.0f} µs beside its bytes.")
    if found.link is not None and found.link.compute_slowdown:
        lines.append(f"Beside each lane that is busy, compute is taken to be {found.link.compute_slowdown:.1%} slower.")
    return lines


def _memory(found: Findings) -> list[str]:
    lines = []
    if found.host_total_bytes is not None:
        free = f", {size(found.host_available_bytes)} of it free" if found.host_available_bytes is not None else ""
        lines.append(f"Host memory: {size(found.host_total_bytes)}{free}; that is the most that can rest there.")
    if found.pin_bytes_per_s:
        seconds = (1 << 30) / found.pin_bytes_per_s
        lines.append(
            f"Pinning: {seconds:.2f} s a GiB. It is done beside the steps after the first, and what is not ready stays "
            "on the device meanwhile, if that has room."
        )
    elif not found.is_accelerator:
        lines.append("Pinning: does not apply without an accelerator.")
    limit = found.memory_lock_bytes
    lines.append(
        "Memory lock: no limit."
        if limit is None
        else f"Memory lock: {size(limit)} (`ulimit -l`). CUDA pins past it on most systems; where pinning fails, raise "
        "it."
    )
    return lines


def _near(found: Findings) -> list[str]:
    placement = found.placement
    if placement is None:
        return []
    nodes = ", ".join(map(str, placement.cpu_nodes))
    if not found.is_accelerator or placement.device_node is None:
        which = f"node {nodes}" if nodes else "a system that names no nodes"
        where = "; on which node the device is, the system does not say." if found.is_accelerator else "."
        return [f"NUMA: this process runs on {which}{where}"]
    if placement.cpu_nodes == (placement.device_node,):
        return [f"NUMA: device and process are both on node {nodes}, as they should be."]
    return [
        f"NUMA: the device is on node {placement.device_node} and this process may run on node {nodes or '?'}. Bytes "
        f"that rest on another node cross one more link: start it with `numactl --cpunodebind={placement.device_node} "
        f"--membind={placement.device_node}`."
    ]


def _disk(found: Findings) -> list[str]:
    disk = found.disk
    if disk is None:
        return []
    hidden = disk.write_bytes_per_s * 0.01
    return [
        f"Disk tier: {rate(disk.write_bytes_per_s)} written, {rate(disk.read_bytes_per_s)} read in {disk.folder}, "
        f"{size(disk.free_bytes)} free. It can hide {hidden / 1e6:.0f} MB for each 10 ms of forward"
        + (", so it is for what fits nowhere else." if found.is_accelerator else ".")
    ]
