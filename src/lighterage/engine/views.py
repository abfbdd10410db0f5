"""A saved tensor as a byte range of an allocation and the view over it, and back."""

from __future__ import annotations

import collections
from typing import ClassVar, NamedTuple

import torch


class ViewSpec(NamedTuple):
    """How to rebuild a strided tensor over an allocation.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> view = x.t()[1:]
    >>> spec = describe(view, *byte_range(view))
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

    def fills(self, lo: int, hi: int) -> bool:
        """Whether bytes [lo, hi) are all of the view's, and just what a contiguous tensor of its size takes."""
        return (
            lo == self.lo
            and hi == self.hi
            and lo < hi
            and self.dtype in _PLAIN
            and self.size.numel() * self.dtype.itemsize == hi - lo
        )


_PLAIN = frozenset(
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int32, torch.int64]
)


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes [lo, hi) of its storage that the elements of a strided tensor lie in."""
    lo = int(tensor.storage_offset()) * tensor.itemsize
    if tensor.is_contiguous():
        return lo, lo + tensor.nbytes
    if tensor.numel() == 0:
        return lo, lo
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return lo, lo + (1 + last) * tensor.itemsize


def describe(tensor: torch.Tensor, lo: int, hi: int) -> ViewSpec:
    """The view spec of a strided tensor; [lo, hi) is its `byte_range`."""
    # tuple's own constructor: on the hottest path there is, that of a named tuple costs twice as much.
    return tuple.__new__(
        ViewSpec, (tensor.dtype, tensor.shape, tensor.stride(), lo, hi, tensor.is_conj(), tensor.is_neg())
    )


class Ground:
    """Device memory that saved tensors are rebuilt over, all of them views of one tensor, or that tensor itself.

    So they share a version counter, as the tensors that were saved did: what a backward writes into one of them is
    noticed when the next is asked for.
    """

    __slots__ = ("_is", "_version", "memory")

    def __init__(self, memory: torch.Tensor, spec: ViewSpec | None = None) -> None:
        """`memory` is contiguous. With `spec` it was allocated for that view, and may be the view by itself."""
        self.memory = memory
        self._version = memory._version
        self._is = None
        if spec is not None and not spec.conj and not spec.neg and memory.stride() == spec.stride:
            self._is = spec

    @property
    def num_changes(self) -> int:
        """How often something was written through a rebuilt tensor."""
        return self.memory._version - self._version

    def rebuild(self, spec: ViewSpec, shift: int) -> torch.Tensor:
        """The tensor that `spec` describes; byte 0 of the allocation lies at byte `shift` of the memory."""
        whole = self.memory
        if spec == self._is:
            return whole
        if spec.dtype is not whole.dtype:
            whole = as_bytes(whole)
            itemsize = spec.dtype.itemsize
            odd = whole.numel() % itemsize
            whole = (whole[: whole.numel() - odd] if odd else whole).view(spec.dtype)
        tensor = whole.as_strided(spec.size, spec.stride, (spec.lo + shift) // spec.dtype.itemsize)
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


class InPlaceWatch:
    """The version counter of a saved tensor, without its memory.

    A detached alias shares the counter; its data is then swapped for an empty tensor, so that it holds no bytes.
    """

    __slots__ = ("_alias", "version")

    # By the device's index, which is -1 for the CPU, and dtype.
    _EMPTY: ClassVar[dict[int, dict[torch.dtype, torch.Tensor]]] = collections.defaultdict(dict)

    def __init__(self, tensor: torch.Tensor) -> None:
        alias = tensor.detach()
        of_device = self._EMPTY[tensor.get_device()]
        empty = of_device.get(tensor.dtype)
        if empty is None:
            with torch.inference_mode(False):
                empty = of_device[tensor.dtype] = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        alias.data = empty
        self._alias = alias
        self.version = alias._version

    @classmethod
    def of_wrapper(cls, tensor: torch.Tensor) -> InPlaceWatch:
        """The watch of a wrapper subclass: the outer counter is the one that PyTorch checks."""
        watch = cls.__new__(cls)
        with torch._C._DisableTorchDispatch():
            watch._alias = tensor.detach()
        watch.version = tensor._version
        return watch

    def shared_with(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` has this very counter, rather than one of its own that shows the same number.

        PyTorch has no question for that; so this one is moved by one for a moment, and put back.
        """
        now = self._alias._version
        bump = torch._C._autograd._unsafe_set_version_counter
        bump((self._alias,), (now + 1,))
        try:
            return tensor._version == now + 1
        finally:
            bump((self._alias,), (now,))

    @property
    def dtype(self) -> torch.dtype:
        return self._alias.dtype

    @property
    def now(self) -> int:
        """The counter as it is now."""
        return self._alias._version


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
