"""The errors that lighterage raises for causes outside the caller's arguments."""

from __future__ import annotations


class OffloadError(RuntimeError):
    """A transfer could not be carried out: full disk, I/O error, damaged file, or a graph used after a fork."""


class GraphError(RuntimeError):
    """A CUDA graph could not be captured, or was to be replayed over bytes that are still needed or gone already."""
