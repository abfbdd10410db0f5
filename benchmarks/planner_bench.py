"""A model without offload, and beside it steps of other modes over the same parameters."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import lighterage
from benchmarks.decoder_cases import Row, spread, timed_step, timed_steps
from benchmarks.decoder_model import Decoder, build, inputs, twin
from benchmarks.decoder_modes import Mode
from benchmarks.shapes import DecoderShape

IN_A_ROW = 3
"""Steps that count, after one that does not: before it the device was idle, and another mode's lanes were busy."""


class PartlyCheckpointed(Decoder):
    """The decoder with its first `num_checkpointed` layers recomputed in backward."""

    num_checkpointed = 0

    def run_layer(self, layer: nn.Module, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        if any(layer is one for one in list(self.layers)[: self.num_checkpointed]):
            return torch.utils.checkpoint.checkpoint(layer, x_BSH, cos_SD, sin_SD, use_reentrant=False)
        return layer(x_BSH, cos_SD, sin_SD)


class Bench:
    """The decoder."""

    mode_class = Mode

    def __init__(self, shape: DecoderShape, device: torch.device) -> None:
        self.begin(build(shape, device), *inputs(shape, device))

    def begin(self, model: nn.Module, x: Tensor, probe: Tensor) -> None:
        """Keep what is measured, and warm up."""
        self.device = x.device
        self.model, self.x, self.probe = model, x, probe
        self.plain = self.mode("none")
        for _ in range(3):
            self.plain.step(self.x, self.probe)

    def twin(self, num_checkpointed: int = 0) -> nn.Module:
        """A module tree of its own over the same parameters, its first so many layers checkpointed."""
        model = twin(self.model, PartlyCheckpointed)
        model.num_checkpointed = num_checkpointed
        return model

    def mode(self, name: str, *, num_checkpointed: int = 0, policy: dict[str, Any] | None = None) -> Mode:
        """A way to train a twin: as it is, checkpointed, or under the offloader that `policy` gives."""
        model = self.twin(num_checkpointed)
        offloader = None if policy is None else lighterage.offload(model.layers, **policy)
        return self.mode_class(name=name, model=model, offloader=offloader)

    def step(self, mode: Mode) -> tuple[float, float, int]:
        """One timed step; gradients are dropped after it, so that they are not in the next mode's way."""
        timed = timed_step(mode, self.x, self.probe)
        self._drop_gradients(mode)
        return timed

    def steps(self, mode: Mode, count: int) -> tuple[list[float], list[float], int]:
        """`count` timed steps in a row; gradients are dropped after them."""
        timed = timed_steps(mode, self.x, self.probe, count)
        self._drop_gradients(mode)
        return timed

    def _drop_gradients(self, mode: Mode) -> None:
        self.model.zero_grad(set_to_none=True)
        mode.model.zero_grad(set_to_none=True)
        self.x.grad = None

    def pairs(self, mode: Mode, rounds: int) -> Row:
        """`mode` and the step without it in turn, four steps in a row each, the first of them not counted.

        Medians, and the median of the ratios of `mode`'s steps to the mean of those without it just before and after:
        the card drifts by as much as is to be told.
        """
        mine, walls, peaks = [], [], []
        gc.collect()
        gc.disable()  # a collection takes tens of milliseconds, and falls on whoever comes by
        try:
            plain = [self.steps(self.plain, 1 + IN_A_ROW)[0][1:]]
            for _ in range(rounds):
                steps, wall, peak = self.steps(mode, 1 + IN_A_ROW)
                mine.append(steps[1:])
                walls += wall[1:]
                peaks.append(peak)
                plain.append(self.steps(self.plain, 1 + IN_A_ROW)[0][1:])
        finally:
            gc.enable()
        beside = [statistics.mean(before + after) for before, after in itertools.pairwise(plain)]
        ratios = [step / base for steps, base in zip(mine, beside, strict=True) for step in steps]
        return {
            "device": spread(list(itertools.chain(*mine))),
            "wall": spread(walls),
            "none": spread(list(itertools.chain(*plain))),
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "peak_bytes": max(peaks),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersMode(Mode):
    """A way to train a model whose output has a gradient of its own."""

    def step(self, x: Tensor, probe: Tensor) -> None:
        """Forward and backward; gradients are dropped first and kept after."""
        self.model.zero_grad(set_to_none=True)
        x.grad = None
        self.model(x).backward(probe)


class LayersBench(Bench):
    """A model of lighterage's own layers: with `layers`, `num_checkpointed` and `inputs()`."""

    mode_class = LayersMode

    def __init__(self, model: nn.Module) -> None:
        self.begin(model, *model.inputs())

    def twin(self, num_checkpointed: int = 0) -> nn.Module:
        # Parameters that copying has "seen" are shared.
        model = copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})
        model.num_checkpointed = num_checkpointed
        return model
