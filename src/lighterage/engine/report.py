"""The ledger as a table that a person can read, and as data."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..planner.plan import SectionPlan
from .backward_order import BackwardOrder
from .ledger import Ledger, OffloadStats, Row
from .planning import Autoplan
from .policy import Policy
from .units import format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SectionReport:
    """The figures of one section over a step, its runs added up. Sizes in bytes."""

    name: str
    runs: int
    saves: int
    saved_bytes: int
    unique_bytes: int
    bytes_out: int
    bytes_in: int
    copies_out: int
    copies_in: int
    kept: dict[str, int]
    still_alive: list[tuple[str, int]]
    late_reloads: int
    late_ms: float
    unseen_bytes: int | None
    mode: str | None = None
    """How the plan has its backward fed: `"save"`, `"selective"` or `"recompute"`; None where no plan was made."""
    why: str = ""
    """What the plan chose for it, and for what reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What an offloader did in its last finished step. `str()` gives a table."""

    steps: int
    sections_from: str
    policy: dict[str, Any]
    stats: OffloadStats
    sections: list[SectionReport]
    stood_aside: list[tuple[str, str, int]]
    refusals: dict[str, int]
    prefetch_hits: int
    prefetch_misses: int
    release_wait_ms: float = 0.0
    """Time for which copies out were waited for, so that device memory could go."""
    plan: str | None = None
    """What the plan is for, or what is still missing to make one; None where it is made by hand."""
    predicted_ms: float | None = None
    """Of forward and backward under the plan, as it was foreseen."""
    measured_ms: float | None = None
    """The same as it was last measured."""
    predicted_peak_bytes: int | None = None
    measured_peak_bytes: int | None = None
    foreseen_phases_ms: list[tuple[str, int | None, float]] = dataclasses.field(default_factory=list)
    """Direction, section and time of each phase, as they were foreseen."""
    measured_phases_ms: list[tuple[str, int | None, float]] = dataclasses.field(default_factory=list)
    """The same as they were last measured."""
    planning_ms: float | None = None
    """Host time that making the plan took, once."""
    link: str | None = None
    """What the copies go over, as it was measured."""
    times_scaled: float = 1.0
    """By what the times were scaled since they were measured, to be those of the steps since then."""
    plans_remade: int = 0
    """How often the plan was made anew since then, of the times as they were scaled."""
    measured_slowdown: float | None = None
    """The part by which steps under the plan took longer than steps in turn with them in which all stays: 0.02 is 2 %.
    None where there is no price, or it is not seen yet."""
    plans_corrected: int = 0
    """How often the plan was made anew because it broke its price."""
    planned_in_thread: str | None = None
    """Why the plan was made in a thread of this program, which slows the steps beside it, and in no process of its own;
    None: it was not."""
    plan_settled: bool = False
    """Whether steps under the plan were timed, and nothing is in the making that would change what is foreseen."""
    drifts: int = 0
    """How often steps were measured anew because they did not fit the plan."""
    agreed_with: int = 1
    """Ranks that the plan was made for together."""

    def to_json(self, indent: int | None = None) -> str:
        """The same as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=indent, default=str)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def build_report(
    *,
    ledger: Ledger,
    stats: OffloadStats,
    sections_from: str,
    order: BackwardOrder,
    policy: Policy,
    auto: Autoplan | None,
    release_wait_ms: float,
) -> Report:
    """The report on the last finished step of `ledger`."""
    by_name: dict[str, list[Row]] = {}
    for row in ledger.last.rows:
        by_name.setdefault(row.name, []).append(row)
    planned = {} if auto is None or auto.plan is None else {s.name: s for s in auto.plan.sections}
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    return Report(
        steps=ledger.num_steps,
        sections_from=sections_from,
        policy={k: int(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in fields.items()},
        stats=stats,
        sections=[_add_up(name, rows, planned.get(name)) for name, rows in by_name.items()],
        stood_aside=[(name, reason, count) for (name, reason), count in ledger.stood_aside.items()],
        refusals=dict(ledger.refusals),
        prefetch_hits=order.hits,
        prefetch_misses=order.misses,
        release_wait_ms=release_wait_ms,
        **({} if auto is None else _of_plan(auto)),
    )


def _of_plan(auto: Autoplan) -> dict[str, Any]:
    prediction = auto.prediction
    return {
        "plan": auto.told,
        "predicted_ms": None if prediction is None else prediction.step_ms,
        "predicted_peak_bytes": None if prediction is None else prediction.peak_bytes,
        "measured_ms": auto.checks.measured_ms,
        "measured_peak_bytes": auto.checks.measured_peak_bytes,
        "foreseen_phases_ms": []
        if prediction is None
        else [(p.direction, p.section, p.end_ms - p.start_ms) for p in prediction.phases],
        "measured_phases_ms": list(auto.checks.measured_phases_ms),
        "planning_ms": auto.planning_ms,
        "planned_in_thread": auto.planned_in_thread,
        "link": None if auto.link is None else auto.link.told,
        "times_scaled": auto.pace.since_measured,
        "plans_remade": auto.pace.num_remade,
        "measured_slowdown": auto.price.measured,
        "plans_corrected": auto.price.num_corrected,
        "plan_settled": auto.is_settled,
        "drifts": auto.num_drifts,
        "agreed_with": auto.agreed_with,
    }


def _add_up(name: str, rows: list[Row], planned: SectionPlan | None) -> SectionReport:
    kept: dict[str, int] = {}
    for row in rows:
        for reason, nbytes in row.kept.items():
            kept[reason] = kept.get(reason, 0) + nbytes
    unseen = [row.unseen_bytes for row in rows if row.unseen_bytes is not None]
    return SectionReport(
        name=name,
        runs=len(rows),
        saves=sum(r.saves for r in rows),
        saved_bytes=sum(r.saved_bytes for r in rows),
        unique_bytes=sum(r.unique_bytes for r in rows),
        bytes_out=sum(r.bytes_out for r in rows),
        bytes_in=sum(r.bytes_in for r in rows),
        copies_out=sum(r.copies_out for r in rows),
        copies_in=sum(r.copies_in for r in rows),
        kept=kept,
        still_alive=[item for row in rows for item in row.alive],
        late_reloads=sum(r.late_reloads for r in rows),
        late_ms=sum(r.late_ms for r in rows),
        unseen_bytes=sum(unseen) if unseen else None,
        mode=None if planned is None else planned.mode,
        why="" if planned is None else planned.why,
    )


_HEADINGS = ("section", "runs", "saves", "saved", "unique", "out", "in", "copies", "kept", "late ms")


def _lines(report: Report) -> list[str]:
    stats = report.stats
    lines = [f"lighterage: step {report.steps}; sections are {report.sections_from}"]
    if not report.sections:
        lines.append("No step has finished yet: a step ends when backward has used or dropped all that was saved.")
    else:
        rows = [_HEADINGS, *(_cells(section) for section in report.sections), _total_cells(report)]
        lines += _table(rows)
    if report.plan is not None:
        lines += ["", *_plan_lines(report)]
    kept: dict[str, list[int]] = {}
    for section in report.sections:
        for reason, nbytes in section.kept.items():
            entry = kept.setdefault(reason, [0, 0])
            entry[0] += nbytes
            entry[1] += 1
    if kept:
        lines += ["", "kept on the device, and why:"]
        for reason, (nbytes, count) in sorted(kept.items(), key=lambda item: -item[1][0]):
            lines.append(f"  {format_bytes(nbytes):>10}  {reason} ({count} {'section' if count == 1 else 'sections'})")
    alive = [(section.name, label, nbytes) for section in report.sections for label, nbytes in section.still_alive]
    if alive:
        lines += ["", "moved, but still held by somebody else, so nothing was freed (not moved in later steps):"]
        lines += [f"  {format_bytes(nbytes):>10}  {label} saved in {name}" for name, label, nbytes in alive]
    unseen = [(s.name, s.unseen_bytes) for s in report.sections if s.unseen_bytes]
    if unseen:
        lines += ["", "device memory that grew in forward beyond what was saved (outputs, attributes of ctx):"]
        lines += [f"  {format_bytes(nbytes):>10}  {name}" for name, nbytes in unseen]
    for refusal, count in report.refusals.items():
        lines += ["", f"kept {count} allocations on the device, since the start: {refusal}"]
    if report.stood_aside:
        lines += ["", "stood aside, since the start:"]
        lines += [f"  {count:>6} x {name}: {reason}" for name, reason, count in report.stood_aside]
        if any("checkpoint" in reason for _, reason, _ in report.stood_aside):
            lines.append("  (inputs of checkpointed layers are offloaded if the whole model is given to offload)")
    lines += [
        "",
        f"at rest now {format_bytes(stats.host_bytes_in_use)}, of it on disk "
        f"{format_bytes(stats.disk_bytes_in_use)}; at most {format_bytes(stats.host_bytes_peak)}; host memory held "
        f"{format_bytes(stats.host_bytes_reserved)}",
    ]
    if report.plan is not None:
        lines.append(
            f"exposed: {stats.late_reloads} reloads late by {stats.late_ms:.2f} ms in all, and "
            f"{report.release_wait_ms:.2f} ms of waiting for copies out"
        )
        return lines
    lines.append(
        f"next section foreseen {report.prefetch_hits} times, missed {report.prefetch_misses} times; "
        f"{stats.late_reloads} reloads late by {stats.late_ms:.2f} ms in all"
    )
    if report.sections and stats.bytes_out == 0:
        lines.append("nothing was moved: the reasons stand above. With few sections, try keep_last=0.")
    return lines


def _plan_lines(report: Report) -> list[str]:
    lines = [f"plan: {report.plan}"]
    lines += [f"  {section.name}: {section.why}" for section in report.sections if section.why]
    if report.predicted_ms is not None and report.predicted_peak_bytes is not None:
        text = f"foreseen {report.predicted_ms:.1f} ms a step and a peak of {format_bytes(report.predicted_peak_bytes)}"
        if report.measured_ms is not None and report.measured_peak_bytes is not None:
            text += f"; measured {report.measured_ms:.1f} ms and {format_bytes(report.measured_peak_bytes)}"
        lines.append(text)
    if report.link is not None:
        lines.append(f"link: {report.link}")
    if report.times_scaled != 1.0:
        text = f"times scaled by {report.times_scaled:.3f} since they were measured, as steps since then took"
        lines.append(text + (f"; made anew from them {report.plans_remade} times" if report.plans_remade else ""))
    if report.plans_corrected:
        lines.append(f"made anew {report.plans_corrected} times, since steps under the plan broke its price")
    if report.planned_in_thread:
        lines.append(f"made in a thread, beside which steps are slow, and in no process: {report.planned_in_thread}")
    if report.drifts:
        lines.append(f"measured anew {report.drifts} times, since steps did not fit the plan")
    if report.agreed_with > 1:
        lines.append(f"made for {report.agreed_with} ranks together")
    return lines


def _cells(section: SectionReport) -> tuple[str, ...]:
    return (
        section.name,
        str(section.runs),
        str(section.saves),
        format_bytes(section.saved_bytes),
        format_bytes(section.unique_bytes),
        format_bytes(section.bytes_out),
        format_bytes(section.bytes_in),
        f"{section.copies_out}/{section.copies_in}",
        format_bytes(sum(section.kept.values())),
        f"{section.late_ms:.2f}",
    )


def _total_cells(report: Report) -> tuple[str, ...]:
    stats = report.stats
    return (
        "all",
        str(sum(s.runs for s in report.sections)),
        str(sum(s.saves for s in report.sections)),
        format_bytes(stats.saved_bytes),
        format_bytes(stats.unique_bytes),
        format_bytes(stats.bytes_out),
        format_bytes(stats.bytes_in),
        f"{stats.copies_out}/{stats.copies_in}",
        format_bytes(stats.kept_bytes),
        f"{stats.late_ms:.2f}",
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]
