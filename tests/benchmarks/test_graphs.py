"""The benchmark of graphs says what was reached, and that it needs a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import graphs
from benchmarks.environment import capture


def times(milliseconds: float) -> dict[str, Any]:
    return {"median": milliseconds, "min": milliseconds, "max": milliseconds, "num": 1}


@pytest.mark.parametrize("reached", [True, False])
def test_each_figure_stands_beside_what_it_has_to_reach(reached: bool) -> None:
    moved = {"bytes_out": 1 << 30, "bytes_in": 1 << 30}
    beside = {"way": "w", "num_multiprocessors": 66, "replay": times(5), "kernel": times(5)}
    rows = {
        "decoder": [
            {"policy": "p", "eager": times(100), "graph": times(101 if reached else 103), "loss_equal": True, **moved}
        ],
        "narrow": [{"eager": times(30), "graph": times(10 if reached else 29), "graphs apart": times(12)}],
        "overlap": [
            {"in_pairs": True, "both": times(6 if reached else 9), **beside},
            {"in_pairs": False, "both": times(10), **beside},
        ],
    }
    text = graphs.to_markdown(rows, capture(torch.device("cpu"), "benchmarks.graphs"))
    assert text.count(": reached") == (3 if reached else 0) and text.count(": missed") == (0 if reached else 3)
    assert "| 1.00, 1.00 GiB | yes |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_it_says_that_it_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert graphs.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
