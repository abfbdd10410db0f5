"""Figures as people read them."""

from __future__ import annotations

import re

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size(nbytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least one.

    >>> size(3 << 29), size(700)
    ('1.50 GiB', '700 bytes')
    """
    for unit, name in _UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}" if unit >= 1 << 30 else f"{nbytes / unit:.0f} {name}"
    return f"{nbytes:.0f} bytes"


def rate(bytes_per_s: float) -> str:
    """A rate as links are sold: powers of ten.

    >>> rate(55e9), rate(0.8e9)
    ('55 GB/s', '0.80 GB/s')
    """
    gigabytes = bytes_per_s / 1e9
    return f"{gigabytes:.0f} GB/s" if gigabytes >= 10 else f"{gigabytes:.2f} GB/s"


def parse_size(text: str) -> int:
    """Bytes from text such as `30GiB`, `512 MiB` or `1.5GB`.

    Raises:
        ValueError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f'a size is a number and a unit, such as "30GiB" or "512MiB"; got {text!r}.')
    power = "_KMGT".index(match[2].upper() or "_")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_rate(text: str) -> float:
    """Bytes a second from text such as `450GB/s`.

    Raises:
        ValueError: the text is no rate.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B/s\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f'a rate is a number and a unit, such as "450GB/s" or "800MB/s"; got {text!r}.')
    return float(match[1]) * float((1024 if match[3] else 1000) ** "_KMGT".index(match[2].upper()))
