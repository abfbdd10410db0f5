"""The demo's figure: activation bytes on the device over the time of one step, both runs on one axis."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lighterage.cli.demo_train import RunResult

_MIB = 1024**2
_PLAIN = "#b5482a"
_MOVED = "#1f6f8b"


def draw(plain: RunResult, moved: RunResult, *, path: Path, title: str) -> None:
    """Write a PNG to `path`."""
    figure = Figure(figsize=(9, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Two peaks of nearly the same height would write over each other.
    beneath = max(moved.live_bytes) > 0.9 * max(plain.live_bytes)
    for result, color, name, lift in (
        (plain, _PLAIN, "without offload", 8),
        (moved, _MOVED, "with offload", -18 if beneath else 8),
    ):
        mib = [nbytes / _MIB for nbytes in result.live_bytes]
        axes.plot(result.times_ms, mib, color=color, linewidth=1.6, label=name)
        axes.fill_between(result.times_ms, mib, color=color, alpha=0.12, linewidth=0)
        peak = max(range(len(mib)), key=mib.__getitem__)
        axes.plot(result.times_ms[peak], mib[peak], "o", color=color, markersize=5)
        axes.annotate(
            f"peak {mib[peak]:,.0f} MiB",
            (result.times_ms[peak], mib[peak]),
            textcoords="offset points",
            xytext=(0, lift),
            ha="center",
            color=color,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("time in the step: forward, then backward (ms)")
    axes.set_ylabel("activations and temporaries on the device (MiB)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, max(max(plain.live_bytes), max(moved.live_bytes)) / _MIB * 1.14)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)
