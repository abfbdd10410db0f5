"""Every recipe, splits that try the corners, and the comparison of a program with itself under offload."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import lighterage
from lighterage.recipes import (
    Float8BlockScaling,
    Float8CurrentScaling,
    MXFP8BlockScaling,
    NVFP4BlockScaling,
    Recipe,
)

RECIPES: dict[str, Recipe | None] = {
    "none": None,
    "fp8_block": Float8BlockScaling(),
    "mxfp8": MXFP8BlockScaling(),
    "nvfp4": NVFP4BlockScaling(),
    "fp8_tensor": Float8CurrentScaling(),
}
QUANTIZED = {name: recipe for name, recipe in RECIPES.items() if recipe is not None}
ERRORS = {"none": 0.01, "fp8_block": 0.08, "mxfp8": 0.08, "nvfp4": 0.35, "fp8_tensor": 0.12}
"""Norm of the difference from float64, over the norm of the result: of an output, or of a gradient."""

Losses = Callable[[], torch.Tensor]


def ragged(num_experts: int, num_units: int, unit: int = 32) -> list[int]:
    """Splits of `num_units * unit` rows; every third expert but the last has none."""
    units = [num_units // num_experts] * num_experts
    for i in range(0, num_experts - 1, 3):
        units[i + 1] += units[i]
        units[i] = 0
    units[-1] += num_units - sum(units)
    return [size * unit for size in units]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in the norm of the whole."""
    return float((got.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


def gradients(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients that there are, which are then cleared."""
    found = []
    for tensor in tensors:
        if tensor.grad is not None:
            found.append(tensor.grad.clone())
            tensor.grad = None
    return found


class Recorded:
    """Remembers the storages that are passed through it, without keeping them."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function
        self.refs: list[StorageWeakRef] = []
        self.num_bytes = 0

    def __call__(self, *arguments: object) -> torch.Tensor:
        tensor = self._function(*arguments)
        self.refs.append(StorageWeakRef(tensor.untyped_storage()))
        self.num_bytes += tensor.nbytes
        return tensor


def check_offload(
    layers: nn.ModuleList,
    run: Callable[[], torch.Tensor],
    leaves: list[torch.Tensor],
    *,
    refs: Callable[[], list[StorageWeakRef]] = list,
    copies: int,
    tier: str = "disk",
    seed: int = 3,
) -> lighterage.OffloadStats:
    """Run without and with offload: the same bits, `copies` out and in, all of it freed in between."""
    torch.manual_seed(seed)
    loss = run()
    loss.backward()
    wanted = [loss.detach().clone(), *gradients(leaves)]
    assert len(wanted) > 1
    refs().clear()
    with lighterage.offload(layers, keep_last=0, min_bytes=1, tier=tier) as offloader:
        torch.manual_seed(seed)
        loss = run()
        for section in offloader.sections:
            offloader.release(section)
        section = None
        gc.collect()
        assert all(ref.expired() for ref in refs()), "something keeps what was moved"
        loss.backward()
        stats = offloader.stats()
    got = [loss.detach().clone(), *gradients(leaves)]
    assert len(got) == len(wanted)
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    assert (stats.copies_out, stats.copies_in) == (copies, copies)
    assert stats.still_alive_bytes == 0
    assert (stats.bytes_out > 0) == (copies > 0)
    return stats
