"""What is measured of plans, one function a case; each returns plain data."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lighterage
from benchmarks import decoder_modes, planner_host
from benchmarks.decoder_cases import GIB, Row
from benchmarks.decoder_modes import Mode
from benchmarks.planner_bench import Bench
from benchmarks.shapes import HOST_BOUND, TINY
from lighterage.errors import BudgetError

# A plan is made beside the steps in about a second, of which a step may be a small part.
LEAST_STEPS_TO_PLAN, MOST_SECONDS_TO_PLAN = 14, 30.0
# What is foreseen is brought to the pace of the first steps under the plan, which may then be made anew, twice, and
# three times because it breaks its price.
MOST_SECONDS_TO_SETTLE = 60.0
# As training takes them: where the device has caught up before each, the host is what their first phases wait for, and
# a plan is made for times that the steps it is for do not take.
STEPS_IN_A_ROW = 8
# Steps at rest and planned ones are compared in rows of their own, which must not all begin as these do.
STEPS_TO_SETTLE = 28
GOALS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("max_slowdown=0.01, recompute=never", {"max_slowdown": 0.01, "recompute": "never"}),
    ("max_slowdown=0.03, recompute=never", {"max_slowdown": 0.03, "recompute": "never"}),
    ("max_slowdown=0.03", {"max_slowdown": 0.03}),
    ("device_budget=8.2GiB", {"device_budget": "8.2GiB"}),
)
LAYERS_GOALS = ("max_slowdown=0.01, recompute=never", "max_slowdown=0.03")
BUDGETS_GIB = (7.7, 8.4, 9.1, 9.8, 10.5, 11.2, 11.9, 12.6, 13.3, 14.0)


@contextmanager
def planned(bench: Bench, **policy: Any) -> Iterator[tuple[Mode, Row]]:
    """A mode under a plan, and what the planner foresaw.

    Raises:
        BudgetError: no plan keeps to the budget.
    """
    mode = bench.mode(str(policy), policy=policy)
    offloader = mode.offloader
    try:
        first_ms: list[float] = []
        begin = time.perf_counter()
        while offloader.plan is None and (
            len(first_ms) < LEAST_STEPS_TO_PLAN or time.perf_counter() - begin < MOST_SECONDS_TO_PLAN
        ):
            first_ms += bench.steps(mode, STEPS_IN_A_ROW)[0]
        row: Row = {"steps_to_plan": len(first_ms), "first_steps_ms": first_ms}
        begin, steps_to_settle = time.perf_counter(), 0
        while (
            offloader.plan is not None
            and not offloader.report().plan_settled
            and time.perf_counter() - begin < MOST_SECONDS_TO_SETTLE
        ):
            bench.steps(mode, STEPS_TO_SETTLE)
            steps_to_settle += STEPS_TO_SETTLE
        row["steps_to_settle"] = steps_to_settle
        row |= foreseen(offloader)
        yield mode, row
    finally:
        mode.close()
        del offloader, mode
        gc.collect()


def foreseen(offloader: lighterage.Offloader) -> Row:
    """What the report tells of the plan."""
    report = offloader.report()
    plan, timeline = offloader.plan, offloader.timeline
    if plan is None or timeline is None:
        return {"planned": False}
    return {
        "planned": True,
        "why": plan.why,
        "sections": [f"{section.name}: {section.why}" for section in plan.sections],
        "modes": [section.mode for section in plan.sections],
        "timeline_step_ms": timeline.step_ms,
        "timeline_peak_bytes": timeline.measured_peak_bytes,
        "selective_ms": [section.selective_ms for section in timeline.sections],
        "predicted_ms": report.predicted_ms,
        "predicted_peak_bytes": report.predicted_peak_bytes,
        "planning_ms": report.planning_ms,
        "times_scaled": report.times_scaled,
        "plans_remade": report.plans_remade,
        "measured_slowdown": report.measured_slowdown,
        "plans_corrected": report.plans_corrected,
        "plan_settled": report.plan_settled,
        "drifts": report.drifts,
        "phases_ms": report.measured_phases_ms,
        "foreseen_phases_ms": report.foreseen_phases_ms,
        "release_wait_ms": report.release_wait_ms,
        "link": report.link,
    }


def goals(
    bench: Bench, chosen: Sequence[tuple[str, dict[str, Any]]], rounds: int, out: Path | None = None
) -> Iterator[Row]:
    """Each goal: step, peak, and what was foreseen of both. Timelines and plans are written down into `out`."""
    for number, (name, policy) in enumerate(chosen):
        try:
            with planned(bench, **policy) as (mode, row):
                row |= {"mode": name, "ours": True, **bench.pairs(mode, rounds)}
                stats = mode.offloader.stats()
                row["bytes_out"], row["late_ms"] = stats.bytes_out, stats.late_ms
                if out is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    (out / f"plan-{number}.json").write_text(mode.offloader.plan.to_json())
                    (out / f"timeline-{number}.json").write_text(mode.offloader.timeline.to_json())
                    (out / f"report-{number}.txt").write_text(str(mode.offloader.report()))
        except BudgetError as error:
            row = {"mode": name, "refused": str(error), "smallest_bytes": error.smallest_bytes}
        except Exception as error:  # one that fails must not stop the others
            row = {"mode": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
        mode = None  # its twin has buffers of its own, which the next goal's peak must not count
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


def layers(bench: Bench, rounds: int, *, tiny: bool, out: Path | None = None) -> Iterator[Row]:
    """A model of lighterage's own layers: checkpointed, not at all, by half and whole; and under three goals.

    The budget is what checkpointing takes: there a plan has to be the faster one.
    """
    count = len(bench.model.layers)
    for num in (0, count // 2, count):
        yield (row := checkpointed(bench, num, rounds))
    small = {"min_bytes": 1024} if tiny else {}
    chosen = [(name, policy | small) for name, policy in GOALS if name in LAYERS_GOALS]
    # A CPU has no peak of its own: what is saved counts there, and the tiny models save less than this.
    budget = row["peak_bytes"] or 2 << 20
    chosen.append((f"device_budget={budget / GIB:.2f}GiB, of checkpointing", {"device_budget": budget} | small))
    yield from goals(bench, chosen, rounds, out)


def bits(bench: Bench, chosen: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Row]:
    """Loss and every gradient under each plan against the step without, under deterministic kernels."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        loss = bench.plain.step(bench.x, bench.probe)
        wanted = [p.grad.clone() for p in bench.plain.model.parameters()]
        again = bench.plain.step(bench.x, bench.probe)
        repeats = torch.equal(loss, again) and _same_gradients(bench.plain, wanted)
        yield {"mode": "none, run twice", "equal": repeats}
        for name, policy in chosen:
            mode = bench.mode(name, policy=policy)
            with mode.offloader as offloader:
                equal = True
                for _ in range(10):  # steps that measure, then steps under the plan
                    equal = equal and torch.equal(mode.step(bench.x, bench.probe), loss)
                    equal = equal and _same_gradients(mode, wanted)
                modes = {s.mode for s in offloader.plan.sections} if offloader.plan is not None else set()
                yield {
                    "mode": name,
                    "equal": equal,
                    "bytes_out": offloader.stats().bytes_out,
                    "modes": sorted(modes),
                }
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        bench.model.zero_grad(set_to_none=True)


def _same_gradients(mode: Mode, wanted: list[Tensor]) -> bool:
    return all(
        torch.equal(parameter.grad.view(torch.uint8), gradient.view(torch.uint8))
        for parameter, gradient in zip(mode.model.parameters(), wanted, strict=True)
    )


def checkpoint_mixes(bench: Bench, rounds: int) -> Iterator[Row]:
    """The first so many layers checkpointed, from none to all."""
    for num in range(len(bench.model.layers) + 1):
        yield checkpointed(bench, num, rounds)


def checkpointed(bench: Bench, num: int, rounds: int) -> Row:
    """The first `num` layers checkpointed."""
    mode = bench.mode(f"{num} layers checkpointed", num_checkpointed=num)
    bench.step(mode)
    return {"mode": mode.name, **bench.pairs(mode, rounds)}


def peers(bench: Bench, rounds: int) -> Iterator[Row]:
    """Peers that move everything."""
    for name in ("save_on_cpu", "trl"):
        try:
            mode = decoder_modes.make(name, bench.model)
            bench.step(mode)
            row = {"mode": name, **bench.pairs(mode, rounds)}
        except Exception as error:
            row = {"mode": name, "failed": f"{type(error).__name__}: {str(error)[:160]}"}
        yield row


def host_time(bench: Bench, device: torch.device, rounds: int) -> Row:
    """Host time of planning: that of each step beside the step of the wide model, and that of making its plan, once."""
    with planned(bench, max_slowdown=0.01, recompute="never") as (_, row):
        pass
    cuda = device.type == "cuda"
    shape, policy = (HOST_BOUND, {"min_bytes": 16384}) if cuda else (TINY, {"min_bytes": 1024, "tier": "host"})
    found = planner_host.host_time(shape, device, rounds, row["timeline_step_ms"], **policy)
    return found | {"making_ms": row["planning_ms"]}
