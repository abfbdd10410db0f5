"""The ways to train the decoder that are set side by side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import lighterage
from benchmarks.decoder_model import CheckpointedDecoder, Decoder, twin

PEERS = ("none", "checkpoint", "save_on_cpu", "trl")


class NotInstalledError(Exception):
    """A peer's package is not here; the message says which."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to train, ready to step."""

    name: str
    model: Decoder
    around_step: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    offloader: lighterage.Offloader | None = None

    def step(self, x: Tensor, probe: Tensor) -> Tensor:
        """Forward and backward; gradients are dropped first and kept after. Returns the loss, still on the device."""
        self.model.zero_grad(set_to_none=True)
        with self.around_step():
            loss = self.model(x, probe)
            loss.backward()
        return loss.detach()

    def close(self) -> None:
        if self.offloader is not None:
            self.offloader.close()


def make(name: str, model: Decoder) -> Mode:
    """The mode `name`, over a twin of `model`: a peer's name, or a policy such as `keep_last=2,release_after=1`.

    Raises:
        NotInstalledError: the peer's package is not here.
        ValueError: neither a peer nor a policy.
    """
    pinned = next(model.parameters()).is_cuda
    if name == "none":
        return Mode(name=name, model=twin(model))
    if name == "checkpoint":
        return Mode(name=name, model=twin(model, CheckpointedDecoder))
    if name == "save_on_cpu":
        around = lambda: torch.autograd.graph.save_on_cpu(pin_memory=pinned)  # noqa: E731
        return Mode(name=name, model=twin(model), around_step=around)
    if name == "trl":
        theirs = twin(model)
        return Mode(name=name, model=theirs, around_step=_trl(theirs, pinned))
    ours = twin(model)
    return Mode(name=name, model=ours, offloader=lighterage.offload(ours.layers, **parse_policy(name)))


def parse_policy(text: str) -> dict[str, int]:
    """`"keep_last=2,release_after=1"` as the keywords of `lighterage.offload`.

    Raises:
        ValueError: a part is not `name=number`.
    """
    fields = {}
    for part in text.split(","):
        name, separator, value = part.partition("=")
        if not separator or not value.isdigit():
            raise ValueError(f"a policy is name=number, separated by commas, such as keep_last=2; got {text!r}")
        fields[name.strip()] = int(value)
    return fields


def _trl(model: Decoder, pinned: bool) -> Callable[[], contextlib.AbstractContextManager[object]]:
    try:
        from trl.models.activation_offloading import OffloadActivations
    except ImportError as error:
        raise NotInstalledError(f"not installed ({error})") from error
    if not pinned:
        raise NotInstalledError("needs an accelerator")
    # One for all steps, as its trainer uses it: it keeps streams and counters between them.
    context = OffloadActivations(use_pin_memory=True, use_streams=True)
    context.update_model_params(model)  # what it must not move, as its trainer tells it
    return lambda: context
