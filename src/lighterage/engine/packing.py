"""Decides what becomes of each saved tensor, and makes its handle."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn

from ..marks import Mark, mark_of
from .allocation import Allocation
from .handles import Handle, Kept, KeptWrapper, Offloaded, OffloadedWrapper
from .lanes import Transport
from .ledger import Ledger
from .modules import Residents
from .policy import Policy
from .sections import Section
from .stores import Stores
from .traffic import Traffic
from .views import InPlaceWatch, byte_range, describe
from .wrappers import is_wrapper, parts_of, wait_for


class Packer:
    """The pack hook of an offloader's sections."""

    def __init__(
        self,
        lock: threading.RLock,
        policy: Policy,
        ledger: Ledger,
        residents: Residents,
        stores: Stores,
        traffic: Traffic,
        begin: Callable[[Section], None],
    ) -> None:
        self._lock = lock
        self._min_bytes = max(1, policy.min_bytes)
        self._ledger = ledger
        self._residents = residents
        self._stores = stores
        self._traffic = traffic
        self._begin = begin
        self._allocations: dict[int, weakref.ref[Allocation]] = {}
        self.transports: dict[torch.device, Transport | None] = {}

    def pack(self, tensor: torch.Tensor, section: Section) -> Handle:
        """A handle for one saved tensor. Called for every save of a section, in the thread that saves."""
        row = section.row
        if section.index is None:
            self._begin(section)
        row.saves += 1
        if type(tensor) is not torch.Tensor:
            return self._pack_special(tensor, section)
        return self._pack_plain(tensor, section)

    def _pack_plain(self, tensor: torch.Tensor, section: Section) -> Offloaded | Kept:
        if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return Kept(tensor, section)
        if tensor.is_nested or tensor.is_quantized or tensor._is_zerotensor():
            return Kept(tensor, section)
        row = section.row
        nbytes = tensor.nbytes
        row.saved_bytes += nbytes
        storage = tensor.untyped_storage()
        key = storage._cdata
        lo, hi = byte_range(tensor)
        base = tensor._base
        if base is not None and type(base) is not torch.Tensor and isinstance(base, nn.Parameter):
            self._ledger.step.note_kept(row, key, lo, hi, "parameter")
            return Kept(tensor, section)
        if storage.nbytes() < self._min_bytes:
            self._ledger.step.note_kept(row, key, lo, hi, "under min_bytes")
            return Kept(tensor, section)
        device = tensor.device
        transport = self.transports.get(device) or self._open_transport(device)
        mark = mark_of(key)
        reason = self._why_kept(tensor, section, key, transport, mark, nbytes)
        capture = 0 if transport is None else transport.capture()
        with self._lock:
            known = self._allocations.get(key)
            allocation = None if known is None else known()
            if allocation is not None and not (allocation.capture == capture and allocation.shows(tensor)):
                allocation = None
            if allocation is not None:
                if reason is not None:
                    if allocation.moved:  # by an earlier section, for nothing
                        self._traffic.still_alive.add(allocation)
                    allocation.keep(reason, storage)
                else:
                    reason = allocation.kept
            if reason is not None or transport is None:
                self._ledger.step.note_kept(row, key, lo, hi, reason or "on another device")
                return Kept(tensor, section)
            watch = InPlaceWatch(tensor)
            spec = describe(tensor, lo, hi)
            if allocation is None or not allocation.takes(lo, hi):
                allocation = Allocation(transport, storage, watch, row, spec, capture)
                self._allocations[key] = weakref.ref(allocation)
            section.enter(allocation)
            allocation.saved_at.append((section.name, row.saves, nbytes))
            fresh = allocation.add(storage, lo, hi)
            if fresh:
                row.unique_bytes += fresh
                self._traffic.gather(allocation, section, fresh, mark)
        return Offloaded(allocation, spec, watch, section)

    def _why_kept(
        self,
        tensor: torch.Tensor,
        section: Section,
        key: int,
        transport: Transport | None,
        mark: Mark | None,
        nbytes: int,
    ) -> str | None:
        """Why a large tensor that is no parameter stays where it is, or None."""
        if transport is None or (self._residents.accelerators and tensor.get_device() < 0):
            return "on another device"
        base = tensor._base
        resident = self._residents.reason(key, tensor if base is None else base)
        if resident is not None:
            return resident
        if mark is Mark.NOT_OFFLOAD:
            return "mark_not_offload"
        if section.keep_reason is not None:
            return section.keep_reason
        if not section.open:
            return "saved after its section had ended"
        still_alive = self._traffic.still_alive
        if still_alive and (section.name, section.row.saves, nbytes) in still_alive:
            return "held by somebody else when it was moved in an earlier step"
        return None

    def _pack_special(self, tensor: torch.Tensor, section: Section) -> Handle:
        """A tensor of a class of its own: a parameter, a wrapper subclass, a fake tensor."""
        if not is_wrapper(tensor):
            waited = wait_for(tensor)
            if waited is not tensor:
                return self.pack(waited, section)
            if isinstance(tensor, nn.Parameter | nn.Buffer) and tensor.layout is torch.strided:
                section.row.saved_bytes += tensor.nbytes
                reason = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
                self._ledger.step.note_kept(section.row, tensor.untyped_storage()._cdata, *byte_range(tensor), reason)
            return Kept(tensor, section)
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return KeptWrapper(tensor, section)
        context, parts = parts_of(tensor)
        inner: dict[str, Offloaded | OffloadedWrapper | torch.Tensor] = {}
        moved = False
        for name, (part, movable) in parts.items():
            handle = self._pack_part(part, section) if movable else None
            inner[name] = part if handle is None else handle
            moved = moved or handle is not None
        return OffloadedWrapper(tensor, context, inner, section) if moved else KeptWrapper(tensor, section)

    def _pack_part(self, part: torch.Tensor, section: Section) -> Offloaded | OffloadedWrapper | None:
        if type(part) is torch.Tensor:
            plain = self._pack_plain(part, section)
            return plain if isinstance(plain, Offloaded) else None
        handle = self._pack_special(part, section)
        return handle if isinstance(handle, Offloaded | OffloadedWrapper) else None

    def _open_transport(self, device: torch.device) -> Transport | None:
        with self._lock:
            if device not in self.transports:
                self.transports[device] = self._stores.open(device)
            return self.transports[device]

    def prepare(self) -> None:
        """Open the lanes of the devices that the modules are on, so that host memory is made ready meanwhile."""
        for device in self._residents.accelerators:
            self._open_transport(device)

    def capture(self) -> int:
        """The graph that is captured on the calling thread's stream, or 0."""
        return max((t.capture() for t in self.transports.values() if t is not None), default=0)

    def forget_dead(self) -> None:
        """Drop the entries of allocations that are gone."""
        self._allocations = {key: ref for key, ref in self._allocations.items() if ref() is not None}
