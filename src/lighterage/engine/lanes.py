"""The copy-lane protocol: an ordered asynchronous queue of copies, and the fences it hands back."""

from __future__ import annotations

from typing import Protocol


class Fence(Protocol):
    """The point in a lane's queue after which a set of copies has finished."""

    def done(self) -> bool:
        """Whether the copies have finished. Never blocks."""
        ...

    def wait(self) -> None:
        """Block the calling host thread until the copies have finished; raise the error that stopped them, if any."""
        ...
