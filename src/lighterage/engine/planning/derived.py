"""What is not saved but computed again by itself, from what else is saved. See Note [Derived saves] in `tracing.py`."""

from __future__ import annotations

import contextlib
import threading
from typing import Any, NamedTuple

import torch

from ...errors import OffloadError
from ..scopes import Unpackable
from ..views import byte_range
from .clock import Clock, Mark

_NOTHING = contextlib.nullcontext()


class _Asked(threading.local):
    """What was computed for the handle that is asked now: each once, whoever of the others needs it too."""

    done: dict[int, torch.Tensor] | None = None


_asked = _Asked()


class Made(NamedTuple):
    """How the memory of a tensor was filled."""

    func: Any
    args: list[Any]
    """With something else in the place of each tensor."""

    kwargs: dict[str, Any]
    output: int | None
    """Which of the operator's results it is; None: the only one."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    lo: int
    """The byte of its storage at which it begins."""

    version: int
    device: str
    operand_bytes: int
    """What the operator was given."""


class Source(NamedTuple):
    """A tensor that an operator is called with again: a view over what `origin` gives."""

    origin: Unpackable
    origin_lo: int
    """The byte of its storage at which what `origin` gives begins."""

    lo: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        whole = self.origin.unpack()
        # Some free the memory of parameters between their forward and their backward, which no version tells.
        if whole.untyped_storage().nbytes() < byte_range(whole, whole.nbytes)[1]:
            raise OffloadError(
                f"a {tuple(whole.shape)} {whole.dtype} tensor has no memory when backward needs it, to compute again "
                'what was not saved. Fill it before, or pass recompute="never".'
            )
        return _view(whole, self.lo - self.origin_lo, self.size, self.stride)


def _view(whole: torch.Tensor, shift: int, size: torch.Size, stride: tuple[int, ...]) -> torch.Tensor:
    """The tensor that begins `shift` bytes after the first of `whole`."""
    if not shift and whole.shape == size and whole.stride() == stride:
        return whole
    return whole.as_strided(size, stride, whole.storage_offset() + shift // whole.itemsize)


class Derivation:
    """One call of an operator, that gives what was not saved. All handles of the same memory share one.

    What it gives is kept until the last of them is gone, so that three products that read one norm call it once. Not
    where backward may come again, nor for other streams than the one that it was computed on. For one handle nothing is
    computed twice in any case.
    """

    __slots__ = ("_args", "_kept", "_kwargs", "_lasting", "depth", "made")

    def __init__(self, made: Made, args: list[Any], kwargs: dict[str, Any], *, lasting: bool) -> None:
        """`args` and `kwargs` have a `Source` in the place of each tensor. `lasting`: others may ask for it too."""
        self.made = made
        self._args = args
        self._kwargs = kwargs
        self._lasting = lasting
        self._kept: tuple[torch.Tensor, int, object] | None = None
        self.depth = 1 + max(map(_depth, (*args, *kwargs.values())), default=0)
        """So many operators are called one inside another."""

    def unpack(self) -> torch.Tensor:
        """The operator's result, of the bits that it had in forward."""
        kept = self._kept
        if kept is not None:
            tensor, version, stream = kept
            if tensor._version == version and stream == _stream(tensor.device):
                return tensor
        done = {} if _asked.done is None else _asked.done
        if id(self) in done:
            return done[id(self)]
        made = self.made
        with torch.no_grad():
            args = [_filled(value) for value in self._args]
            kwargs = {name: _filled(value) for name, value in self._kwargs.items()}
            # Operators were noted below autocast.
            with torch.autocast(made.device, enabled=False) if torch.is_autocast_enabled(made.device) else _NOTHING:
                out = made.func(*args, **kwargs)
        result: torch.Tensor = out if made.output is None else out[made.output]
        if result.shape != made.size or result.stride() != made.stride or result.dtype is not made.dtype:
            raise OffloadError(
                f"{made.func} gave {tuple(result.shape)} {result.dtype} of strides {result.stride()} when it was "
                f"called again for backward, and {tuple(made.size)} {made.dtype} of strides {made.stride} before: "
                'it depends on a setting that has changed since. Leave it as it is, or pass recompute="never".'
            )
        if self._lasting and _goes_once():
            self._kept = result, result._version, _stream(result.device)
        done[id(self)] = result
        return result


def _filled(value: Any) -> Any:
    if isinstance(value, Source):
        return value.tensor()
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _depth(value: Any) -> int:
    if isinstance(value, list):
        return max(map(_depth, value), default=0)
    return value.origin.depth if isinstance(value, Source) and isinstance(value.origin, Derivation) else 0


def _goes_once() -> bool:
    """Whether a backward runs that drops its graph."""
    autograd = torch._C._autograd
    return torch._C._current_graph_task_id() != -1 and not autograd._get_current_graph_task_keep_graph()


def _stream(device: torch.device) -> object:
    return None if device.type == "cpu" else torch.accelerator.current_stream(device)


class Stopwatch:
    """Takes the time of what is derived for one run of a section."""

    __slots__ = ("_clock", "_marks")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: list[tuple[Mark, Mark]] = []

    def mark(self) -> Mark:
        return self._clock.mark()

    def took(self, start: Mark) -> None:
        """Something was derived, from `start` to now."""
        self._marks.append((start, self._clock.mark()))

    def ms(self) -> float | None:
        """Milliseconds in all; None: nothing was derived, or the device has not come past it. Never blocks."""
        if not self._marks or not all(self._clock.passed(end) for _, end in self._marks):
            return None
        return sum(self._clock.ms(start, end) for start, end in self._marks)


class Derived:
    """A saved tensor that was not saved: a view over what a derivation gives."""

    __slots__ = ("_derivation", "_lo", "_size", "_stopwatch", "_stride")

    def __init__(self, derivation: Derivation, tensor: torch.Tensor, stopwatch: Stopwatch | None = None) -> None:
        self._derivation = derivation
        self._stopwatch = stopwatch
        self._lo = byte_range(tensor, tensor.nbytes)[0]
        self._size = tensor.shape
        self._stride = tensor.stride()

    def unpack(self) -> torch.Tensor:
        derivation, outer, stopwatch = self._derivation, _asked.done, self._stopwatch
        if outer is None:
            _asked.done = {}
        try:
            if stopwatch is None or outer is not None:
                whole = derivation.unpack()
            else:
                self._stopwatch = None  # once is what backward takes: others may follow over the same graph
                start = stopwatch.mark()
                whole = derivation.unpack()
                stopwatch.took(start)
        except RuntimeError as error:
            if outer is not None or isinstance(error, OffloadError) or "inplace operation" not in str(error):
                raise
            hint = f'{error} It was read to compute again what was not saved; with recompute="never" that is saved.'
            raise RuntimeError(hint) from None
        finally:
            _asked.done = outer
        return _view(whole, self._lo - derivation.made.lo, self._size, self._stride)
