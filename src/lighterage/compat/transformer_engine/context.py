"""The context under which layers run, each a section of its own, numbered in the order in which they run."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from types import TracebackType

import torch

from lighterage import LiveSection, Offloader, OffloadError, background
from lighterage.compat.transformer_engine.manual import ManualOffloadSynchronizer, check_layer
from lighterage.unseen import unseen

# Note [Which layer this is]
#
# A context is entered without a name, so layers are known by counting. The count starts again after `num_layers`
# entries; after an exception inside the context; and where all that was saved since it started is gone, which is how a
# forward that left layers out, or that failed between two layers, is told from one that goes on. Entries that save
# nothing by their nature are not counted: under no_grad, and where the engine stands aside, as in a checkpoint's
# recomputation. What counting cannot know (a layer dropped while another microbatch waits) costs speed and memory only:
# a section that bears the wrong number still has its own bytes. `layer` gives the number.


class _Entered(threading.local):
    """How many contexts this thread is inside of, saved-tensor hooks being a thread's own."""

    num_recording = 0


_ENTERED = _Entered()


def is_cpu_offload_enabled() -> bool:
    """Whether the calling thread is inside a context, and what it saves there is looked at."""
    return _ENTERED.num_recording > 0


class _Thread(threading.local):
    def __init__(self) -> None:
        self.scope: contextlib.AbstractContextManager[LiveSection | None] | None = None
        self.live: LiveSection | None = None
        self.layer_id = 0
        self.saved: list[LiveSection] = []
        """Of the layers since the count started, those that saved something."""

    def restart(self) -> None:
        self.layer_id = 0
        self.saved = []


class CpuOffloadContext(contextlib.ContextDecorator):
    """`with context: y = layer(x)` for each layer, in the order of forward. Made by `get_cpu_offload_context`."""

    def __init__(
        self,
        offloader: Offloader,
        *,
        num_layers: int,
        num_offloaded: int,
        controller: ManualOffloadSynchronizer | None = None,
    ) -> None:
        """num_offloaded: of the `num_layers` layers, so many from the first on; with a controller, that decides."""
        self._offloader = offloader
        self._num_layers = num_layers
        self._num_offloaded = num_offloaded
        self._controller = controller
        self._thread = _Thread()
        weakref.finalize(self, _close_apart, offloader).atexit = False

    @property
    def offloader(self) -> Offloader:
        """What does the work: its `report()` and `stats()` tell what was moved, and why not."""
        return self._offloader

    def close(self) -> None:
        """Give host memory and files back. What was saved before stays usable. Done too when the context is dropped."""
        self._offloader.close()

    @contextlib.contextmanager
    def layer(self, layer_id: int) -> Iterator[CpuOffloadContext]:
        """The context of the layer with this number, where layers do not run in turn; the count goes on from it.

        Raises: TypeError, ValueError: no such layer.
        """
        check_layer(layer_id, self._num_layers)
        self._thread.restart()
        self._thread.layer_id = layer_id
        with self:
            yield self

    @unseen
    def __enter__(self) -> CpuOffloadContext:
        """Raises: OffloadError: this thread is inside already, or the context is closed."""
        thread = self._thread
        if thread.scope is not None:
            raise OffloadError(
                "the offload context was entered inside itself, so two layers would be one. Leave it after each layer."
            )
        if thread.saved and all(live.section is None for live in thread.saved):
            thread.restart()
        scope = self._scope(thread.layer_id)
        live = scope.__enter__()
        thread.scope, thread.live = scope, live
        if live is not None and self._controller is not None:
            self._controller.runs(thread.layer_id, live)
        _ENTERED.num_recording += live is not None
        return self

    def _scope(self, layer_id: int) -> contextlib.AbstractContextManager[LiveSection | None]:
        if not torch.is_grad_enabled():
            return contextlib.nullcontext()
        name = f"layer {layer_id}"
        if self._controller is not None:
            return self._offloader.section(name, plan="manual")
        return self._offloader.section(name, plan="policy" if layer_id < self._num_offloaded else "keep")

    @unseen
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        thread = self._thread
        scope, live = thread.scope, thread.live
        if scope is None:
            raise OffloadError("the offload context was left without having been entered: write `with context:`.")
        thread.scope = thread.live = None
        _ENTERED.num_recording -= live is not None
        try:
            scope.__exit__(kind, error, traceback)
        finally:
            if kind is not None:
                thread.restart()
            elif live is not None:
                self._ran(live)

    def _ran(self, live: LiveSection) -> None:
        thread = self._thread
        if live.section is not None:
            thread.saved.append(live)
        thread.layer_id += 1
        if thread.layer_id == self._num_layers:
            thread.restart()

    def __repr__(self) -> str:
        return f"<offload context of {self._num_layers} layers: {self._offloader!r}>"


class DisabledContext(contextlib.nullcontext[None]):
    """What `get_cpu_offload_context(enabled=False)` gives: it does nothing, and is used like the one that does."""

    offloader: Offloader | None = None
    """There is none."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._num_layers = num_layers

    @contextlib.contextmanager
    def layer(self, layer_id: int) -> Iterator[DisabledContext]:
        """The layer with this number, which nothing is done about.

        Raises: TypeError, ValueError: no such layer.
        """
        check_layer(layer_id, self._num_layers)
        yield self

    def close(self) -> None:
        """Nothing to give back."""

    def __repr__(self) -> str:
        return f"<offload context of {self._num_layers} layers: disabled>"


def _close_apart(offloader: Offloader) -> None:
    # The garbage collector may run this anywhere, also where the offloader's lock is held: a thread may wait for it.
    background.start(offloader.close, "lighterage-close")
