"""The demo's `--plot`: trains once more under a plan that the offloader makes, and draws the step that it foresees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lighterage
from lighterage.cli.demo_config import DemoConfig
from lighterage.cli.demo_text import batches
from lighterage.cli.demo_train import make_model
from lighterage.cli.plot_step import draw_step
from lighterage.engine.link import measure_link
from lighterage.planner.plan import Plan, SectionPlan
from lighterage.planner.simulate import simulate

MOST_STEPS = 20
"""By then a plan is there: some steps are measured, one may be tried, and planning takes less than a second."""

SLOWDOWN = {"cpu": 1.0, "cuda": 0.03}
"""What the plan may cost. A CPU moves to a file, behind which next to nothing hides: there the step may take double,
so that there is something to see."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """What `draw_planned_step` found."""

    why: str
    """The plan in a sentence."""

    figure: Path


def draw_planned_step(config: DemoConfig, text: Tensor, *, on_step: Callable[[int, float], None]) -> PlannedStep | None:
    """Train until a plan is made, and draw it into the folder of the results; None where no plan came up.

    `on_step(step, loss)` is called after each step.
    """
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = make_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    slowdown = SLOWDOWN[device.type]
    with lighterage.offload(model.layers, max_slowdown=slowdown, tier=config.tier) as offloader:
        source = batches(text, batch=config.batch, seq=config.seq, seed=config.seed)
        for step, (text_BT, next_BT) in zip(range(MOST_STEPS), source, strict=False):
            optimizer.zero_grad(set_to_none=False)
            loss = model(text_BT.to(device), next_BT.to(device))
            loss.backward()
            optimizer.step()
            on_step(step, loss.item())
            del loss
            if offloader.plan is not None:
                break
        plan, timeline = offloader.plan, offloader.timeline
    if plan is None or timeline is None:
        return None
    link = measure_link(device, config.tier)
    kept = Plan(
        sections=tuple(SectionPlan(name=section.name) for section in timeline.sections),
        fetches=((),) * len(timeline.phases),
    )
    figure = config.out / "planned_step.png"
    draw_step(
        simulate(timeline, plan, link),
        path=figure,
        title=f"A step as planned, to take at most {slowdown:.0%} longer: memory above, copies under it",
        plain=simulate(timeline, kept, link),
        memory_name="device memory" if device.type == "cuda" else "saved tensors on the device",
    )
    return PlannedStep(why=plan.why, figure=figure)
