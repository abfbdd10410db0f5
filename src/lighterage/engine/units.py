"""Byte counts: rounding them, and writing them so that a person can read them."""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


def round_up(nbytes: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `nbytes`.

    >>> round_up(513, 512)
    1024
    """
    return -(-nbytes // unit) * unit


def format_bytes(nbytes: int) -> str:
    """`nbytes` in the largest binary unit that leaves at least one, to one decimal.

    >>> format_bytes(24 * GIB), format_bytes(700)
    ('24.0 GiB', '700 bytes')
    """
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} bytes"
