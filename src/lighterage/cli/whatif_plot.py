"""The picture of `lighterage whatif`: peak memory against step time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lighterage.planner.pareto import ParetoPoint

_GIB = 1 << 30
_MOST_SHOWN = 0.25
_COLORS = ("#1f6f8b", "#b5482a", "#3b7d3b", "#7a4fa3", "#a3812a")


def draw_curves(
    curves: Sequence[tuple[str, Sequence[ParetoPoint]]],
    *,
    path: Path,
    title: str,
    kept_bytes: int,
    budget_bytes: int | None = None,
    max_slowdown: float | None = None,
) -> None:
    """Write a PNG to `path`: one line for each (link, points). `kept_bytes`: the peak with everything kept."""
    figure = Figure(figsize=(9, 5.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smallest = min((point.peak_bytes for _, points in curves for point in points), default=kept_bytes)
    # What lies far out is in the table; here it would press the rest together.
    longest = max((point.slowdown for _, points in curves for point in points), default=0.0)
    shown = max(min(longest, _MOST_SHOWN), 1.5 * (max_slowdown or 0.0), 0.01)
    for number, (name, points) in enumerate(curves):
        color = _COLORS[number % len(_COLORS)]
        slowdowns = [100 * point.slowdown for point in points]
        peaks = [point.peak_bytes / _GIB for point in points]
        axes.step(slowdowns, peaks, where="post", color=color, linewidth=1.5)
        axes.plot(slowdowns, peaks, "o", color=color, markersize=3.5)
        if points:
            # Beside its beginning: there the curves are furthest apart.
            axes.annotate(
                name,
                (slowdowns[0], peaks[0]),
                xytext=(9, 1),
                textcoords="offset points",
                color=color,
                fontweight="bold",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
            )
    axes.axhline(kept_bytes / _GIB, color="#8a8a8a", linewidth=1)
    axes.annotate(
        f"everything kept: {kept_bytes / _GIB:.2f} GiB",
        (0.995, kept_bytes / _GIB),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="#666666",
        fontsize=9,
    )
    if budget_bytes is not None:
        axes.axhline(budget_bytes / _GIB, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            f"budget {budget_bytes / _GIB:.2f} GiB",
            (0.995, budget_bytes / _GIB),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    if max_slowdown is not None:
        axes.axvline(100 * max_slowdown, color="black", linewidth=1, linestyle="--")
        axes.annotate(
            f"{max_slowdown:.1%} slower",
            (100 * max_slowdown, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_title(title, fontsize=11, loc="left")
    beyond = " – longer ones are in the table" if longest > shown else ""
    axes.set_xlabel(f"how much longer the step takes (%){beyond}")
    axes.set_ylabel("peak of device memory (GiB)")
    axes.set_xlim(-2 * shown, 104 * shown)
    low = min(smallest, budget_bytes or smallest) / _GIB
    margin = 0.08 * max(kept_bytes / _GIB - low, 0.01)
    axes.set_ylim(low - margin, kept_bytes / _GIB + 1.5 * margin)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
