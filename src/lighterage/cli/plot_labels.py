"""Labels of points in a picture, each beside its point and none over another or over a line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

Line = list[tuple[float, float]]
Place = tuple[float, float, str, str]

# Away from the point in font points, and how the text is set there: near places first, and above a falling curve.
_PLACES: tuple[Place, ...] = (
    (4, 4, "left", "bottom"),
    (-4, -4, "right", "top"),
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (4, -4, "left", "top"),
    (-4, 4, "right", "bottom"),
    (0, 6, "center", "bottom"),
    (0, -6, "center", "top"),
)


def unit_of(most: float) -> tuple[int, str]:
    """The largest binary unit that leaves at least one of `most` bytes, and its name.

    >>> unit_of(3 << 20)
    (1048576, 'MiB')
    """
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if most >= unit:
            return unit, name
    return 1, "bytes"


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, tuple[str, ...]]],
    *,
    color: str,
    taken: list[Bbox],
    lines: Sequence[Line],
    fontsize: float = 7.5,
) -> list[str]:
    """Write beside each point the first of its texts that finds room; returns the texts that were written.

    Call it when the limits and scales of `axes` are final. Those points that come first have the choice.

    points: (x, y, texts), the shorter texts behind.
    taken: boxes in pixels that no label may cover; the labels' own are added.
    lines: level and upright lines in data coordinates that no label may cover.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]  # constrained layout moves the axes when drawn
    frame = axes.get_window_extent()
    segments = [
        (tuple(axes.transData.transform(a)), tuple(axes.transData.transform(b)))
        for line in lines
        for a, b in itertools.pairwise(line)
    ]
    written = []
    for x, y, texts in points:
        for text, (right, up, horizontal, vertical) in itertools.product(texts, _PLACES):
            label = axes.annotate(
                text,
                (x, y),
                xytext=(right, up),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                color=color,
                fontsize=fontsize,
            )
            box = label.get_window_extent().padded(1.5)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken) and not _crossed(box, segments):
                taken.append(box)
                written.append(text)
                break
            label.remove()
    return written


def _crossed(box: Bbox, segments: Sequence[tuple[tuple[float, ...], tuple[float, ...]]]) -> bool:
    """Whether one of the segments, each level or upright, runs through `box`."""
    return any(box.overlaps(Bbox([a, b])) for a, b in segments)
