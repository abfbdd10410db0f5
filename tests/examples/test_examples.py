"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_a_higher_price_buys_a_smaller_peak():
    command = [sys.executable, str(EXAMPLES / "plan_for_a_price.py"), "--layers", "2", "--width", "128"]
    done = subprocess.run([*command, "--tokens", "256"], capture_output=True, text=True, check=True, timeout=150)
    rows = done.stdout.split("price  step ms  peak GiB  moved GiB\n")[1].splitlines()
    assert [row.split()[0] for row in rows] == ["0%", "1%", "3%", "10%", "30%", "100%"]
    peaks = [float(row.split()[2]) for row in rows]
    assert peaks == sorted(peaks, reverse=True)
