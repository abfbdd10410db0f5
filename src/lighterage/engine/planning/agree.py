"""Lets the ranks of one job make the same plan: each tells what it measured, and all plan for the most of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time

import torch

from ...planner.timeline import Link, Phase, Timeline

# Who does not answer for so long is planned without.
PATIENCE_S = 10.0
_LOOK_AGAIN_S = 0.02


def is_alone() -> bool:
    """Whether no other rank waits for the steps of this one, nor this one for theirs."""
    dist = torch.distributed
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def agreed(timeline: Timeline, link: Link) -> tuple[Timeline, Link, int]:
    """`timeline` with the most of what the ranks with the same sections measured, their slowest link, and their number.

    The ranks' words go through the key-value store that the job was started with, whatever the backend: nothing for the
    device to do, and a rank without an offloader holds nobody up for more than `PATIENCE_S`. Where the store is gone,
    with its process group or the rank that serves it, this rank plans by itself.
    """
    if is_alone():
        return timeline, link, 1
    try:
        said = _all_said(timeline, link)
    except (RuntimeError, ValueError):  # what torch.distributed raises of a store, and of a group, that is no more
        said = None
    if said is None:
        return timeline, link, 1
    alike = [(Timeline.from_json(one), Link.from_json(other)) for form, one, other in said if form == _form(timeline)]
    return _most([one for one, _ in alike]), _slowest([other for _, other in alike]), len(alike)


def _all_said(timeline: Timeline, link: Link) -> list[list[str]] | None:
    """Form, timeline and link of every rank, in their order; None where one does not answer, or has not waited.

    Raises:
        RuntimeError, ValueError: the store or the process group is gone.
    """
    dist = torch.distributed
    store = dist.distributed_c10d._get_default_store()
    world, rank = dist.get_world_size(), dist.get_rank()
    # How often this rank has come here is the job's to know: a count of the process would outlive its process group.
    prefix = f"lighterage/{store.add(f'lighterage/rounds/{rank}', 1)}"
    store.set(f"{prefix}/{rank}", json.dumps([_form(timeline), timeline.to_json(), link.to_json()]))
    keys = [f"{prefix}/{other}" for other in range(world)]
    # Asked again and again: a call that waits would hold the store up for whoever else needs it.
    deadline = time.monotonic() + PATIENCE_S
    while not store.check(keys):
        if time.monotonic() > deadline:
            # Who comes later must not plan together with what this rank said: it will have planned by itself.
            store.set(f"{prefix}/{rank}", json.dumps(None))
            return None
        time.sleep(_LOOK_AGAIN_S)
    said = [json.loads(store.get(key)) for key in keys]
    return None if None in said else said


def _form(timeline: Timeline) -> str:
    """What has to be equal for timelines to be compared one by one."""
    form = repr(
        (
            [(s.name, [a.save for a in s.allocations]) for s in timeline.sections],
            # What passes between two sections is a phase for one rank and too short to be one for another.
            [(p.direction, p.section) for p in timeline.phases if p.section is not None],
        )
    )
    return hashlib.sha256(form.encode()).hexdigest()


def _slowest(links: list[Link]) -> Link:
    return dataclasses.replace(
        links[0],
        out_bytes_per_s=min(link.out_bytes_per_s for link in links),
        in_bytes_per_s=min(link.in_bytes_per_s for link in links),
        both_bytes_per_s=min(link.both_bytes_per_s for link in links),
        copy_us=max(link.copy_us for link in links),
        compute_slowdown=max(link.compute_slowdown for link in links),
        move_us=max(link.move_us for link in links),
    )


def _passages(timeline: Timeline) -> set[int]:
    """Where a phase belongs to no section: how many phases of sections come before it."""
    found, count = set(), 0
    for phase in timeline.phases:
        if phase.section is None:
            found.add(count)
        else:
            count += 1
    return found


def _with_passages(timeline: Timeline, wanted: set[int]) -> Timeline:
    """`timeline` with no other phases between sections than those; what passes elsewhere counts to the phase before."""
    phases: list[Phase] = []
    count = 0
    for phase in timeline.phases:
        if phase.section is None and count not in wanted and phases:
            before = phases[-1]
            work_bytes = max(before.work_bytes, phase.work_bytes)
            phases[-1] = dataclasses.replace(before, ms=before.ms + phase.ms, work_bytes=work_bytes)
        elif phase.section is not None or count in wanted:
            phases.append(phase)
        count += phase.section is not None
    return dataclasses.replace(timeline, phases=tuple(phases))


def _most(timelines: list[Timeline]) -> Timeline:
    common = set.intersection(*(_passages(timeline) for timeline in timelines))
    timelines = [_with_passages(timeline, common) for timeline in timelines]
    first = timelines[0]
    sections = []
    for versions in zip(*(t.sections for t in timelines), strict=True):
        allocations = []
        for each in zip(*(v.allocations for v in versions), strict=True):
            # Whoever measured most bytes of it speaks for it; whoever has to keep it, for all.
            largest = max(each, key=lambda a: a.held_bytes)
            kept = next((a.kept for a in each if a.kept is not None), None)
            allocations.append(dataclasses.replace(largest, kept=kept))
        times = [v.selective_ms for v in versions]
        known = [ms for ms in times if ms is not None]
        sections.append(
            dataclasses.replace(
                versions[0],
                allocations=tuple(allocations),
                not_recomputed=next((v.not_recomputed for v in versions if v.not_recomputed is not None), None),
                selective_ms=max(known) if len(known) == len(times) else None,
                recompute_ms=max((v.recompute_ms for v in versions if v.recompute_ms is not None), default=None),
                hooks_forward_ms=max(v.hooks_forward_ms for v in versions),
                hooks_backward_ms=max(v.hooks_backward_ms for v in versions),
            )
        )
    phases = tuple(
        dataclasses.replace(each[0], ms=max(p.ms for p in each), work_bytes=max(p.work_bytes for p in each))
        for each in zip(*(t.phases for t in timelines), strict=True)
    )
    peaks = [t.measured_peak_bytes for t in timelines if t.measured_peak_bytes is not None]
    return dataclasses.replace(
        first, sections=tuple(sections), phases=phases, measured_peak_bytes=max(peaks, default=None)
    )
