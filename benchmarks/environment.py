"""What stands beside every table: the command, the machine, the versions, the date."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """Where and how a benchmark ran."""

    command: str
    date: str
    device: str
    driver: str | None
    cpu: str
    num_cpus: int
    host_gib: float
    python: str
    versions: dict[str, str]

    def to_markdown(self) -> str:
        """A few lines to stand above a table."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        driver = f", driver {self.driver}" if self.driver else ""
        return "\n".join(
            [
                f"- command: `{self.command}`",
                f"- date: {self.date}",
                f"- device: {self.device}{driver}",
                f"- host: {self.cpu}, {self.num_cpus} CPUs, {self.host_gib:.0f} GiB",
                f"- versions: Python {self.python}, {versions}",
            ]
        )


def capture(device: torch.device, module: str) -> Environment:
    """Describe this process, started as `python -m module` with its own arguments, on `device`."""
    return Environment(
        command=shlex.join(["python", "-m", module, *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        driver=_driver() if device.type == "cuda" else None,
        cpu=_cpu_name(),
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        host_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3,
        python=platform.python_version(),
        versions={"torch": torch.__version__, **_versions("lighterage", "trl", "transformers", "triton")},
    )


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None
