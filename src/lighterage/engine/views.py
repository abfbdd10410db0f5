"""A saved tensor as a byte range of an allocation and the view over it, and back."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import torch


class ViewSpec(NamedTuple):
    """How to rebuild a strided tensor over an allocation.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> view = x.t()[1:]
    >>> spec = describe(view, view.nbytes)
    >>> (spec.lo, spec.hi, tuple(spec.size), spec.stride)
    (4, 24, (2, 2), (1, 3))
    """

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    lo: int
    """First byte, from the start of the storage."""
    hi: int
    """One past the last byte that an element of the view touches."""
    conj: bool
    neg: bool
    dense: bool
    """Whether there are bytes [lo, hi), and they are just what a contiguous tensor of this size and type takes."""


_PLAIN = frozenset(
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64]
)


def byte_range(tensor: torch.Tensor, nbytes: int) -> tuple[int, int]:
    """The bytes [lo, hi) of its storage that the elements of a strided tensor of `nbytes` lie in."""
    lo = int(tensor.storage_offset())
    if lo:
        lo *= tensor.itemsize
    if tensor.is_contiguous():
        return lo, lo + nbytes
    if nbytes == 0:
        return lo, lo
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return lo, lo + (1 + last) * tensor.itemsize


def describe(tensor: torch.Tensor, nbytes: int) -> ViewSpec:
    """The view spec of a strided tensor of `nbytes`."""
    dtype, neg = tensor.dtype, tensor.is_neg()
    conj = dtype not in _PLAIN and tensor.is_conj()
    if tensor.is_contiguous():
        lo = int(tensor.storage_offset())
        if lo:
            lo *= tensor.itemsize
        hi = lo + nbytes
        dense = nbytes > 0 and not neg and dtype in _PLAIN
    else:
        lo, hi = byte_range(tensor, nbytes)
        dense = False
    # tuple's own constructor: on the hottest path there is, that of a named tuple costs twice as much.
    return _new_tuple(ViewSpec, (dtype, tensor.shape, tensor.stride(), lo, hi, conj, neg, dense))


_new_tuple = tuple.__new__


def rebuild(memory: torch.Tensor, spec: ViewSpec, shift: int) -> torch.Tensor:
    """The tensor that `spec` describes, over contiguous `memory`, of which byte `shift` is byte 0 of the allocation.

    All that is rebuilt over one tensor shares its version counter, as the tensors that were saved shared theirs: what
    a backward writes into one of them is noticed when the next is asked for.
    """
    dtype = spec.dtype
    whole = memory
    if dtype is not memory.dtype:
        whole = as_bytes(memory)
        odd = whole.numel() % dtype.itemsize
        whole = (whole[: whole.numel() - odd] if odd else whole).view(dtype)
    tensor = whole.as_strided(spec.size, spec.stride, (spec.lo + shift) // dtype.itemsize)
    if spec.conj:
        tensor = torch._conj(tensor)
    return torch._neg_view(tensor) if spec.neg else tensor


def byte_view(storage: torch.UntypedStorage, lo: int, hi: int) -> torch.Tensor:
    """Bytes [lo, hi) of `storage` as a uint8 tensor of shape (hi - lo,)."""
    view = torch.empty(0, dtype=torch.uint8, device=storage.device)
    view.set_(storage, lo, (hi - lo,), (1,))
    return view


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as uint8 of shape (nbytes,), over the same memory."""
    return tensor if tensor.dtype is torch.uint8 and tensor.dim() == 1 else tensor.view(-1).view(torch.uint8)


# Note [Watching without holding]
# Whether a saved tensor was changed in place is told by its version counter, which a detached alias shares. Its data is
# then swapped for an empty tensor, so that the alias holds no bytes: `emptied_alias` is the counter alone.

_EMPTY = torch.empty(0, dtype=torch.uint8)


def emptied_alias(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that shares the version counter of `tensor`; see Note [Watching without holding]."""
    alias = tensor.detach()
    try:
        alias.data = _EMPTY
    except RuntimeError:  # memory of some devices changes places only with memory of the same
        alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias


_comparing = threading.RLock()
# In a forked child another thread may have held it for ever.
os.register_at_fork(after_in_child=_comparing._at_fork_reinit)  # type: ignore[attr-defined]


def share_counter(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a` and `b` have one version counter, rather than two that show the same number.

    PyTorch has no question for that; so the counter of `a` is moved by one for a moment, and put back. Another thread
    may look at it in that moment: those of the engine look again with `settled_version`, but PyTorch's own check of
    what is saved elsewhere does not. So this is asked only where nothing else tells.
    """
    with _comparing:
        now = a._version
        bump = torch._C._autograd._unsafe_set_version_counter
        bump((a,), (now + 1,))
        try:
            return b._version == now + 1
        finally:
            bump((a,), (now,))


def settled_version(tensor: torch.Tensor) -> int:
    """What the version counter shows while nobody moves it to compare it with another."""
    with _comparing:
        return tensor._version


def counter_of_wrapper(tensor: torch.Tensor) -> torch.Tensor:
    """An alias of a wrapper subclass with the outer version counter, which is the one that PyTorch checks."""
    with torch._C._DisableTorchDispatch():
        return tensor.detach()


def changed_in_place(kind: str, size: torch.Size, version: int, now: int, section: str) -> RuntimeError:
    """The error for a saved tensor that was changed before backward, in the words that PyTorch uses for it."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{kind} {list(size)}], saved in section {section!r}, is at version {now}; expected version {version} "
        "instead. Hint: enable anomaly detection to find the operation that failed to compute its gradient, with "
        "torch.autograd.set_detect_anomaly(True), or save a copy of the tensor before changing it."
    )


def type_name(tensor: torch.Tensor) -> str:
    """`torch.cuda.FloatTensor` and the like, as PyTorch names a tensor in its in-place error."""
    try:
        return str(tensor.type())
    except Exception:  # dtypes without a legacy tensor type
        return f"{tensor.device.type} {tensor.dtype}"
