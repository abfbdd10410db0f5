"""Random forwards of cheap operators, views, casts and writes in place: what is derived of them has the same bits."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lighterage
from lighterage.engine.planning import proofs, timelines
from tests.engine.planned import STEPS_TO_PLAN, assert_equal, random_plan, train
from tests.engine.programs import Stack, assert_nothing_left

WIDTH = 16

UNARY: list[tuple[str, Any]] = [
    ("silu", F.silu),
    ("tanh", torch.tanh),
    ("relu", torch.relu),
    ("sigmoid", torch.sigmoid),
    ("softmax", lambda x: x.softmax(-1)),
    ("norm", lambda x: F.layer_norm(x, (WIDTH,))),
    ("rms", lambda x: F.rms_norm(x, (WIDTH,))),
    ("drop", lambda x: F.dropout(x, 0.2)),
    ("there and back", lambda x: x.double().sin().float()),
    ("turned", lambda x: x.view(-1, 4, WIDTH).transpose(0, 1).contiguous().cos().reshape(x.shape)),
    ("rolled", lambda x: x.roll(1, 0) * 0.5),
    ("halves", lambda x: torch.cat([x[:, WIDTH // 2 :].tanh(), x[:, : WIDTH // 2]], -1)),
    ("strided", lambda x: torch.stack([x[:, ::2].sin(), x[:, 1::2]], -1).flatten(1)),
    ("where", lambda x: torch.where(x > 0, x, x * 0.1)),
    ("scaled", lambda x: x * torch.linspace(0.5, 1.5, WIDTH)),
    ("flipped", lambda x: x.flip(0).clone()),
    ("mean", lambda x: x - x.mean(-1, keepdim=True)),
]


class Program(nn.Module):
    """A forward made of a seed: the same for all layers and steps."""

    def __init__(self, seed: int, length: int = 14) -> None:
        super().__init__()
        rng = random.Random(seed)
        kinds = ["product", "unary", "unary", "unary", "binary", "binary", "write", "write unseen by autograd"]
        self.steps = [
            (rng.choice(kinds), rng.randrange(1 << 20), rng.randrange(1 << 20), rng.randrange(1 << 20))
            for _ in range(length)
        ]
        self.weights = nn.ParameterList([torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        values = [F.layer_norm(x, (WIDTH,)) @ self.weights[0], x]
        for kind, a, b, c in self.steps:
            one, other = values[a % len(values)], values[b % len(values)]
            if kind == "product":
                values.append(one @ self.weights[c % 3])
            elif kind == "unary":
                values.append(UNARY[c % len(UNARY)][1](one))
            elif kind == "binary":
                values.append(one * other.sigmoid() if c % 2 else one + 0.3 * other)
            elif kind == "write" and one is not x:
                values.append(one.mul_(0.9) if c % 2 else one.add_(other.detach() * 0.1))
            elif one is not x:
                with torch.no_grad():
                    one[:, c % WIDTH] = 0.25
        return x + values[-1] @ self.weights[1] + values[len(values) // 2]


def rows() -> list[Tensor]:
    return [torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(3), requires_grad=True)]


def models(seed: int) -> tuple[Stack, Stack] | None:
    """A program of `seed` or of one after it, that PyTorch runs; most of those that write in place it refuses."""
    for attempt in range(200):
        torch.manual_seed(seed)
        model = Stack([Program(1000 * seed + attempt) for _ in range(3)])
        other = copy.deepcopy(model)
        try:
            train(model, rows(), 1)
        except RuntimeError:
            continue
        return model, other
    return None


@pytest.mark.parametrize("seed", range(40))
def test_random_forwards_give_the_same_bits(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    compare = proofs._differences
    monkeypatch.setattr(proofs, "_differences", lambda a, b: found.extend(compare(a, b)) or compare(a, b))
    monkeypatch.setattr(timelines, "_ENOUGH", 0.0)
    made = models(seed)
    assert made is not None
    plain, model = made
    expected = train(plain, rows(), 2)
    with lighterage.offload(model.layers, recompute="auto", min_bytes=64, tier="host", max_slowdown=0.5) as offloader:
        train(model, rows(), STEPS_TO_PLAN)
        timeline = offloader.timeline
        assert timeline is not None
        for number in range(2):
            offloader.use_plan(random_plan(timeline, 2 * seed + number, modes=("selective",)), timeline)
            assert_equal(expected, train(model, rows(), 2))
        assert_nothing_left(offloader)
    assert not any(map(bool, found)), "nothing is found out in the first step that was not known"


def test_random_forwards_derive_much() -> None:
    """The test above would see nothing if nothing were derived."""
    found = []
    for seed in range(8):
        made = models(seed)
        assert made is not None
        _, model = made
        with lighterage.offload(model.layers, recompute="auto", min_bytes=64, tier="host") as offloader:
            train(model, rows(), STEPS_TO_PLAN)
            timeline = offloader.timeline
            assert timeline is not None
            found.append(sum(a.kind == "pointwise" for a in timeline.sections[1].allocations))
    assert sum(found) >= 8
