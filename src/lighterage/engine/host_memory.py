"""How much memory this process may use on its host, and how much of it is left."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from .units import KIB, MIB

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")


def total_bytes() -> int:
    """Bytes of memory of the machine, or of the control group's limit where that is lower."""
    total = _meminfo().get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for folder in _memory_folders() if (limit := _limit(folder)) is not None)])


def available_bytes() -> int | None:
    """Bytes that can still be used without swapping or meeting the control group's limit; None where nobody says."""
    left = [value] if (value := _meminfo().get("MemAvailable")) is not None else []
    for folder in _memory_folders():
        limit, used = _limit(folder), _used(folder)
        if limit is not None and used is not None:
            left.append(limit - used)
    return min(left) if left else None


def spare_bytes() -> int:
    """Bytes that must stay available for everybody else: 512 MiB, or 2 % of the memory where that is more."""
    return max(512 * MIB, total_bytes() // 50)


def _meminfo() -> dict[str, int]:
    """The two figures of `/proc/meminfo` that matter here, in bytes; empty where there is no such file."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.startswith(("MemTotal:", "MemAvailable:")))
    return {field[0].rstrip(":"): int(field[1]) * KIB for field in fields}


@lru_cache(maxsize=1)
def _memory_folders() -> tuple[Path, ...]:
    """The control-group folders that limit this process, its own and every one above it, of either version."""
    folders: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        own = root / name.lstrip("/")
        folders += [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
    return tuple(folder for folder in folders if _limit(folder) is not None)


def _limit(folder: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _used(folder: Path) -> int | None:
    """Bytes charged to the group, less the file cache that the kernel would drop first."""
    for name, cache in (("memory.current", "inactive_file "), ("memory.usage_in_bytes", "total_inactive_file ")):
        try:
            used = int((folder / name).read_text())
            stat = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        return used - sum(int(line.split()[1]) for line in stat if line.startswith(cache))
    return None
