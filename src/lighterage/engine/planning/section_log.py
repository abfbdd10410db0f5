"""What is recorded of one run of one section: its saves, when they were read, and the products it computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...planner.timeline import Kind
from .. import spans
from ..allocation import Allocation, Stage
from ..ledger import Row
from ..scopes import Pack
from .clock import Mark
from .derived import Stopwatch

MEASURED = "measured: nothing is moved"
"""The reason for which all stays in a step that is measured."""

READ_TWICE = "its backward asks for a saved tensor twice"
"""The reason for which PyTorch cannot compute a section again."""


class SaveLog:
    """One allocation, under the save that brought it."""

    __slots__ = (
        "_allocation",
        "_refs",
        "born",
        "covered",
        "derivable",
        "held_bytes",
        "kept",
        "keys",
        "kind",
        "label",
        "module",
        "save",
        "uses",
    )

    def __init__(self, save: int, label: str, kind: Kind, born: Mark) -> None:
        self.save = save
        self.label = label
        self.kind: Kind = kind
        self.born = born
        self.kept: str | None = None
        self.derivable = False
        """Whether it need not be saved: something cheap makes it from what else is. Told in the first step alone."""
        self.module = ""
        """Which module inside the section saved it, where that was watched."""
        self.held_bytes = 0
        self.covered: dict[int, list[spans.Span]] = {}
        self.keys: list[int] = []
        self.uses: list[tuple[int, Mark]] = []
        """The phase, by its place in the step, and the moment of each read."""
        self._refs: list[StorageWeakRef] = []
        self._allocation: weakref.ref[Allocation] | None = None

    def take(self, tensor: torch.Tensor) -> None:
        """A part of it that was not known: a plain tensor, of which nothing is held."""
        storage = tensor.untyped_storage()
        self.keys.append(storage._cdata)
        self.held_bytes += storage.nbytes()
        self._refs.append(StorageWeakRef(storage))

    def cover(self, key: int, lo: int, hi: int) -> None:
        known = self.covered.get(key)
        if known is None:
            self.covered[key] = [(lo, hi)]
        elif (lo, hi) not in known:
            self.covered[key] = spans.merge([*known, (lo, hi)])

    def follow(self, allocation: Allocation) -> None:
        self._allocation = weakref.ref(allocation)

    @property
    def nbytes(self) -> int:
        return sum(hi - lo for covered in self.covered.values() for lo, hi in covered)

    def holds(self, key: int) -> bool:
        """Whether the storage with this id is still the one that was taken."""
        return any(k == key and not ref.expired() for k, ref in zip(self.keys, self._refs, strict=True))

    @property
    def live_bytes(self) -> int:
        """Device memory that it takes now."""
        allocation = None if self._allocation is None else self._allocation()
        if allocation is not None and allocation.stage is Stage.BACK:
            return self.held_bytes
        return self.held_bytes if any(not ref.expired() for ref in self._refs) else 0


class Proof(Protocol):
    """What a comparison has shown."""

    def holds_for(self, section: SectionLog) -> bool: ...


Role = Literal["bare", "hooked", "moved", "selective", "again"]
"""How a section ran: at rest; with hooks, and all of it kept; moved; computed again, in part or whole."""


StateKey = tuple[str, tuple[bool, ...]]
"""A section, and which of its modules train: what its forward changes depends on both."""


class SectionLog:
    """One run of one section."""

    __slots__ = (
        "__weakref__",
        "gap",
        "index",
        "input_keys",
        "inside",
        "key",
        "kind",
        "name",
        "not_recomputed",
        "num_moved",
        "overwritten",
        "products",
        "proof",
        "prover",
        "role",
        "row",
        "saves",
        "stopwatch",
        "watch",
    )

    def __init__(self, name: str, gap: bool, row: Row) -> None:
        self.name = name
        self.gap = gap
        self.row = row
        self.index: int | None = None
        self.saves: list[SaveLog] = []
        self.input_keys: dict[int, int] = {}
        """Storages of the call's tensors, and their places among them."""
        self.products: list[ProductLog] = []
        self.prover: Callable[[Pack], Pack] | None = None
        """Makes the pack that tells what is derivable of it; until its forward has begun."""
        self.proof: Proof | None = None
        """Whether what is derivable of sections of its kind was shown to have the same bits."""
        self.overwritten = False
        """Whether its forward writes over a product, so that the product cannot be put by."""
        self.not_recomputed: str | None = None
        self.role: Role | None = None
        """Told as its forward ends."""
        self.num_moved = 0
        """Allocations of it that leave."""
        self.stopwatch: Stopwatch | None = None
        """Of what backward derives of its saves, where the step is one of a trial."""
        self.inside: list[str] = []
        """The modules inside the section that run now, where that is watched."""
        self.key: StateKey | None = None
        self.watch: Callable[[], str | None] | None = None
        """Tells, as backward comes to it, what has changed that its forward started from."""
        self.kind: object = None
        """Sections of one kind take the same time: the class of the module."""


class ProductLog:
    """One product that a section's forward computed, in the order of computing."""

    __slots__ = ("_refs", "keys", "nbytes", "saves_before")

    def __init__(self, saves_before: int) -> None:
        self.saves_before = saves_before
        """How many saves its section had made before."""
        self.nbytes = 0
        self.keys: list[int] = []
        self._refs: list[StorageWeakRef] = []

    def take(self, tensor: torch.Tensor) -> None:
        """One of the tensors that it gave."""
        storage = tensor.untyped_storage()
        # While the weak reference is there no other storage has this id.
        self._refs.append(StorageWeakRef(storage))
        self.keys.append(storage._cdata)
        self.nbytes = max(self.nbytes, storage.nbytes())
