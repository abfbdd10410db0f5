"""What the user says of single tensors: never move this one, or move this one."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .unseen import unseen


class Mark(enum.Enum):
    """What was asked of the allocation that a tensor lives in."""

    NOT_OFFLOAD = "mark_not_offload"
    OFFLOAD = "mark_offload"


class _Marks:
    """Marks by storage id. The weak reference beside each keeps its id from being given to a new storage."""

    def __init__(self) -> None:
        self._by_storage: dict[int, tuple[StorageWeakRef, Mark]] = {}
        self._sweep_at = 64

    def put(self, storage: torch.UntypedStorage, mark: Mark) -> None:
        key = storage._cdata
        known = self._by_storage.get(key)
        if known is not None and known[1] is Mark.NOT_OFFLOAD and not known[0].expired():
            return
        self._by_storage[key] = (StorageWeakRef(storage), mark)
        if len(self._by_storage) >= self._sweep_at:
            self._by_storage = {k: v for k, v in list(self._by_storage.items()) if not v[0].expired()}
            self._sweep_at = max(64, 2 * len(self._by_storage))

    def get(self, key: int) -> Mark | None:
        known = self._by_storage.get(key)
        return None if known is None or known[0].expired() else known[1]


_MARKS = _Marks()


def mark_of(storage_id: int) -> Mark | None:
    """The mark on the storage with this id (`storage._cdata`), or None."""
    return _MARKS.get(storage_id)


def any_marks() -> bool:
    """Whether any storage may be marked; where none is, there is no need to ask for each."""
    return bool(_MARKS._by_storage)


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            inner = getattr(tensor, name)
            if isinstance(inner, torch.Tensor):
                yield from _storages(inner)
    elif tensor.layout is torch.strided and not tensor.is_nested:
        yield tensor.untyped_storage()


def _put(function: str, tensors: tuple[torch.Tensor, ...], mark: Mark) -> None:
    for position, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{function} takes tensors; argument {position} is a {type(tensor).__name__}. "
                "Pass the tensors themselves, unpacked: mark_not_offload(*outputs)."
            )
        for storage in _storages(tensor):
            _MARKS.put(storage, mark)


@unseen
def mark_not_offload(*tensors: torch.Tensor) -> None:
    """Keep on the device every allocation that one of `tensors` lives in.

    Holds for plain tensors of any shape and dtype, for their views, and for wrapper subclasses (each tensor inside).
    It holds whatever the policy's `select` is, and wins over `mark_offload`. It may be called after autograd saved the
    tensor, as long as the section that saved it has not been released. Nothing is written on the tensor itself; the
    mark ends with the allocation. Tensors that are never moved (sparse, nested with strided layout) are accepted.

    Raises:
        TypeError: an argument is not a tensor.
    """
    _put("mark_not_offload", tensors, Mark.NOT_OFFLOAD)


@unseen
def mark_offload(*tensors: torch.Tensor) -> None:
    """Ask for every allocation that one of `tensors` lives in to be moved.

    This is what `Policy(select="marked")` listens to; under `select="unmarked"` such allocations move anyway. The same
    tensors are accepted as by `mark_not_offload`, which wins where both were called.

    Raises:
        TypeError: an argument is not a tensor.
    """
    _put("mark_offload", tensors, Mark.OFFLOAD)
