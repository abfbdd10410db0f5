"""Which modules are sections, and which memory belongs to modules rather than to autograd."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from .wrappers import is_wrapper, parts_of

CAST = "ToCopyBackward0"
"""The autograd node of a cast."""


class SectionModules:
    """The sections that a module or an iterable of modules stands for.

    A ModuleList, ModuleDict, Sequential or iterable is taken as it is, each member a section. Any other single module
    is a root: its longest ModuleList or Sequential gives the sections, and what is saved between them belongs to it.

    Raises:
        TypeError: something is not an nn.Module.
        ValueError: there is no module at all.
    """

    def __init__(self, modules: nn.Module | Iterable[nn.Module]) -> None:
        whole: nn.Module | None = None
        self.root_name = ""
        self.chosen_from: str
        """For the report: where the sections were found."""
        if isinstance(modules, nn.ModuleDict):
            members = [(name, member) for name, member in modules.items()]
            self.chosen_from = "the members of the ModuleDict that was given"
        elif isinstance(modules, nn.ModuleList | nn.Sequential):
            members = _numbered(modules)
            self.chosen_from = f"the members of the {type(modules).__name__} that was given"
        elif isinstance(modules, nn.Module):
            members, whole = self._search(modules)
        else:
            members = _numbered(_modules_of(modules))
            self.chosen_from = "the modules that were given"
        if not members:
            raise ValueError(
                "there is no module to offload: the list that was given is empty. Pass model.layers, the model itself, "
                "or an iterable of its layers in forward order."
            )
        last = {id(module): position for position, (_, module) in enumerate(members)}
        self.sections = [
            (name, module) for position, (name, module) in enumerate(members) if last[id(module)] == position
        ]
        self.root = whole
        self._by_name = dict(self.sections)
        self.all_modules = [module for _, module in self.sections] if whole is None else [whole]

    def gap_name(self, position: int) -> str:
        """The name of what is saved after the section at `position`, up to the next one; -1: before the first."""
        where = f"after {self.sections[position][0]}" if position >= 0 else f"before {self.sections[0][0]}"
        return f"{self.root_name}, {where}"

    @property
    def gaps(self) -> list[str]:
        """The names of all that may be saved between the sections."""
        return [] if self.root is None else [self.gap_name(position) for position in range(-1, len(self.sections))]

    def _search(self, root: nn.Module) -> tuple[list[tuple[str, nn.Module]], nn.Module | None]:
        best: tuple[str, nn.ModuleList | nn.Sequential] | None = None
        for name, module in root.named_modules():
            if isinstance(module, nn.ModuleList | nn.Sequential) and (best is None or len(module) > len(best[1])):
                best = (name, module)
        if best is None or len(best[1]) == 0:
            self.chosen_from = f"the {type(root).__name__} itself, which holds no ModuleList or Sequential"
            return [(type(root).__name__, root)], None
        self.root_name = type(root).__name__
        self.chosen_from = f"{best[0]!r} of the {type(root).__name__}, its longest {type(best[1]).__name__}"
        return [(f"{best[0]}.{index}", member) for index, member in enumerate(best[1])], root

    def module_of(self, name: str) -> nn.Module | None:
        """The module of the section of this name; None for one that is named in code, and for what is between two."""
        return self._by_name.get(name)

    def has(self, name: str) -> bool:
        """Whether `name` is that of a module, rather than of a section named in code."""
        return name in self._by_name


def _modules_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    hint = "Pass model.layers, the model itself, or an iterable of its layers in forward order."
    try:
        members = list(modules)
    except TypeError:
        raise TypeError(f"offload takes an nn.Module or an iterable of them; got {modules!r}. {hint}") from None
    for position, member in enumerate(members):
        if not isinstance(member, nn.Module):
            raise TypeError(
                f"item {position} of what offload was given is a {type(member).__name__}, no nn.Module. {hint}"
            )
    return members


def _numbered(members: Iterable[nn.Module]) -> list[tuple[str, nn.Module]]:
    return [(f"{type(member).__name__}.{index}", member) for index, member in enumerate(members)]


class _Owner(NamedTuple):
    """Whose a storage is."""

    ref: StorageWeakRef
    """Of the storage: torch.utils.swap_tensors, and with it Module.to, refuses a tensor that has weak references."""
    reason: str
    device: torch.device


class Residents:
    """Memory of parameters and registered buffers: never moved, nor what autocast made of it.

    Parameters are also known by their class, at once; this finds those that are saved through `.data`, flat buffers,
    and the like. It is read anew at the first save of each step.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self.owners: dict[int, _Owner] = {}
        self.accelerators: set[torch.device] = set()
        """The accelerators that some of the memory is on: if there are any, CPU tensors are on the host already."""
        self.refresh()

    def refresh(self) -> None:
        """Read the modules' parameters and buffers again. What is as it was is looked at and no more."""
        known, owners = self.owners, {}
        parts = list(_parts(self._modules))
        for reason, all_tensors in (
            ("parameter", [part._parameters for part in parts]),
            ("buffer", [part._buffers for part in parts]),
        ):
            for tensors in all_tensors:
                for tensor in tensors.values():
                    if tensor is None:
                        continue
                    if type(tensor) is nn.Parameter and tensor.layout is torch.strided:
                        key = tensor.untyped_storage()._cdata
                        owner = known.get(key)
                        if owner is not None and owner.reason == reason and not owner.ref.expired():
                            owners[key] = owner
                            continue
                    for plain in _plain(tensor):
                        storage = plain.untyped_storage()
                        owners[storage._cdata] = _Owner(StorageWeakRef(storage), reason, plain.device)
        self.owners = owners
        self.accelerators = {device for device in {owner.device for owner in owners.values()} if device.type != "cpu"}

    def reason(self, key: int, tensor: torch.Tensor) -> str | None:
        """Why the storage with the id `key` stays, if it does; `tensor` is the saved tensor or the base of its view."""
        known = self.owners.get(key)
        if known is not None and not known.ref.expired():
            return known.reason
        if tensor.requires_grad:
            node = tensor.grad_fn
            if node is not None and type(node).__name__ == CAST:
                source = node.next_functions[0][0]
                if isinstance(getattr(source, "variable", None), nn.Parameter):
                    return "cast of a parameter"
        return None


def _parts(modules: Iterable[weakref.ref[nn.Module]]) -> Iterator[nn.Module]:
    """All modules and the modules inside them, each once. `Module.modules` builds a name for each, which takes time."""
    waiting = [module for ref in modules if (module := ref()) is not None]
    seen = set(map(id, waiting))
    while waiting:
        part = waiting.pop()
        yield part
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if is_wrapper(tensor):
        for part, _ in parts_of(tensor)[1].values():
            if isinstance(part, torch.Tensor):
                yield from _plain(part)
    elif tensor.layout is torch.strided and tensor.device.type != "meta" and not nn.parameter.is_lazy(tensor):
        yield tensor
