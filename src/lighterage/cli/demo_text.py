"""Real text that every machine with Python has: the sources of the standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "lib2to3"})


def standard_library_text(max_bytes: int = 4 * 1024**2, root: Path | None = None) -> Tensor:
    """The sources of the standard library, one after another in the order of their paths, as a uint8 vector.

    Raises:
        ValueError: this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    pieces: list[bytes] = []
    left = max_bytes
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if left <= 0:
            break
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            pieces.append(path.read_bytes()[:left])
            left -= len(pieces[-1])
    if not any(pieces):
        raise ValueError(f"no Python sources under {root}; this Python came without its standard library's text")
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)


def batches(text: Tensor, *, batch: int, seq: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of random pieces of `text`: (batch, seq) bytes and the bytes that follow each, both int64."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - seq, (batch, 1), generator=generator)
        piece = text[starts + torch.arange(seq + 1)].long()
        yield piece[:, :-1], piece[:, 1:]
