"""Decides what becomes of each saved tensor, and makes its handle."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn

from ..marks import Mark, any_marks, mark_of
from .allocation import Allocation
from .handles import Handle, Kept, KeptWrapper, Offloaded, OffloadedWrapper
from .lanes import Transport
from .ledger import Ledger
from .modules import CAST, Residents
from .policy import Policy
from .sections import Section
from .stores import Stores
from .traffic import HELD_ELSEWHERE, Traffic
from .views import byte_range, describe, emptied_alias, settled_version
from .wrappers import is_wrapper, parts_of, wait_for

# Note [Few looks]
# A look at one attribute of a tensor costs 50 to 100 ns, and far more on a busy host; packing a save is some twenty of
# them, and they are most of what it costs. So each is taken once and handed on, and what one look tells is not asked
# again: a storage that cannot be had tells sparse tensors and those that torch.func wraps, an address that cannot be
# had tells those that have no memory.


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
        # See Note [Few looks].
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse tensors and the like, and what torch.func wraps
            return Kept(tensor, section)
        if tensor.is_nested or tensor.is_quantized:
            return Kept(tensor, section)
        try:
            address = storage.data_ptr()
        except RuntimeError:  # there is no memory, though the storage has a size: zero tensors
            return Kept(tensor, section)
        key, base, nbytes = storage._cdata, tensor._base, tensor.nbytes
        row = section.row
        row.saved_bytes += nbytes
        if base is not None and type(base) is not torch.Tensor and isinstance(base, nn.Parameter):
            return self._keep(tensor, section, key, nbytes, "parameter")
        storage_bytes = storage.nbytes()
        if storage_bytes < self._min_bytes:
            return self._keep(tensor, section, key, nbytes, "under min_bytes")
        device = tensor.device
        transport = self.transports.get(device) or self._open_transport(device)
        mark = mark_of(key) if any_marks() else None
        reason = self._why_kept(tensor, base, section, key, transport, mark, nbytes)
        orders = section.orders
        is_first = key not in self._allocations
        if is_first:
            # Most often nothing of it was saved before; then what stays is settled without the lock.
            if reason is None and orders is not None:
                reason = orders.why_kept(row.saves, nbytes)
            if reason is not None or transport is None:
                return self._keep(tensor, section, key, nbytes, reason or "on another device")
        capture = 0 if transport is None else transport.capture()
        owner = tensor if base is None else base
        with self._lock:
            known = self._allocations.get(key)
            allocation = None if known is None else known()
            if allocation is not None and not (allocation.capture == capture and allocation.shows(tensor, owner)):
                allocation = None
            if allocation is not None:
                if reason is not None:
                    if allocation.moved:  # by an earlier section, for nothing
                        self._traffic.still_alive.add(allocation)
                    allocation.keep(reason, storage)
                else:
                    reason = allocation.kept
            elif reason is None and orders is not None and not is_first:
                reason = orders.why_kept(row.saves, nbytes)
            if reason is not None or transport is None:
                return self._keep(tensor, section, key, nbytes, reason or "on another device")
            alias = emptied_alias(tensor)
            version = settled_version(alias)
            spec = describe(tensor, nbytes)
            lo, hi = spec.lo, spec.hi
            if allocation is None or not allocation.takes(lo, hi):
                allocation = Allocation(
                    transport, storage, key, storage_bytes, address, alias, version, row, spec, owner, capture
                )
                self._allocations[key] = section.allocations[id(allocation)] = weakref.ref(allocation)
                if orders is not None:
                    orders.took(row.saves, allocation)
                fresh = hi - lo
            else:
                section.enter(allocation)
                fresh = allocation.add(storage, lo, hi)
            allocation.saved_at.append((section.name, row.saves, nbytes))
            if fresh:
                row.unique_bytes += fresh
                self._traffic.gather(allocation, section, fresh, mark)
        return Offloaded(self._traffic, allocation, spec, alias, version, section)

    def _keep(self, tensor: torch.Tensor, section: Section, key: int, nbytes: int, reason: str) -> Kept:
        if tensor.is_contiguous():
            lo = int(tensor.storage_offset())
            if lo:
                lo *= tensor.itemsize
            hi = lo + nbytes
        else:
            lo, hi = byte_range(tensor, nbytes)
        step = self._ledger.step
        section.row.last_kept = reason
        if key in step.kept:
            step.note_kept(section.row, key, lo, hi, reason)
        else:  # the same, for what is most often so
            row, step.kept[key] = section.row, ((lo, hi),)
            row.unique_bytes += hi - lo
            row.kept[reason] = row.kept.get(reason, 0) + hi - lo
        return Kept(tensor, section)

    def _why_kept(
        self,
        tensor: torch.Tensor,
        base: torch.Tensor | None,
        section: Section,
        key: int,
        transport: Transport | None,
        mark: Mark | None,
        nbytes: int,
    ) -> str | None:
        """Why a large tensor that is no parameter stays where it is, or None."""
        residents = self._residents
        if transport is None or (residents.accelerators and tensor.get_device() < 0):
            return "on another device"
        owner = tensor if base is None else base
        if key in residents.owners or (owner.requires_grad and type(owner.grad_fn).__name__ == CAST):
            resident = residents.reason(key, owner)
            if resident is not None:
                return resident
        if mark is Mark.NOT_OFFLOAD:
            return "mark_not_offload"
        if section.keep_reason is not None:
            return section.keep_reason
        if not section.open:
            return "saved after its section had ended"
        saves = self._traffic.still_alive.saves
        if saves and (section.name, section.row.saves, nbytes) in saves:
            return HELD_ELSEWHERE
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
                self._ledger.step.note_kept(
                    section.row, tensor.untyped_storage()._cdata, *byte_range(tensor, tensor.nbytes), reason
                )
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
        found = 0
        for transport in self.transports.values():
            if transport is not None:
                found = max(found, transport.capture())
        return found

    def forget_dead(self) -> None:
        """Drop the entries of allocations that are gone."""
        self._allocations = {key: ref for key, ref in self._allocations.items() if ref() is not None}
