"""What a plan does to a step, on a given link."""

from __future__ import annotations

from collections.abc import Sequence

from .layout import Layout, lay_out
from .plan import Plan
from .prediction import Copy, PhasePrediction, Prediction, Stalls
from .run import Run
from .timeline import Link, Timeline


class _Planned:
    """The decisions that a plan has written down."""

    def __init__(self, releases: list[list[int]], fetches: list[list[int]]) -> None:
        self._releases = releases
        self._fetches = fetches

    def fetches(self, phase: int, run: Run) -> Sequence[int]:
        return self._fetches[phase]

    def releases(self, phase: int, run: Run) -> Sequence[int]:
        return self._releases[phase]


def simulate(timeline: Timeline, plan: Plan, link: Link) -> Prediction:
    """Predict a step of `timeline` under `plan` over `link`. Exact for the model that docs/planner.md describes.

    Each moved allocation is queued on the outbound lane where it is saved; its memory goes free at the end of the
    phase that the plan names, for which the compute stream waits for the copy. As a phase begins, its fetches take
    their memory and are queued on the inbound lane. A use waits until the bytes are there; what nobody has fetched is
    allocated and queued there and then as urgent: it comes after the chunk in progress, and until it is through
    copies out stop at the end of their chunk. An allocation that has been read is not released.

    Raises:
        ValueError: the plan is of another timeline: other sections, phases or saves.
    """
    check_match(timeline, plan)
    layout = lay_out(timeline, [section.mode for section in plan.sections])
    moved, planned = _decisions(timeline, plan, layout)
    run = Run(layout, link, moved, recording=True)
    run.go(planned)
    return predict(timeline, run)


def check_match(timeline: Timeline, plan: Plan) -> None:
    """Raise ValueError if `plan` was made for another timeline."""
    names, planned = [s.name for s in timeline.sections], [s.name for s in plan.sections]
    if names != planned:
        raise ValueError(
            f"a plan has the sections of its timeline, in order; got a plan of {len(planned)} ({_few(planned)}) for "
            f"{len(names)} ({_few(names)}). Plan again for this timeline."
        )
    if len(plan.fetches) != len(timeline.phases):
        raise ValueError(
            f"a plan has fetches for each phase; got {len(plan.fetches)} for {len(timeline.phases)} phases. "
            "Plan again for this timeline."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _decisions(timeline: Timeline, plan: Plan, layout: Layout) -> tuple[list[bool], _Planned]:
    where = {(item.section, item.allocation.save): index for index, item in enumerate(layout.items)}
    known = {(s, a.save) for s, record in enumerate(timeline.sections) for a in record.allocations}
    num_phases = len(timeline.phases)
    moved = [False] * len(layout.items)
    releases: list[list[int]] = [[] for _ in range(num_phases)]
    for section, each in enumerate(plan.sections):
        for move in each.moves:
            if (section, move.save) not in known:
                raise ValueError(
                    f"the plan moves save {move.save} of section {section} ({each.name}), and there is none."
                )
            index = where.get((section, move.save))
            # What its mode computes again is not saved, and what has to stay stays.
            if index is None or layout.items[index].allocation.kept is not None:
                continue
            moved[index] = True
            due = layout.items[index].birth[0] + move.release_after
            if due < num_phases:
                releases[due].append(index)
    for due_now in releases:
        due_now.sort(key=lambda index: layout.items[index].birth)
    fetches: list[list[int]] = []
    for phase in plan.fetches:
        for fetch in phase:
            if (fetch.section, fetch.save) not in known:
                raise ValueError(f"the plan fetches save {fetch.save} of section {fetch.section}, and there is none.")
        indices = (where.get((fetch.section, fetch.save)) for fetch in phase)
        fetches.append([index for index in indices if index is not None])
    return moved, _Planned(releases, fetches)


def predict(timeline: Timeline, run: Run) -> Prediction:
    """What a recorded run says."""
    recording = run.recording
    assert recording is not None, "the run was recorded"
    run.lanes.drain()
    layout, step_ms = run.layout, run.now_ms
    phases = tuple(
        PhasePrediction(
            direction=phase.direction,
            section=phase.section,
            start_ms=start,
            end_ms=end,
            stalls_ms=Stalls(reload=reload, release=release, recompute=recompute, slowdown=slowed, host=host),
            peak_bytes=peak,
        )
        for phase, start, end, reload, release, recompute, slowed, host, peak in zip(
            timeline.phases,
            recording.starts_ms,
            recording.ends_ms,
            recording.reload_ms,
            recording.release_ms,
            layout.recompute_ms,
            recording.slowed_ms,
            recording.host_ms,
            recording.peaks,
            strict=True,
        )
    )
    on_demand = set(run.on_demand)
    out_copies = _copies(layout, run.lanes.out.records, set())
    in_copies = _copies(layout, run.lanes.back.records, on_demand)
    return Prediction(
        step_ms=step_ms,
        peak_bytes=run.peak_bytes,
        stalls_ms=Stalls(
            reload=sum(recording.reload_ms),
            release=sum(recording.release_ms),
            recompute=sum(layout.recompute_ms),
            slowdown=run.slowed_ms,
            host=run.host_ms,
        ),
        phases=phases,
        curve=tuple(recording.curve),
        out_copies=out_copies,
        in_copies=in_copies,
        bytes_out=sum(copy.nbytes for copy in out_copies),
        bytes_in=sum(copy.nbytes for copy in in_copies),
        out_busy=_busy(out_copies, step_ms),
        in_busy=_busy(in_copies, step_ms),
        num_on_demand=len(on_demand),
        on_demand_bytes=sum(layout.items[index].allocation.nbytes for index in on_demand),
    )


def _copies(
    layout: Layout, records: list[tuple[int, float, float, float]] | None, on_demand: set[int]
) -> tuple[Copy, ...]:
    assert records is not None, "the run was recorded"
    items = layout.items
    return tuple(
        Copy(
            section=items[index].section,
            save=items[index].allocation.save,
            nbytes=round(nbytes),
            start_ms=start,
            end_ms=end,
            on_demand=index in on_demand,
        )
        for index, start, end, nbytes in records
    )


def _busy(copies: Sequence[Copy], step_ms: float) -> float:
    busy_ms = sum(min(copy.end_ms, step_ms) - copy.start_ms for copy in copies if copy.start_ms < step_ms)
    return busy_ms / step_ms if step_ms else 0.0
