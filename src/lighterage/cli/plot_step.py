"""A picture of one step: device bytes over time, and under them what both lanes carry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lighterage.cli.plot_labels import unit_of
from lighterage.planner.prediction import Copy, PhasePrediction, Prediction

_PLAIN = "#8a8a8a"
_LINE = "#1f6f8b"
_OUT = "#b5482a"
_IN = "#3b7d3b"
_LATE = "#d9a441"
_LATE_TEXT = "#8a6414"


def draw_step(
    prediction: Prediction,
    *,
    path: Path,
    title: str,
    plain: Prediction | None = None,
    budget_bytes: int | None = None,
    memory_name: str = "device memory",
) -> None:
    """Write a PNG to `path`. `plain`: the step with everything kept, drawn behind; `budget_bytes`: a line across.

    memory_name: what the step's peak is of; on a CPU only what is saved counts.
    """
    figure = Figure(figsize=(10, 6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    memory, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1.3))
    unit, name = unit_of(max(prediction.peak_bytes, plain.peak_bytes if plain else 0))
    top = max(prediction.peak_bytes, plain.peak_bytes if plain else 0, budget_bytes or 0) / unit
    end = max(prediction.step_ms, plain.step_ms if plain else 0.0)
    if plain is not None:
        _curve(memory, plain, unit, name, _PLAIN, "everything kept")
    _curve(memory, prediction, unit, name, _LINE, "planned" if plain is not None else memory_name, budget_bytes)
    if budget_bytes is not None:
        memory.axhline(budget_bytes / unit, color=_OUT, linewidth=1, linestyle="--")
        memory.annotate(
            f"budget {budget_bytes / unit:.2f} {name}",
            (end, budget_bytes / unit),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=_OUT,
            fontsize=8,
        )
    _phases(memory, prediction.phases, top * 1.16)
    memory.set_title(title, fontsize=11, loc="left")
    memory.set_ylabel(f"{memory_name} ({name})")
    memory.set_ylim(0, top * 1.24 or 1)  # a step that saved nothing is a flat line
    memory.grid(axis="y", alpha=0.25)
    totals = [
        _lane(lanes, prediction.out_copies, 1, "out", _OUT),
        _lane(lanes, prediction.in_copies, 0, "in", _IN),
    ]
    lanes.set_ylim(-0.6, 1.6)
    lanes.set_yticks([1, 0], [f"lane out\n{totals[0]}", f"lane in\n{totals[1]}"])
    lanes.tick_params(axis="y", length=0)
    lanes.set_xlabel(f"time in the step (ms){_waits(prediction)}")
    lanes.set_xlim(0, end * 1.01)
    for axes in (memory, lanes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _curve(
    axes: Axes,
    prediction: Prediction,
    unit: int,
    name: str,
    color: str,
    label: str,
    budget_bytes: int | None = None,
) -> None:
    times = [ms for ms, _ in prediction.curve] + [prediction.step_ms]
    amounts = [nbytes / unit for _, nbytes in prediction.curve]
    amounts.append(amounts[-1] if amounts else 0.0)
    axes.step(times, amounts, where="post", color=color, linewidth=1.5)
    axes.fill_between(times, amounts, step="post", color=color, alpha=0.10, linewidth=0)
    peak = max(range(len(amounts)), key=amounts.__getitem__)
    axes.plot(times[peak], amounts[peak], "o", color=color, markersize=5)
    late = times[peak] > 0.7 * prediction.step_ms
    # Over the line of the budget where the peak nearly touches it, or the line would run through the words.
    near = budget_bytes is not None and amounts[peak] <= budget_bytes / unit < 1.06 * amounts[peak]
    axes.annotate(
        f"{label}: peak {amounts[peak]:.2f} {name}",
        (times[peak], budget_bytes / unit if near and budget_bytes is not None else amounts[peak]),
        xytext=(-6 if late else 6, 4),
        textcoords="offset points",
        ha="right" if late else "left",
        color=color,
        fontweight="bold",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
    )


def _phases(axes: Axes, phases: Sequence[PhasePrediction], height: float) -> None:
    """Forward and backward named over the curve, and the sections' boundaries as thin lines."""
    for phase in phases:
        axes.axvline(phase.end_ms, color="black", alpha=0.08, linewidth=0.6)
    for start, end, direction in _runs(phases):
        if end - start > 0.03 * phases[-1].end_ms:
            axes.annotate(
                "",
                (start, height),
                (end, height),
                arrowprops={"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": "black", "linewidth": 0.8},
            )
            axes.text((start + end) / 2, height * 1.012, direction, ha="center", va="bottom", fontsize=9)


def _runs(phases: Sequence[PhasePrediction]) -> list[tuple[float, float, str]]:
    """Neighbours of one direction as one; what lies between belongs to none."""
    runs: list[tuple[float, float, str]] = []
    for phase in phases:
        if phase.direction == "other":
            continue
        if runs and runs[-1][2] == phase.direction:
            runs[-1] = (runs[-1][0], phase.end_ms, phase.direction)
        else:
            runs.append((phase.start_ms, phase.end_ms, phase.direction))
    return runs


def _lane(axes: Axes, copies: Sequence[Copy], row: int, name: str, color: str) -> str:
    """Draws a lane's copies, and says how much it carried."""
    planned = [(c.start_ms, c.end_ms - c.start_ms) for c in copies if not c.on_demand]
    asked = [(c.start_ms, c.end_ms - c.start_ms) for c in copies if c.on_demand]
    # With an edge, so that a copy of a hundredth of a millimetre is seen too.
    axes.broken_barh(planned, (row - 0.3, 0.6), facecolors=color, edgecolors=color, linewidth=0.8, alpha=0.85)
    axes.broken_barh(asked, (row - 0.3, 0.6), facecolors=_LATE, edgecolors=_LATE, linewidth=0.8)
    if asked:
        # Before the first copy: what is asked for late comes in, and nothing comes in during forward.
        axes.annotate(
            f"yellow: {len(asked)} that came when they were asked for",
            (min(copy.start_ms for copy in copies), row),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=_LATE_TEXT,
            fontsize=8,
        )
    if not copies:
        axes.text(0.01, row, f"nothing goes {name}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        return ""
    total = sum(copy.nbytes for copy in copies)
    unit, unit_name = unit_of(total)
    return f"{total / unit:.2f} {unit_name}"


def _waits(prediction: Prediction) -> str:
    stalls = prediction.stalls_ms
    parts = [
        f"{ms:.1f} {what}"
        for ms, what in (
            (stalls.reload, "waiting for reloads"),
            (stalls.release, "waiting for copies out"),
            (stalls.recompute, "computing again"),
            (stalls.slowdown, "computing slower beside copies"),
            (stalls.host, "for the host's work on moves and hooks"),
        )
        if ms >= 0.05
    ]
    spent = f", of which {', '.join(parts)}" if parts else ", no wait in it"
    return f"; the planned step takes {prediction.step_ms:.1f}{spent}"
