"""The picture of `lighterage whatif`: peak memory against step time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from lighterage.cli.plot_labels import Line, label_points, unit_of
from lighterage.planner.figures import rate
from lighterage.planner.pareto import ParetoPoint
from lighterage.planner.timeline import Link

_COLORS = ("#1f6f8b", "#b5482a", "#3b7d3b", "#7a4fa3", "#a3812a")
_KEPT = "#666666"
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_MULTIPLES = (
    *(1 + digit * 10.0**power for power in (-6, -5, -4, -3, -2, -1) for digit in (1, 2, 5)),
    *(digit * 10.0**power for power in range(16) for digit in (1, 2, 3, 5)),
)


def draw_curves(
    curves: Sequence[tuple[Link, Sequence[ParetoPoint]]],
    *,
    path: Path,
    device: str,
    step_ms: float,
    kept_bytes: int,
    budget_bytes: int | None = None,
    max_slowdown: float | None = None,
) -> None:
    """Write a PNG to `path`: one line for each (link, points), all of them from the first point to the last.

    device: what the step was measured on. step_ms, kept_bytes: of the step with everything kept.
    budget_bytes, max_slowdown: the goal, as a line across.
    """
    figure = Figure(figsize=(10, 6.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, name = unit_of(kept_bytes)
    longest = max([0.01, 1.05 * (max_slowdown or 0.0), *(point.slowdown for _, points in curves for point in points)])
    _time_axis(axes, longest, step_ms)
    peaks = [kept_bytes, *(point.peak_bytes for _, points in curves for point in points), budget_bytes or kept_bytes]
    low, high = min(peaks) / unit, max(peaks) / unit
    margin = 0.08 * max(high - low, 0.02 * high)
    axes.set_ylim(low - margin, high + margin)
    axes.set_ylabel(f"peak of device memory ({name})")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"Peak memory against step time: a step of {step_ms:.1f} ms on {device}",
        fontsize=11,
        loc="left",
        parse_math=False,
    )

    taken = _key(axes, curves)
    lines: list[Line] = [_across(axes, kept_bytes / unit, _KEPT, "-")]
    if budget_bytes is not None:
        lines.append(_across(axes, budget_bytes / unit, "black", "--"))
    if max_slowdown is not None:
        axes.axvline(1 + max_slowdown, color="black", linewidth=1, linestyle="--")
        lines.append([(1 + max_slowdown, bound) for bound in axes.get_ylim()])
    steps = [_curve(points, longest, unit) for _, points in curves]
    for number, ((_, points), line) in enumerate(zip(curves, steps, strict=True)):
        color = _COLORS[number % len(_COLORS)]
        axes.plot(*zip(*line, strict=True), color=color, linewidth=1.5) if line else None
        axes.plot(
            [1 + point.slowdown for point in points],
            [point.peak_bytes / unit for point in points],
            "o",
            color=color,
            markersize=4,
        )
    lines += steps
    across = [(kept_bytes, f"everything kept: {kept_bytes / unit:.2f} {name}", _KEPT)]
    if budget_bytes is not None:
        across.append((budget_bytes, f"budget {budget_bytes / unit:.2f} {name}", "black"))
    for nbytes, text, color in across:
        for end in reversed(axes.get_xlim()):  # at the right, where the curves are low, if nothing is there
            if label_points(axes, [(end, nbytes / unit, (text,))], color=color, taken=taken, lines=lines, fontsize=9):
                break
    if max_slowdown is not None:
        foot = (1 + max_slowdown, axes.get_ylim()[0], (f"at most {1 + max_slowdown:.3g} ×",))
        label_points(axes, [foot], color="black", taken=taken, lines=lines, fontsize=9)
    for number, (_, points) in enumerate(curves):
        apart = _apart(points, longest, kept_bytes - min(peaks))
        ends_first = [*apart[:1], *apart[:0:-1]]
        texts = [
            (1 + point.slowdown, point.peak_bytes / unit, (f"{peak}, {1 + point.slowdown:.3f} ×", peak))
            for point in ends_first
            for peak in [f"{point.peak_bytes / unit:.2f}"]
        ]
        label_points(axes, texts, color=_COLORS[number % len(_COLORS)], taken=taken, lines=lines)
    figure.savefig(path)


def _time_axis(axes: Axes, longest: float, step_ms: float) -> None:
    """Multiples of the step, whose beginning is spread: there plans are many and close, and few lie far out."""

    def spread(multiple: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.copysign(np.sqrt(np.abs(multiple - 1)), multiple - 1)

    def back(place: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return 1 + np.copysign(place * place, place)

    axes.set_xscale("function", functions=(spread, back))
    end = math.sqrt(longest)
    axes.set_xlim(1 - (0.02 * end) ** 2, 1 + (1.07 * end) ** 2)
    ticks = [1.0]
    for multiple in _MULTIPLES:
        if ticks[-1] < multiple <= 1 + longest and math.sqrt(multiple - 1) - math.sqrt(ticks[-1] - 1) > 0.08 * end:
            ticks.append(multiple)
    axes.set_xticks(ticks, [f"{tick:.10g} ×\n{tick * step_ms:.4g} ms" for tick in ticks], minor=False)
    axes.set_xlabel(
        "step time, as a multiple of the step without offload and in ms (short steps are drawn further apart)"
    )


def _key(axes: Axes, curves: Sequence[tuple[Link, Sequence[ParetoPoint]]]) -> list[Bbox]:
    """Names the links where falling curves leave room; returns the room that it takes."""
    texts = [
        axes.text(
            0.99,
            0.9 - 0.045 * number,
            f"{link.name or 'the link'}: {rate(link.out_bytes_per_s)} out, {rate(link.in_bytes_per_s)} in, "
            f"{rate(link.both_bytes_per_s)} both at once",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=_COLORS[number % len(_COLORS)],
            fontweight="bold",
            fontsize=9,
            bbox=_WHITE,
            parse_math=False,  # a name is no formula, whatever is in it
        )
        for number, (link, _) in enumerate(curves)
    ]
    texts.append(
        axes.text(
            0.99,
            0.9 - 0.045 * len(curves),
            "a point is a plan; beside it are its peak and its step",
            transform=axes.transAxes,
            ha="right",
            va="top",
            color=_KEPT,
            fontsize=8,
            bbox=_WHITE,
        )
    )
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    return [text.get_window_extent() for text in texts]


def _across(axes: Axes, height: float, color: str, style: str) -> Line:
    axes.axhline(height, color=color, linewidth=1, linestyle=style)
    return [(bound, height) for bound in axes.get_xlim()]


def _curve(points: Sequence[ParetoPoint], longest: float, unit: int) -> Line:
    """Level until the next plan that can be had, then down to it; the last holds for all longer steps."""
    line: Line = []
    for point in points:
        x, y = 1 + point.slowdown, point.peak_bytes / unit
        line += [(x, line[-1][1]), (x, y)] if line else [(x, y)]
    if line:
        line.append((1 + (1.07 * math.sqrt(longest)) ** 2, line[-1][1]))
    return line


def _apart(points: Sequence[ParetoPoint], longest: float, span_bytes: int) -> list[ParetoPoint]:
    """The points that the eye can tell apart: of some that lie on each other, the one with the smallest peak."""
    apart: list[ParetoPoint] = []
    first: ParetoPoint | None = None  # of those that lie on each other
    for point in points:
        if (
            first is not None
            and math.sqrt(max(point.slowdown, 0)) - math.sqrt(max(first.slowdown, 0)) < 0.03 * math.sqrt(longest)
            and first.peak_bytes - point.peak_bytes < 0.025 * span_bytes
        ):
            apart.pop()
        else:
            first = point
        apart.append(point)
    return apart
