"""Timelines and random plans for models in tests."""

from __future__ import annotations

import random

import torch
from torch import nn

import lighterage
from lighterage.planner.plan import Fetch, Move, Plan, SectionPlan
from lighterage.planner.timeline import Timeline

STEPS_TO_PLAN = 5
"""In the last of so many steps the plan is carried out."""

MODES = ("save", "save", "selective", "recompute")


def random_plan(timeline: Timeline, seed: int, *, modes: tuple[str, ...] = MODES) -> Plan:
    """Any plan: what moves, how it is computed, when it is let go of and when it is fetched, sensible or not."""
    rng = random.Random(seed)
    likely = rng.choice((0.2, 0.6, 1.0))
    sections = []
    for section in timeline.sections:
        free = not section.gap and section.not_recomputed is None
        moves = [
            Move(save=a.save, release_after=rng.choice((0, 0, 1, 2, 5, 40)))
            for a in section.allocations
            if rng.random() < likely
        ]
        if rng.random() < 0.2:
            moves.append(Move(save=997, release_after=0))
        sections.append(
            SectionPlan(name=section.name, mode=rng.choice(modes) if free else "save", moves=tuple(moves))  # type: ignore[arg-type]
        )
    everything = [Fetch(section=i, save=m.save) for i, s in enumerate(sections) for m in s.moves]
    fetches: list[list[Fetch]] = [[] for _ in timeline.phases]
    for fetch in everything:
        if rng.random() < 0.75:
            fetches[rng.randrange(len(fetches))].append(fetch)
    return Plan(sections=tuple(sections), fetches=tuple(tuple(row) for row in fetches))


def train(model: nn.Module, inputs: list[torch.Tensor], steps: int) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Losses and gradients of `steps` seeded steps."""
    results = []
    for step in range(steps):
        torch.manual_seed(step)
        model.zero_grad(set_to_none=True)
        losses = [model(x).square().mean() for x in inputs]
        torch.stack(losses).sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((torch.stack(losses).detach().clone(), grads))
    return results


def assert_equal(
    plain: list[tuple[torch.Tensor, list[torch.Tensor]]], other: list[tuple[torch.Tensor, list[torch.Tensor]]]
) -> None:
    for step, ((loss, grads), (their_loss, their_grads)) in enumerate(zip(plain, other, strict=True)):
        assert torch.equal(loss, their_loss), f"the loss of step {step} differs"
        assert len(grads) == len(their_grads)
        assert all(torch.equal(a, b) for a, b in zip(grads, their_grads, strict=True)), f"gradients of step {step}"


def measured(model: nn.Module, given: object, inputs: list[torch.Tensor], **policy: object) -> Timeline:
    """What an offloader measures of `model`."""
    with lighterage.offload(given, **{"min_bytes": 64, "tier": "host", **policy}) as offloader:  # type: ignore[arg-type]
        train(model, inputs, STEPS_TO_PLAN)
        timeline = offloader.timeline
    assert timeline is not None
    return timeline
