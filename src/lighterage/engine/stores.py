"""The rooms that an offloader's bytes rest in, opened when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from .arena import Arena, Block, slice_parts
from .cpu import CpuTransport, Room
from .cuda import CudaPinner
from .disk import DiskStore
from .lanes import Transport
from .pinned_disk import DiskTransport
from .pinned_host import HostTransport
from .policy import Policy

# The most that may wait in pinned memory on its way to a disk that is slower than the link.
PASSAGE_BYTES = 2 << 30


class _ArenaStore:
    """The arena as a store of the CPU backend: memory to memory."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    @property
    def refusal(self) -> str | None:
        return self._arena.refusal

    def acquire(self, nbytes: int) -> Room | None:
        return self._arena.acquire(nbytes)

    def write(self, room: Room, data: torch.Tensor, offset: int = 0) -> None:
        for part, piece in _pairs(room, data, offset):
            part.copy_(piece)

    def read(self, room: Room, data: torch.Tensor, offset: int = 0) -> None:
        for part, piece in _pairs(room, data, offset):
            piece.copy_(part)


def _pairs(room: Room, data: torch.Tensor, offset: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """What of a block's parts belongs to which bytes of `data`, which lie at its byte `offset`."""
    assert isinstance(room, Block)
    parts = slice_parts(room.parts, offset, offset + data.numel())
    if len(parts) == 1:
        return ((parts[0], data),)
    return zip(parts, data.split([part.numel() for part in parts]), strict=True)


def _pinner(device: torch.device) -> CudaPinner | None:
    return CudaPinner(device) if device.type == "cuda" else None


class Stores:
    """Opens transports, and shares one arena and one file among the devices of an offloader.

    `before_copies` is called before copies start on any lane; tests delay lanes with it.
    """

    def __init__(self, policy: Policy, before_copies: Callable[[], None] | None = None) -> None:
        self._policy = policy
        self._before_copies = before_copies
        self._arenas: dict[bool, Arena] = {}
        self._passage: Arena | None = None
        self._disk: DiskStore | None = None
        if policy.tier == "disk" or policy.disk_dir is not None:
            self._open_disk()

    def open(self, device: torch.device) -> Transport | None:
        """A transport for `device`, or None where nothing can be moved from it."""
        accelerator = torch.accelerator.current_accelerator()
        tier = self._policy.tier or ("disk" if device.type == "cpu" else "host")
        if device.type == "cpu":
            store = _ArenaStore(self._arena(device)) if tier == "host" else self._open_disk()
            return CpuTransport(store, self._before_copies)  # type: ignore[arg-type]
        if accelerator is None or device.type != accelerator.type:
            return None
        if tier == "host":
            transport = HostTransport(device, self._arena(device), self._before_copies)
            # Within a budget what is to leave must leave, however much of the device is free.
            transport.must_leave = self._policy.device_budget_bytes is not None
            return transport
        if self._passage is None:
            self._passage = Arena(pinner=_pinner(device), budget=PASSAGE_BYTES)
        return DiskTransport(device, self._passage, self._open_disk(), self._before_copies)

    def prepare(self) -> None:
        """More may have to rest at once than before: make memory ready beside the steps, until `settle`."""
        for arena in self._arenas.values():
            arena.prepare()

    def settle(self) -> None:
        """A step is over: arenas of which it is known by now what rests at once commit nothing more in advance."""
        for arena in self._arenas.values():
            arena.settle()

    def _arena(self, device: torch.device) -> Arena:
        pinned = device.type == "cuda"
        if pinned not in self._arenas:
            self._arenas[pinned] = Arena(pinner=_pinner(device), budget=self._policy.budget_bytes)
            self._arenas[pinned].prepare()
        return self._arenas[pinned]

    def _open_disk(self) -> DiskStore:
        if self._disk is None:
            policy = self._policy
            self._disk = DiskStore(policy.disk_dir, budget=policy.budget_bytes, checksums=policy.disk_checksums)
        return self._disk

    @property
    def bytes_in_use(self) -> int:
        """Bytes at rest now, on whichever tier."""
        return sum(arena.bytes_in_use for arena in self._arenas.values()) + self.disk_bytes_in_use

    @property
    def disk_bytes_in_use(self) -> int:
        return 0 if self._disk is None else self._disk.bytes_in_use

    @property
    def bytes_peak(self) -> int:
        """The most bytes that rested at once."""
        return sum(arena.bytes_peak for arena in self._arenas.values()) + (self._disk.bytes_peak if self._disk else 0)

    @property
    def host_bytes_reserved(self) -> int:
        """Host memory that is held, in use or not."""
        passage = [] if self._passage is None else [self._passage]
        return sum(arena.bytes_reserved for arena in [*self._arenas.values(), *passage])

    def close(self) -> None:
        """Give everything back. Transports are closed before."""
        for arena in self._arenas.values():
            arena.close()
        if self._passage is not None:
            self._passage.close()
        if self._disk is not None:
            self._disk.close()
