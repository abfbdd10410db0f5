"""Selective recomputation: two dispatch modes; one puts by what some operators gave, the other hands it out."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import SAC_IGNORED_OPS

from ..errors import OffloadError
from .views import changed_in_place, emptied_alias, type_name

Op = torch._ops.OpOverload


class Held(Protocol):
    """A tensor that was put by; `unpack` gives its bytes back, on its device, any number of times."""

    def unpack(self) -> torch.Tensor: ...


Hold = Callable[[torch.Tensor], Held]
"""How a tensor is put by. It is called below autograd; what it returns must not hold the tensor itself."""

Choose = Callable[[Op, int, tuple[Any, ...], dict[str, Any], Any], Hold | None]
"""Of an operator, how often it was called before, its arguments and result: how to put it by. None: compute again."""


class HeldHere:
    """A tensor that stays where it is."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = self._tensor._version

    def unpack(self) -> torch.Tensor:
        tensor = self._tensor
        if tensor._version != self._version:
            raise changed_in_place(
                type_name(tensor), tensor.shape, self._version, tensor._version, "selective recomputation"
            )
        return tensor


class HeldOnHost:
    """A tensor that was copied to host memory."""

    __slots__ = ("_alias", "_copy", "_device", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._device = tensor.device
        self._alias = emptied_alias(tensor)
        self._version = self._alias._version
        self._copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        self._copy.copy_(tensor.detach())

    def unpack(self) -> torch.Tensor:
        now = self._alias._version
        if now != self._version:
            kind = str(self._copy.dtype)
            raise changed_in_place(kind, self._copy.shape, self._version, now, "selective recomputation")
        back = torch.empty_strided(self._copy.size(), self._copy.stride(), dtype=self._copy.dtype, device=self._device)
        return back.copy_(self._copy)


class _RandomState:
    """Where the random generators stood after an operator that draws from them: who skips it has to move them there."""

    __slots__ = ("_device", "_states")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = (torch.get_rng_state(), None if device.type == "cpu" else _module(device).get_rng_state(device))

    def restore(self) -> None:
        torch.set_rng_state(self._states[0])
        if self._states[1] is not None:
            _module(self._device).set_rng_state(self._states[1], self._device)


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


class _Entry:
    __slots__ = ("_watched", "held", "random")

    def __init__(self, held: Any, random: _RandomState | None, watched: list[tuple[torch.Tensor, int]]) -> None:
        """`watched`: aliases of the tensors that were put by, without their memory, and their versions then."""
        self.held = held
        self.random = random
        self._watched = watched

    @property
    def is_overwritten(self) -> bool:
        """Whether what was put by has been written over since."""
        return any(alias._version != version for alias, version in self._watched)


class _Store:
    """What the forward put by, by operator and by how often it was called before; None where nothing was."""

    def __init__(self) -> None:
        self.entries: dict[Op, list[_Entry | None]] = collections.defaultdict(list)


class _Keeping(TorchDispatchMode):
    """Runs around the forward: puts by what it is told to."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Under any other mode torch.compile gives up what runs inside, for good."""
        return True

    def __init__(self, store: _Store, choose: Choose, again_if_overwritten: Callable[[Hold], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store
        self._choose = choose
        self._again_if_overwritten = again_if_overwritten

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in SAC_IGNORED_OPS or isinstance(func, HigherOrderOperator):
            return out
        entries = self._store.entries[func]
        hold = self._choose(func, len(entries), args, kwargs, out)
        # What writes to its arguments has to do so again: whoever called it may look at those.
        if hold is None or func._schema.is_mutable:
            entries.append(None)
            return out
        random = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            device = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device("cpu"))
            random = _RandomState(device)
        # Below autograd a detached alias has a version counter of its own, unless this key is let in again.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            held = tree_map(lambda x: hold(x) if isinstance(x, torch.Tensor) else _Plain(x), out)
            plain = [x for x in tree_leaves(out) if type(x) is torch.Tensor] if self._again_if_overwritten(hold) else []
            watched = [(emptied_alias(x), x._version) for x in plain]
        entries.append(_Entry(held, random, watched))
        return out


class _Plain:
    """Something that is no tensor."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def unpack(self) -> Any:
        return self._value


class _HandingOut(TorchDispatchMode):
    """Runs around the recomputation: gives what was put by instead of computing it."""

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Under any other mode torch.compile gives up what runs inside, for good."""
        return True

    def __init__(self, store: _Store) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store
        self._counts: collections.Counter[Op] = collections.Counter()

    def __enter__(self) -> _HandingOut:
        self._counts.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SAC_IGNORED_OPS or isinstance(func, HigherOrderOperator):
            return func(*args, **kwargs)
        number = self._counts[func]
        self._counts[func] += 1
        entries = self._store.entries.get(func, [])
        if number >= len(entries):
            raise OffloadError(
                f"{func} ran {number + 1} times when a section was computed again for backward, and {len(entries)} "
                "times before: what it computes depends on something that has changed since. Do not checkpoint it, or "
                'offload with recompute="never".'
            )
        entry = entries[number]
        if entry is not None and entry.is_overwritten:
            entry = entries[number] = None
        if entry is None:
            return func(*args, **kwargs)
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            out = tree_map(lambda held: _fresh(held.unpack()), entry.held)
        if entry.random is not None:
            entry.random.restore()
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            # The graph is dropped after this: what is handed out now is the last that refers to the bytes.
            entry.held = _Spent()
        return out


class _Spent:
    def unpack(self) -> Any:
        raise RuntimeError(
            "Trying to backward through the graph a second time: what a recomputed section had put by was freed the "
            "first time. Specify retain_graph=True if you need to backward through the graph a second time."
        )


def _fresh(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def contexts(
    choose: Choose, *, again_if_overwritten: Callable[[Hold], bool]
) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The two contexts of one checkpointed call: around its forward, and around its recomputation.

    `again_if_overwritten`: whether what was put by in this way, and changed in place since, is computed again.
    Otherwise that is reported when it is needed, as PyTorch reports it.
    """
    store = _Store()
    return _Keeping(store, choose, again_if_overwritten), _HandingOut(store)
