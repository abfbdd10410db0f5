"""Captures what a block issues, and leaves PyTorch as it was however the block ends."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..engine.graph_driver import graph_driver
from ..errors import GraphError

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE as Pool


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Pool, stream: torch.cuda.Stream) -> Iterator[set[int]]:
    """Capture the block's work on `stream` into `graph`; gives the set in which events recorded inside will be.

    However the block ends, the capture is over then, and the current stream is what it was.

    Raises:
        GraphError: the block did what no graph can hold.
    """
    torch.cuda.synchronize()
    gc.collect()  # what dies inside a capture may do what a capture forbids
    collects = gc.isenabled()
    gc.disable()
    before = torch.cuda.current_stream()
    torch.cuda.set_stream(stream)
    events: set[int] = set()
    try:
        # Other threads, such as those of data loaders, may do as they like meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield events
            driver = graph_driver()
            found = None if driver is None else driver.capture_of(stream.cuda_stream)
            if driver is not None and found is not None:
                events |= driver.recorded_events(found[1])
        except BaseException:
            _end(graph, pool, stream)
            raise
        error = _end(graph, pool, stream)
        if error is not None:
            raise GraphError(
                f"the capture failed: {error}. What a graph holds must not wait for the device or be waited for by the "
                "host, and side streams must be joined."
            ) from error
    finally:
        torch.cuda.set_stream(before)
        if collects:
            gc.enable()


def _end(graph: torch.cuda.CUDAGraph, pool: Pool, stream: torch.cuda.Stream) -> Exception | None:
    try:
        graph.capture_end()
    except Exception as error:
        # PyTorch leaves its allocator in the capture where CUDA reports that the capture is broken. It does not where
        # the graph was made and something was said about it (a warning that is an error here): then the graph has its
        # share in the pool, and gives it up itself.
        if not _is_made(graph):
            for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with contextlib.suppress(Exception):
                    undo(stream.device_index, pool)
        return error
    return None


def _is_made(graph: torch.cuda.CUDAGraph) -> bool:
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True
