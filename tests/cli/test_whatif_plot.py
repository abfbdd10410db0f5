"""The picture of `lighterage whatif` shows all plans and can be read."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure

from lighterage.cli.plot_labels import label_points
from lighterage.cli.whatif_plot import draw_curves
from lighterage.planner.links import NAMED, link_named
from lighterage.planner.pareto import pareto
from tests.planner.decoder import GIB, decoder


@pytest.fixture(scope="module")
def curves():
    timeline = decoder(6)
    return timeline, {name: pareto(timeline, link_named(name)) for name in (*NAMED, "3GB/s")}


@pytest.fixture
def axes(monkeypatch):
    """What the figures that were saved are made of."""
    seen = []

    def savefig(figure, path):
        original(figure, path)
        seen.extend(figure.axes)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def draw(path, curves, names, **goal):
    timeline, found = curves
    draw_curves(
        [(link_named(name), found[name]) for name in names],
        path=path,
        device="a card",
        step_ms=timeline.step_ms,
        kept_bytes=14 * GIB,
        **goal,
    )
    return [point for name in names for point in found[name]]


@pytest.mark.parametrize("names", [("pcie5",), ("nvlink-c2c",), ("3GB/s",), ("pcie5", "pcie4", "nvlink-c2c")])
def test_every_plan_is_inside_and_no_words_lie_over_others(tmp_path, curves, axes, names):
    points = draw(tmp_path / "c.png", curves, names, budget_bytes=9 * GIB)
    (one,) = axes
    (left, right), (bottom, top) = one.get_xlim(), one.get_ylim()
    for point in points:
        assert left < 1 + point.slowdown < right
        assert bottom < point.peak_bytes / GIB < top
    boxes = [text.get_window_extent() for text in one.texts]
    assert len(boxes) > 5
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    frame = one.get_window_extent()
    for box in boxes:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    ticks = [label.get_window_extent() for label in one.get_xticklabels()]
    for a, b in itertools.pairwise(ticks):
        assert not a.overlaps(b)


def test_it_says_what_it_shows(tmp_path, curves, axes):
    timeline, found = curves
    draw(tmp_path / "c.png", curves, ("pcie5", "3GB/s"), max_slowdown=0.03)
    (one,) = axes
    said = "\n".join(text.get_text() for text in one.texts)
    fastest = found["pcie5"][0]
    for words in (
        "PCIe 5 x16: 55 GB/s out, 55 GB/s in, 98 GB/s both at once",
        "3GB/s: 3.00 GB/s out",
        "everything kept: 14.00 GiB",
        "at most 1.03 ×",
        f"{fastest.peak_bytes / GIB:.2f}",
    ):
        assert words in said
    assert one.get_ylabel() == "peak of device memory (GiB)"
    assert "in ms" in one.get_xlabel() and "multiple" in one.get_xlabel()
    assert f"a step of {timeline.step_ms:.1f} ms on a card" in one.get_title(loc="left")
    assert one.get_xticklabels()[0].get_text() == f"1 ×\n{timeline.step_ms:.4g} ms"


def test_of_one_link_each_plan_that_can_be_told_apart_is_labelled(tmp_path, curves, axes):
    points = draw(tmp_path / "c.png", curves, ("3GB/s",))
    said = "\n".join(text.get_text() for text in axes[0].texts)
    unlabelled = [point for point in points if f"{point.peak_bytes / GIB:.2f}, {1 + point.slowdown:.3f} ×" not in said]
    peaks = [point.peak_bytes for point in points]
    for point in unlabelled:
        others = [abs(point.peak_bytes - peak) for peak in peaks if peak != point.peak_bytes]
        assert min(others) < 0.025 * (14 * GIB - min(peaks))


def test_no_plans_at_all_are_a_picture_too(tmp_path, axes):
    draw_curves([(NAMED["pcie5"], ())], path=tmp_path / "c.png", device="a card", step_ms=1.0, kept_bytes=100)
    assert axes[0].get_ylabel() == "peak of device memory (bytes)"


def test_a_label_without_room_is_shortened_or_left_out(tmp_path):
    figure = Figure(figsize=(2, 2), dpi=100)
    one = figure.add_subplot()
    one.set_xlim(0, 1)
    one.set_ylim(0, 1)
    texts = [(0.5, 0.5, ("far too long for a picture as small as this one is", "short"))]
    taken = []
    assert label_points(one, texts, color="black", taken=taken, lines=[]) == ["short"]
    wall = [(0.0, 0.5), (1.0, 0.5)], [(0.5, 0.0), (0.5, 1.0)]
    one.set_xlim(0.4, 0.6)
    one.set_ylim(0.4, 0.6)
    assert label_points(one, texts, color="black", taken=[one.get_window_extent()], lines=list(wall)) == []
