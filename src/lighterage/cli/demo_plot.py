"""The demo's figure: activation bytes on the device over the time of one step, both runs on one axis."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lighterage.cli.demo_train import RunResult
from lighterage.cli.plot_labels import unit_of

_PLAIN = "#8a8a8a"
_MOVED = "#1f6f8b"
_COLUMNS = 300


def draw(plain: RunResult, moved: RunResult, *, path: Path, title: str) -> None:
    """Write a PNG to `path`."""
    figure = Figure(figsize=(10, 5.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, unit_name = unit_of(max(max(plain.live_bytes), max(moved.live_bytes)))
    end = max(plain.times_ms[-1], moved.times_ms[-1])
    # What is smaller goes in front, or it would not be seen; its label goes inside, so that none lies on the other.
    _area(axes, plain, end, unit, _PLAIN)
    _area(axes, moved, end, unit, _MOVED)
    peaks = {name: max(run.live_bytes) / unit for name, run in (("without offload", plain), ("with offload", moved))}
    top = max(peaks.values())
    for run, color, name, height in (
        (plain, _PLAIN, "without offload", 1.16 * top),
        (moved, _MOVED, "with offload", 1.07 * top),
    ):
        at = run.times_ms[max(range(len(run.live_bytes)), key=run.live_bytes.__getitem__)]
        axes.plot(at, peaks[name], "o", color=color, markersize=5)
        axes.plot([at, at], [peaks[name], height], color=color, linewidth=0.8)
        left = at > 0.6 * end
        axes.annotate(
            f"{name}: peak {peaks[name]:,.1f} {unit_name}, a step of {run.times_ms[-1]:,.0f} ms",
            (at, height),
            xytext=(-5 if left else 5, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=color,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        axes.axvline(run.backward_ms, ymax=0.78, color=color, linewidth=1, linestyle=":")
    axes.annotate(
        "backward begins",
        (max(plain.backward_ms, moved.backward_ms), 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
    )
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("time in the step: forward, then backward (ms)")
    axes.set_ylabel(f"activations and temporaries on the device ({unit_name})")
    axes.set_xlim(0, end * 1.01)
    axes.set_ylim(0, 1.24 * top)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _area(axes: Axes, run: RunResult, end_ms: float, unit: int, color: str) -> None:
    width_ms = end_ms / _COLUMNS
    heights = [nbytes / unit for nbytes in columns(run.times_ms, run.live_bytes, width_ms)]
    edges = [min(number * width_ms, run.times_ms[-1]) for number in range(len(heights) + 1)]
    axes.stairs(heights, edges, color=color, linewidth=1.3)
    axes.stairs(heights, edges, color=color, alpha=0.18, fill=True)


def columns(times_ms: Sequence[float], nbytes: Sequence[int], width_ms: float) -> list[int]:
    """The most bytes there were in each stretch of `width_ms`; what holds at its beginning counts.

    Thousands of operations take and give back memory in a step: drawn one by one they blacken the picture.

    >>> columns([0.0, 1.0, 5.0], [3, 7, 2], 2.0)
    [7, 7, 7]
    """
    most = []
    start = 0
    for number in range(int(times_ms[-1] / width_ms) + 1 if width_ms else 1):
        following = bisect.bisect_left(times_ms, (number + 1) * width_ms) if width_ms else len(times_ms)
        most.append(max(nbytes[max(start - 1, 0) : max(following, 1)]))
        start = following
    return most
