"""What is measured of plans, one function a case; each returns plain data."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lighterage
from benchmarks import decoder_modes, planner_host
from benchmarks.decoder_cases import GIB, Row, spread, synchronize, timed_step
from benchmarks.decoder_model import CheckpointedDecoder, Decoder, build, inputs, twin
from benchmarks.decoder_modes import Mode
from benchmarks.moe_stack_model import RECIPES, Stack, StackShape
from benchmarks.shapes import HOST_BOUND, TINY, DecoderShape
from lighterage.errors import BudgetError

MOST_STEPS_TO_PLAN = 14
GOALS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("max_slowdown=0.01, recompute=never", {"max_slowdown": 0.01, "recompute": "never"}),
    ("max_slowdown=0.03, recompute=never", {"max_slowdown": 0.03, "recompute": "never"}),
    ("max_slowdown=0.03", {"max_slowdown": 0.03}),
    ("device_budget=8.2GiB", {"device_budget": "8.2GiB"}),
)
BUDGETS_GIB = (7.7, 8.4, 9.1, 9.8, 10.5, 11.2, 11.9, 12.6, 13.3, 14.0)
FEW_BUDGETS_GIB = (7.8, 8.4, 9.4, 10.6, 11.8)


class PartlyCheckpointed(Decoder):
    """The decoder with its first `num_checkpointed` layers recomputed in backward."""

    num_checkpointed = 0

    def run_layer(self, layer: nn.Module, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        if any(layer is one for one in list(self.layers)[: self.num_checkpointed]):
            return torch.utils.checkpoint.checkpoint(layer, x_BSH, cos_SD, sin_SD, use_reentrant=False)
        return layer(x_BSH, cos_SD, sin_SD)


class Bench:
    """The decoder without offload, and steps of other modes beside it."""

    def __init__(self, shape: DecoderShape, device: torch.device) -> None:
        self.device = device
        self.model = build(shape, device)
        self.x, self.probe = inputs(shape, device)
        self.plain = Mode(name="none", model=twin(self.model))
        for _ in range(3):
            self.plain.step(self.x, self.probe)

    def step(self, mode: Mode) -> tuple[float, float, int]:
        """One timed step; gradients are dropped after it, so that they are not in the next mode's way."""
        timed = timed_step(mode, self.x, self.probe)
        self.model.zero_grad(set_to_none=True)
        mode.model.zero_grad(set_to_none=True)
        return timed

    def pairs(self, mode: Mode, rounds: int) -> Row:
        """`mode` and the step without it in turn: medians, and the median of the ratios of neighbours."""
        mine, plain, ratios, peaks, walls = [], [], [], [], []
        gc.collect()
        gc.disable()  # a collection takes tens of milliseconds, and falls on whoever comes by
        try:
            for _ in range(rounds):
                self.step(self.plain)  # what follows another mode's step is not timed: the lanes were idle
                base = self.step(self.plain)
                self.step(mode)
                steps = [self.step(mode) for _ in range(2)]
                plain.append(base[0])
                mine += [step[0] for step in steps]
                walls += [step[1] for step in steps]
                peaks += [step[2] for step in steps]
                ratios += [step[0] / base[0] for step in steps]
        finally:
            gc.enable()
        return {
            "device": spread(mine),
            "wall": spread(walls),
            "none": spread(plain),
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "peak_bytes": max(peaks),
        }


@contextmanager
def planned(bench: Bench, **policy: Any) -> Iterator[tuple[Mode, Row]]:
    """A mode under a plan, and what the planner foresaw.

    Raises:
        BudgetError: no plan keeps to the budget.
    """
    model = twin(bench.model)
    offloader = lighterage.offload(model.layers, **policy)
    mode = Mode(name=str(policy), model=model, offloader=offloader)
    try:
        first_ms: list[float] = []
        while offloader.plan is None and len(first_ms) < MOST_STEPS_TO_PLAN:
            synchronize(bench.device)
            first_ms.append(bench.step(mode)[1])
        row: Row = {"steps_to_plan": len(first_ms), "first_steps_ms": first_ms}
        for _ in range(3):
            bench.step(mode)
        row |= foreseen(offloader)
        yield mode, row
    finally:
        mode.close()
        del model, offloader, mode
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
        "phases_ms": report.measured_phases_ms,
        "foreseen_phases_ms": report.foreseen_phases_ms,
        "release_wait_ms": report.release_wait_ms,
        "link": report.link,
    }


def goals(bench: Bench, chosen: Sequence[tuple[str, dict[str, Any]]], rounds: int, out: Path | None) -> list[Row]:
    """Each goal: step, peak, and what was foreseen of both. The first one's timeline is written down."""
    rows: list[Row] = []
    for number, (name, policy) in enumerate(chosen):
        try:
            with planned(bench, **policy) as (mode, row):
                row |= {"mode": name, **bench.pairs(mode, rounds)}
                stats = mode.offloader.stats()
                row["bytes_out"], row["late_ms"] = stats.bytes_out, stats.late_ms
                if out is not None:
                    (out / f"plan-{number}.json").write_text(mode.offloader.plan.to_json())
                    (out / f"timeline-{number}.json").write_text(mode.offloader.timeline.to_json())
                    if number == 0:
                        (out / "report.txt").write_text(str(mode.offloader.report()))
        except BudgetError as error:
            row = {"mode": name, "refused": str(error), "smallest_bytes": error.smallest_bytes}
        except Exception as error:  # one that fails must not stop the others
            row = {"mode": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append(row)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def bits(bench: Bench, chosen: Sequence[tuple[str, dict[str, Any]]]) -> list[Row]:
    """Loss and every gradient under each plan against the step without, under deterministic kernels."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    rows: list[Row] = []
    try:
        loss = bench.plain.step(bench.x, bench.probe)
        wanted = [p.grad.clone() for p in bench.plain.model.parameters()]
        again = bench.plain.step(bench.x, bench.probe)
        repeats = torch.equal(loss, again) and _same_gradients(bench.plain, wanted)
        rows.append({"mode": "none, run twice", "equal": repeats})
        for name, policy in chosen:
            model = twin(bench.model)
            with lighterage.offload(model.layers, **policy) as offloader:
                mode = Mode(name=name, model=model, offloader=offloader)
                equal = True
                for _ in range(10):  # steps that measure, then steps under the plan
                    equal = equal and torch.equal(mode.step(bench.x, bench.probe), loss)
                    equal = equal and _same_gradients(mode, wanted)
                modes = {s.mode for s in offloader.plan.sections} if offloader.plan is not None else set()
                rows.append(
                    {
                        "mode": name,
                        "equal": equal,
                        "bytes_out": offloader.stats().bytes_out,
                        "modes": sorted(set(modes)),
                    }
                )
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        bench.model.zero_grad(set_to_none=True)
    return rows


def _same_gradients(mode: Mode, wanted: list[Tensor]) -> bool:
    return all(
        torch.equal(parameter.grad.view(torch.uint8), gradient.view(torch.uint8))
        for parameter, gradient in zip(mode.model.parameters(), wanted, strict=True)
    )


def checkpoint_mixes(bench: Bench, rounds: int) -> list[Row]:
    """The first so many layers checkpointed, from none to all."""
    rows: list[Row] = []
    for num in range(len(bench.model.layers) + 1):
        model = twin(bench.model, PartlyCheckpointed if num < len(bench.model.layers) else CheckpointedDecoder)
        if isinstance(model, PartlyCheckpointed):
            model.num_checkpointed = num
        mode = Mode(name=f"{num} layers checkpointed", model=model)
        bench.step(mode)
        rows.append({"mode": mode.name, **bench.pairs(mode, rounds)})
    return rows


def peers(bench: Bench, rounds: int) -> list[Row]:
    """Peers that move everything."""
    rows: list[Row] = []
    for name in ("save_on_cpu", "trl"):
        try:
            mode = decoder_modes.make(name, bench.model)
            bench.step(mode)
            rows.append({"mode": name, **bench.pairs(mode, rounds)})
        except Exception as error:
            rows.append({"mode": name, "failed": f"{type(error).__name__}: {str(error)[:160]}"})
    return rows


def host_time(bench: Bench, device: torch.device, rounds: int) -> Row:
    """Host time of planning: that of each step beside the step of the wide model, and that of making its plan, once."""
    with planned(bench, max_slowdown=0.01, recompute="never") as (_, row):
        pass
    cuda = device.type == "cuda"
    shape, policy = (HOST_BOUND, {"min_bytes": 16384}) if cuda else (TINY, {"min_bytes": 1024, "tier": "host"})
    found = planner_host.host_time(shape, device, rounds, row["timeline_step_ms"], **policy)
    return found | {"making_ms": row["planning_ms"]}


def stack(shape: StackShape, recipe: str, device: torch.device, rounds: int) -> list[Row]:
    """The stack of experts without offload, checkpointed, and under the same goals."""
    model = Stack(shape, RECIPES[recipe], device)
    x, gradient = model.inputs()

    def step(run: Callable[[Tensor], Tensor]) -> tuple[float, int]:
        model.zero_grad(set_to_none=True)
        x.grad = None
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        run(x).backward(gradient)
        synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return (time.perf_counter() - start) * 1e3, peak

    def rounds_of(name: str, run: Callable[[Tensor], Tensor]) -> Row:
        step(run)
        steps = [step(run) for _ in range(3 * rounds)]
        return {"mode": name, "wall": spread([s[0] for s in steps]), "peak_bytes": max(s[1] for s in steps)}

    rows = [rounds_of("none", model)]
    rows.append(rounds_of("checkpoint", lambda x: _checkpointed(model, x)))
    none = rows[0]
    half = (none["peak_bytes"] + rows[1]["peak_bytes"]) // 2
    policies: list[tuple[str, dict[str, Any]]] = [
        ("max_slowdown=0.01, recompute=never", {"max_slowdown": 0.01, "recompute": "never"}),
        ("max_slowdown=0.03", {"max_slowdown": 0.03}),
    ]
    if half:
        policies += [
            (f"device_budget={half / GIB:.2f}GiB (midway to checkpointing)", {"device_budget": half}),
            ("device_budget of checkpointing", {"device_budget": rows[1]["peak_bytes"]}),
        ]
    for name, policy in policies:
        try:
            with lighterage.offload(model.layers, **policy) as offloader:
                for _ in range(MOST_STEPS_TO_PLAN):
                    step(model)
                    if offloader.plan is not None:
                        break
                rows.append(rounds_of(name, model) | foreseen(offloader))
        except Exception as error:
            rows.append({"mode": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"})
    rows.append(rounds_of("none, again", model))
    return [{"stack": f"{shape.name}, {shape.experts} experts, {recipe}", **row} for row in rows]


def _checkpointed(model: Stack, x: Tensor) -> Tensor:
    from lighterage.formats.splits import Splits

    splits = Splits.of(model.shape.splits, len(x), x.device)
    for layer in model.layers:
        x = torch.utils.checkpoint.checkpoint(layer, x, splits, use_reentrant=False)
    return x
