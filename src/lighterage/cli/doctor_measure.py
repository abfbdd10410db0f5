"""Measures what offload depends on: links, pinning, limits, placement, disk. Each part fails on its own."""

from __future__ import annotations

import dataclasses
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from lighterage.engine import host_memory
from lighterage.engine.link import Lanes, measure_link
from lighterage.engine.units import KIB, MIB
from lighterage.planner.timeline import Link

T = TypeVar("T")

SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
_PINNED = 256 * MIB
_CHUNK = 16 * MIB


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeRates:
    """Bytes a second for copies of one size: out alone, in alone, both at once in total."""

    nbytes: int
    out_bytes_per_s: float
    in_bytes_per_s: float
    both_bytes_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disk:
    """The disk tier's folder, with the file written through to the disk and read back from it."""

    folder: str
    free_bytes: int
    write_bytes_per_s: float
    read_bytes_per_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """NUMA nodes of the device and of the CPUs that this process may run on; None where the system does not say."""

    device_node: int | None
    cpu_nodes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """All that was measured; None for what does not apply here or failed."""

    device: str
    """What it is called, and where."""

    is_accelerator: bool
    device_bytes: int | None = None
    link: Link | None = None
    by_size: tuple[SizeRates, ...] | None = None
    pin_bytes_per_s: float | None = None
    memory_lock_bytes: int | None = None
    """The most that this process may lock; None for no limit."""

    host_total_bytes: int | None = None
    host_available_bytes: int | None = None
    placement: Placement | None = None
    disk: Disk | None = None
    failures: tuple[str, ...] = ()


def examine(device: torch.device, disk_dir: str | None, *, disk_bytes: int = 256 * MIB) -> Findings:
    """Measure everything that applies to `device`; takes some seconds."""
    failures: list[str] = []
    accelerator = device.type != "cpu"

    def attempt(what: str, measure: Callable[[], T]) -> T | None:
        try:
            return measure()
        except Exception as error:  # a machine on which one thing fails is what this is for
            failures.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return None

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Findings(
        device=attempt("the device's name", lambda: _name(device)) or str(device),
        is_accelerator=accelerator,
        device_bytes=attempt("the device's memory", lambda: _device_bytes(device)) if accelerator else None,
        link=attempt("the link", lambda: measure_link(device, "host")) if accelerator else None,
        by_size=attempt("the link by size", lambda: _by_size(device)) if accelerator else None,
        pin_bytes_per_s=attempt("pinning", _pin_rate) if device.type == "cuda" else None,
        memory_lock_bytes=None if soft == resource.RLIM_INFINITY else soft,
        host_total_bytes=attempt("the host's memory", host_memory.total_bytes),
        host_available_bytes=attempt("the host's free memory", host_memory.available_bytes),
        placement=attempt("NUMA placement", lambda: _placement(device)),
        disk=attempt("the disk tier", lambda: disk_rates(disk_dir or tempfile.gettempdir(), disk_bytes)),
        failures=tuple(failures),
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"the CPU ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def _device_bytes(device: torch.device) -> int:
    return int(torch.accelerator.get_memory_info(device)[1])


def _by_size(device: torch.device) -> tuple[SizeRates, ...]:
    lanes = Lanes(device, max(SIZES))
    lanes.seconds(max(SIZES), out=2, back=2)
    rows = []
    for nbytes in SIZES:
        count = max(4, min(64, 256 * MIB // nbytes))
        rows.append(
            SizeRates(
                nbytes=nbytes,
                out_bytes_per_s=lanes.rate(nbytes, out=count),
                in_bytes_per_s=lanes.rate(nbytes, back=count),
                both_bytes_per_s=lanes.rate(nbytes, out=count, back=count),
            )
        )
    return tuple(rows)


def _pin_rate() -> float:
    torch.empty(MIB, dtype=torch.uint8, pin_memory=True)  # the first of a process makes what the driver needs
    memory = torch.empty(_PINNED, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    start = time.perf_counter()
    code = int(cudart.cudaHostRegister(memory.data_ptr(), _PINNED, 1))
    seconds = time.perf_counter() - start
    if code:
        raise OSError(f"cudaHostRegister of {_PINNED} bytes failed with error {code}")
    cudart.cudaHostUnregister(memory.data_ptr())
    return _PINNED / seconds


def _placement(device: torch.device) -> Placement:
    return Placement(device_node=_device_node(device), cpu_nodes=_cpu_nodes())


def _device_node(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    parts = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    if not all(isinstance(part, int) for part in parts):
        return None
    address = f"{parts[0]:04x}:{parts[1]:02x}:{parts[2]:02x}.0"
    try:
        node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _cpu_nodes() -> tuple[int, ...]:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    nodes = set()
    for folder in Path("/sys/devices/system/node").glob("node[0-9]*"):
        try:
            cpus = parse_cpus((folder / "cpulist").read_text())
        except OSError:
            continue
        if cpus & allowed:
            nodes.add(int(folder.name[4:]))
    return tuple(sorted(nodes))


def parse_cpus(text: str) -> set[int]:
    """CPUs from the kernel's list form.

    >>> sorted(parse_cpus("0-2,7"))
    [0, 1, 2, 7]
    """
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def disk_rates(folder: str, nbytes: int) -> Disk:
    """Write a file of `nbytes` through to the disk of `folder` and read it back, past the system's page cache."""
    block = os.urandom(_CHUNK)  # what is all alike, some disks store for nothing
    count = max(1, nbytes // _CHUNK)
    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = file.fileno()
        start = time.perf_counter()
        for _ in range(count):
            _write(descriptor, block)
        os.fsync(descriptor)
        write_s = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        start = time.perf_counter()
        while os.read(descriptor, _CHUNK):
            pass
        read_s = time.perf_counter() - start
    status = os.statvfs(folder)
    total = count * _CHUNK
    return Disk(
        folder=str(folder),
        free_bytes=status.f_bavail * status.f_frsize,
        write_bytes_per_s=total / max(write_s, 1e-9),
        read_bytes_per_s=total / max(read_s, 1e-9),
    )


def _write(descriptor: int, block: bytes) -> None:
    rest = memoryview(block)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
