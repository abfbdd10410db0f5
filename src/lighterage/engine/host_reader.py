"""Brings bytes back by letting the device's own threads read them, where the copy engine is taken."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence

import torch

from .. import background
from .graph_driver import graph_driver

# Note [Why a kernel reads]
# Copies of one direction go through one engine, in the order in which it was given them, whatever their streams: on an
# H100, 8 MiB that were asked for while 512 MiB were on their way came after all of those, cut into chunks or not, in
# one call or in many. So where the inbound lane is at work, an urgent reload is read by a kernel instead: it shares the
# link with the engine, and compute that waits for the bytes leaves multiprocessors free for it. The kernel is compiled
# beside the steps when it is first missed, and until then the engine does it.

Reads = Sequence[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
"""Device memory, and the pinned parts that are to be read into it, one after another; all uint8."""


class HostReader:
    """Reads pinned memory by a kernel, once that is there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self._asked = not _has_triton()

    def read(self, work: Reads) -> bool:
        """Read on the current stream. False: the kernel is not there (yet), and nothing was done.

        Nor is anything done while another device is the current one, on which it would run.
        """
        read = self._read
        if read is None:
            if not self._asked:
                self._asked = True
                background.start(self._try_to_make_ready, "lighterage-read")
            return False
        if torch.cuda.current_device() != self._device.index:
            return False
        for to, parts in work:
            at = 0
            for part in parts:
                read(to[at : at + part.numel()], part)
                at += part.numel()
        return True

    def _try_to_make_ready(self) -> None:
        try:
            self.make_ready()
        except Exception as error:  # a machine without a compiler, say: the engine goes on making all copies
            warnings.warn(
                "reloads that backward waits for stay behind those that are on their way: the kernel that would read "
                f"them was not compiled ({type(error).__name__}: {error}). Nothing else changes.",
                stacklevel=2,
            )

    def make_ready(self) -> None:
        """Compile the kernel, in both widths, by reading a few bytes."""
        from .read_kernel import read

        driver = graph_driver()
        with contextlib.ExitStack() as stack:
            if driver is not None:  # somebody may capture a graph meanwhile, which is none of this
                stack.enter_context(driver.relaxed())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.cuda.device(self._device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            there = torch.zeros(4096, dtype=torch.uint8, pin_memory=True)
            here = torch.empty_like(there, device=self._device)
            for nbytes in (4096, 4095):
                read(here[:nbytes], there[:nbytes])
        self._read = read


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
