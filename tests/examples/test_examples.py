"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_find_keep_last_moves_more_as_it_keeps_less():
    command = [
        sys.executable,
        str(EXAMPLES / "find_keep_last.py"),
        "--layers",
        "2",
        "--width",
        "128",
        "--tokens",
        "256",
    ]
    done = subprocess.run([*command, "--steps", "1"], capture_output=True, text=True, check=True, timeout=150)
    header, *rows = done.stdout.splitlines()
    assert header.split()[0] == "keep_last"
    assert [int(row.split()[0]) for row in rows] == [2, 1, 0]
    moved = [float(row.split()[2]) for row in rows]
    assert moved[0] == 0
    assert 0 < moved[1] < moved[2]
