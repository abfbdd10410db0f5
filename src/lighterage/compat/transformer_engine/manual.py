"""The controller of a schedule by hand, in terms of layer numbers."""

from __future__ import annotations

import dataclasses

from lighterage import LiveSection, Offloader


@dataclasses.dataclass
class _Forward:
    """One forward pass of one layer that still waits for backward."""

    live: LiveSection
    reload_asked: bool = False


class ManualOffloadSynchronizer:
    """Says when each layer's saved tensors leave, when their device memory goes, and when they return.

    It decides speed and memory, never the result: any call may be left out, repeated, or come at another time, and what
    backward asks for is brought back then. A layer for which nothing is called stays on the device. Calls for a layer
    of which nothing waits for backward, because it was dropped, ran under `no_grad` or is through, do nothing.

    Made by `get_cpu_offload_context(manual_synchronization=True)`.
    """

    def __init__(self, offloader: Offloader, num_layers: int) -> None:
        self._offloader = offloader
        self._num_layers = num_layers
        self._forwards: dict[int, list[_Forward]] = {}

    def start_offload_layer(self, layer_id: int) -> None:
        """Start copying out what the layer saved, in every forward that waits for backward.

        Called inside of the layer's context, it is about what was saved so far. Copies come after the work that the
        current stream holds now. The tensors stay usable.
        Raises: ValueError, TypeError: no such layer.
        """
        for forward in self._waiting(layer_id):
            self._offloader.evict(forward.live)

    def release_activation_forward_gpu_memory(self, layer_id: int) -> None:
        """Give the device memory back, ordered after the copies, in every forward that waits for backward.

        The host does not wait. What was not copied yet is copied first.
        Raises: ValueError, TypeError: no such layer. OffloadError: copies failed; those tensors stay on the device.
        """
        for forward in self._waiting(layer_id):
            self._offloader.release(forward.live)

    def start_reload_layer(self, layer_id: int, *, newest: bool = False) -> None:
        """Start bringing back what the layer saved, in the oldest forward that was not asked for yet.

        newest: take the newest instead, for a schedule whose last microbatch goes backward first.
        Raises: ValueError, TypeError: no such layer.
        """
        waiting = self._waiting(layer_id)
        for forward in reversed(waiting) if newest else waiting:
            section = forward.live.section
            if section is not None and not (section.open or section.visited or forward.reload_asked):
                forward.reload_asked = True
                self._offloader.prefetch(forward.live)
                return

    def runs(self, layer_id: int, live: LiveSection) -> None:
        """Note that a forward of a layer begins. Called by the context."""
        self._forwards[layer_id] = [*self._waiting(layer_id), _Forward(live)]

    def _waiting(self, layer_id: int) -> list[_Forward]:
        check_layer(layer_id, self._num_layers)
        return [forward for forward in self._forwards.get(layer_id, ()) if forward.live.section is not None]


def check_layer(layer_id: int, num_layers: int) -> None:
    """Raise TypeError or ValueError unless there is a layer of this number."""
    if isinstance(layer_id, bool) or not isinstance(layer_id, int):
        raise TypeError(f"layer_id is a whole number; got {layer_id!r}.")
    if not 0 <= layer_id < num_layers:
        raise ValueError(
            f"layer_id must be from 0 to {num_layers - 1}, since model_layers={num_layers}; got {layer_id}. "
            "Pass the number of layers that run under the context as model_layers."
        )
