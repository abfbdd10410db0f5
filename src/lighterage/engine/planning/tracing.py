"""Tells, of what a section saves, which cheap operator made it from what else is saved.

Note [Derived saves]
What a decoder layer saves for its products is made by norms and activations of what these save themselves: the
operand of the last product is `silu(gate) * up`, and gate and up are saved too. So it need not be saved at all. One
call of the operator that made it, on the same operands, gives the same bits when backward asks for it; no forward runs
again, and what nobody asks for is not computed.

A dispatch mode around the forward notes the cheap operators. When something is saved whose memory one of them made, its
operands are looked up: those that were saved too serve as sources, and those that were not are derived in turn. It is
saved itself where that leads nowhere, and where anybody has written to it, or to an operand, since: version counters
tell. They do not tell of kernels that write without PyTorch's knowledge. So what operators gave inside an
`autograd.Function` is never derived, nor is what one of those has returned; and in the first step, whose saves are all
there, what was derived is compared with them, bit by bit (`proofs.py`). That sees one moment: who begins to write
through `.data` or an alias of another library after the first step is not noticed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode

from ...unseen import unseen
from ..scopes import Pack, Unpackable
from ..sections import Section
from ..views import byte_range
from .derived import Derivation, Derived, Made, Source, Stopwatch
from .origins import is_cheap, made_by_custom_function

_MOST_OPERATORS = 16
"""That are called for one save."""

_MOST_DEEP = 24
"""Operators that are called one inside another, each in some frames of Python's stack."""

_MOST_READ = 4
"""Bytes that an operator reads for one that it gives: sums are small, and take as long as what they are taken of."""

_ALIGNED = 15
"""Kernels of reductions go by another way, and may sum in another order, where an operand begins at an odd address."""


_SEVERAL = (tuple, list)
_HOLD_TENSORS = (torch.Tensor, *_SEVERAL)


class _Operand(NamedTuple):
    """A tensor that an operator was called with."""

    key: int
    made: Made | None
    """How it was made; None: that is not known, or it has changed since."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    lo: int
    hi: int
    version: int


class _Saved(NamedTuple):
    handle: Unpackable
    dtype: torch.dtype
    lo: int
    hi: int
    version: int


class _Untraceable(Exception):
    """An operand that cannot be had again."""


class Tracer(TorchDispatchMode):
    """Notes, around the forward of one section, which cheap operators make what. It holds no tensor's memory."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Under any other mode torch.compile gives up what runs inside, for good."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paused = False
        """Whether what runs now is none of the section's."""
        self._made: dict[int, Made] = {}
        # While the weak reference is there no other storage has this id.
        self._refs: dict[int, StorageWeakRef] = {}
        self._saved: dict[int, _Saved] = {}
        self._derivations: dict[int, Derivation] = {}

    def drop(self) -> None:
        """Take it off the calling thread's modes, if it is the one that was entered last. Harmless when repeated."""
        if _get_current_dispatch_mode() is self:
            try:
                self.__exit__(None, None, None)
            except IndexError:  # an interrupt came in the middle of it before
                _pop_mode()

    def __exit__(self, *error: Any) -> None:
        if _get_current_dispatch_mode() is self:  # else an interrupt came before it was entered
            super().__exit__(*error)  # type: ignore[no-untyped-call]
        # Whatever is saved holds the hook that packed it, and with that this: it must not hold what else was saved.
        for known in (self._made, self._refs, self._saved, self._derivations):
            known.clear()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Two more frames around each operator would do what `unseen` does at no cost."""
        return False

    @unseen
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        # With gradients off it is inside of an autograd.Function, or of no use to backward.
        if is_cheap(func) and not self.paused and torch.is_grad_enabled():
            try:
                self._note(func, args, kwargs or {}, out)
            except (_Untraceable, NotImplementedError, RuntimeError):  # the last two: without memory
                return out
        return out

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        given: list[_Operand] = []
        spec = [self._told(value, given) if isinstance(value, _HOLD_TENSORS) else value for value in args]
        named = {name: self._told(value, given) for name, value in kwargs.items()}
        keys, operand_bytes = [one.key for one in given], 0
        for one in given:
            operand_bytes += one.hi - one.lo
        several = isinstance(out, _SEVERAL)
        for number, tensor in enumerate(out if several else (out,)):
            if not _is_plain(tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in keys or key in self._made or not tensor.numel():
                continue  # it is, or lies in, what the operator was given
            self._refs[key] = StorageWeakRef(storage)
            self._made[key] = Made(
                func,
                spec,
                named,
                number if several else None,
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                tensor.storage_offset() * tensor.itemsize,
                tensor._version,
                tensor.device.type,
                operand_bytes,
            )

    def _told(self, value: Any, given: list[_Operand]) -> Any:
        """`value` with an operand in the place of each tensor. Adds them to `given`."""
        if isinstance(value, torch.Tensor):
            operand = self._operand(value)
            given.append(operand)
            return operand
        if isinstance(value, _SEVERAL):
            return [self._told(one, given) for one in value]
        return value

    def _operand(self, tensor: torch.Tensor) -> _Operand:
        if not _is_plain(tensor) or tensor.data_ptr() & _ALIGNED:
            raise _Untraceable
        storage = tensor.untyped_storage()
        key, version = storage._cdata, tensor._version
        if key not in self._refs:
            self._refs[key] = StorageWeakRef(storage)
        made = self._made.get(key)
        if made is not None and (made.version != version or made_by_custom_function(tensor)):
            made = None
        lo, hi = byte_range(tensor, tensor.nbytes)
        return _Operand(key, made, tensor.dtype, tensor.shape, tensor.stride(), lo, hi, version)

    # --- saves ------------------------------------------------------------------------------------------------------

    def saved(self, tensor: torch.Tensor, handle: Unpackable) -> None:
        """`tensor` was saved as `handle`, so that it may serve as a source."""
        if not _is_plain(tensor):
            return
        key = tensor.untyped_storage()._cdata
        lo, hi = byte_range(tensor, tensor.nbytes)
        known = self._saved.get(key)
        if known is None or known.version != tensor._version or (lo <= known.lo and known.hi <= hi):
            if key not in self._refs:
                self._refs[key] = StorageWeakRef(tensor.untyped_storage())
            self._saved[key] = _Saved(handle, tensor.dtype, lo, hi, tensor._version)

    def is_derived(self, tensor: torch.Tensor) -> bool:
        """Whether the memory that `tensor` lies in is derived already, for another save of it."""
        return _is_plain(tensor) and tensor.untyped_storage()._cdata in self._derivations

    def derivation(self, tensor: torch.Tensor) -> Derivation | None:
        """How the memory that `tensor` lies in is had again, from now on for all saves; None: it has to be saved."""
        if not _is_plain(tensor):
            return None
        key = tensor.untyped_storage()._cdata
        made = self._made.get(key)
        if made is None or made.version != tensor._version or made.dtype is not tensor.dtype:
            return None
        if made.operand_bytes > _MOST_READ * made.size.numel() * made.dtype.itemsize:
            return None
        if made_by_custom_function(tensor):
            return None
        found = self._derivations.get(key)
        if found is None:
            try:
                found = self._derive(made, [_MOST_OPERATORS], lasting=True)
            except _Untraceable:
                return None
            self._derivations[key] = found
        return found

    def _derive(self, made: Made, left: list[int], *, lasting: bool) -> Derivation:
        left[0] -= 1
        if left[0] < 0:
            raise _Untraceable
        args = [self._found(value, left) for value in made.args]
        kwargs = {name: self._found(value, left) for name, value in made.kwargs.items()}
        found = Derivation(made, args, kwargs, lasting=lasting)
        if found.depth > _MOST_DEEP:
            raise _Untraceable
        return found

    def _found(self, value: Any, left: list[int]) -> Any:
        """`value` with what gives its tensor in the place of each operand."""
        if isinstance(value, list):
            return [self._found(one, left) for one in value]
        if not isinstance(value, _Operand):
            return value
        derived = self._derivations.get(value.key)
        if derived is not None and value.made is not None and derived.made.dtype is value.dtype:
            return Source(derived, derived.made.lo, value.lo, value.dtype, value.size, value.stride)
        saved = self._saved.get(value.key)
        if (
            saved is not None
            and saved.version == value.version
            and saved.dtype is value.dtype
            and saved.lo <= value.lo
            and value.hi <= saved.hi
        ):
            return Source(saved.handle, saved.lo, value.lo, value.dtype, value.size, value.stride)
        if value.made is None or value.made.dtype is not value.dtype:
            raise _Untraceable
        passing = self._derive(value.made, left, lasting=False)
        return Source(passing, value.made.lo, value.lo, value.dtype, value.size, value.stride)


def _is_plain(tensor: Any) -> bool:
    """Whether it is a strided tensor whose elements are its bytes."""
    if type(tensor) is not torch.Tensor and type(tensor) is not nn.Parameter:
        return False
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_inference():
        return False
    return not (tensor.is_complex() or tensor.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))


class DerivingPack:
    """The pack of a section of which some saves are derived."""

    __slots__ = ("_pack", "_saves", "_stopwatch", "_tracer")

    def __init__(self, pack: Pack, tracer: Tracer, saves: frozenset[int], stopwatch: Stopwatch | None = None) -> None:
        """`saves`: the numbers of those that bring memory which is derived. `stopwatch`: takes the time of that."""
        self._pack = pack
        self._stopwatch = stopwatch
        self._tracer = tracer
        self._saves = saves

    def __call__(self, tensor: torch.Tensor, section: Section) -> Unpackable:
        tracer, row = self._tracer, section.row
        tracer.paused = True
        try:
            if row.saves + 1 in self._saves or tracer.is_derived(tensor):
                derivation = tracer.derivation(tensor)
                if derivation is not None:
                    row.saves += 1
                    row.saved_bytes += tensor.nbytes
                    return Derived(derivation, tensor, self._stopwatch)
            handle = self._pack(tensor, section)
            tracer.saved(tensor, handle)
            return handle
        finally:
            tracer.paused = False
