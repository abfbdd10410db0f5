"""Training in each recipe goes where training in bf16 goes.

A decoder of two mixtures of experts learns to copy: the second half of each sequence is the first. What is compared is
the mean loss of the last tenth of the steps.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.nn.layers import RECIPES, Stack, sparse

STEPS, TOKENS, BATCH = 200, 32, 8
DISTANCE = {"fp8_block": 0.05, "mxfp8": 0.05, "fp8_current": 0.05, "nvfp4": 0.1}
"""How far from bf16's loss, in nats, each may end. The loss begins near 3.5 and the best possible one is 1.7."""


def batch(step: int) -> Tensor:
    half = torch.randint(32, (BATCH, TOKENS // 2), generator=torch.Generator().manual_seed(step))
    return torch.cat([half, half], dim=1)


@functools.cache
def final_loss(name: str) -> tuple[float, float]:
    """First loss, and the mean over the last tenth of the steps."""
    torch.manual_seed(0)
    recipe = RECIPES[name]
    model = Stack(sparse(recipe, shared_ffn_size=0), recipe, num_layers=2).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(STEPS):
        text = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(text)
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    last = losses[-STEPS // 10 :]
    return losses[0], sum(last) / len(last)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DISTANCE))
def test_the_loss_ends_near_that_of_bf16(name):
    first, ended = final_loss(name)
    _, wanted = final_loss("none")
    assert wanted < first - 1
    assert abs(ended - wanted) < DISTANCE[name]
