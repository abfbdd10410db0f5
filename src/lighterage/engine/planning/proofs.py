"""Compares what is derived with what was saved, in the first step, in which both are there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..scopes import Pack, Unpackable
from ..sections import Section
from .derived import Derivation, Derived
from .recording import Measured
from .section_log import SectionLog
from .tracing import Tracer

PROOFS_OF_A_KIND = 2
"""Sections of one kind run the same code: so many of them speak for all."""

_CHUNK = 1 << 24
"""Elements that are compared at a time."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Proof:
    """Whether what one section derives was, bit by bit, what it had saved."""

    def __init__(self, has_room: Callable[[int], bool]) -> None:
        """`has_room`: whether so many bytes of the device may be taken."""
        self._has_room = has_room
        self._differs: list[torch.Tensor] = []
        self._failed = False

    def compare(self, saved: torch.Tensor, derivation: Derivation, view: Derived) -> None:
        """Compute again what `saved` was saved as, and note whether it differs. Never waits for the device."""
        # The result, one operand that is derived too, and what the comparison takes.
        if self._failed or not self._has_room(3 * saved.nbytes + 2 * _CHUNK):
            self._failed = True
            return
        try:
            again = view.unpack()
            self._differs += _differences(saved, again)
        except Exception:
            self._failed = True

    @property
    def holds(self) -> bool:
        """Whether all that was asked for was the same. Waits for the device the first time."""
        if not self._failed and self._differs:
            self._failed = any(bool(differs) for differs in self._differs)
            self._differs = []
        return not self._failed


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

    __slots__ = ("_log", "_pack", "_proof", "_tracer")

    def __init__(self, pack: Pack, tracer: Tracer, log: SectionLog, proof: Proof | None) -> None:
        """`proof`: where derivations are compared; None: they are noted, and that is all."""
        self._pack = pack
        self._tracer = tracer
        self._log = log
        self._proof = proof

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
            inner = handle.inner if isinstance(handle, Measured) else handle
            tracer.saved(tensor, inner)
            if derivation is None or self._proof is None:
                return handle
            return _Proven(handle, self._proof, derivation, tensor)
        finally:
            tracer.paused = False


class _Proven:
    """The handle of a save that could have been derived."""

    __slots__ = ("_derivation", "_handle", "_proof", "_view")

    def __init__(self, handle: Unpackable, proof: Proof, derivation: Derivation, tensor: torch.Tensor) -> None:
        self._handle = handle
        self._proof = proof
        self._derivation: Derivation | None = derivation
        self._view: Derived | None = Derived(derivation, tensor)

    def unpack(self) -> torch.Tensor:
        tensor = self._handle.unpack()
        derivation, view = self._derivation, self._view
        if derivation is not None and view is not None:
            self._derivation = self._view = None  # once is enough
            self._proof.compare(tensor, derivation, view)
        return tensor
