"""What a run of a section does with its saves, where something else than the policy decides."""

from __future__ import annotations

from .allocation import Allocation


class Orders:
    """What a run of a section does with its saves: keeps all of them, for one reason."""

    __slots__ = ("_reason", "resting")

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self.resting = False
        """Whether its saves need not be seen: nothing of it leaves."""

    def why_kept(self, save: int, nbytes: int) -> str | None:
        """Why an allocation stays that save number `save` of the section, of so many bytes, has brought; or None."""
        return self._reason

    def took(self, save: int, allocation: Allocation) -> None:
        """An allocation was taken in that is to leave."""
