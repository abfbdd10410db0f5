"""Tests of the engine run tiny products: one thread each is a dozen times faster than a pool that spins for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lighterage.engine.planning import making


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_product() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _plans_are_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where tests can see and change it; `test_apart.py` is about the other one."""
    monkeypatch.setattr(making.Planning, "run_beside", making.Planning.run)
