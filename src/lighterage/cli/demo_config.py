"""What a demo run is made of, and the sizes it has unless told otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """One demo: the same for the run without and the run with offload.

    Raises:
        ValueError: the sizes do not fit together.
    """

    model: Literal["moe", "dense"] = "moe"
    """A mixture of experts in lighterage's layers, or a dense decoder in plain PyTorch."""

    recipe: Literal["fp8_block", "mxfp8", "nvfp4", "fp8_current", "none"] = "fp8_block"
    """How the mixture of experts quantizes its products. The dense decoder does not."""

    experts: int = 8
    """Experts of each layer, each as wide as the model."""

    top_k: int = 2
    """Experts that each token goes to."""

    steps: int = 25
    """Training steps of each run. The first warms up and the last is watched, so neither is timed."""

    layers: int = 8
    """Decoder layers."""

    hidden: int = 256
    """Width of the model; the heads are 64 wide."""

    seq: int = 256
    """Bytes of text in a sequence."""

    batch: int = 8
    """Sequences in a step."""

    keep_last: int = 2
    """Layers at the end of forward whose saved tensors stay on the device."""

    seed: int = 0
    """Of the weights and of the choice of batches."""

    device: str = "cpu"
    """The device that trains, as torch names it."""

    tier: Literal["host", "disk"] | None = None
    """Where what is moved rests; None lets the library choose."""

    plot: bool = False
    """Whether to train once more under a plan that the library makes, and to draw the step."""

    out: Path = Path("demo-out")
    """Folder that the figure and the JSON go to."""

    def __post_init__(self) -> None:
        if self.hidden % 64:
            raise ValueError(f"--hidden must be a multiple of 64 (the width of a head); got {self.hidden}.")
        if self.model == "dense" and self.recipe != "none":
            raise ValueError(f"--recipe {self.recipe} is of --model moe; the dense model is plain PyTorch.")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k {self.top_k} is more than the {self.experts} --experts.")
        if self.recipe != "none" and self.batch * self.seq % 32:
            raise ValueError(
                f"--batch times --seq must be a multiple of 32, because recipes quantize blocks of rows; got "
                f"{self.batch} x {self.seq} = {self.batch * self.seq}. Change one, or take --recipe none."
            )
        if self.steps < 3:
            raise ValueError(
                f"--steps must be at least 3 (the first warms up, the last is measured, those between are timed); "
                f"got {self.steps}."
            )
        if self.keep_last >= self.layers:
            raise ValueError(
                f"--keep-last {self.keep_last} keeps all of the {self.layers} layers, so nothing would move. "
                "Keep fewer, or take more --layers."
            )


_GPU = DemoConfig(steps=12, layers=16, hidden=2048, seq=4096, batch=2, keep_last=12, device="cuda")
_QUICK = DemoConfig(steps=4, layers=4, hidden=128, seq=128, batch=4, keep_last=1)
PRESETS: dict[str, dict[str, DemoConfig]] = {
    "moe": {"cpu": DemoConfig(steps=16, layers=6), "gpu": _GPU, "quick": _QUICK},
    "dense": {
        "cpu": DemoConfig(model="dense", recipe="none"),
        "gpu": dataclasses.replace(_GPU, model="dense", recipe="none"),
        "quick": dataclasses.replace(_QUICK, model="dense", recipe="none"),
    },
}
"""Sizes by model, and by where the demo runs. On a CPU with two cores the longest takes about two minutes."""
