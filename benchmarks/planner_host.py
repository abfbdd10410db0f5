"""What planning costs the host in each step, beside the same moves by a plan that was made by hand."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import lighterage
from benchmarks.decoder_cases import Row, spread, synchronize
from benchmarks.decoder_model import Decoder, build, inputs, twin
from benchmarks.decoder_modes import Mode
from benchmarks.shapes import DecoderShape
from lighterage.engine.planning import checks
from lighterage.planner.plan import Fetch, Move, Plan, SectionPlan
from lighterage.planner.timeline import Timeline

NUM_MOVED = 2
"""Layers of which all is moved: the first ones, as many as `benchmarks.decoder` moves by hand."""

MOST_SECONDS_TO_PLAN = 60
RELEASE_AFTER, PREFETCH_AHEAD = 1, 1


def host_time(shape: DecoderShape, device: torch.device, rounds: int, step_ms: float, **policy: Any) -> Row:
    """Host milliseconds that planning adds to a step, on a model that waits for its host.

    Four twins of one model take turns, so that each turn has one step of each within the same moment: without offload;
    with all of the first layers moved by hand (`keep_last`, `release_after`, `prefetch_ahead`); with the same
    allocations moved, let go of and fetched in the same places by a plan (`use_plan`); and with that plan in steps that
    are timed again, of which there is one in `checks.CHECK_EVERY`. Moving costs the host what the second takes more
    than the first; planning and its bookkeeping, what the third takes more than the second, and the fourth, now and
    then, more than the third. Differences are taken turn by turn; their medians and quartiles are told.

    From the first call of forward to the return of backward nothing is waited for, and what the device takes hides
    behind the host. The model is narrow; saves and sections are those of `step_ms`, the step of the wide one.
    """
    model = build(shape, device)
    x, probe = inputs(shape, device)
    timeline = _measured(model, x, probe, **policy)
    by_hand = {"keep_last": shape.layers - NUM_MOVED, "release_after": RELEASE_AFTER, "prefetch_ahead": PREFETCH_AHEAD}
    plan = same_moves(timeline, NUM_MOVED, release_after=RELEASE_AFTER, prefetch_ahead=PREFETCH_AHEAD)
    modes = {"none": Mode(name="none", model=twin(model)), "by hand": _mode("by hand", model, **by_hand, **policy)}
    for name, around in (("planned", contextlib.nullcontext), ("timed again", _every_step_is_timed)):
        modes[name] = _mode(name, model, around, **policy)
        modes[name].offloader.use_plan(plan, timeline)
    try:
        times = _take_turns(modes, x, probe, rounds)
        stats = {name: mode.offloader.stats() for name, mode in modes.items() if mode.offloader is not None}
    finally:
        for mode in modes.values():
            mode.close()
    bytes_out = {name: one.bytes_out for name, one in stats.items()}
    # What turned out to be held by somebody else, the model's rotary tables, is tried again after some steps.
    if min(bytes_out.values()) < 0.95 * max(bytes_out.values()) or not min(bytes_out.values()):
        raise RuntimeError(f"the modes do not move the same, so that there is nothing to compare: {bytes_out}")
    moving, planning = difference(times["by hand"], times["none"]), difference(times["planned"], times["by hand"])
    again = difference(times["timed again"], times["planned"])
    a_step = planning["median"] + again["median"] / checks.CHECK_EVERY
    return {
        "host_ms": {name: spread(values) for name, values in times.items()},
        "moving_ms": moving,
        "planning_ms": planning,
        "timed_again_ms": again,
        "check_every": checks.CHECK_EVERY,
        "planning_ms_a_step": a_step,
        "share_of_step": a_step / step_ms,
        "step_ms": step_ms,
        "moved_allocations": plan.num_moves,
        "saves": sum(len(section.allocations) for section in timeline.sections),
        "copies_out": {name: one.copies_out for name, one in stats.items()},
        "copies_in": {name: one.copies_in for name, one in stats.items()},
        "bytes_out": bytes_out,
    }


def same_moves(timeline: Timeline, num_moved: int, *, release_after: int, prefetch_ahead: int) -> Plan:
    """A plan that does with the first `num_moved` sections what a policy does that is made by hand."""
    place = {phase.section: number for number, phase in enumerate(timeline.phases) if phase.direction == "forward"}

    def phases_after(index: int) -> int:
        # By hand, what no later section's forward lets go of stays until backward wants it: here, past the last phase.
        return place.get(index + release_after, len(timeline.phases)) - place[index]

    sections = [
        SectionPlan(
            name=section.name,
            moves=tuple(
                Move(save=one.save, release_after=phases_after(index))
                for one in section.allocations
                if index < num_moved and one.kept is None
            ),
        )
        for index, section in enumerate(timeline.sections)
    ]
    fetches: list[tuple[Fetch, ...]] = []
    for phase in timeline.phases:
        ahead = -1 if phase.section is None or phase.direction != "backward" else phase.section - prefetch_ahead
        moves = sections[ahead].moves if ahead >= 0 else ()
        fetches.append(tuple(Fetch(section=ahead, save=move.save) for move in moves))
    return Plan(sections=tuple(sections), fetches=tuple(fetches))


def difference(more: Sequence[float], less: Sequence[float]) -> Row:
    """Median and quartiles of what `more` takes beyond `less`, turn by turn."""
    values = [a - b for a, b in zip(more, less, strict=True)]
    lower, median, upper = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "quartiles": [lower, upper], "num": len(values)}


def _measured(model: Decoder, x: Tensor, probe: Tensor, **policy: Any) -> Timeline:
    mode = _mode("measured", model, recompute="never", **policy)
    deadline = time.monotonic() + MOST_SECONDS_TO_PLAN
    try:
        while mode.offloader.timeline is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no plan came within {MOST_SECONDS_TO_PLAN} s: {mode.offloader.report().plan}")
            mode.step(x, probe)
            synchronize(x.device)
            time.sleep(0.01)  # the plan is made beside the steps, which are short
        return mode.offloader.timeline
    finally:
        mode.close()


def _mode(
    name: str,
    model: Decoder,
    around_step: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    **policy: Any,
) -> Mode:
    ours = twin(model)
    offloader = lighterage.offload(ours.layers, **policy)
    return Mode(name=name, model=ours, around_step=around_step, offloader=offloader)


@contextlib.contextmanager
def _every_step_is_timed() -> Iterator[None]:
    usual, checks.CHECK_EVERY = checks.CHECK_EVERY, 1
    try:
        yield
    finally:
        checks.CHECK_EVERY = usual


def _take_turns(modes: dict[str, Mode], x: Tensor, probe: Tensor, rounds: int) -> dict[str, list[float]]:
    """Host milliseconds of each mode's steps. Each turn begins with another mode: none is always after the same one."""
    times: dict[str, list[float]] = {name: [] for name in modes}
    names = list(modes)
    for turn in range(-5, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            mode = modes[name]
            mode.model.zero_grad(set_to_none=True)
            synchronize(x.device)
            gc.disable()  # a collection in one of them would be taken for its cost
            with mode.around_step():
                start = time.perf_counter()
                loss = mode.model(x, probe)
                loss.backward()
                elapsed_ms = (time.perf_counter() - start) * 1e3
            gc.enable()
            del loss
            if turn >= 0:
                times[name].append(elapsed_ms)
    return times
