"""Compares what is derived with what was saved, in the first step, in which both are there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..scopes import Pack, Unpackable
from ..sections import Section
from .derived import Derived
from .recording import Measured
from .section_log import SectionLog
from .tracing import Tracer

PROOFS_ENOUGH = 2
"""So many sections of one class speak for all that save the same: they run the same code."""

_CHUNK = 1 << 24
"""Elements that are compared at a time."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Proof:
    """Whether what sections of one kind derive was, bit by bit, what they had saved."""

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        """`has_room`: whether so many bytes of the device may be taken for a moment."""
        self._has_room = has_room
        self._differs: list[torch.Tensor] = []
        self._compared: dict[object, list[Comparison]] = {}
        """By what sections save: some of one class may run other code than others."""
        self._failed = False

    def begins(self, section: Comparison) -> bool:
        """Whether `section`, to which backward has come, is one of those that are compared."""
        compared = self._compared.setdefault(_signature(section.log), [])
        if self._failed or sum(not one.is_short for one in compared) >= PROOFS_ENOUGH:
            return False
        compared.append(section)
        return True

    def compare(self, section: Comparison, saved: torch.Tensor, again: Derived) -> None:
        """Compute again what `saved` was saved as, and note whether it differs. Never waits for the device."""
        # The result, what it is made of where that is derived too, and what the comparison takes.
        if self._failed or not self._has_room(3 * saved.nbytes + 2 * _CHUNK):
            section.is_short = True
            return
        try:
            self._differs += _differences(saved, again.unpack())
        except Exception:  # an operand that was written to since, though nobody reads what it was saved for
            self._failed = True

    def holds_for(self, section: SectionLog) -> bool:
        """Whether one like `section` was compared as a whole, and nothing differed. It waits for the device."""
        self._failed = self._failed or any(bool(differs) for differs in self._differs)
        self._differs = []
        return not self._failed and any(not one.is_short for one in self._compared.get(_signature(section), ()))


def _signature(section: SectionLog) -> object:
    return tuple((save.save, save.kind, save.derivable) for save in section.saves)


class Comparison:
    """What is compared of one section."""

    def __init__(self, proof: Proof, log: SectionLog) -> None:
        self._proof = proof
        self.log = log
        self._takes_part: bool | None = None
        self.is_short = False
        """Whether there was no room for all of it."""

    def see(self, saved: torch.Tensor, again: Derived) -> None:
        """Backward reads `saved`, which could be derived."""
        if self._takes_part is None:
            self._takes_part = self._proof.begins(self)
        if self._takes_part:
            self._proof.compare(self, saved, again)


def _differences(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    """Of `a` and `b`, of one shape and type, whether they differ in some bit, by parts."""
    with torch.no_grad():
        if a.shape != b.shape or a.dtype is not b.dtype:
            return [torch.ones((), dtype=torch.bool)]
        bits = _BITS[a.itemsize]
        a, b = a.view(bits), b.view(bits)
        if a.dim() == 0 or a.numel() <= _CHUNK:
            return [torch.ne(a, b).any()]
        along = max(range(a.dim()), key=a.shape.__getitem__)
        length = max(1, a.shape[along] * _CHUNK // a.numel())
        return [torch.ne(x, y).any() for x, y in zip(a.split(length, along), b.split(length, along), strict=True)]


class ProvingPack:
    """The pack of a section in the first step: all is saved, and what could be derived is told to its log."""

    __slots__ = ("_comparison", "_log", "_pack", "_tracer")

    def __init__(self, pack: Pack, tracer: Tracer, log: SectionLog, proof: Proof) -> None:
        self._pack = pack
        self._tracer = tracer
        self._log = log
        self._comparison = Comparison(proof, log)

    def __call__(self, tensor: torch.Tensor, section: Section) -> Unpackable:
        tracer, saves = self._tracer, self._log.saves
        tracer.paused = True
        try:
            before = len(saves)
            handle = self._pack(tensor, section)
            brought, derivation = len(saves) > before, None
            if brought or tracer.is_derived(tensor):
                derivation = tracer.derivation(tensor)
            if brought:
                saves[-1].derivable = derivation is not None
            tracer.saved(tensor, handle.inner if isinstance(handle, Measured) else handle)
            return handle if derivation is None else _Proven(handle, self._comparison, Derived(derivation, tensor))
        finally:
            tracer.paused = False


class _Proven:
    """The handle of a save that could have been derived."""

    __slots__ = ("_again", "_comparison", "_handle")

    def __init__(self, handle: Unpackable, comparison: Comparison, again: Derived) -> None:
        self._handle = handle
        self._comparison = comparison
        self._again: Derived | None = again

    def unpack(self) -> torch.Tensor:
        tensor = self._handle.unpack()
        again, self._again = self._again, None  # once is enough
        if again is not None:
            self._comparison.see(tensor, again)
        return tensor
