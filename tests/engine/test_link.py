"""The quick measurement of a link."""

from __future__ import annotations

import time

import pytest
import torch

from lighterage.engine import link as link_module
from lighterage.engine.link import measure_link
from lighterage.planner.links import PCIE_COMPUTE_SLOWDOWN
from lighterage.planner.timeline import Link


@pytest.mark.parametrize("tier", ["disk", "host", None])
def test_a_cpu_link_is_measured_in_a_moment(tier):
    measure_link(torch.device("cpu"), tier)
    start = time.perf_counter()
    link = measure_link(torch.device("cpu"), tier)
    assert time.perf_counter() - start < 2.0  # 0.03 s on an idle machine
    for rate in (link.out_bytes_per_s, link.in_bytes_per_s):
        assert 1e7 < rate < 1e12
        assert rate <= link.both_bytes_per_s <= link.out_bytes_per_s + link.in_bytes_per_s
    assert 0 <= link.copy_us < 1e5
    assert link.name == f"cpu and {tier or 'disk'}"
    assert Link.from_json(link.to_json()) == link


def test_a_disk_link_is_that_of_its_folder(tmp_path):
    assert measure_link(torch.device("cpu"), "disk", tmp_path).out_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="disk_dir"):
        measure_link(torch.device("cpu"), "disk", tmp_path / "missing")


GB = 1e9
Rates = tuple[float, float, float]


class PlayedLanes:
    """Carries so many bytes a second out, in, and in both, another three in each measurement; the last ones remain.

    `first_round`: what the first rounds of the first measurement do of that.
    """

    def __init__(self, *measurements: Rates, first_rounds: float = 1.0) -> None:
        self._measurements = measurements
        self._first_rounds = first_rounds
        self.num_measured = 0
        self.pauses: list[float] = []
        self._rounds = iter(())  # type: Iterator[float]
        self._was: tuple[int, int] | None = None

    def seconds(self, nbytes: int, *, out: int = 0, back: int = 0) -> float:
        if (out, back) != self._was:
            self.num_measured += (out, back) == (8, 0)
            rates = self._measurements[min(self.num_measured, len(self._measurements)) - 1]
            rate = rates[2 if out and back else 1 if back else 0]
            least = self._first_rounds if self.num_measured == 1 else 1.0
            self._rounds = iter([0.5 * least * rate] + [least * rate] * 2 + [rate] + [0.7 * rate] * 10)
            self._was = out, back
        return nbytes * (out + back) / next(self._rounds)

    def rates(self) -> list[float]:
        found = link_module._rates(self.seconds, self.pauses.append)
        return [pytest.approx(rate / GB) for rate in found]


WELL = (54.8 * GB, 54.5 * GB, 99.9 * GB)


@pytest.mark.parametrize("rates", [WELL, (53.8 * GB, 51.2 * GB, 99.7 * GB), (20 * GB, 20 * GB, 33 * GB)])
def test_where_nothing_is_in_the_way_the_lanes_are_measured_once_and_without_a_pause(rates):
    lanes = PlayedLanes(rates)
    assert [rate / GB for rate in rates] == lanes.rates()
    assert lanes.pauses == []
    assert lanes.num_measured == 1


@pytest.mark.parametrize(
    "held_up",
    [
        (54.9 * GB, 23.0 * GB, 57.9 * GB),
        (47.6 * GB, 53.1 * GB, 99.9 * GB),
        (54.7 * GB, 49.7 * GB, 99.9 * GB),
        (54.7 * GB, 54.3 * GB, 60.0 * GB),
    ],
)
def test_lanes_that_something_is_in_the_way_of_are_measured_until_it_has_gone(held_up):
    lanes = PlayedLanes(held_up, held_up, WELL)
    found = lanes.rates()
    assert [max(a, b) / GB for a, b in zip(held_up, WELL, strict=True)] == found, "the best that was seen counts"
    assert lanes.num_measured == 4, "it went in the third, and the fourth says that nothing more goes"
    assert lanes.pauses == list(link_module._PAUSES_S[:3])


def test_lanes_that_still_become_faster_are_measured_again():
    """Both directions alike: only the rounds show it."""
    lanes = PlayedLanes((48 * GB, 48 * GB, 90 * GB), WELL, first_rounds=0.9)
    assert [rate / GB for rate in WELL] == lanes.rates()
    assert lanes.num_measured == 3, "the second measurement was faster, the third as fast"


def test_lanes_that_are_unlike_by_themselves_are_measured_so_often_and_for_so_long():
    own = (50 * GB, 25 * GB, 40 * GB)
    lanes = PlayedLanes(own)
    assert [rate / GB for rate in own] == lanes.rates()
    assert lanes.pauses == list(link_module._PAUSES_S)
    assert sum(lanes.pauses) < 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_gpu_link_is_measured_in_a_moment_and_leaves_no_memory(tier):
    device = torch.device("cuda")
    measure_link(device, tier)
    before = torch.cuda.memory_allocated(device)
    stream = torch.cuda.current_stream(device)
    start = time.perf_counter()
    link = measure_link(device, tier)
    assert time.perf_counter() - start < 0.5
    assert torch.cuda.memory_allocated(device) == before
    assert torch.cuda.current_stream(device) == stream
    assert link.out_bytes_per_s > 1e8 and link.in_bytes_per_s > 1e8
    assert link.compute_slowdown == PCIE_COMPUTE_SLOWDOWN
    if tier == "host":
        assert link.copy_us < 200
