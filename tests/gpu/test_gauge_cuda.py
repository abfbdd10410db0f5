"""Claims about the gauge of device memory: it tells what PyTorch tells."""

from __future__ import annotations

import pytest
import torch

from lighterage.engine.planning.clock import Gauge

pytestmark = pytest.mark.gpu

MIB = 1 << 20


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_it_tells_what_is_allocated_and_the_most_since_it_was_started(name: str) -> None:
    gauge = Gauge(torch.device(name))
    held = torch.empty(MIB, dtype=torch.uint8, device=name)
    gauge.start()
    before = gauge.now()
    assert before == torch.cuda.memory_allocated(name) and gauge.peak() == before
    large = torch.empty(64 * MIB, dtype=torch.uint8, device=name)
    del large
    assert gauge.now() == before
    assert gauge.peak() == before + 64 * MIB == torch.cuda.max_memory_allocated(name)
    gauge.start()
    assert gauge.peak() == before
    del held
