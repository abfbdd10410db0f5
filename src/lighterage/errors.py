"""The errors that lighterage raises for causes outside the caller's arguments."""

from __future__ import annotations


class OffloadError(RuntimeError):
    """A transfer could not be carried out: full disk, I/O error, damaged file, or a graph used after a fork."""


class GraphError(RuntimeError):
    """A CUDA graph could not be captured, or was to be replayed over bytes that are still needed or gone already."""


class BudgetError(OffloadError):
    """No plan keeps the step within the device budget that was asked for.

    `smallest_bytes` is the smallest peak that a plan was found for.
    """

    def __init__(self, message: str, *, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return _budget_error, (self.args[0], self.smallest_bytes)


def _budget_error(message: str, smallest_bytes: int) -> BudgetError:
    """As it is unpickled."""
    return BudgetError(message, smallest_bytes=smallest_bytes)
