"""Offload by hand inside one stage of a 1F1B pipeline: which microbatch's activations are on the device, and when.

    python examples/manual_schedule_1f1b.py --stages 4 --stage 0

Stage s of S runs S - s - 1 forwards to warm up, then one forward and one backward in turn. So S - s microbatches wait
for their backward at any time, and one of them is worked on: the others' activations need not be on the device. Nothing
of this is needed for correct gradients; every call below could be left out or come at another time.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses

import torch
from torch import Tensor, nn

import lighterage
from lighterage import LiveSection, Offloader


@dataclasses.dataclass
class Microbatch:
    """What a stage holds of a microbatch between its forward and its backward."""

    output: Tensor
    sections: list[LiveSection]
    """One for each layer, in the order of forward. Holding them holds no activation."""


class Stage:
    """One stage of the pipeline, with its neighbours made up: `inputs` come from before, gradients from behind."""

    def __init__(self, layers: nn.Sequential, offloader: Offloader | None) -> None:
        self.layers = layers
        self.offloader = offloader
        self.waiting: collections.deque[Microbatch] = collections.deque()
        self.most_host_bytes = 0

    def forward(self, x: Tensor) -> None:
        num_before = len(self.offloader.sections) if self.offloader else 0
        output = self.layers(x)
        # The live sections are listed in the order of forward, so those of this microbatch are the last ones.
        sections = self.offloader.sections[num_before:] if self.offloader else []
        self.waiting.append(Microbatch(output, sections))

    def send_away(self, microbatch: Microbatch) -> None:
        """Its backward is at least one other microbatch away."""
        if self.offloader:
            # Copies of a module's section start by themselves when its forward ends, so this only makes sure; a section
            # opened with plan="manual" would start to copy here.
            for section in microbatch.sections:
                self.offloader.evict(section)
            # The compute stream waits for each section's copies, not the host, and the memory is free for what comes
            # next: in order of forward, because the first section's copies are through first.
            for section in microbatch.sections:
                self.offloader.release(section)
            self.most_host_bytes = max(self.most_host_bytes, self.offloader.stats().host_bytes_in_use)

    def call_back(self, microbatch: Microbatch) -> None:
        """Its backward is next. The copies run beside the forward that is queued after this call."""
        if self.offloader:
            # Last section first: backward begins with it.
            for section in reversed(microbatch.sections):
                self.offloader.prefetch(section)

    def backward(self) -> None:
        microbatch = self.waiting.popleft()
        gradient = torch.full_like(microbatch.output, 1 / microbatch.output.numel())
        microbatch.output.backward(gradient)


def run_1f1b(stage: Stage, inputs: list[Tensor], num_warmup: int) -> None:
    """One step."""
    for x in inputs[:num_warmup]:
        stage.forward(x)
        stage.send_away(stage.waiting[-1])
    for x in inputs[num_warmup:]:
        # The oldest microbatch goes backward right after this forward: it comes back meanwhile.
        if stage.waiting:
            stage.call_back(stage.waiting[0])
        stage.forward(x)
        if len(stage.waiting) > 1:
            stage.send_away(stage.waiting[-1])
        stage.backward()
    while stage.waiting:
        # Cool-down: while one goes backward, the next one comes back. This one was called back a turn ago, except for
        # the first; asking again for what is there does nothing.
        stage.call_back(stage.waiting[0])
        if len(stage.waiting) > 1:
            stage.call_back(stage.waiting[1])
        stage.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_warmup = min(args.stages - args.stage - 1, args.microbatches)

    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.TransformerEncoderLayer(args.width, 4, batch_first=True, dropout=0.0) for _ in range(args.layers))
    ).to(device)
    plain = copy.deepcopy(layers)
    inputs = [torch.randn(1, args.tokens, args.width, device=device) for _ in range(args.microbatches)]

    run_1f1b(Stage(plain, None), inputs, num_warmup)

    # By hand: no section is released by itself (release_after), and none brought back ahead of time (prefetch_ahead).
    # None is kept for being among the last, except in the last stage: there backward follows its own forward at once,
    # so nothing ever waits, and whatever moved would move in vain.
    keep_last = 0 if num_warmup else args.layers
    with lighterage.offload(layers, keep_last=keep_last, release_after=10**6, prefetch_ahead=0) as offloader:
        stage = Stage(layers, offloader)
        run_1f1b(stage, inputs, num_warmup)
        stats = offloader.stats(total=True)

    same = all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), layers.parameters(), strict=True))
    print(f"stage {args.stage} of {args.stages}, {args.microbatches} microbatches, {num_warmup} forwards to warm up")
    print(f"MiB out {stats.bytes_out / 2**20:.1f}, MiB in {stats.bytes_in / 2**20:.1f}")
    print(f"MiB at rest at most {stage.most_host_bytes / 2**20:.1f}, late ms {stats.late_ms:.1f}")
    print(f"gradients are those without offload: {same}")


if __name__ == "__main__":
    main()
