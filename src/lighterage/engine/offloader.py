"""Packs, evicts, releases, reloads and unpacks saved tensors: applies the plan."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import OffloadError
from ..marks import Mark, mark_of
from . import hooks
from .allocation import Allocation, SavedAt, Stage
from .handles import Handle, Kept, KeptWrapper, Offloaded, OffloadedWrapper, unpack
from .lanes import Transport
from .ledger import Ledger, OffloadStats
from .modules import Residents, SectionModules
from .policy import Policy
from .report import Report, build_report
from .sections import BackwardOrder, Section
from .stores import Stores
from .views import InPlaceWatch, ViewSpec, describe
from .wrappers import is_wrapper, parts_of, wait_for

# Copies start when so much has been gathered and another allocation is saved: one pair of events serves them all.
GATHER_BYTES = 4 << 20
# Device memory is compared with what was saved in the first steps only: asking the allocator costs tens of microseconds.
WATCH_MEMORY_STEPS = 3


class Recorder:
    """The pack hook of one section, or of what a module's forward saves between its sections."""

    __slots__ = ("_owner", "section")

    def __init__(self, owner: Offloader, section: Section) -> None:
        self._owner = owner
        self.section = section

    def __call__(self, tensor: torch.Tensor) -> Handle:
        return self._owner.pack(tensor, self.section)


class _BetweenSections:
    """The pack hook of a module's forward around its sections: each stretch between two of them is a section too."""

    __slots__ = ("_name", "_owner", "_position", "_section")

    def __init__(self, owner: Offloader, name: str) -> None:
        self._owner = owner
        self._name = name
        self._position = -1
        self._section: Section | None = None

    def __call__(self, tensor: torch.Tensor) -> Handle:
        if self._section is None:
            self._section = self._owner.open_gap(self._name, self._position)
        return self._owner.pack(tensor, self._section)

    def end_stretch(self, position: int | None = None) -> None:
        """A section begins here, the one at `position`; None: the forward ends."""
        section, self._section = self._section, None
        if section is not None:
            self._owner.close_section(section)
        if position is not None:
            self._position = position


class _Threads(threading.local):
    def __init__(self) -> None:
        self.between: list[_BetweenSections] = []


class Offloader:
    """Moves what sections save for backward off the device, and back. Made by `lighterage.offload`.

    Thread-safe. Usable as a context manager, which closes it. Correctness never depends on what is called on it or when:
    every saved tensor can be asked for at any time.
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module],
        policy: Policy,
        *,
        before_copies: Callable[[], None] | None = None,
    ) -> None:
        self._policy = policy
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._closed = False
        self._stores = Stores(policy, before_copies)
        self._transports: dict[torch.device, Transport | None] = {}
        self._table: dict[int, weakref.ref[Allocation]] = {}
        self._gathered: list[Allocation] = []
        self._gathered_bytes = 0
        self._gathered_on: tuple[int, Transport] | None = None
        self._live: dict[int, weakref.ref[Section]] = {}
        self._ended: collections.deque[tuple[int, int]] = collections.deque()
        self._waiting: collections.deque[weakref.ref[Section]] = collections.deque()
        self._num_open = 0
        self._tick = 0
        self._step_id = 0
        self._order = BackwardOrder()
        self._ledger = Ledger()
        self._flagged: dict[str, set[tuple[int, int]]] = {}
        self._threads = _Threads()
        self._named_order: dict[str, None] = {}
        self._kept_names: frozenset[str] | None = None
        self._modules = SectionModules(modules)
        self._residents = Residents(self._modules.all_modules)
        self._attachments: list[hooks.Attachment] = []
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    # --- sections -------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        for position, (name, module) in enumerate(self._modules.sections):
            self._attachments.append(hooks.Attachment(module, self._section_scope(name, position)))
        if self._modules.root is not None:
            self._attachments.append(hooks.Attachment(self._modules.root, self._root_scope))

    def _section_scope(self, name: str, position: int) -> hooks.Scope:
        def scope(call: hooks.Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
            with self._scope(name, position):
                return call(module, *args, **kwargs)

        return scope

    @contextlib.contextmanager
    def _scope(self, name: str, position: int | None) -> Iterator[Section | None]:
        between = self._threads.between
        reason = self._why_stand_aside()
        if reason is not None:
            self._stand_aside(name, position, reason)
            yield None
            return
        if between:
            between[-1].end_stretch(position)
        section = self._open_section(name, self._why_keep_section(name, position))
        before = self._device_bytes()
        try:
            with torch.autograd.graph.saved_tensors_hooks(Recorder(self, section), unpack):
                yield section
        except BaseException:
            section.open = False
            with self._lock:
                self._num_open -= 1
                self._gathered_drop(section)
            raise
        self._note_growth(section, before)
        self.close_section(section)

    def section(self, name: str) -> contextlib.AbstractContextManager[Section | None]:
        """A section around code that is not an nn.Module.

        Args:
            name: what the report calls it; the same name for the same code in every step.

        Raises:
            TypeError, ValueError: `name` is not a non-empty string.
            OffloadError: the offloader is closed.
        """
        if not isinstance(name, str):
            raise TypeError(f"a section's name is a string; got {name!r}.")
        if not name:
            raise ValueError('a section\'s name cannot be empty. Name it after its code: offloader.section("encoder").')
        if self._closed:
            raise OffloadError(
                f"section({name!r}) was opened on a closed offloader. Make a new one with lighterage.offload."
            )
        return self._scope(name, None)

    def _root_scope(self, call: hooks.Call, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        reason = self._why_stand_aside()
        if reason is not None:
            self._ledger.stood_aside[(self._modules.root_name, reason)] += 1
            return call(module, *args, **kwargs)
        between = _BetweenSections(self, self._modules.root_name)
        self._threads.between.append(between)
        try:
            with torch.autograd.graph.saved_tensors_hooks(between, unpack):
                return call(module, *args, **kwargs)
        finally:
            self._threads.between.remove(between)
            between.end_stretch()

    def open_gap(self, name: str, position: int) -> Section:
        """A section for what is saved after the section at `position` ended, up to the next one."""
        sections = self._modules.sections
        where = f"after {sections[position][0]}" if position >= 0 else f"before {sections[0][0]}"
        kept = position + 1 >= len(sections) - self._policy.keep_last
        return self._open_section(f"{name}, {where}", "keep_last" if kept else None, gap=True)

    def _why_stand_aside(self) -> str | None:
        if self._closed:
            return "closed"
        if os.getpid() != self._pid:
            return "forked process"
        if torch._C._current_graph_task_id() != -1:
            return "inside a running backward"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "inside a torch.func transform"
        if not torch._C._autograd._saved_tensors_hooks_is_enabled():
            return "saved-tensor hooks are disabled"
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and not isinstance(top[0], Recorder | _BetweenSections):
            module = getattr(top[0], "__module__", None) or type(top[0]).__module__
            if module == "torch.utils.checkpoint":
                return "inside torch.utils.checkpoint"
            return f"under saved-tensor hooks of {module}"
        return None

    def _stand_aside(self, name: str, position: int | None, reason: str) -> None:
        self._ledger.stood_aside[(name, reason)] += 1
        between = self._threads.between
        if between and reason != "inside a running backward":
            between[-1].end_stretch(position)
            with self._lock:
                self._pass_section()

    def _why_keep_section(self, name: str, position: int | None) -> str | None:
        if self._kept_names is not None:
            return "keep_last" if name in self._kept_names else None
        if position is None:
            return None
        return "keep_last" if position >= len(self._modules.sections) - self._policy.keep_last else None

    def _open_section(self, name: str, keep_reason: str | None, gap: bool = False) -> Section:
        with self._lock:
            self._tidy()
            self._num_open += 1
            return Section(self, name, keep_reason, gap)

    def close_section(self, section: Section) -> None:
        """The section's forward has ended: start what is left to copy, and release what has had its time."""
        section.open = False
        with self._lock:
            self._num_open -= 1
            self._flush()
            if section.index is not None:
                section.tick = self._tick
                self._waiting.append(weakref.ref(section))
            if not section.gap:
                if section.index is not None and not self._modules.has(section.name):
                    self._named_order.pop(section.name, None)
                    self._named_order[section.name] = None
                self._pass_section()

    def _pass_section(self) -> None:
        """One more section has passed: release those whose time has come."""
        self._tick += 1
        failure: OffloadError | None = None
        while self._waiting:
            section = self._waiting[0]()
            if section is not None and self._tick - section.tick <= self._policy.release_after:
                break
            self._waiting.popleft()
            if section is not None and not section.visited:
                try:
                    self._release(section)
                except OffloadError as error:
                    failure = failure or error
            section = None
        if failure is not None:
            raise failure

    @property
    def sections(self) -> list[Section]:
        """The live sections, in the order of forward: those of which something saved is still waiting for backward."""
        with self._lock:
            self._tidy()
            return [section for ref in self._live.values() if (section := ref()) is not None]

    # --- packing --------------------------------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor, section: Section) -> Handle:
        """The pack hook: a handle for one saved tensor."""
        if section.index is None:
            self._first_save(section)
        row = section.row
        row.saves += 1
        row.saved_bytes += tensor.nbytes if type(tensor) is torch.Tensor else 0
        if type(tensor) is not torch.Tensor:
            return self._pack_special(tensor, section)
        packed = self._pack_plain(tensor, section)
        return Kept(tensor, section) if packed is None else packed

    def _first_save(self, section: Section) -> None:
        with self._lock:
            if not self._live:
                self._residents.refresh()
            index = self._order.created(section.name)
            section.index = index
            self._ledger.step.rows.append(section.row)
            note = (self._step_id, index)
            ended = self._ended
            self._live[index] = weakref.ref(section, lambda _, note=note, ended=ended: ended.append(note))  # type: ignore[misc]

    def _pack_plain(self, tensor: torch.Tensor, section: Section) -> Offloaded | None:
        """An `Offloaded` handle, or None: keep the tensor as it is."""
        if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return self._kept(section, f"{tensor.layout} tensor", tensor)
        if tensor.is_nested or tensor.is_quantized:
            return self._kept(section, "nested or quantized tensor", tensor)
        base = tensor._base
        if base is not None and type(base) is not torch.Tensor and isinstance(base, nn.Parameter):
            return self._kept(section, "parameter", tensor)
        storage = tensor.untyped_storage()
        total = storage.nbytes()
        if total < self._policy.min_bytes or total == 0:
            return self._kept(section, "under min_bytes", tensor)
        device = tensor.device
        transport = self._transports.get(device) or self._open_transport(device)
        if transport is None or (device.type == "cpu" and self._residents.on_accelerator):
            return self._kept(section, "on another device", tensor)
        key = storage._cdata
        resident = self._residents.reason(key, tensor if base is None else base)
        if resident is not None:
            return self._kept(section, resident, tensor)
        if self._closed or not section.open:
            return self._kept(section, "closed", tensor)
        nbytes = tensor.nbytes
        reason = section.keep_reason
        mark = mark_of(key)
        if mark is Mark.NOT_OFFLOAD:
            reason = "mark_not_offload"
        elif reason is None:
            flagged = self._flagged.get(section.name)
            if flagged and (section.row.saves, nbytes) in flagged:
                reason = "alive elsewhere in an earlier step"
        spec = describe(tensor)
        with self._lock:
            allocation = self._find(key, tensor._version)
            if reason is not None:
                if allocation is not None:
                    allocation.keep(reason, storage)
                return self._kept(section, reason, tensor, spec)
            if allocation is not None and allocation.kept is not None:
                return self._kept(section, allocation.kept, tensor, spec)
            watch = InPlaceWatch(tensor)
            if allocation is None or not allocation.takes(spec.lo, spec.hi):
                label = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                allocation = Allocation(transport, storage, watch, section.row, label)
                self._table[key] = weakref.ref(allocation)
            allocation.saved_at.append(SavedAt(section.name, section.row.saves, nbytes))
            if id(allocation) not in section.allocations:
                section.allocations[id(allocation)] = weakref.ref(allocation)
            fresh = allocation.add(storage, spec.lo, spec.hi)
            if fresh:
                section.row.unique_bytes += fresh
                self._gather(allocation, section, fresh, transport, mark)
        return Offloaded(allocation, spec, watch, section)

    def _kept(self, section: Section, reason: str, tensor: torch.Tensor, spec: ViewSpec | None = None) -> None:
        step = self._ledger.step
        if spec is None:
            if tensor.layout is not torch.strided or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return
            if tensor.is_nested or tensor.device.type == "meta":
                return
            spec = describe(tensor)
        step.note_kept(section.row, tensor.untyped_storage()._cdata, spec.lo, spec.hi, reason)

    def _pack_special(self, tensor: torch.Tensor, section: Section) -> Handle:
        """A tensor of a class of its own: a parameter, a wrapper subclass, a fake tensor."""
        if isinstance(tensor, nn.Parameter | nn.Buffer) or isinstance(tensor._base, nn.Parameter):
            if not is_wrapper(tensor):
                section.row.saved_bytes += tensor.nbytes
                self._kept(section, "parameter" if isinstance(tensor, nn.Parameter) else "buffer", tensor)
                return Kept(tensor, section)
            return KeptWrapper(tensor, section)
        waited = wait_for(tensor)
        if waited is not tensor:
            return self.pack(waited, section)
        if not is_wrapper(tensor):
            return Kept(tensor, section)
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
            section.row.saved_bytes += part.nbytes
            return self._pack_plain(part, section)
        handle = self._pack_special(part, section)
        return handle if isinstance(handle, Offloaded | OffloadedWrapper) else None

    def _open_transport(self, device: torch.device) -> Transport | None:
        with self._lock:
            if device not in self._transports:
                self._transports[device] = self._stores.open(device)
            return self._transports[device]

    def _find(self, key: int, version: int) -> Allocation | None:
        ref = self._table.get(key)
        allocation = None if ref is None else ref()
        if allocation is None or allocation.version != version or not allocation.unchanged:
            return None
        return allocation

    # --- evicting -------------------------------------------------------------------------------------------------

    def _gather(
        self, allocation: Allocation, section: Section, fresh: int, transport: Transport, mark: Mark | None
    ) -> None:
        """Queue the fresh ranges of an allocation for copying; what was gathered before it may start."""
        if self._policy.select == "marked" and mark is not Mark.OFFLOAD:
            section.undecided.append(weakref.ref(allocation))
            return
        on = (transport.stream_key(), transport)
        if self._gathered_on is not None and self._gathered_on != on:
            self._flush()
        if self._gathered and self._gathered[-1] is allocation:
            self._gathered_bytes += fresh
            return
        if self._gathered_bytes >= GATHER_BYTES:
            self._flush()
        self._gathered_on = on
        self._gathered.append(allocation)
        self._gathered_bytes += fresh

    def _gathered_drop(self, section: Section) -> None:
        """An exception ended the section: what it gathered is not worth moving."""
        mine = section.allocations
        self._gathered = [a for a in self._gathered if id(a) not in mine]
        if not self._gathered:
            self._gathered_bytes = 0
            self._gathered_on = None

    def _flush(self) -> None:
        """Start copying what was gathered."""
        gathered, self._gathered = self._gathered, []
        on, self._gathered_on = self._gathered_on, None
        self._gathered_bytes = 0
        if gathered and on is not None:
            self._evict(gathered, on[1])

    def _evict(self, allocations: Sequence[Allocation], transport: Transport) -> None:
        chosen: list[Allocation] = []
        for allocation in allocations:
            if not allocation.pending or allocation.kept is not None:
                continue
            if mark_of(allocation.key) is Mark.NOT_OFFLOAD:
                allocation.keep("mark_not_offload")
            elif not allocation.unchanged:
                allocation.keep("changed in place after it was saved")
            else:
                chosen.append(allocation)
                continue
            self._note_stays(allocation)
        batches = [allocation.sources() for allocation in chosen]
        resting = transport.evict([source for batch in batches for source in batch])
        at = 0
        for allocation, batch in zip(chosen, batches, strict=True):
            rests = resting[at : at + len(batch)]
            at += len(batch)
            placed = [rest for rest in rests if rest is not None]
            if len(placed) < len(batch):
                for rest in placed:
                    rest.retire()
                reason = transport.refusal or "no room at rest"
                self._ledger.refusals[reason] += 1
                allocation.keep(reason)
                self._note_stays(allocation)
                continue
            allocation.copied(batch, placed)
            row = allocation.row
            row.bytes_out += sum(hi - lo for _, lo, hi in batch)
            row.copies_out += len(batch)

    def _note_stays(self, allocation: Allocation) -> None:
        assert allocation.kept is not None
        kept = allocation.row.kept
        kept[allocation.kept] = kept.get(allocation.kept, 0) + sum(hi - lo for lo, hi in allocation.covered)

    def evict(self, section: Section) -> None:
        """Start copying out what `section` saved, if that has not begun. Its tensors stay usable.

        Raises:
            ValueError: the section belongs to another offloader.
        """
        self._check(section)
        with self._lock:
            self._flush()
            self._decide(section)

    def _decide(self, section: Section) -> None:
        """Under `select="marked"`: move what has been marked since it was saved."""
        undecided, section.undecided = section.undecided, []
        for ref in undecided:
            allocation = ref()
            if allocation is None or not allocation.pending:
                continue
            if mark_of(allocation.key) is Mark.OFFLOAD:
                self._evict([allocation], allocation.transport)
            else:
                section.undecided.append(ref)

    # --- releasing ------------------------------------------------------------------------------------------------

    def release(self, section: Section) -> None:
        """Give back the device memory of what `section` saved, ordered after its copies. Evicts first if need be.

        Raises:
            ValueError: the section belongs to another offloader.
            OffloadError: the copies failed (a full disk, an I/O error); the tensors stay on the device.
        """
        self._check(section)
        with self._lock:
            self._flush()
            self._release(section)

    def _release(self, section: Section) -> None:
        self._decide(section)
        for ref in section.undecided:
            allocation = ref()
            if allocation is not None and allocation.pending:
                allocation.keep("not marked")
                self._note_stays(allocation)
        section.undecided = []
        ordered: set[int] = set()
        failure: OffloadError | None = None
        for allocation in section.live_allocations():
            leaving = allocation.leaving
            if leaving is None:
                continue
            if mark_of(allocation.key) is Mark.NOT_OFFLOAD:
                allocation.keep("mark_not_offload")
                self._note_stays(allocation)
                continue
            if id(leaving) not in ordered:
                try:
                    leaving.order()
                except OffloadError as error:
                    failure = failure or OffloadError(
                        f"{allocation.label} of section {section.name!r} could not be moved and stays on the device: "
                        f"{error}"
                    )
                    allocation.keep("the transfer failed")
                    self._note_stays(allocation)
                    continue
                ordered.add(id(leaving))
            allocation.let_go()
        if failure is not None:
            raise failure

    # --- reloading and unpacking ----------------------------------------------------------------------------------

    def prefetch(self, section: Section) -> None:
        """Start bringing back what `section` saved.

        Raises:
            ValueError: the section belongs to another offloader.
        """
        self._check(section)
        with self._lock:
            self._reload(section)

    def _reload(self, section: Section) -> None:
        away = [a for a in section.live_allocations() if a.stage is Stage.AWAY]
        self._bring_back(away[::-1])

    def _bring_back(self, away: list[Allocation]) -> None:
        groups: dict[int, list[Allocation]] = {}
        for allocation in away:
            groups.setdefault(id(allocation.transport), []).append(allocation)
        for group in groups.values():
            transport = group[0].transport
            with torch.inference_mode(False), torch.no_grad():
                batches = []
                for allocation in group:
                    self._note_if_alive(allocation)
                    batches.append(allocation.room())
                fences = transport.restore(batches)
            for allocation, batch, fence in zip(group, batches, fences, strict=True):
                allocation.returning(fence)
                allocation.row.bytes_in += sum(resting.nbytes for resting, _ in batch)
                allocation.row.copies_in += len(batch)

    def _note_if_alive(self, allocation: Allocation) -> None:
        if allocation.still_alive:
            allocation.row.alive.append((allocation.label, allocation.nbytes))
            for saved in allocation.saved_at:
                self._flagged.setdefault(saved.section, set()).add((saved.ordinal, saved.nbytes))

    def visit(self, section: Section) -> None:
        """Backward has come to `section`: bring back what it saved, and start on what comes next."""
        with self._lock:
            if section.visited:
                return
            section.visited = True
            if section.index is None:
                return
            self._order.visited(section.index)
            self._reload(section)
            if self._closed:
                return
            ahead = 0
            live = {i: s for i, ref in self._live.items() if (s := ref()) is not None}
            for upcoming in self._order.upcoming(section.index, live):
                if ahead >= self._policy.prefetch_ahead:
                    break
                self._reload(upcoming)
                ahead += not upcoming.gap

    def load(self, allocation: Allocation, spec: ViewSpec, section: Section) -> torch.Tensor:
        """The saved tensor that `spec` describes, on the device."""
        with self._lock:
            if allocation.stage is Stage.AWAY:
                self._bring_back([allocation])
            elif allocation.stage is Stage.HELD:
                allocation.wanted = True
        tensor, wait = allocation.use(spec)
        if wait is not None:
            with self._lock:
                self._ledger.step.note_wait(allocation.row, wait)
        return tensor

    # --- housekeeping ---------------------------------------------------------------------------------------------

    def _check(self, section: Section) -> None:
        if not isinstance(section, Section):
            raise TypeError(f"a section is taken from offloader.sections; got {section!r}.")
        if section.owner is not self:
            raise ValueError(f"section {section.name!r} belongs to another offloader. Call that one's method.")

    def _tidy(self) -> None:
        """Take note of what finalizers left behind: sections that ended, memory that was buried."""
        for transport in self._transports.values():
            if transport is not None:
                transport.tidy()
        while self._ended:
            step, index = self._ended.popleft()
            if step == self._step_id:
                self._live.pop(index, None)
        if not self._live and self._num_open == 0 and self._ledger.step.rows:
            self._finish_step()
        if self._closed and not self._live and self._transports:
            self._shut()

    def _finish_step(self) -> None:
        self._ledger.finish_step()
        self._order.finish_step()
        self._step_id += 1
        self._waiting.clear()
        self._table = {key: ref for key, ref in self._table.items() if ref() is not None}
        if self._named_order:
            names = [*(name for name, _ in self._modules.sections), *self._named_order]
            keep = self._policy.keep_last
            self._kept_names = frozenset(names[-keep:] if keep else ())

    def _device_bytes(self) -> int | None:
        if self._ledger.num_steps >= WATCH_MEMORY_STEPS:
            return None
        known = [t.device_bytes() for t in self._transports.values() if t is not None]
        return sum(b for b in known if b is not None) if known and None not in known else None

    def _note_growth(self, section: Section, before: int | None) -> None:
        if before is None:
            return
        after = self._device_bytes()
        if after is not None:
            section.row.unseen_bytes = max(0, after - before - section.row.unique_bytes)

    def stats(self, total: bool = False) -> OffloadStats:
        """Figures of the last finished step, or since the start; the sizes at rest are as they are now.

        A step ends when nothing saved in it is waiting for backward any more.
        """
        with self._lock:
            self._tidy()
            stats = self._ledger.total() if total else self._ledger.last.stats()
            return dataclasses.replace(
                stats,
                host_bytes_in_use=self._stores.bytes_in_use,
                disk_bytes_in_use=self._stores.disk_bytes_in_use,
                host_bytes_peak=self._stores.bytes_peak,
                host_bytes_reserved=self._stores.host_bytes_reserved,
            )

    def report(self) -> Report:
        """What happened in the last finished step, section by section; `str(report)` is a table, `.to_json()` data."""
        with self._lock:
            stats = self.stats()
            return build_report(
                ledger=self._ledger,
                stats=stats,
                sections_from=self._modules.chosen_from,
                order=self._order,
                policy=self._policy,
            )

    @property
    def policy(self) -> Policy:
        return self._policy

    def close(self) -> None:
        """Detach from the modules and give host memory and files back. Harmless when repeated.

        What was saved before stays usable: a backward that is still to come works. Its room is given back when the
        graph is gone.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for attachment in getattr(self, "_attachments", []):
                attachment.detach()
            self._gathered.clear()
            self._gathered_on = None
            self._tidy()
            if not self._transports:
                self._stores.close()

    def _shut(self) -> None:
        transports, self._transports = self._transports, {}
        for transport in transports.values():
            if transport is not None:
                transport.close()
        self._stores.close()

    def __enter__(self) -> Offloader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._live)} live sections"
        return f"<lighterage.Offloader over {len(self._modules.sections)} sections, {state}>"
