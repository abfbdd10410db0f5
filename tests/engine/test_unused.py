"""Claims about what has come back and waits for its first use: the window that prefetching may fill."""

from __future__ import annotations

import pytest
import torch

from lighterage import Policy
from lighterage.engine.allocation import Allocation, Stage
from lighterage.engine.offloader import Offloader
from lighterage.engine.traffic import Traffic
from lighterage.engine.unused import Unused
from lighterage.engine.views import ViewSpec

KIB = 1024


def test_bytes_leave_the_sum_when_they_are_used_or_their_owner_is_gone() -> None:
    unused = Unused()
    for allocation, nbytes in ((1, 10), (2, 200), (3, 3000)):
        unused.add(allocation, nbytes)
    assert unused.use(2) and not unused.use(2)
    unused.drop(3)
    unused.drop(3)
    assert unused.nbytes == 10
    assert not unused.use(3)
    assert unused.use(1) and unused.nbytes == 0


def test_in_a_step_as_the_last_one_every_byte_is_fetched_before_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = Policy(tier="host", min_bytes=1, keep_last=0, release_after=0, prefetch_ahead=2)
    offloader = Offloader(torch.nn.ModuleList([torch.nn.Identity()]), policy)
    asked: list[bool] = []
    load = Traffic.load

    def watched(traffic: Traffic, allocation: Allocation, spec: ViewSpec, in_backward: bool) -> torch.Tensor:
        asked.append(allocation.stage is Stage.AWAY)
        return load(traffic, allocation, spec, in_backward)

    monkeypatch.setattr(Traffic, "load", watched)
    for _ in range(3):
        asked.clear()
        x = torch.ones(4 * KIB, requires_grad=True)
        y = x
        for name in "abcdef":
            with offloader.section(name):
                for _ in range(4):
                    y = y.sigmoid()
        y.sum().backward()
        del y
    assert len(asked) > 20 and not any(asked), "backward asked for bytes that nobody had started to bring back"
    offloader.close()
