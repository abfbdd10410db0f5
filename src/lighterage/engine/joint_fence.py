"""A fence that stands for several."""

from __future__ import annotations

from .lanes import Fence, Wait


class AllOf:
    """Copies that were started at different times: an earlier one may have failed where the last one has not."""

    def __init__(self, *fences: Fence) -> None:
        self.fences = list(fences)

    def done(self) -> bool:
        return all(fence.done() for fence in self.fences)

    def wait(self) -> None:
        for fence in self.fences:
            fence.wait()

    def order(self) -> Wait | None:
        wait = None
        for fence in self.fences:
            wait = fence.order()
        return wait

    def ordered_on(self, stream: int) -> bool:
        return all(fence.ordered_on(stream) for fence in self.fences)
