"""The picture of a step says by itself what it shows."""

from __future__ import annotations

import dataclasses

import pytest
from matplotlib.figure import Figure

from lighterage.cli.plot_step import draw_step
from lighterage.planner.choose import plan
from lighterage.planner.goal import Goal
from lighterage.planner.simulate import simulate
from tests.planner.decoder import GIB, LINK, decoder


@pytest.fixture
def texts(monkeypatch):
    """What the figures that were saved say."""
    seen: list[str] = []

    def savefig(figure, path):
        for axes in figure.axes:
            seen.extend(text.get_text() for text in axes.texts)
            seen.extend((axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")))
            seen.extend(label.get_text() for label in axes.get_yticklabels())
            assert axes.get_legend() is None
        original(figure, path)

    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def test_peaks_phases_and_lanes_are_named_in_place(tmp_path, texts):
    timeline = decoder()
    goal = Goal(device_budget=int(8.2 * GIB))
    seen = simulate(timeline, plan(timeline, LINK, goal), LINK)
    kept = simulate(timeline, plan(timeline, LINK, Goal(device_budget=80 * GIB)), LINK)
    path = tmp_path / "step.png"
    draw_step(seen, path=path, title="Eight layers", plain=kept, budget_bytes=goal.device_budget)
    assert path.read_bytes().startswith(b"\x89PNG")
    said = "\n".join(texts)
    out_bytes, in_bytes = (sum(copy.nbytes for copy in copies) for copies in (seen.out_copies, seen.in_copies))
    for words in (
        "Eight layers",
        f"planned: peak {seen.peak_bytes / GIB:.2f} GiB",
        "everything kept: peak 14.23 GiB",
        "budget 8.20 GiB",
        "forward",
        "backward",
        f"lane out\n{out_bytes / GIB:.2f} GiB",
        f"lane in\n{in_bytes / GIB:.2f} GiB",
        "waiting for reloads",
        "device memory (GiB)",
    ):
        assert words in said


def test_a_step_without_copies_says_so(tmp_path, texts):
    timeline = decoder(2)
    kept = simulate(timeline, plan(timeline, LINK, Goal(device_budget=80 * GIB)), LINK)
    draw_step(kept, path=tmp_path / "step.png", title="kept")
    said = "\n".join(texts)
    assert "nothing goes out" in said and "nothing goes in" in said and "no wait" in said


def test_what_the_host_takes_for_moves_is_a_cause_of_its_own(tmp_path, texts):
    timeline, link = decoder(4), dataclasses.replace(LINK, move_us=200.0)
    seen = simulate(timeline, plan(timeline, link, Goal(max_slowdown=0.05, recompute="never")), link)
    draw_step(seen, path=tmp_path / "step.png", title="moved")
    assert f"{seen.stalls_ms.host:.1f} for the host's work on moves and hooks" in "\n".join(texts)


def test_reloads_that_came_when_they_were_asked_for_are_counted_in_place(tmp_path, texts):
    timeline = decoder(4)
    made = plan(timeline, LINK, Goal(max_slowdown=3.0, recompute="never"))
    bare = dataclasses.replace(made, fetches=((),) * len(made.fetches))
    seen = simulate(timeline, bare, LINK)
    assert seen.num_on_demand
    draw_step(seen, path=tmp_path / "step.png", title="asked for", memory_name="saved tensors")
    said = "\n".join(texts)
    assert f"yellow: {seen.num_on_demand} that came when they were asked for" in said
    assert "saved tensors (GiB)" in said
