"""The quick measurement of a link."""

from __future__ import annotations

import time

import pytest
import torch

from lighterage.engine.link import measure_link
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
    if tier == "host":
        assert link.copy_us < 200
