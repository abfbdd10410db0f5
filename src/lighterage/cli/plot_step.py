"""A picture of one step: device bytes over time, and under them what both lanes carry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lighterage.planner.prediction import Copy, PhasePrediction, Prediction

_GIB = 1 << 30
_PLAIN = "#8a8a8a"
_LINE = "#1f6f8b"
_OUT = "#b5482a"
_IN = "#3b7d3b"
_LATE = "#d9a441"


def draw_step(
    prediction: Prediction, *, path: Path, title: str, plain: Prediction | None = None, budget_bytes: int | None = None
) -> None:
    """Write a PNG to `path`. `plain`: the step with everything kept, drawn behind; `budget_bytes`: a line across."""
    figure = Figure(figsize=(10, 6), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    memory, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1.3))
    unit, name = _unit(max(prediction.peak_bytes, plain.peak_bytes if plain else 0))
    top = max(prediction.peak_bytes, plain.peak_bytes if plain else 0, budget_bytes or 0) / unit
    end = max(prediction.step_ms, plain.step_ms if plain else 0.0)
    if plain is not None:
        _curve(memory, plain, unit, name, _PLAIN, "everything kept")
    _curve(memory, prediction, unit, name, _LINE, "planned" if plain is not None else "device memory")
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
    memory.set_ylabel(f"device memory ({name})")
    memory.set_ylim(0, top * 1.24)
    memory.grid(axis="y", alpha=0.25)
    _lane(lanes, prediction.out_copies, 1, "out", _OUT)
    _lane(lanes, prediction.in_copies, 0, "in", _IN)
    lanes.set_ylim(-0.6, 1.6)
    lanes.set_yticks([1, 0], ["lane out", "lane in"])
    lanes.tick_params(axis="y", length=0)
    lanes.set_xlabel(f"time in the step (ms){_waits(prediction)}")
    lanes.set_xlim(0, end * 1.01)
    for axes in (memory, lanes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _unit(most: float) -> tuple[int, str]:
    for unit, name in ((_GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if most >= unit:
            return unit, name
    return 1, "bytes"


def _curve(axes: Axes, prediction: Prediction, unit: int, name: str, color: str, label: str) -> None:
    times = [ms for ms, _ in prediction.curve] + [prediction.step_ms]
    amounts = [nbytes / unit for _, nbytes in prediction.curve]
    amounts.append(amounts[-1] if amounts else 0.0)
    axes.step(times, amounts, where="post", color=color, linewidth=1.5)
    axes.fill_between(times, amounts, step="post", color=color, alpha=0.10, linewidth=0)
    peak = max(range(len(amounts)), key=amounts.__getitem__)
    axes.plot(times[peak], amounts[peak], "o", color=color, markersize=5)
    late = times[peak] > 0.7 * prediction.step_ms
    axes.annotate(
        f"{label}: peak {amounts[peak]:.2f} {name}",
        (times[peak], amounts[peak]),
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


def _lane(axes: Axes, copies: Sequence[Copy], row: int, name: str, color: str) -> None:
    planned = [(c.start_ms, c.end_ms - c.start_ms) for c in copies if not c.on_demand]
    asked = [(c.start_ms, c.end_ms - c.start_ms) for c in copies if c.on_demand]
    # With an edge, so that a copy of a hundredth of a millimetre is seen too.
    axes.broken_barh(planned, (row - 0.3, 0.6), facecolors=color, edgecolors=color, linewidth=0.8, alpha=0.85)
    axes.broken_barh(asked, (row - 0.3, 0.6), facecolors=_LATE, edgecolors=_LATE, linewidth=0.8)
    if not copies:
        axes.text(0.01, row, f"nothing goes {name}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        return
    total = sum(copy.nbytes for copy in copies)
    unit, unit_name = _unit(total)
    axes.annotate(
        f"{total / unit:.2f} {unit_name} {name}" + (f", {len(asked)} asked for late (yellow)" if asked else ""),
        (copies[-1].end_ms, row),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=8,
        annotation_clip=False,
    )


def _waits(prediction: Prediction) -> str:
    stalls = prediction.stalls_ms
    parts = [
        f"{ms:.1f} ms {what}"
        for ms, what in (
            (stalls.reload, "waited for reloads"),
            (stalls.release, "waited for copies out"),
            (stalls.recompute, "computed again"),
        )
        if ms >= 0.05
    ]
    return f" – of {prediction.step_ms:.1f}: {', '.join(parts)}" if parts else f" – {prediction.step_ms:.1f}, no wait"
