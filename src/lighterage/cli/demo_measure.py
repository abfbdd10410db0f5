"""Where a training step is, and how many bytes its activations hold there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StepClock:
    """Notes when forward and backward reach each layer.

    A step passes 2 L + 3 places: its start, the forward of each layer, the loss, the backward of each layer (the last
    layer first), its end. The hooks are plain module and gradient hooks: they save nothing and change nothing.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []

    @property
    def place(self) -> int:
        """The index of the place passed last."""
        return len(self._marks) - 1

    def mark(self) -> None:
        """Pass the next place."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            # Whichever device is the current one: autograd's threads have their own.
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Time one forward and backward; the caller marks the loss between them."""
        self._marks.clear()
        hooks = [layer.register_forward_pre_hook(self._entered) for layer in self._layers]
        hooks += [layer.register_forward_hook(self._left) for layer in self._layers]
        try:
            self.mark()
            yield
            self.mark()
        finally:
            for hook in hooks:
                hook.remove()

    def places_ms(self) -> list[float]:
        """Milliseconds from the start of the step to each place. Waits for the device."""
        first = self._marks[0]
        if not isinstance(first, float):
            torch.cuda.synchronize(self._device)
            return [first.elapsed_time(mark) for mark in self._marks if not isinstance(mark, float)]
        return [(mark - first) * 1e3 for mark in self._marks if isinstance(mark, float)]

    def _entered(self, module: nn.Module, args: tuple[object, ...]) -> None:
        self.mark()

    def _left(self, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        output.register_hook(self._backward_reached)

    def _backward_reached(self, gradient: Tensor) -> None:
        self.mark()


class SavedAllocations(contextlib.AbstractContextManager["SavedAllocations"]):
    """Counts, without an offloader, the allocations that autograd saves in `layers` and that are worth moving.

    Those of parameters and buffers, and those of less than `min_bytes`, are not.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], min_bytes: int) -> None:
        self._layers = list(layers)
        self._min_bytes = min_bytes
        self._resident = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        self._found: set[int] = set()
        self._inside = False
        self._stack = contextlib.ExitStack()

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self._found)

    def __enter__(self) -> Self:
        for layer in self._layers:
            self._stack.callback(layer.register_forward_pre_hook(lambda *_: self._enter(True)).remove)
            self._stack.callback(layer.register_forward_hook(lambda *_: self._enter(False)).remove)
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _enter(self, inside: bool) -> None:
        self._inside = inside

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._inside and storage.nbytes() >= self._min_bytes and storage._cdata not in self._resident:
            self._found.add(storage._cdata)
        return tensor.detach()  # holding an output itself would make a cycle


class LiveBytes(TorchDispatchMode):
    """Samples, after every operation of one step, the bytes of the tensors that came up in the step and still live.

    Storages are watched by weak references and asked for their size, so nothing is kept alive and what was released
    counts no more, whoever released it. `resident` was there before and does not count: parameters, gradients,
    optimizer state, the batch. On a CUDA device the allocator's own count stands in, less what it was at the start.
    A step under it is slowed down severalfold, and so never timed.
    """

    def __init__(self, clock: StepClock, device: torch.device, resident: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples: list[tuple[int, int]] = []
        """(place, bytes) after each operation."""
        self._clock = clock
        self._device = device
        self._resident = {tensor.untyped_storage()._cdata for tensor in resident}
        self._known: dict[int, StorageWeakRef] = {}
        self._base = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        # The offloader takes the memory for what it brings back below all modes, so that they do not see it: the one
        # function that it takes it with is watched by name.
        self._stack.enter_context(mock.patch.object(torch, "empty", self._watching(torch.empty)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _watching(self, empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            tensor = empty(*args, **kwargs)
            self._know(tensor)
            return tensor

        return watched

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._know((args, kwargs, result))
        self.samples.append((self._clock.place, self._live()))
        return result

    def _know(self, tree: object) -> None:
        if self._device.type == "cuda":
            return
        for storage in _storages(tree):
            key = storage._cdata
            if key not in self._resident and (key not in self._known or self._known[key].expired()):
                self._known[key] = StorageWeakRef(storage)

    def _live(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device) - self._base
        total = 0
        dead: list[int] = []
        for key, reference in self._known.items():
            storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                dead.append(key)
            else:
                total += storage.nbytes()
        for key in dead:
            del self._known[key]
        return total


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_iter(tree):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()
        elif isinstance(leaf, torch.UntypedStorage):
            yield leaf
        elif isinstance(leaf, torch.TypedStorage):
            yield leaf._untyped_storage


def over_time(samples: Sequence[tuple[int, int]], places_ms: Sequence[float]) -> tuple[list[float], list[int]]:
    """Spread the samples of a slow, watched step over the times of an unwatched one.

    Samples between two places are set at equal distances between the times of these. For places at 0 and 10 ms,
    `over_time([(0, 5), (0, 7)], [0.0, 10.0])` is `([2.5, 7.5], [5, 7])`.
    """
    counts: dict[int, int] = {}
    for place, _ in samples:
        counts[place] = counts.get(place, 0) + 1
    seen: dict[int, int] = {}
    times: list[float] = []
    for place, _ in samples:
        nth = seen.get(place, 0)
        seen[place] = nth + 1
        start, end = places_ms[place], places_ms[min(place + 1, len(places_ms) - 1)]
        times.append(start + (end - start) * (nth + 0.5) / counts[place])
    return times, [nbytes for _, nbytes in samples]
