"""The figures of plans as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.decoder_cases import GIB, MIB, Row
from benchmarks.environment import Environment

TARGETS = {
    "max_slowdown=0.01, recompute=never": "peak ≤ 12.1 GiB, step ≤ 1.01 ×",
    "max_slowdown=0.03, recompute=never": "peak ≤ 11.4 GiB, step ≤ 1.03 ×",
    "max_slowdown=0.03": "peak ≤ 10.0 GiB, step ≤ 1.03 ×",
    "device_budget=8.2GiB": "step ≤ 1.10 ×",
}


def to_markdown(results: Row, environment: Environment) -> str:
    """All cases that were measured."""
    parts = ["# Plans from measurement", environment.to_markdown()]
    rivals = [*results.get("checkpoint", []), *results.get("peers", [])]
    titles = {
        "goals": "## Goals",
        "refused": "## A budget under the floor",
        "curve": "## Budgets",
        "checkpoint": "## Layers checkpointed",
        "peers": "## Peers",
    }
    for case, title in titles.items():
        if case in results:
            parts += [title, _table(results[case], rivals if case == "curve" else [])]
            parts += [_why(row) for row in results[case] if row.get("why")]
    if "host" in results:
        parts += ["## Host", _host(results["host"])]
    if "bits" in results:
        told = [
            f"- {row['mode']}: {'equal' if row['equal'] else 'DIFFERENT'}"
            + (f", {_gib(row['bytes_out'])} GiB out, modes {', '.join(row['modes'])}" if "bytes_out" in row else "")
            for row in results["bits"]
        ]
        parts += ["## Loss and gradients, bit by bit", "\n".join(told)]
    for case, title in (("stack", "## Stack of experts"), ("block", "## Transformer blocks with experts")):
        for model in dict.fromkeys(row["model"] for row in results.get(case, [])):
            rows = [row for row in results[case] if row["model"] == model]
            parts += [f"{title}: {model}", _table(rows, [row for row in rows if not row.get("ours")])]
            parts += [_why(row) for row in rows if row.get("why")]
    if results.get("seconds"):
        parts.append(
            "Took " + ", ".join(f"{case} {seconds:.0f} s" for case, seconds in results["seconds"].items()) + "."
        )
    return "\n\n".join(parts)


def _why(row: Row) -> str:
    """What the plan is for, and what its steps have changed of it."""
    told = []
    if row.get("times_scaled", 1.0) != 1.0:
        told.append(f"times scaled by {row['times_scaled']:.3f}")
    if row.get("plans_remade"):
        told.append(f"made anew from them {row['plans_remade']} times")
    if row.get("measured_slowdown") is not None:
        told.append(f"{row['measured_slowdown']:+.1%} in turn with steps at rest")
    if row.get("plans_corrected"):
        told.append(f"made anew {row['plans_corrected']} times for breaking its price")
    if row.get("drifts"):
        told.append(f"measured anew {row['drifts']} times")
    return f"- {row['mode']}: {row['why']}" + (f" ({', '.join(told)})" if told else "")


def beaten_by(row: Row, rivals: Sequence[Row]) -> list[str]:
    """The rivals that are as fast as `row`, or faster, at the same peak or less: none, if it dominates.

    Peaks of one mode differ by some MiB between rounds: those within 1 % are the same.
    """
    return [
        one["mode"]
        for one in rivals
        if "ratio" in one and one["peak_bytes"] <= 1.01 * row["peak_bytes"] and one["ratio"] <= row["ratio"]
    ]


def _host(row: Row) -> str:
    def told(name: str) -> str:
        lower, upper = row[name]["quartiles"]
        return f"{row[name]['median']:.3f} ms (quartiles {lower:.3f} and {upper:.3f})"

    return (
        f"Carrying out a plan takes the host {told('planning_ms')} a step more than the same moves by hand "
        f"({row['moved_allocations']} allocations, {row['bytes_out']['planned'] / MIB:.1f} MiB), and "
        f"{told('timed_again_ms')} more in one step of {row['check_every']}, which is timed again: in the mean "
        f"{row['planning_ms_a_step']:.3f} ms of a step of {row['step_ms']:.1f} ms ({100 * row['share_of_step']:.2f} %; "
        f"to reach: ≤ 1 %). The moves by hand take it {told('moving_ms')} more than a step without them. Making the "
        f"plan took {row['making_ms']:.0f} ms once, beside the steps."
    )


def _gib(nbytes: float | None) -> str:
    return "" if not nbytes else f"{nbytes / GIB:.2f}"


def _table(rows: Sequence[Row], rivals: Sequence[Row]) -> str:
    """rivals: what a plan has to beat; without any, the column says what there is to reach."""
    last = "faster than all at its peak or less" if rivals else "to reach"
    lines = [
        f"| mode | step ms | × none (least to most) | foreseen ms | off by | peak GiB | foreseen | off by | {last} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if "device" not in row:
            lines.append(f"| {row['mode']} | {row.get('refused') or row.get('failed')} | | | | | | | |")
            continue
        step, ms, peak = row["device"]["median"], row.get("predicted_ms"), row.get("predicted_peak_bytes")
        low, high = row["ratio_spread"]
        lines.append(
            f"| {row['mode']} | {step:.1f} | {row['ratio']:.3f} ({low:.3f} to {high:.3f}) | "
            f"{'' if ms is None else f'{ms:.1f}'} | {_off(step, ms)} | {_gib(row['peak_bytes'])} | {_gib(peak)} | "
            f"{_off(row['peak_bytes'], peak)} | {_verdict(row, rivals) if rivals else TARGETS.get(row['mode'], '')} |"
        )
    return "\n".join(lines)


def _verdict(row: Row, rivals: Sequence[Row]) -> str:
    if not row.get("ours") or not row["peak_bytes"]:
        return ""
    beaten = beaten_by(row, rivals)
    if beaten:
        return f"**no**: {', '.join(beaten)}"
    near = [one for one in rivals if "ratio" in one and one["peak_bytes"] <= 1.01 * row["peak_bytes"]]
    return f"yes, of {len(near)}" if near else "yes: none of them gets there"


def _off(measured: float, predicted: float | None) -> str:
    return "" if not predicted or not measured else f"{100 * (predicted / measured - 1):+.1f} %"
