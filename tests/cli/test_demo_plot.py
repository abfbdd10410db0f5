"""The demo's picture says by itself what it shows."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from lighterage.cli.demo_plot import columns, draw
from lighterage.cli.demo_train import RunResult

MIB = 1 << 20


def result(times_ms, mib, backward_ms) -> RunResult:
    return RunResult(
        losses=[],
        gradients=[],
        weights={},
        step_ms=[],
        peak_bytes=max(mib) * MIB,
        times_ms=times_ms,
        live_bytes=[nbytes * MIB for nbytes in mib],
        backward_ms=backward_ms,
        num_allocations=None,
        stats=None,
        report=None,
    )


@pytest.mark.parametrize("peaks", [(17, 15), (20, 5), (10, 10)])
def test_both_runs_are_named_beside_their_peaks_and_no_words_lie_over_others(tmp_path, monkeypatch, peaks):
    seen = []
    original = Figure.savefig

    def savefig(figure, path):
        original(figure, path)
        seen.extend(figure.axes)

    monkeypatch.setattr(Figure, "savefig", savefig)
    plain = result([0.0, 10.0, 20.0], [1, peaks[0], 2], 9.0)
    moved = result([0.0, 11.0, 30.0], [1, peaks[1], 2], 12.0)
    draw(plain, moved, path=tmp_path / "demo.png", title="A step")
    (axes,) = seen
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert axes.get_legend() is None
    said = [text.get_text() for text in axes.texts]
    assert f"without offload: peak {peaks[0]}.0 MiB, a step of 20 ms" in said
    assert f"with offload: peak {peaks[1]}.0 MiB, a step of 30 ms" in said
    assert "backward begins" in said
    first, second = (text.get_window_extent() for text in axes.texts[:2])
    assert not first.overlaps(second)
    assert axes.get_title(loc="left") == "A step" and axes.get_ylabel().endswith("on the device (MiB)")


def test_a_column_shows_the_most_there_was_and_what_went_on_from_the_one_before():
    times = [0.0, 0.1, 0.2, 5.0, 9.5]
    assert columns(times, [1, 9, 2, 4, 3], 1.0) == [9, 2, 2, 2, 2, 4, 4, 4, 4, 4]
    assert columns([0.0], [7], 0.0) == [7], "a step that takes no time"
